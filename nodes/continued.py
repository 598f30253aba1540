"""What of a run that was stopped is over already, when it goes on.

A node whose stream has ended forgets everything, so that the next run begins anew. But a relay may keep what it sent, for
hours; if the run is stopped then and started again, the node must not begin anew before that is delivered.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nodes import relay_books
from nodes.planned import Plan, PlannedRelay


def ended(plan: Plan, relays: Iterable[PlannedRelay], state: Path) -> set[str]:
    """Nodes that have ended in the run that goes on: they left nothing behind, and a relay has the end of their stream;
    or it went through such a node.

    :param relays: those that run here.
    """
    over = {
        port.producer
        for relay in relays
        for port in relay.ports
        if relay_books.has_end(state / relay.name / f"{port.producer}.{port.port}") and not _left(state, port.producer)
    }
    waiting = list(over)
    while waiting:
        for edge in plan.nodes[waiting.pop()].inputs:
            if edge.producer not in over and not _left(state, edge.producer):
                over.add(edge.producer)
                waiting.append(edge.producer)
    return over


def _left(state: Path, node: str) -> bool:
    return (state / f"{node}.journal").exists()
