"""The topology: what a user writes in one YAML file, as a model, with every fault placed by line and column.

:func:`load` reads the file and checks its form. What the nodes' own configs mean is not known here: they stay as plain
maps until :mod:`nodes.plan` gives them to their kinds. Nothing here imports a node or a broker.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from schemas import topics
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.located import Located, YamlError, parse
from schemas.problems import missing, shown, validated, without_consequences
from schemas.topology_model import Edge, Line, Node, Topology, TopologyError
from schemas.topology_parts import (
    Broker,
    Delivery,
    Document,
    EdgeOptions,
    Host,
    NodeSettings,
    Overflow,
    Part,
    RelayOptions,
    Secret,
    check_name,
    why,
)

__all__ = [
    "Broker",
    "Delivery",
    "Edge",
    "EdgeOptions",
    "Line",
    "Node",
    "Overflow",
    "RelayOptions",
    "Secret",
    "Topology",
    "TopologyError",
    "load",
    "read",
]

P = TypeVar("P", bound=Part)

MAX_NODES = 500
RESERVED_NODES = frozenset({"models", "blobs", "fed"})
"""Names that a node may not have: the topology's own topics stand there."""
LOCAL = "local"
"""Name of the broker and of the host where the topology names none."""
_NODE_KEYS = ("from", "on", "process", "publish", "durable", "replicas")


def load(path: Path | str, *, kinds: Collection[str] = ()) -> Topology:
    """The topology in a file.

    :param kinds: names of the node kinds; without them any one key that is not a node's own names the kind.
    :raises TopologyError: its form is wrong; all faults that were found.
    :raises ConfigError: there is no such file.
    """
    topology, problems = read(path, kinds=kinds)
    if problems or topology.repeated:
        raise topology.error(problems)
    return topology


def read(path: Path | str, *, kinds: Collection[str] = ()) -> tuple[Topology, list[Problem]]:
    """As :func:`load`, but what is right in a faulty file is still given, so that more can be found in it.

    :raises TopologyError: nothing can be made of the file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {why(error)}") from None
    try:
        document, repeated = parse(data)
    except YamlError as error:
        raise TopologyError([Line(str(path), error.place, error.message)]) from None
    return _Reader(path, document, tuple(repeated), kinds).read()


class _Reader:
    """Reads one document section by section; collects problems and goes on."""

    def __init__(self, path: Path, document: Located, repeated: tuple[YamlError, ...], kinds: Collection[str]) -> None:
        self.path, self.document, self.repeated = path, document, repeated
        self.kinds = kinds
        self.problems: list[Problem] = []
        self.broken: dict[str, Node | None] = {}
        self.broken_brokers: set[str] = set()
        self.broken_hosts: set[str] = set()
        self.relays: dict[str, RelayOptions] = {}

    def read(self) -> tuple[Topology, list[Problem]]:
        raw = self.document.plain()
        if not isinstance(raw, dict):
            self._wrong((), f"expected a map with the keys 'topology' and 'nodes', got {shown(raw)}")
            raise TopologyError([Line(str(self.path), self.document.place, self.problems[0].message)], self.problems)
        for key in raw:
            if key not in Document.model_fields:
                hint = did_you_mean(str(key), Document.model_fields)
                self._wrong((key,), f"unknown key {str(key)!r}{hint}", on_key=True)
        for key in ("topology", "nodes"):
            if key not in raw:
                self.problems.append(missing((key,)))
        name = raw.get("topology")
        if "topology" in raw:
            if not isinstance(name, str):
                self._wrong(("topology",), f"expected a text, got {shown(name)}; put it in quotes")
            else:
                self._name(("topology",), name, on_key=False)
        brokers = self._brokers(raw)
        hosts = self._hosts(raw, brokers)
        self._starters(raw, brokers, hosts)
        nodes = self._nodes(raw, hosts)
        topology = Topology(
            name=name if isinstance(name, str) else "unknown",
            path=self.path,
            base=self.path.parent,
            brokers=brokers,
            hosts=hosts,
            nodes=nodes,
            document=self.document,
            relays=self.relays,
            repeated=self.repeated,
            broken=self.broken,
            shared=self._shared(raw),
        )
        return topology, without_consequences(self.problems)

    def _shared(self, raw: dict[Any, Any]) -> bool:
        """Whether edges may share memory; a problem where that is neither true nor false."""
        value = raw.get("shared", True)
        if not isinstance(value, bool):
            self._wrong(("shared",), f"expected true or false, got {shown(value)}")
            return True
        return value

    def _wrong(self, path: tuple[str | int, ...], message: str, *, on_key: bool = False) -> None:
        self.problems.append(Problem(path, message, on_key=on_key))

    def _name(self, path: tuple[str | int, ...], name: object, *, on_key: bool = True) -> bool:
        """Whether a name is one; a problem if not."""
        try:
            check_name(name if isinstance(name, str) else str(name))
        except ValueError as error:
            self._wrong(path, str(error), on_key=on_key)
            return False
        if not isinstance(name, str):
            self._wrong(path, f"a name is a text; put {shown(name)} in quotes", on_key=on_key)
            return False
        return True

    def _section(self, raw: dict[Any, Any], section: str) -> dict[Any, Any]:
        """A top-level map of named things."""
        value = raw.get(section)
        if value is None and section != "nodes":
            return {}
        if not isinstance(value, dict):
            if section in raw:
                self._wrong((section,), f"expected a map from names to {section}, got {shown(value)}")
            return {}
        return value

    def _part(self, model: type[P], value: Any, *path: str | int) -> P | None:
        """``value`` as ``model``; None and problems if it does not fit."""
        try:
            return validated(model, value)
        except ConfigError as error:
            self.problems.extend(error.under(*path).problems)
            return None

    def _brokers(self, raw: dict[Any, Any]) -> dict[str, Broker]:
        brokers: dict[str, Broker] = {}
        for name, value in self._section(raw, "brokers").items():
            path = ("brokers", name)
            broker = self._part(Broker, value, *path)
            if not self._name(path, name) or broker is None:
                self.broken_brokers.add(str(name))
            else:
                brokers[name] = broker
        if not brokers and not self.broken_brokers:
            brokers[LOCAL] = Broker(run="embedded")
        return brokers

    def _hosts(self, raw: dict[Any, Any], brokers: dict[str, Broker]) -> dict[str, str]:
        hosts: dict[str, str] = {}
        only = next(iter(brokers)) if len(brokers) == 1 and not self.broken_brokers else None
        for name, value in self._section(raw, "hosts").items():
            path = ("hosts", name)
            host = self._part(Host, {} if value is None else value, *path)
            if not self._name(path, name) or host is None:
                self.broken_hosts.add(str(name))
                continue
            broker = host.broker if host.broker is not None else only
            if broker is None and not self.broken_brokers:
                self._wrong(path, f"say which broker it uses, broker: {' or '.join(brokers)}", on_key=True)
            elif broker is not None and broker not in brokers and broker not in self.broken_brokers:
                self._wrong((*path, "broker"), f"unknown broker {broker!r}{did_you_mean(broker, brokers)}")
            elif broker is not None and broker in brokers:
                hosts[name] = broker
                if host.relay is not None:
                    self.relays[name] = host.relay
                continue
            self.broken_hosts.add(name)
        if not hosts and not self.broken_hosts:
            if only is not None:
                hosts[LOCAL] = only
            else:
                self.broken_hosts.add(LOCAL)
                if not self.broken_brokers:
                    self._wrong(("brokers",), "with more than one broker, say under 'hosts' which one each host uses")
        return hosts

    def _starters(self, raw: dict[Any, Any], brokers: dict[str, Broker], hosts: dict[str, str]) -> None:
        """Each broker that the run starts is started by one host."""
        for name, broker in brokers.items():
            if broker.run is None:
                continue
            users = [host for host, used in hosts.items() if used == name]
            if broker.on is None and len(users) > 1 and name not in (raw.get("brokers") or {}):
                message = "with more than one host, name the broker under 'brokers', and the host that starts it"
                self._wrong(("hosts",), message, on_key=True)
            elif broker.on is None and len(users) > 1:
                self._wrong(("brokers", name), f"say which host starts it, on: {' or '.join(users)}", on_key=True)
            elif broker.on is None and len(users) == 1:
                brokers[name] = broker.model_copy(update={"on": users[0]})
            elif broker.on is not None and broker.on not in hosts and broker.on not in self.broken_hosts:
                self._wrong(("brokers", name, "on"), f"unknown host {broker.on!r}{did_you_mean(broker.on, hosts)}")
            elif broker.on is None and not self.broken_hosts:
                self._wrong(("brokers", name), "no host uses this broker", on_key=True)

    def _nodes(self, raw: dict[Any, Any], hosts: dict[str, str]) -> dict[str, Node]:
        written = self._section(raw, "nodes")
        if "nodes" in raw and written == {} and isinstance(raw["nodes"], dict):
            self._wrong(("nodes",), "there is no node in it", on_key=True)
        if len(written) > MAX_NODES:
            self._wrong(("nodes",), f"{len(written)} nodes, at most {MAX_NODES}", on_key=True)
            return {}
        nodes: dict[str, Node] = {}
        for name, value in written.items():
            before = len(self.problems)
            named = self._name(("nodes", name), name)
            if named and name in RESERVED_NODES:
                self._wrong(("nodes", name), f"{name!r} is reserved for the topology's own topics", on_key=True)
            node = self._node(name, value, hosts) if isinstance(name, str) else None
            if node is None or len(self.problems) > before:
                self.broken[str(name)] = node
            else:
                nodes[name] = node
        return nodes

    def _node(self, name: str, value: Any, hosts: dict[str, str]) -> Node | None:
        path = ("nodes", name)
        if not isinstance(value, dict):
            self._wrong(path, f"expected a map with the node's kind, got {shown(value)}", on_key=value is None)
            return None
        kind = self._kind(name, value)
        settings = self._part(NodeSettings, {k: v for k, v in value.items() if k in _NODE_KEYS}, *path)
        inputs = self._inputs(name, value["from"]) if "from" in value else ()
        if kind is None or settings is None:
            return None
        places = self._places(path, settings.on, hosts)
        count = settings.replicas or len(places) or 1
        if len(places) > count:
            self._wrong((*path, "replicas"), f"{len(places)} hosts for {count} replicas; each host runs one or more")
        if count > 1 and settings.process is not None:
            message = "replicas have processes of their own; leave out 'process'"
            self._wrong((*path, "process"), message, on_key=True)
        places = places or [LOCAL]
        return Node(
            name=name,
            kind=kind,
            config=value[kind],
            inputs=inputs,
            host=places[0],
            process=settings.process,
            publish=settings.publish,
            durable=settings.durable,
            hosts=tuple(places[i % len(places)] for i in range(count)),
        )

    def _places(self, path: tuple[str | int, ...], written: Any, hosts: dict[str, str]) -> list[str]:
        """The hosts of a node; those that are not there are told and left out."""
        if written is None:
            if len(hosts) == 1 and not self.broken_hosts:
                return list(hosts)
            if not self.broken_hosts:
                self._wrong(path, f"say on which host it runs, on: {' or '.join(hosts)}", on_key=True)
            return []
        several = isinstance(written, list)
        if several and not written:
            self._wrong((*path, "on"), "there is no host in it")
        found = []
        for i, host in enumerate(written if several else [written]):
            at = (*path, "on", i) if several else (*path, "on")
            if not isinstance(host, str):
                self._wrong(
                    at, f"expected the name of a host{'' if several else ', or a list of them'}, got {shown(host)}"
                )
            elif host not in hosts and host not in self.broken_hosts:
                self._wrong(at, f"unknown host {host!r}{did_you_mean(host, hosts)}")
            elif host in found:
                self._wrong(at, f"{host!r} is there twice; for more replicas than hosts say how many: 'replicas'")
            else:
                found.append(host)
        return found

    def _kind(self, name: str, value: dict[Any, Any]) -> str | None:
        """The one key that says what the node is."""
        others = [key for key in value if key not in _NODE_KEYS]
        found = [key for key in others if key in self.kinds] if self.kinds else others
        path = ("nodes", name)
        if len(found) > 1:
            self._wrong((*path, found[1]), f"a node has one kind; this has {found[0]!r} and {found[1]!r}", on_key=True)
        known = (*self.kinds, *_NODE_KEYS)
        for key in others:
            if key in found:
                continue
            what = "key" if found else "node kind"
            choices = known if found else self.kinds
            self._wrong((*path, key), f"unknown {what} {str(key)!r}{did_you_mean(str(key), choices)}", on_key=True)
        if not others:
            hint = f", one of {', '.join(self.kinds)}" if self.kinds else ""
            self._wrong(path, f"the node's kind is missing{hint}", on_key=True)
        return found[0] if len(found) == 1 and isinstance(found[0], str) else None

    def _inputs(self, name: str, value: Any) -> tuple[Edge, ...]:
        """``from`` in each of its forms."""
        path = ("nodes", name, "from")
        edges: list[Edge] = []
        if isinstance(value, str):
            entries: list[tuple[Any, Any, tuple[str | int, ...]]] = [(value, None, ("from",))]
        elif isinstance(value, list):
            entries = [(entry, None, ("from", i)) for i, entry in enumerate(value)]
        elif isinstance(value, dict):
            entries = [(key, options, ("from", key)) for key, options in value.items()]
        else:
            self._wrong(path, f"expected a node, a list of nodes, or a map from nodes to options, got {shown(value)}")
            return ()
        if not entries:
            self._wrong(path, "no node is named here")
        for entry, options, at in entries:
            full = ("nodes", name, *at)
            on_key = isinstance(value, dict)
            if not isinstance(entry, str):
                self._wrong(full, f"expected a node or node.port, got {shown(entry)}", on_key=on_key)
                continue
            producer, _, port = entry.partition(".")
            if not topics.is_level(producer) or not (topics.is_level(port) or "." not in entry):
                self._wrong(full, f"expected a node or node.port, got {entry!r}", on_key=on_key)
                continue
            taken = self._part(EdgeOptions, {} if options is None else options, *full)
            edge = Edge(producer, port or "out", taken or EdgeOptions(), at)
            if any(other.name == edge.name for other in edges):
                self._wrong(full, f"{edge.name!r} is read twice", on_key=on_key)
            edges.append(edge)
        return tuple(edges)
