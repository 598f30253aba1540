"""What a worker is told of each of its nodes, from the plan."""

from __future__ import annotations

from nodes import planned_relays, planned_sharing
from nodes.assignment import InEdge, NodeSpec, OutPort, Team
from nodes.planned import Plan, PlannedNode


def specify(node: PlannedNode, plan: Plan, bus: bool) -> NodeSpec:
    """A planned node as a worker is told it."""
    known: dict[str, frozenset[str]] = {}
    above = {edge.name: _origins(edge.producer, plan, known) for edge in node.inputs}
    inputs = [
        InEdge(
            producer=edge.origin,
            port=edge.port,
            carrier="local" if edge.carrier == "local" else "mqtt",
            safe=edge.delivery == "safe",
            queue=edge.queue,
            overflow=edge.overflow,
            marked=any(above[edge.name] & others for name, others in above.items() if name != edge.name),
            streams=[other.producer for other in node.inputs if other.name == edge.name],
            lane=edge.lane,
            private=planned_relays.private(edge, plan),
            merged=plan.nodes[edge.producer].replicas > 1 and _timed(node, plan),
            shared=planned_sharing.number(edge, plan),
        )
        for edge in {edge.name: edge for edge in node.inputs}.values()
    ]
    outputs = [
        OutPort(
            name=port,
            local=any(e.port == port and e.carrier == "local" for e in node.consumers),
            remote={
                e.consumer: e.delivery == "fast"
                for e in node.consumers
                if e.port == port and e.carrier != "local" and not e.lane
            },
            publish=bus and (node.published(port) or not any(e.port == port for e in node.consumers)),
            teams=_teams(node, port),
            shared=planned_sharing.readers(node, port),
            always=planned_sharing.always(node, port),
            handed=any(e.port == port and e.carrier == "local" and e.delivery == "safe" for e in node.consumers),
        )
        for port in node.outputs
    ]
    return NodeSpec(
        name=node.name,
        kind=node.kind,
        config=node.written,
        inputs=inputs,
        outputs=outputs,
        host=node.host,
        broker=node.broker,
        durable=node.durable,
        logical=node.logical,
        replica=node.replica,
        replicas=node.replicas,
    )


def _teams(node: PlannedNode, port: str) -> dict[str, Team]:
    """The consumers of a port that have replicas."""
    teams: dict[str, Team] = {}
    for edge in node.consumers:
        if edge.port == port and edge.lane:
            team = teams.setdefault(edge.target, Team(members=[], fast=edge.delivery == "fast"))
            team.members.append(edge.consumer)
    return teams


_NEW_IDENTITIES = frozenset({"ingest", "aggregate", "join"})
"""Kinds whose messages have identities of their own; all others keep those of what they answer."""


def _origins(name: str, plan: Plan, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """The nodes that made the identities which ``name`` sends."""
    if name not in known:
        node = plan.nodes[name]
        own = node.kind in _NEW_IDENTITIES or not node.inputs
        below = (_origins(edge.producer, plan, known) for edge in node.inputs)
        known[name] = frozenset({node.logical}) if own else frozenset().union(*below)
    return known[name]


def _timed(node: PlannedNode, plan: Plan) -> bool:
    """Whether what the node sends, or what it does itself, depends on the order of times."""
    return node.config.timed or any(_timed(plan.nodes[edge.consumer], plan) for edge in node.consumers)
