"""What a node is made of: sources, operators and sinks. The runtime (:mod:`nodes.runtime`) owns everything else.

An operator does no I/O: it is given messages, or a tick of the clock, and answers through the :class:`Emit` that it was
handed. It may be tested with plain values: no bus, no sleep, any clock. Sources and sinks are the two places where I/O is
the point; each is small and in one file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from schemas.messages import Body, Message

if TYPE_CHECKING:
    from broker.bus import Bus


@dataclass(frozen=True, slots=True)
class Flow:
    """What is known, before anything runs, of what travels on an edge.

    :param type: the body's type, e.g. ``readings/1``.
    :param fields: names of the columns where they are known (a CSV header, a mapping); None: not known until run time.
        For ``predictions/1`` and ``aggregate/1`` the fields are those of their rows, see :func:`schemas.rows.rows`.
    """

    type: str
    fields: frozenset[str] | None = None


@dataclass(frozen=True)
class Context:
    """Where a kind finds itself; given to ``check`` and ``build``.

    :param topology: name of the topology.
    :param node: name of the node.
    :param base: folder of the topology file; relative paths in a config start here (:meth:`path`).
    :param state: folder that this node may keep files in.
    :param broker: the host's own broker, by name (or a URL, in tests).
    :param brokers: name → url of the topology's brokers, as resolved for this run.
    :param credentials: name → what :func:`broker.connect.connect` takes of it: user, password, ca, cert, key.
    :param inputs: the node's in-edges, ``<node>.<port>``, in the order of ``from``.
    """

    topology: str
    node: str
    base: Path
    state: Path
    broker: str = ""
    brokers: dict[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    credentials: dict[str, dict[str, str | None]] = field(default_factory=dict, repr=False)

    def path(self, text: str) -> Path:
        """A path of the config, taken from the topology file's folder unless absolute; ``~`` is expanded."""
        return self.base / Path(text).expanduser()

    def bus(self, broker: str | None, name: str, **options: Any) -> Bus:
        """A client of its own (the ``mqtt`` source and sink); not opened yet.

        :param broker: a broker of the topology, with its credentials, or a URL; None: the host's own.
        :param name: ends the client id.
        :param options: further ones of :func:`broker.connect.connect`.
        """
        from broker.connect import connect

        at = self.broker if broker is None else broker
        known: dict[str, Any] = {key: value for key, value in self.credentials.get(at, {}).items() if value is not None}
        client = f"{self.topology}-{self.node}-{name}"
        return connect(self.brokers.get(at, at), client_id=client, **known, **options)


class Emit:
    """Collects the answer to one call of an operator. Rows that are not named here have passed on.

    The runtime makes one per call and reads the lists afterwards; tests do the same.
    """

    __slots__ = ("absorbed", "dead", "dropped", "filtered", "sent")

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.filtered = 0
        self.absorbed = 0
        self.dropped: dict[str, int] = {}
        self.dead: list[tuple[Message, str, str]] = []

    def send(self, message: Message, port: str = "out") -> None:
        """Emit ``message`` on ``port``. Order of calls is the order on the wire."""
        self.sent.append((port, message))

    def filter(self, rows: int = 1) -> None:
        """These rows were left out because the user asked for it."""
        self.filtered += rows

    def absorb(self, rows: int) -> None:
        """These rows are now part of an answer that was sent or is kept in the operator's state and will be."""
        self.absorbed += rows

    def drop(self, reason: str, rows: int = 1) -> None:
        """These rows are lost on purpose (``late``, ``deadline``)."""
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def reject(self, message: Message, reason: str, detail: str) -> None:
        """This whole message cannot be processed: to the dead letters with ``reason`` (short, stable) and ``detail``."""
        self.dead.append((message, reason, detail))

    def messages(self, port: str = "out") -> list[Message]:
        """What was sent on ``port``; for tests."""
        return [m for p, m in self.sent if p == port]


class Operator(ABC):
    """Messages in, messages out."""

    absorbs: ClassVar[bool] = False
    """True: rows are gathered into answers (aggregate); the ledger compares received rows with :meth:`Emit.absorb`.
    False: rows pass through; the ledger compares received rows with emitted ones."""

    blocking: bool = False
    """True: :meth:`process` may take long (a model); the runtime calls it in a worker thread. May be set by
    :meth:`open`, after measuring."""

    overlaps: ClassVar[bool] = False
    """True: a ``blocking`` :meth:`process` keeps nothing from call to call, so the runtime may have the next call ready, and send
    the answers of the last one, while one is under way."""

    calls: int = 1
    """Most calls at the same time of an operator that ``overlaps``, each in a thread of its own. Their answers go out in the
    order in which the calls began."""

    max_batch: int = 1024
    """Most messages the runtime gives to one call."""

    linger: float = 0.0
    """Seconds the runtime may wait to fill a batch of ``max_batch`` once one message is there."""

    def open(self) -> None:
        """Load what is needed (a model). Called once, before the first message, in the worker's main thread.

        :raises MissingError: a library or file is not there.
        """

    async def beside(self) -> None:
        """What it does beside processing, in the event loop: waits for what it is to take over from elsewhere (a newer
        model). Called once, after :meth:`open`; an exception fails the node. Cancelled when the node leaves."""

    @abstractmethod
    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        """Answer messages that came by ``edge`` (``<node>.<port>``), oldest first, all of accepted types.

        An exception means that none of them had any effect; the runtime then gives them one by one, and dead-letters
        those that still raise.
        """

    def tick(self, now: int, emit: Emit) -> None:
        """Time passed: ``now`` in ns since the epoch. Called at or after the time that :meth:`wake` asked for."""

    def wake(self) -> int | None:
        """When :meth:`tick` is wanted next, ns since the epoch; None: not at all. Asked after every call."""
        return None

    def advance(self, edge: str, time: int, emit: Emit) -> int:
        """The stream of this in-edge has come to this event time (ns), though it brought no row of it.

        Told where the node or one before it has replicas. Answers the time that our own stream has come to by that.
        """
        del edge, emit
        return time

    def ended(self, edge: str, emit: Emit) -> None:
        """The stream of this in-edge is complete, that of others may not be. Called before :meth:`finish`."""

    def finish(self, emit: Emit) -> None:
        """All inputs have ended: send what is still held (open windows)."""

    def snapshot(self) -> Any:
        """State as plain msgpack types (arrays as bytes), or None if there is none. Committed by the runtime."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from a :meth:`snapshot`; called after :meth:`open`, before the first message."""

    def held(self) -> int:
        """Rows taken in and not yet absorbed, passed, filtered or dropped (a join's waiting side); for the ledger."""
        return 0

    def close(self) -> None:
        """Free what :meth:`open` took."""


class Draft(msgspec.Struct, frozen=True, gc=False):
    """What a source read: a body and what it speaks of. The runtime gives it its id.

    :param time: event time, ns since the epoch: from the data where it has one.
    :param key: identity given by the data itself (a line number, a frame number), unique in the stream; None lets the
        runtime count.
    """

    source: str
    time: int
    body: Body
    key: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One step of a source: drafts, and the position after them, as plain msgpack types.

    :param dead: undecodable input: (original bytes, reason, detail, position).
    :param dropped: rows lost on purpose since the last chunk, by reason (a camera that overran).
    """

    drafts: list[Draft]
    position: Any = None
    dead: list[tuple[bytes, str, str, str]] = []
    dropped: dict[str, int] = {}


class Source(ABC):
    """Reads the world. The runtime calls :meth:`open`, iterates :meth:`chunks`, tells :meth:`settled`, then closes."""

    live: ClassVar[bool] = False
    """True: what is not taken in time is gone (a camera); the runtime's stream name is new at each start. False: the
    same position gives the same data again, so ids are made from the data and a restart repeats none."""

    awaits: bool = True
    """False: nobody waits for :meth:`settled`, and a position is worth nothing after a restart: commits may be late."""

    async def open(self, position: Any) -> str:
        """Get ready to continue after ``position`` (None: from the beginning).

        :returns: a name for the stream that is equal when the data are (first eight hex digits of a file's digest);
            ``""`` for a live source.
        :raises MissingError: a library or file is not there.
        """
        return ""

    @abstractmethod
    def chunks(self) -> AsyncIterator[Chunk]:
        """Everything from here on, in pieces that are there anyway; ends at the end of the data. A source that never
        ends waits inside. Blocking reads belong in a thread. Called once after each :meth:`open`."""

    async def settled(self, position: Any) -> None:
        """All drafts up to the chunk with this ``position`` are safe in the next nodes (acknowledge a far end here)."""

    async def close(self) -> None:
        """Free what was opened."""


class Sink(ABC):
    """Writes to the world."""

    max_batch: int = 1024
    """Most messages the runtime gives to one :meth:`write`."""

    linger: float = 0.0
    """Seconds the runtime may wait to fill a batch."""

    prompt: ClassVar[bool] = False
    """True: :meth:`write` asks, until it first waits for something, for nothing of the task that it runs in (as
    ``asyncio.timeout``, ``wait_for`` and ``TaskGroup`` do). The runtime then begins it while messages are handed over."""

    async def open(self) -> None:
        """Connect or create. May be retried by the runtime on :class:`SinkAwayError`."""

    @abstractmethod
    async def write(self, messages: Sequence[Message]) -> None:
        """Write; on return all are durable. Idempotent by message id wherever the system allows: after a crash or a
        failed call the runtime writes the same messages again.

        :raises SinkAwayError: the far end is away or busy; nothing or a part was written; the runtime repeats all.
        :raises RejectedError: some are refused for good; the others are written.
        """

    async def beside(self) -> None:
        """What it does beside writing (train). Called once, after :meth:`open`; an exception fails the node. Cancelled when
        the node leaves."""

    async def finish(self) -> None:
        """All inputs have ended, and all is written: returns when what is done beside is over. Cancelled when the node is to
        stop, or when the run is ended, and called again by its next life. Not of a sink with a spool."""

    async def close(self) -> None:
        """Flush and free."""
