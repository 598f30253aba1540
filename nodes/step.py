"""What goes through a node's runtime: one step of its work, its links, and what one commit holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from broker.bus import Bus, Delivery, Publication
from nodes.assignment import Report
from nodes.inputs import Edge
from nodes.ledger import Entry
from nodes.outputs import Mark


class Step:
    """One call of the operator: what it came from, what it waits for, and what is booked when it is done."""

    __slots__ = ("deliveries", "entry", "finishes", "ids", "mark", "position", "replayed")

    def __init__(self) -> None:
        self.entry = Entry()
        self.mark = Mark()
        self.finishes: dict[str, tuple[int, int]] = {}
        self.deliveries: list[tuple[Edge, list[Delivery]]] = []
        self.ids: dict[str, list[str]] = {}
        self.position: Any = None
        self.replayed: list[tuple[str, str]] = []


@dataclass(frozen=True, slots=True)
class Links:
    """A node's ways out.

    :param bus: its own connection, not opened yet; None when it needs none.
    :param intake: a second connection for edges that may pause reading; None when there are none.
    :param local: the in-process bus, opened; None when no node of this process is a neighbour.
    :param report: sends a line to the supervisor.
    """

    bus: Bus | None
    intake: Bus | None
    local: Bus | None
    report: Callable[[Report], None]


Work: TypeAlias = tuple[
    list[Step],
    dict[str, Any],
    dict[str, list[str]],
    list[tuple[str, int, str, bytes]],
    dict[str, int],
    tuple[list[Publication], list[Publication]] | None,
]
"""One commit: its steps, values, identities, new outbox rows, floors of the outbox, and what is sent after it."""
