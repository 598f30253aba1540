"""What a plan is made of: edges and nodes, decided; the runtime and the supervisor run them. :mod:`nodes.plan` makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from nodes.assignment import RelayPort
from nodes.operator import Context, Flow
from nodes.options import Options
from schemas.topology import Broker, Delivery, Overflow, RelayOptions, Topology

Carrier: TypeAlias = Literal["local", "mqtt", "relay"]


@dataclass(frozen=True, slots=True)
class PlannedEdge:
    """One edge, decided.

    :param name: ``<producer>.<port>``.
    :param type: body type that travels on it.
    :param queue: messages that may wait at the consumer.
    :param overflow: what a full queue does; always ``block`` on a safe edge.
    :param carrier: ``local``: both ends in one process; ``mqtt``: by the broker that both hosts use; ``relay``: the two
        hosts use different brokers.
    :param topic: ``<topology>/<producer>/<port>``; messages are on ``<topic>/<source>``. On a lane: the lane's own topic.
    :param origin: the producer as the user named it, where ``producer`` is one of its replicas.
    :param target: likewise the consumer.
    :param lane: the consumer has replicas, and its part of the messages goes to this one alone.
    :param relay: name of the relay that keeps what it carries, if there is one.
    :param shared: big tensors go by memory that both processes share.
    """

    name: str
    producer: str
    port: str
    consumer: str
    type: str
    delivery: Delivery
    queue: int
    overflow: Overflow
    carrier: Carrier
    topic: str
    origin: str
    target: str
    lane: bool = False
    relay: str = ""
    shared: bool = False


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """One node, decided.

    :param config: the kind's own options, checked.
    :param written: the same as the user wrote them: plain values, fit for JSON; a worker makes ``config`` of them again.
    :param outputs: what it emits, by port.
    :param inputs: edges that it reads, in the order of its ``from``.
    :param consumers: edges that read it.
    :param broker: name of its host's broker.
    :param process: label of its process on its host; its own name unless the user groups nodes.
    :param durable: what it sends is kept on its disk until it is done.
    :param logical: the name that the user gave; ``name`` is one of its replicas, ``<logical>-<number>``, if it has any.
    :param replica: number of this replica, from 0.
    :param replicas: how many there are.
    """

    name: str
    kind: str
    config: Options
    written: dict[str, Any]
    context: Context
    inputs: list[PlannedEdge]
    outputs: dict[str, Flow]
    consumers: list[PlannedEdge]
    host: str
    broker: str
    process: str
    publish: Literal["auto", "always"]
    durable: bool
    logical: str
    replica: int = 0
    replicas: int = 1

    def published(self, port: str) -> bool:
        """Whether what leaves by ``port`` goes to the broker (also)."""
        return self.publish == "always" or any(
            e.port == port and e.carrier != "local" and not e.lane for e in self.consumers
        )


@dataclass(frozen=True, slots=True)
class PlannedRelay:
    """A relay that keeps: what safe edges send from its host's broker to another one.

    :param name: as its books are called; also of its process.
    :param far: name of the other broker.
    :param ports: what it relays, each with a spool of its own.
    """

    name: str
    host: str
    broker: str
    far: str
    ports: list[RelayPort]
    options: RelayOptions

    @property
    def kind(self) -> str:
        """What the table shows."""
        return "relay"

    @property
    def process(self) -> str:
        """Label of its process."""
        return self.name


@dataclass(frozen=True, slots=True)
class Plan:
    """A topology that can run.

    :param nodes: in topological order: every node after those that it reads.
    """

    topology: Topology
    nodes: dict[str, PlannedNode]
    edges: list[PlannedEdge] = field(default_factory=list)
    relays: dict[str, PlannedRelay] = field(default_factory=dict)

    def processes(self, host: str | None = None) -> dict[tuple[str, str], list[PlannedNode]]:
        """Nodes by (host, process label), those of one host or of all."""
        out: dict[tuple[str, str], list[PlannedNode]] = {}
        for node in self.nodes.values():
            if host is None or node.host == host:
                out.setdefault((node.host, node.process), []).append(node)
        return out

    def brokers(self, host: str | None = None) -> dict[str, Broker]:
        """Brokers that are needed: those of one host's nodes or of all, also by name in their options, and those that the host
        starts for others.
        """
        here = [node for node in self.nodes.values() if host is None or node.host == host]
        used = {node.broker for node in here}
        used.update(name for node in here for name in _brokers(node.written))
        used |= {name for name, b in self.topology.brokers.items() if b.run is not None and b.on == host}
        for node in self.nodes.values():  # of their own, beside the host's: a job's, or where a source or sink is
            if host in {None, node.host}:
                named = (node.config, getattr(node.config, "options", None))
                used |= {str(getattr(config, "broker", "")) for config in named}
        for edge in self.edges:
            ends = (self.nodes[edge.producer], self.nodes[edge.consumer])
            if edge.carrier == "relay" and any(host in {None, node.host} for node in ends):
                used |= {node.broker for node in ends}
        for relay in self.relays.values():
            if host in {None, relay.host}:
                used |= {relay.broker, relay.far}
        return {name: broker for name, broker in self.topology.brokers.items() if name in used}


def _brokers(written: Any) -> Iterator[str]:
    """What the options of a kind name as ``broker``: names and URLs."""
    if isinstance(written, list):
        for value in written:
            yield from _brokers(value)
    elif isinstance(written, dict):
        for key, value in written.items():
            if key == "broker" and isinstance(value, str):
                yield value
            else:
                yield from _brokers(value)
