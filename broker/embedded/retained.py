"""Retained messages: one per topic, found by filter."""

from __future__ import annotations

from collections.abc import Iterator

from broker.embedded.limits import Limits
from broker.embedded.messages import Message


class Retained:
    """The retained messages of the broker (3.3.1.3).

    They stand in a tree of levels, so that a filter visits only what it can match. Expired ones are passed
    over, and go by :meth:`sweep`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._messages: dict[str, Message] = {}
        self._below: dict[str, dict[str, None]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> bool:
        """Keep ``message`` in place of its topic's last one; an empty payload clears it ([MQTT-3.3.1-6]).

        :returns: False when the limits of retained messages leave no room; the last one stays then.
        """
        topic = message.topic
        old = self._messages.get(topic)
        if message.empty:
            if old is not None:
                self._drop(topic)
            return True
        grown = self.bytes + message.size - (old.size if old else 0)
        if grown > self._limits.retained_bytes or (
            old is None and len(self._messages) >= self._limits.retained_messages and not topic.startswith("$SYS/")
        ):
            return False
        self.bytes = grown
        self._messages[topic] = message
        if old is None:
            self._grow(topic)
        return True

    def matching(self, pattern: str, now: float) -> Iterator[Message]:
        """The retained messages that a filter (no ``$share``) matches and that have not expired."""
        if "+" not in pattern and "#" not in pattern:
            topics = [pattern] if pattern in self._messages else []
        else:
            topics = self._topics(pattern.split("/"))
        for topic in topics:
            message = self._messages[topic]
            if (expires := message.expires) is None or expires > now:
                yield message

    def sweep(self, now: float) -> list[str]:
        """Forget what has expired.

        :returns: the topics of that.
        """
        gone = [t for t, m in self._messages.items() if m.properties.expiry is not None and (m.expires or 0) <= now]
        for topic in gone:
            self._drop(topic)
        return gone

    # The tree is a dict of prefixes: "a/b" -> {"c": None} says that there is something at or below "a/b/c".

    def _grow(self, topic: str) -> None:
        prefix = topic
        while True:
            parent, slash, last = prefix.rpartition("/")
            key = parent + slash
            children = self._below.setdefault(key, {})
            if last in children:
                return
            children[last] = None
            if not slash:
                return
            prefix = parent

    def _drop(self, topic: str) -> None:
        self.bytes -= self._messages.pop(topic).size
        prefix = topic
        while prefix not in self._messages and prefix + "/" not in self._below:
            parent, slash, last = prefix.rpartition("/")
            key = parent + slash
            children = self._below[key]
            del children[last]
            if children:
                return
            del self._below[key]
            if not slash:
                return
            prefix = parent

    def _topics(self, levels: list[str]) -> list[str]:
        prefixes = [""]
        for i, level in enumerate(levels):
            if level == "#":
                found: list[str] = []
                for prefix in prefixes:
                    # "a/#" takes "a" itself; the first level's wildcard takes no "$" topics ([MQTT-4.7.2-1]).
                    if prefix and prefix[:-1] in self._messages:
                        found.append(prefix[:-1])
                    self._all(prefix, found, dollar=i > 0)
                return found
            if level == "+":
                prefixes = [
                    f"{prefix}{child}/"
                    for prefix in prefixes
                    for child in self._below.get(prefix, ())
                    if i or not child.startswith("$")
                ]
            else:
                prefixes = [f"{prefix}{level}/" for prefix in prefixes if level in self._below.get(prefix, ())]
            if not prefixes:
                return []
        return [prefix[:-1] for prefix in prefixes if prefix[:-1] in self._messages]

    def _all(self, prefix: str, found: list[str], *, dollar: bool) -> None:
        todo = [prefix]
        while todo:
            prefix = todo.pop()
            for child in self._below.get(prefix, ()):
                if not prefix and not dollar and child.startswith("$"):
                    continue
                topic = prefix + child
                if topic in self._messages:
                    found.append(topic)
                todo.append(topic + "/")
