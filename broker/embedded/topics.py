"""Topic names, topic filters, and who subscribes to what.

Filters without wildcards stand in a dict, the others in a tree of levels; what a topic leads to is kept as a
:class:`Route` until a subscription changes, so a busy topic costs one dict look-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from broker.embedded.messages import Manner, manner

if TYPE_CHECKING:
    from broker.embedded.sessions import Session

MAX_ROUTES = 65_536
"""Routes kept; past it all are forgotten and found anew."""


def is_name(topic: str, levels: int) -> bool:
    """Whether ``topic`` may be published to (4.7): not empty, no wildcards, at most ``levels`` levels."""
    return bool(topic) and "+" not in topic and "#" not in topic and "\0" not in topic and topic.count("/") < levels


def is_filter(text: str, levels: int) -> bool:
    """Whether ``text`` is a topic filter (4.7.1) of at most ``levels`` levels, ``$share/<group>/`` not included."""
    if not text or "\0" in text or text.count("/") >= levels:
        return False
    if "+" not in text and "#" not in text:
        return True
    parts = text.split("/")
    if "#" in parts[:-1]:  # [MQTT-4.7.1-1]
        return False
    return all(part in {"+", "#"} or ("+" not in part and "#" not in part) for part in parts)


def split_shared(text: str) -> tuple[str | None, str]:
    """The group (None where it is not shared) and the filter proper.

    :raises ValueError: a ``$share/`` without a sound group or filter ([MQTT-4.8.2-1], -2).
    """
    if not text.startswith("$share/"):
        return None, text
    _, _, rest = text.partition("/")
    group, slash, pattern = rest.partition("/")
    if not group or not slash or not pattern or "+" in group or "#" in group:
        raise ValueError(text)
    return group, pattern


def covers(wide: str, narrow: str) -> bool:
    """Whether every topic that ``narrow`` matches is matched by ``wide`` too (both are filters)."""
    have, want = wide.split("/"), narrow.split("/")
    if narrow.startswith("$") and have[0] in {"+", "#"}:
        return False
    for i, part in enumerate(have):
        if part == "#":
            return True
        if i >= len(want) or want[i] == "#" or (part != "+" and part != want[i]):
            return False
    return len(have) == len(want)


class Subscription:
    """One filter of one session, with its options (3.8.3.1)."""

    __slots__ = ("group", "identifier", "no_local", "pattern", "qos", "retain_as_published", "session")

    def __init__(
        self,
        session: Session,
        pattern: str,
        qos: int,
        *,
        no_local: bool = False,
        retain_as_published: bool = False,
        identifier: int | None = None,
        group: str | None = None,
    ) -> None:
        self.session = session
        self.pattern = pattern
        self.qos = qos
        self.no_local = no_local
        self.retain_as_published = retain_as_published
        self.identifier = identifier
        self.group = group


class Target:
    """All subscriptions of one session that match one topic, as one: a message is delivered once, at the highest of
    their QoS, with all their identifiers (3.3.4)."""

    __slots__ = ("_kept", "_plain", "local", "retain_as_published", "session", "subscriptions")

    def __init__(self, session: Session, subscriptions: list[Subscription], group: Group | None = None) -> None:
        self.session = session
        self.subscriptions = subscriptions
        qos = max(s.qos for s in subscriptions)
        identifiers = tuple(s.identifier for s in subscriptions if s.identifier)
        self.retain_as_published = any(s.retain_as_published for s in subscriptions)
        self.local = not any(s.no_local for s in subscriptions)
        if group is None:
            self._plain = tuple(manner(min(q, qos), False, identifiers) for q in range(3))
            self._kept = tuple(manner(min(q, qos), True, identifiers) for q in range(3))
        else:
            self._plain = tuple(Manner(min(q, qos), False, identifiers, group) for q in range(3))
            self._kept = tuple(Manner(min(q, qos), True, identifiers, group) for q in range(3))

    def manner(self, qos: int, retain: bool) -> Manner:
        """How this session gets a message published with ``qos`` and ``retain``."""
        return self._kept[qos] if retain and self.retain_as_published else self._plain[qos]

    def retained(self, qos: int) -> Manner:
        """How this session gets a retained message because it subscribed ([MQTT-3.3.1-8])."""
        return self._kept[qos]

    def own(self) -> Target | None:
        """The same for a message that this session itself published: subscriptions with *no local* do not count."""
        rest = [s for s in self.subscriptions if not s.no_local]
        return Target(self.session, rest) if rest else None


class Group:
    """One shared subscription (4.8.2): a group name and a filter."""

    __slots__ = ("_turn", "members", "name", "pattern")

    def __init__(self, name: str, pattern: str) -> None:
        self.name = name
        self.pattern = pattern
        self.members: dict[Session, Target] = {}
        self._turn = 0

    def choose(self, besides: Session | None = None) -> Target | None:
        """Whose turn it is. Connected members with room come first, then connected ones, then those that are away."""
        members = list(self.members.values())
        best: Target | None = None
        rank = 3
        for i in range(len(members)):
            target = members[(self._turn + i) % len(members)]
            if target.session is besides:
                continue
            mine = target.session.readiness
            if mine < rank:
                best, rank = target, mine
                if not mine:
                    self._turn = (self._turn + i + 1) % len(members)
                    return best
        if best is not None:
            self._turn += 1
        return best


class Route:
    """Where messages of one topic go."""

    __slots__ = ("groups", "targets")

    def __init__(self, targets: list[Target], groups: list[Group]) -> None:
        self.targets = targets
        self.groups = groups


class _Leaf:
    """The subscriptions with one filter."""

    __slots__ = ("groups", "sessions")

    def __init__(self) -> None:
        self.sessions: dict[Session, Subscription] = {}
        self.groups: dict[str, Group] = {}

    def __bool__(self) -> bool:
        return bool(self.sessions or self.groups)


class _Node:
    __slots__ = ("children", "leaf")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.leaf = _Leaf()


class Subscriptions:
    """All subscriptions of the broker."""

    def __init__(self) -> None:
        self._exact: dict[str, _Leaf] = {}
        self._root = _Node()
        self._routes: dict[str, Route] = {}
        self._ways: dict[tuple[object, ...], Route] = {}
        """Routes by what they lead to: topics that go the same way share one."""
        self.changes = 0
        """How often a subscription came or went: what was found before may be wrong now."""
        self.count = 0
        self.system = 0
        """How many filters ask for ``$SYS`` topics."""

    def add(self, subscription: Subscription) -> None:
        """Put a subscription in, in place of one of the same session, group and filter."""
        pattern, session = subscription.pattern, subscription.session
        leaf = self._leaf(pattern)
        if subscription.group is None:
            fresh = session not in leaf.sessions
            leaf.sessions[session] = subscription
        else:
            group = leaf.groups.get(subscription.group)
            if group is None:
                group = leaf.groups[subscription.group] = Group(subscription.group, pattern)
            fresh = session not in group.members
            group.members[session] = Target(session, [subscription], group)
        if fresh:
            self.count += 1
            self.system += pattern.startswith("$SYS/")
        self._changed(pattern)

    def remove(self, subscription: Subscription) -> None:
        """Take a subscription out."""
        pattern, session = subscription.pattern, subscription.session
        leaf = self._leaf(pattern)
        if subscription.group is None:
            gone = leaf.sessions.pop(session, None) is not None
        else:
            group = leaf.groups.get(subscription.group)
            gone = group is not None and group.members.pop(session, None) is not None
            if group is not None and not group.members:
                del leaf.groups[subscription.group]
        if gone:
            self.count -= 1
            self.system -= pattern.startswith("$SYS/")
        if not leaf:
            self._prune(pattern)
        self._changed(pattern)

    def route(self, topic: str) -> Route:
        """Where a message of ``topic`` goes."""
        route = self._routes.get(topic)
        if route is None:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
                self._ways.clear()
            route = self._routes[topic] = self._find(topic)
        return route

    def _find(self, topic: str) -> Route:
        of: dict[Session, list[Subscription]] = {}
        groups: list[Group] = []
        for leaf in self._matching(topic):
            for session, subscription in leaf.sessions.items():
                of.setdefault(session, []).append(subscription)
            groups += leaf.groups.values()
        way = (*((session, *found) for session, found in of.items()), *groups)
        route = self._ways.get(way)
        if route is None:
            route = self._ways[way] = Route([Target(session, found) for session, found in of.items()], groups)
        return route

    def _matching(self, topic: str) -> Iterator[_Leaf]:
        if (exact := self._exact.get(topic)) is not None:
            yield exact
        nodes = [self._root]
        wild = not topic.startswith("$")  # [MQTT-4.7.2-1]
        for level in topic.split("/"):
            below: list[_Node] = []
            for node in nodes:
                children = node.children
                if wild:
                    if (rest := children.get("#")) is not None:
                        yield rest.leaf
                    if (single := children.get("+")) is not None:
                        below.append(single)
                if (named := children.get(level)) is not None:
                    below.append(named)
            wild = True
            nodes = below
            if not nodes:
                return
        for node in nodes:
            yield node.leaf
            if (rest := node.children.get("#")) is not None:  # "a/#" matches "a" too (4.7.1.2)
                yield rest.leaf

    def _leaf(self, pattern: str) -> _Leaf:
        if "+" not in pattern and "#" not in pattern:
            return self._exact.setdefault(pattern, _Leaf())
        node = self._root
        for level in pattern.split("/"):
            node = node.children.setdefault(level, _Node())
        return node.leaf

    def _prune(self, pattern: str) -> None:
        if self._exact.pop(pattern, None) is not None:
            return
        path = [self._root]
        levels = pattern.split("/")
        for level in levels:
            path.append(path[-1].children[level])
        for level, parent, node in zip(reversed(levels), reversed(path[:-1]), reversed(path[1:]), strict=True):
            if node.children or node.leaf:
                return
            del parent.children[level]

    def _changed(self, pattern: str) -> None:
        self.changes += 1
        self._ways.clear()
        if "+" in pattern or "#" in pattern:
            self._routes.clear()
        else:
            self._routes.pop(pattern, None)


def any_covers(wide: Iterable[str], narrow: str) -> bool:
    """Whether one of ``wide`` covers ``narrow``, see :func:`covers`."""
    return any(covers(pattern, narrow) for pattern in wide)
