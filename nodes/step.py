"""What goes through a node's runtime: one step of its work, its links, and what one commit holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.bus import Bus, Delivery
from nodes.assignment import Report
from nodes.channel import Mark
from nodes.edge import Edge
from nodes.ledger import Entry
from nodes.outputs import Staged

if TYPE_CHECKING:
    from broker.local import LocalBus


class Step:
    """One call of the operator: what it came from, what it waits for, and what is booked when it is done."""

    __slots__ = (
        "advanced",
        "deliveries",
        "entry",
        "finishes",
        "ids",
        "mark",
        "marks",
        "position",
        "progress",
        "replayed",
    )

    def __init__(self) -> None:
        self.entry = Entry()
        self.mark = Mark()
        self.finishes: dict[str, tuple[int, int]] = {}
        self.deliveries: list[tuple[Edge, list[Delivery]]] = []
        self.ids: dict[str, list[str]] = {}
        self.position: Any = None
        self.replayed: list[tuple[str, str]] = []
        self.progress: dict[str, int] = {}
        """By edge, the event time that it has come to without a row."""
        self.advanced: int | None = None
        """Event time that our own stream has come to by that."""
        self.marks: dict[str, int] = {}
        """By stream, see :mod:`nodes.merge`."""


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
    local: LocalBus | None
    report: Callable[[Report], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What one commit holds, all as of one moment.

    :param values: for the journal, encoded: what they were made from goes on changing while the commit is under way.
    :param ids: identities taken, by edge.
    :param outbox: (port, number, topic, payload) of new rows of a durable outbox.
    :param floors: numbers up to which its rows may be forgotten, by port.
    :param staged: what is sent after the commit.
    :param position: a source's.
    """

    steps: list[Step]
    values: dict[str, bytes]
    ids: dict[str, list[str]]
    outbox: list[tuple[str, int, str, bytes]]
    floors: dict[str, int]
    staged: Staged | None
    position: Any
