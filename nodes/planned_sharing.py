"""Which edges of a plan share memory: those that bring big tensors from one process of a host to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from nodes.planned import Plan, PlannedEdge, PlannedNode
from schemas.topology import Topology

TYPES = frozenset({"frame/1", "tensors/1"})
"""Body types that are worth it; the size of each message decides when it is sent."""
MOST = 32
"""Readers of a port that can share its memory."""


def shared(
    topology: Topology, edges: Mapping[str, list[PlannedEdge]], off: frozenset[tuple[str, str]]
) -> dict[str, list[PlannedEdge]]:
    """The edges by consumer, with those that share memory marked.

    Nodes with replicas do not: what one of them is to get goes by topics of its own, and may be given to another.

    :param off: (edge, consumer) of edges for which the user does not want it.
    """
    nodes, count = topology.nodes, Counter[tuple[str, str]]()

    def fits(edge: PlannedEdge) -> bool:
        one, other = nodes[edge.producer], nodes[edge.consumer]
        if not topology.shared or edge.carrier != "mqtt" or edge.type not in TYPES or (edge.name, edge.consumer) in off:
            return False
        if one.host != other.host or len(one.hosts) > 1 or len(other.hosts) > 1:
            return False
        count[edge.producer, edge.port] += 1
        return count[edge.producer, edge.port] <= MOST

    return {name: [replace(edge, shared=fits(edge)) for edge in some] for name, some in edges.items()}


def number(edge: PlannedEdge, plan: Plan) -> int | None:
    """An edge's number among those that share the memory of its port."""
    return next(iter([i for i, e in enumerate(_of(plan.nodes[edge.producer], edge.port)) if e == edge]), None)


def readers(node: PlannedNode, port: str) -> dict[str, str]:
    """Those that share a port's memory, by number: name → ``safe``, or what is done when it is too slow."""
    return {e.consumer: e.overflow if e.delivery == "fast" else e.delivery for e in _of(node, port)}


def always(node: PlannedNode, port: str) -> bool:
    """Whether the public topic of a port has to carry everything, listened to or not."""
    others = [e for e in node.consumers if e.port == port and e.carrier != "local" and not e.lane and not e.shared]
    return node.publish == "always" or bool(others)


def _of(node: PlannedNode, port: str) -> list[PlannedEdge]:
    return [edge for edge in node.consumers if edge.port == port and edge.shared]
