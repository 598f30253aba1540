"""Replicas in a plan: a node with ``replicas: N`` becomes N nodes, each with a process, a state folder and books of its own.

The work is divided by source, so that each source's order is kept. What only one replica is to get goes by its *lane*, a topic of
its own; what replicas send goes out on the topics of the node as the user named it, where nobody sees how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nodes.planned import Carrier, Plan, PlannedEdge, PlannedNode
from schemas import topics
from schemas.topology import Topology


def expanded(plan: Plan) -> Plan:
    """The plan with every replica as a node of its own; the same plan if no node has any."""
    if all(node.replicas == 1 for node in plan.nodes.values()):
        return plan
    members = {name: _members(node, plan.topology) for name, node in plan.nodes.items()}
    edges = [
        _between(edge, producer, consumer, plan.topology)
        for edge in plan.edges
        for consumer in members[edge.consumer]
        for producer in members[edge.producer]
    ]
    nodes = {
        node.name: replace(
            node,
            inputs=[edge for edge in edges if edge.consumer == node.name],
            consumers=[edge for edge in edges if edge.producer == node.name],
        )
        for several in members.values()
        for node in several
    }
    return Plan(plan.topology, nodes, edges, plan.relays)


def _members(node: PlannedNode, topology: Topology) -> list[PlannedNode]:
    if node.replicas == 1:
        return [node]
    made = []
    for i, (name, host) in enumerate(topology.nodes[node.name].members.items()):
        broker = topology.hosts[host]
        context = replace(node.context, state=node.context.state.parent / name, broker=broker)
        made.append(replace(node, name=name, replica=i, host=host, broker=broker, process=name, context=context))
    return made


def _between(edge: PlannedEdge, producer: PlannedNode, consumer: PlannedNode, topology: Topology) -> PlannedEdge:
    """The edge between two nodes of which one is a replica, or the edge as it is."""
    if producer.replicas == consumer.replicas == 1:
        return edge
    carrier: Carrier = "mqtt" if producer.broker == consumer.broker else "relay"
    lane = consumer.replicas > 1
    topic = topics.lane(topology.name, consumer.name, producer.name, edge.port) if lane else edge.topic
    return replace(edge, producer=producer.name, consumer=consumer.name, carrier=carrier, lane=lane, topic=topic)


def logical(plan: Plan) -> Mapping[str, list[str]]:
    """Node as the user named it → its replicas, or itself; in the plan's order. A relay that keeps is one of them."""
    out: dict[str, list[str]] = {}
    for node in plan.nodes.values():
        out.setdefault(node.logical, []).append(node.name)
    return out | {name: [name] for name in plan.relays}
