"""The plan of a topology: everything that can be known before anything runs, and every fault that can be found.

:func:`plan` gives each node's config to its kind, follows the types of what travels from the sources to the sinks, and
decides how each edge is carried. The runtime and the supervisor run the plan; ``penstock check`` only makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from pydantic import ValidationError

from nodes import kinds, planned_jobs
from nodes.operator import Context, Flow
from nodes.options import Options
from nodes.planned import Carrier, Plan, PlannedEdge, PlannedNode
from nodes.planned_relays import keeping
from nodes.planned_sharing import shared
from nodes.replicas import expanded
from nodes.variants import VariantConfig
from schemas import topics
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.problems import problems_of
from schemas.topology import Delivery, Edge, Node, Topology, read

__all__ = ["Plan", "PlannedEdge", "PlannedNode", "plan", "prepare"]

Resolver: TypeAlias = Callable[[str], ModuleType]

FAST_TYPES = frozenset({"frame/1", "tensors/1"})
"""Body types whose edges are fast where the user does not say."""
QUEUE: dict[Delivery, int] = {"safe": 1024, "fast": 8}
"""Messages that may wait at the consumer where the user does not say."""
TYPES = frozenset({"readings/1", "frame/1", "tensors/1", "predictions/1", "aggregate/1", "event/1", "update/1"})
"""Body types that nodes send each other."""


def prepare(
    path: Path | str,
    *,
    state: Path | None = None,
    brokers: Mapping[str, str] | None = None,
    resolve: Resolver | None = None,
) -> Plan:
    """The plan of the topology in a file: what ``penstock check`` and ``penstock run`` call.

    :raises TopologyError: all that is wrong in the file, its form and its nodes.
    """
    names = kinds.names("node")
    topology, problems = read(path, kinds=names)
    return _Planner(topology, problems, state, brokers, resolve).plan()


def plan(
    topology: Topology,
    problems: Iterable[Problem] = (),
    *,
    state: Path | None = None,
    brokers: Mapping[str, str] | None = None,
    resolve: Resolver | None = None,
) -> Plan:
    """The plan of a topology.

    :param problems: what :func:`~schemas.topology.read` found; told together with what is found here.
    :param state: folder under which each node gets a folder of its own; default: ``.penstock/<topology>`` beside the file.
    :param brokers: name → url of brokers as resolved for this run; default: as the topology says.
    :param resolve: kind → its module; default: the kinds of this package.
    :raises TopologyError: all that is wrong, placed in the file.
    """
    return _Planner(topology, problems, state, brokers, resolve).plan()


def _resolve(kind: str) -> ModuleType:
    return kinds.module("node", kind)


class _Planner:
    """Goes through the nodes once; collects problems and goes on with what does not depend on them."""

    def __init__(
        self,
        topology: Topology,
        problems: Iterable[Problem],
        state: Path | None,
        brokers: Mapping[str, str] | None,
        resolve: Resolver | None,
    ) -> None:
        self.topology = topology
        self.problems = list(problems)
        self.state = state if state is not None else topology.base / ".penstock" / topology.name
        self.urls = {name: broker.url or f"mqtt://{broker.listen}" for name, broker in topology.brokers.items()}
        self.urls.update(brokers or {})
        self.resolve = resolve or _resolve
        self.configs: dict[str, Options] = {}
        self.written: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, dict[str, Flow] | None] = {}
        """Ports of the nodes seen so far; None: not known, because something is wrong with the node."""

    def plan(self) -> Plan:
        nodes = self.topology.nodes
        self._dangling()
        order = self._order()
        for node in [*nodes.values(), *self.topology.broken.values()]:
            if node is not None:
                self._configure(node)
        for name in order:
            self._follow(nodes[name])
        self.problems += planned_jobs.problems(self.topology, self.configs)
        self._unread()
        self._replicas()
        if self.problems or self.topology.repeated:
            raise self.topology.error(self.problems)
        edges = {name: [self._edge(nodes[name], edge) for edge in nodes[name].inputs] for name in order}
        relays, edges = keeping(self.topology, edges)
        unshared = {(e.name, n.name) for n in nodes.values() for e in n.inputs if not e.options.shared}
        edges = shared(self.topology, edges, frozenset(unshared))
        self._unkept(edges)
        every = [edge for some in edges.values() for edge in some]
        planned = {name: self._node(nodes[name], edges[name], every) for name in order}
        return expanded(Plan(self.topology, planned, every, relays))

    def _wrong(self, node: str, path: tuple[str | int, ...], message: str, *, on_key: bool = False) -> None:
        self.problems.append(Problem(("nodes", node, *path), message, on_key=on_key))

    def _dangling(self) -> None:
        """Edges from nodes that are not there."""
        known = {*self.topology.nodes, *self.topology.broken}
        for node in [*self.topology.nodes.values(), *filter(None, self.topology.broken.values())]:
            for edge in node.inputs:
                if edge.producer not in known:
                    hint = did_you_mean(edge.producer, known - {node.name})
                    self._at(node, edge, f"unknown node {edge.producer!r}{hint}")

    def _at(self, node: Node, edge: Edge, message: str) -> None:
        """A problem of an edge; in the map form of ``from`` the edge is a key."""
        on_key = isinstance(edge.path[-1], str) and len(edge.path) > 1
        self._wrong(node.name, edge.path, message, on_key=on_key)

    def _order(self) -> list[str]:
        """Nodes, each after those that it reads, otherwise as written; a problem for each cycle."""
        nodes = self.topology.nodes
        waiting = {name: {e.producer for e in node.inputs if e.producer in nodes} for name, node in nodes.items()}
        order: list[str] = []
        while waiting:
            ready = [name for name, before in waiting.items() if before.isdisjoint(waiting)]
            if not ready:
                cycle = _cycle(waiting)
                edge = next(e for e in nodes[cycle[0]].inputs if e.producer == cycle[-1])
                self._at(nodes[cycle[0]], edge, f"a cycle: {' → '.join([*cycle, cycle[0]])}")
                waiting[cycle[0]].discard(cycle[-1])
                continue
            for name in ready:
                order.append(name)
                del waiting[name]
        return order

    def _context(self, node: Node) -> Context:
        return Context(
            topology=self.topology.name,
            node=node.name,
            base=self.topology.base,
            state=self.state / node.name,
            broker=self.topology.hosts.get(node.host, ""),
            brokers=dict(self.urls),
            inputs=tuple(edge.name for edge in node.inputs),
        )

    def _configure(self, node: Node) -> None:
        """The kind's options from what was written, and what the kind itself finds wrong in them."""
        try:
            module = self.resolve(node.kind)
        except ConfigError as error:
            for problem in error.problems:
                self._wrong(node.name, (node.kind,), problem.message, on_key=True)
            return
        model: type[Options] = module.Config
        raw = node.config if isinstance(node.config, dict) else model.shorthand(node.config)
        raw = {} if raw is None else raw
        try:
            config = model.model_validate(raw)
            config.check(self._context(node))
        except ValidationError as error:
            problems = problems_of(error, model, raw, _inner(model, raw))
            self.problems.extend(ConfigError(*problems).under("nodes", node.name, node.kind).problems)
        except ConfigError as error:
            self.problems.extend(error.under("nodes", node.name, node.kind).problems)
        else:
            self.configs[node.name] = config
            self.written[node.name] = raw

    def _follow(self, node: Node) -> None:
        """What comes in fits and what goes out is known."""
        self.outputs[node.name] = None
        config = self.configs.get(node.name)
        if config is None:
            return
        accepted = config.accepts()
        if accepted is not None and not accepted and node.inputs:
            self._wrong(node.name, ("from",), f"{self._called(node)} reads nothing from other nodes", on_key=True)
            return
        if (accepted is None or accepted) and not node.inputs:
            self._wrong(
                node.name, (), f"{self._called(node)} reads from other nodes; say from which in 'from'", on_key=True
            )
            return
        flows = [self._arriving(node, edge, accepted) for edge in node.inputs]
        known = [flow for flow in flows if flow is not None]
        if len(known) < len(flows):
            return
        try:
            outputs = config.emits(known, self._context(node))
        except ConfigError as error:
            self.problems.extend(error.under("nodes", node.name, node.kind).problems)
            return
        for port, flow in outputs.items():
            if not topics.is_level(port) or port in topics.RESERVED_PORTS:
                self._wrong(node.name, (node.kind,), f"a port cannot be named {port!r}", on_key=True)
            if flow.type not in TYPES:
                message = f"port {port!r} sends {flow.type!r}, which is no body type{did_you_mean(flow.type, TYPES)}"
                self._wrong(node.name, (node.kind,), message, on_key=True)
        self.outputs[node.name] = outputs

    def _called(self, node: Node) -> str:
        config = self.configs[node.name]
        if isinstance(config, VariantConfig):
            return f"{node.kind} ({config.family} {config.kind})"
        return node.kind

    def _arriving(self, node: Node, edge: Edge, accepted: frozenset[str] | None) -> Flow | None:
        """What an edge brings; None if that is not known or does not fit."""
        ports = self.outputs.get(edge.producer)
        if ports is None:
            return None
        flow = ports.get(edge.port)
        if flow is None:
            if not ports:
                self._at(node, edge, f"the node {edge.producer!r} sends nothing that can be read")
            else:
                names = [f"{edge.producer}.{p}" if p != "out" else edge.producer for p in sorted(ports)]
                hint = f"; say which: {', '.join(names)}" if edge.port == "out" else did_you_mean(edge.name, names)
                self._at(node, edge, f"the node {edge.producer!r} has no port {edge.port!r}{hint}")
            return None
        if accepted is not None and flow.type not in accepted:
            *others, last = sorted(accepted)
            wanted = f"{', '.join(others)} or {last}" if others else last
            self._at(node, edge, f"{self._called(node)} reads {wanted}, but {edge.name!r} sends {flow.type}")
            return None
        return flow

    def _unread(self) -> None:
        """Nodes whose answers go nowhere; not looked for as long as another fault may be why."""
        if self.problems:
            return
        nodes = self.topology.nodes.values()
        read = {edge.producer for node in nodes for edge in node.inputs}
        for node in nodes:
            if self.outputs.get(node.name) and node.name not in read and node.publish != "always":
                message = "no node reads this; read it, or say publish: always for readers outside of the topology"
                self._wrong(node.name, (), message, on_key=True)

    def _unkept(self, edges: Mapping[str, list[PlannedEdge]]) -> None:
        """A relay that keeps does so for whole nodes only.

        :raises TopologyError: an edge of replicas that it would have to keep.
        """
        nodes = self.topology.nodes
        for edge in [edge for some in edges.values() for edge in some if edge.relay]:
            ends = [name for name in (edge.producer, edge.consumer) if len(nodes[name].hosts) > 1]
            if ends:
                message = f"it has replicas, and the relay {edge.relay!r} keeps edges of nodes without only"
                self._wrong(ends[0], (), message, on_key=True)
        if self.problems:
            raise self.topology.error(self.problems)

    def _replicas(self) -> None:
        """Nodes that cannot have replicas, and names that replicas take."""
        for node in self.topology.nodes.values():
            config = self.configs.get(node.name)
            if len(node.hosts) < 2 or config is None:
                continue
            if (reason := config.whole()) is not None:
                self._wrong(node.name, (), f"{self._called(node)} cannot have replicas: {reason}", on_key=True)
            for name in node.members:
                if name in self.topology.nodes:
                    self._wrong(name, (), f"{name!r} is the name of a replica of {node.name!r}", on_key=True)

    def _edge(self, node: Node, edge: Edge) -> PlannedEdge:
        producer = self.topology.nodes[edge.producer]
        hosts = self.topology.hosts
        flow = (self.outputs[edge.producer] or {})[edge.port]
        options = edge.options
        default: Delivery = "fast" if flow.type in FAST_TYPES and options.overflow is None else "safe"
        if options.overflow is not None:
            default = "fast"
        delivery = options.delivery or default
        carrier: Carrier = "relay"
        if (producer.host, _label(producer)) == (node.host, _label(node)):
            carrier = "local"
        elif hosts[producer.host] == hosts[node.host]:
            carrier = "mqtt"
        return PlannedEdge(
            name=edge.name,
            producer=edge.producer,
            port=edge.port,
            consumer=node.name,
            type=flow.type,
            delivery=delivery,
            queue=options.queue or QUEUE[delivery],
            overflow=options.overflow or "block",
            carrier=carrier,
            topic=topics.output(self.topology.name, edge.producer, edge.port),
            origin=edge.producer,
            target=node.name,
        )

    def _node(self, node: Node, inputs: list[PlannedEdge], every: list[PlannedEdge]) -> PlannedNode:
        return PlannedNode(
            name=node.name,
            kind=node.kind,
            config=self.configs[node.name],
            written=self.written[node.name],
            context=self._context(node),
            inputs=inputs,
            outputs=self.outputs[node.name] or {},
            consumers=[edge for edge in every if edge.producer == node.name],
            host=node.host,
            broker=self.topology.hosts[node.host],
            process=_label(node),
            publish=node.publish,
            durable=node.durable,
            logical=node.name,
            replicas=len(node.hosts),
        )


def _label(node: Node) -> str:
    return node.process or node.name


def _inner(model: type[Options], raw: Any) -> dict[tuple[str | int, ...], type[Options]]:
    """Models of the kinds within a node's config, by where their options stand, for the names of their keys."""
    if not isinstance(raw, dict):
        return {}
    if issubclass(model, VariantConfig):
        name = raw.get(model.family)
        return {(): model.together(name)} if isinstance(name, str) and name in kinds.names(model.family) else {}
    found: dict[tuple[str | int, ...], type[Options]] = {}
    steps = raw.get("steps")
    for i, step in enumerate(steps if isinstance(steps, list) else ()):
        if isinstance(step, dict) and len(step) == 1:
            name = next(iter(step))
            found.update(_option_model(("steps", i, name), "step", name))
    return found


def _option_model(path: tuple[str | int, ...], family: str, name: Any) -> dict[tuple[str | int, ...], type[Options]]:
    known = isinstance(name, str) and name in kinds.names(family)
    return {path: kinds.module(family, name).Config} if known else {}


def _cycle(waiting: Mapping[str, set[str]]) -> list[str]:
    """One cycle, each node reading the one before it, from the node that was written first."""
    name = next(iter(waiting))
    seen: list[str] = []
    while name not in seen:
        seen.append(name)
        name = min(before for before in waiting[name] if before in waiting)
    cycle = seen[seen.index(name) :][::-1]
    first = min(cycle, key=list(waiting).index)
    at = cycle.index(first)
    return cycle[at:] + cycle[:at]
