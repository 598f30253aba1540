"""What comes into a node: items, the streams that they come by, and the edges that these are of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from broker.bus import Delivery, Subscription
from broker.window import ReceiveWindow, RecentIds
from nodes.assignment import InEdge
from nodes.journal import SEEN, Journal
from nodes.merge import FLOOR, Merge
from schemas import codec
from schemas.messages import Message

if TYPE_CHECKING:
    from broker.local import LocalSubscription
    from nodes.sharing import Reading

MOST_REPLICAS = 64
"""An epoch's remainder by this is the number of the replica that it is of."""
FOREIGN = "foreign"
"""The ledger's edge of what somebody else published on a topic of ours."""
REPLAYED = "replayed"
"""The ledger's edge of dead letters that somebody had sent to us again."""


class Item(msgspec.Struct, gc=False):
    """A message on its way through a node.

    :param stream: the one it came by.
    :param number: (epoch, seq) on a numbered edge.
    :param delivery: the local bus's, to be acknowledged.
    :param arrived: ns since the epoch.
    :param foreign: not of the producer's numbered stream; taken whatever its identity.
    :param again: foreign, and a dead letter of ours that is replayed.
    :param mark: event time that the stream has come to with it, where streams are merged.
    """

    stream: Stream
    message: Message
    arrived: int
    number: tuple[int, int] | None = None
    delivery: Delivery | None = None
    foreign: bool = False
    again: bool = False
    mark: int = FLOOR

    @property
    def edge(self) -> Edge:
        """The edge that its stream is of."""
        return self.stream.edge


class Stream:
    """What one producer sends by an edge; a producer with replicas is several.

    :ivar name: ``<producer>.<port>``, where the producer may be a replica.
    """

    def __init__(self, edge: Edge, producer: str, journal: Journal) -> None:
        self.edge = edge
        self.producer = producer
        self.name = f"{producer}.{edge.spec.port}"
        epoch, done = (journal.get("floors") or {}).get(self.name, (0, 0))
        self.window = ReceiveWindow(epoch=epoch, done=done)
        self.ended = False
        self.away: float | None = None
        self.rooted = False


class Drops(msgspec.Struct):
    """What a ``fast`` edge dropped, not yet booked: rows by reason."""

    messages: int = 0
    rows: dict[str, int] = {}

    def drop(self, reason: str, rows: int) -> None:
        """One message more."""
        self.messages += 1
        self.rows[reason] = self.rows.get(reason, 0) + rows


class Edge:
    """One edge that the node reads, and what is known of it.

    :ivar remote: whether it comes by MQTT, and so has a window and acknowledgements.
    :ivar near: where it does not: what it is read from, which is :attr:`subscription` too.
    :ivar endings: of a ``fast`` edge within the process, by which its end comes.
    """

    def __init__(self, spec: InEdge, journal: Journal, known: Sequence[str], replayed: Sequence[str]) -> None:
        self.spec = spec
        self.name = spec.name
        self.remote = spec.carrier != "local"
        self.streams = [Stream(self, producer, journal) for producer in spec.streams or [spec.producer]]
        marks = journal.get("marks") or {}
        self.merge = Merge[Item]([marks.get(stream.name, FLOOR) for stream in self.streams]) if spec.merged else None
        self.ids = RecentIds(SEEN, known)
        self.replayed = RecentIds(SEEN, replayed)
        self.subscription: Subscription | None = None
        self.near: LocalSubscription | None = None
        self.endings: LocalSubscription | None = None
        self.since = 0  # ns since the epoch: when the first of what is queued there came
        self.shared: Reading | None = None
        self.out_of_reach = asyncio.Event()
        self.dropped = Drops()

    @property
    def ended(self) -> bool:
        """All of its streams have ended."""
        for stream in self.streams:  # noqa: SIM110 - asked for at each step, and a generator costs three times as much
            if not stream.ended:
                return False
        return True

    def stream(self, epoch: int) -> Stream:
        """The stream with this numbering: an epoch tells its producer's number."""
        return self.streams[epoch % MOST_REPLICAS] if epoch % MOST_REPLICAS < len(self.streams) else self.streams[0]

    def lost(self, delivery: Delivery) -> None:
        """A full queue dropped it. The end of the stream, which comes again, is no loss."""
        payload = delivery.payload
        rows = payload.rows if isinstance(payload, Message) else codec.rows_in(payload)
        if rows is not None:
            self.dropped.drop("queue-full", rows)

    @property
    def queued(self) -> int:
        """Messages that have arrived and were not looked at yet."""
        return 0 if self.subscription is None else self.subscription.queued
