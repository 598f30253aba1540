"""The sending side of a node: its ports, what is kept until it is done, and the consumers' acknowledgements.

Every message of a port goes out once on the port's topic, where anybody may listen; what one consumer lacks is sent again on
that consumer's private topic. Nodes of the same process get the objects themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from broker.bus import Bus, Publication, Receipt
from broker.window import Ack, Kept, Knock, SendWindow, pack, unpack_ack
from nodes import log
from nodes.assignment import OutPort
from nodes.journal import Journal
from schemas import codec, topics
from schemas.errors import BusError, ClosedError, PacketTooLargeError, PublishFailedError
from schemas.messages import End, Message

_RESEND_CHECK = 0.25
"""Seconds between looks for what has had no progress."""
_PATIENCE = 5.0
"""Seconds of silence of a consumer before we say that we wait for it."""


class Mark:
    """What has to be acknowledged before the effect of one step is done: numbers on ports, receipts of the local bus."""

    __slots__ = ("_numbers", "_receipts")

    def __init__(self) -> None:
        self._numbers: dict[str, tuple[SendWindow, int]] = {}
        self._receipts: list[Receipt] = []

    def number(self, port: str, window: SendWindow, seq: int) -> None:
        """Wait for ``seq`` of ``port``."""
        self._numbers[port] = (window, seq)

    def receipt(self, receipt: Receipt) -> None:
        """Wait for the local bus."""
        self._receipts.append(receipt)

    @property
    def done(self) -> bool:
        """Whether everything is acknowledged."""
        return all(window.floor >= seq for window, seq in self._numbers.values()) and all(
            receipt.done() for receipt in self._receipts
        )


class Staged(msgspec.Struct):
    """What waits to be sent. ``upto``: last number of each port with a durable outbox that it holds."""

    remote: list[Publication]
    local: list[Publication]
    upto: dict[str, int]


class Outputs:
    """All ports of one node.

    :param bus: the node's connection; None when nothing leaves the process.
    :param local: the in-process bus; None when no node of this process reads us.
    :param epoch: this incarnation's numbering (ns of its start), or the kept one of a durable outbox.
    :param durable: numbered messages go to the journal's outbox, and out only after :meth:`flush`.
    :param progress: called when something more is done.
    """

    def __init__(
        self,
        topology: str,
        node: str,
        ports: Sequence[OutPort],
        *,
        bus: Bus | None,
        local: Bus | None,
        journal: Journal,
        epoch: int,
        earlier: Sequence[int],
        durable: bool,
        progress: Callable[[], None],
        window: int = 1024,
        window_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._topology = topology
        self._node = node
        self._ports = {port.name: port for port in ports}
        self._bus = bus
        self._local = local
        self._durable = durable
        self._progress = progress
        self._room = asyncio.Event()
        self._heard = asyncio.Event()
        self._windows: dict[str, SendWindow] = {}
        self._staged: list[Publication] = []
        self._staged_local: list[Publication] = []
        self._fresh: list[tuple[str, int, str, bytes]] = []
        self._receipts: set[Receipt] = set()
        self._released: dict[str, int] = {}
        numbers = (journal.get("numbers") or {}) if durable else {}
        for port in ports:
            if not port.remote:
                continue
            kept = journal.outbox(port.name) if durable else []
            first = kept[0][0] if kept else numbers.get(port.name, 1)
            made = SendWindow(epoch, port.remote, messages=window, size=window_bytes, first=first, earlier=earlier)
            made.committed = (kept[-1][0] if kept else first - 1) if durable else None
            for _, topic, payload in kept:
                made.push(topic, payload, time.time_ns())
            self._windows[port.name] = made
            if durable:
                self._released[port.name] = made.floor

    @property
    def waiting(self) -> list[str]:
        """Remote consumers that were never heard of."""
        return sorted({name for window in self._windows.values() for name in window.waiting})

    @property
    def idle(self) -> bool:
        """Nothing is kept any more: every consumer is done with everything."""
        return not any(window.kept for window in self._windows.values()) and not self._receipts

    @property
    def only_end(self) -> bool:
        """Consumers are done with everything but the end of the stream."""
        return not self._receipts and all(kept.final for window in self._windows.values() for kept in window.kept)

    @property
    def releasable(self) -> bool:
        """The durable outbox holds rows that are done and may be forgotten."""
        return self._durable and self._released != {name: window.floor for name, window in self._windows.items()}

    @property
    def backlog(self) -> int:
        """Messages sent and not yet done."""
        return sum(len(window.kept) for window in self._windows.values())

    def left(self, consumer: str) -> None:
        """A consumer has ended and left; its last acknowledgement may have been lost with a broker."""
        for window in self._windows.values():
            window.left(consumer)
        self._heard.set()
        self._moved()

    async def start(self) -> None:
        """Listen for acknowledgements and make ourselves known to the consumers."""
        if self._bus is None or not self._windows:
            return
        pattern = f"{self._topology}/{self._node}/ack/#"
        self._acks = await self._bus.subscribe([pattern], qos=1, capacity=4096, overflow="latest")
        await self.knock()

    async def listen(self) -> None:
        """Take acknowledgements for ever; a task of the runtime's."""
        if self._bus is None or not self._windows:
            return
        while True:
            for delivery in (batch := await self._acks.receive()):
                parts = delivery.topic.split("/")
                if (
                    len(parts) == 5
                    and (window := self._windows.get(parts[3]))
                    and (ack := unpack_ack(delivery.payload))
                ):
                    await self._acknowledged(parts[3], parts[4], window, ack)
            self._acks.acknowledge(batch)
            self._moved()

    async def resend(self) -> None:
        """Send again what has had no progress, for ever; a task of the runtime's."""
        quiet = time.monotonic() + _PATIENCE
        while self._bus is not None and self._windows:
            await asyncio.sleep(_RESEND_CHECK)
            now = time.time_ns()
            for port, window in self._windows.items():
                for consumer, kept in window.due(now):
                    await self._again(port, consumer, kept)
            if self.waiting and time.monotonic() > quiet:
                quiet = time.monotonic() + 6 * _PATIENCE
                log.info("waiting for consumers", node=self._node, consumers=", ".join(self.waiting))
                await self.knock()

    async def ready(self) -> None:
        """Wait until every remote consumer was heard of, so that what is sent first is not lost."""
        while self.waiting:
            self._heard.clear()
            await self._heard.wait()

    async def room(self) -> None:
        """Wait until every port has room: the back-pressure of the slowest consumer."""
        while any(not window.room for window in self._windows.values()):
            self._room.clear()
            await self._room.wait()

    def stage(self, sent: Sequence[tuple[str, Message]], mark: Mark) -> list[tuple[Message, str]]:
        """Number and encode messages; they leave with :meth:`flush`. ``mark`` is told what to wait for.

        :returns: messages that cannot travel (larger than the broker takes), with the reason.
        """
        refused = []
        now = time.time_ns()
        for name, message in sent:
            port = self._ports.get(name)
            if port is None:
                continue
            topic = topics.output(self._topology, self._node, name, message.source or self._node)
            if port.publish and self._bus is not None:
                window = self._windows.get(name)
                if window is not None and window.sequenced:
                    payload = codec.encode(message, epoch=window.epoch, seq=window.next)
                else:
                    payload = codec.encode(message)
                limit = self._bus.max_payload
                if limit is not None and len(payload) + len(topic) > limit:
                    refused.append((message, f"{len(payload)} bytes, the broker takes at most {limit}"))
                    continue
                if window is not None and window.sequenced:
                    if self._durable:
                        self._fresh.append((name, window.next, topic, payload))
                    mark.number(name, window, window.next)
                    window.push(topic, payload, now)
                    qos = 1
                else:
                    qos = 0
                properties = (("traceparent", message.trace),) if message.trace else ()
                self._staged.append(
                    Publication(topic, payload, qos=qos, properties=properties, content_type=codec.CONTENT_TYPE)
                )
            if port.local:
                self._staged_local.append(Publication(topic, message, qos=1))
        return refused

    def end(self, mark: Mark, messages: dict[str, int]) -> None:
        """Stage the end of every port's stream; ``messages`` were sent on each."""
        now = time.time_ns()
        for name, port in self._ports.items():
            message = Message(f"{self._node}:end", self._node, now, End(messages=messages.get(name, 0)))
            topic = topics.output(self._topology, self._node, name)
            if (window := self._windows.get(name)) is not None:
                payload = codec.encode(message, epoch=window.epoch, seq=window.next)
                mark.number(name, window, window.next)
                window.push(topic, payload, now, final=True)
                self._staged.append(Publication(topic, payload, qos=1, content_type=codec.CONTENT_TYPE))
            elif port.publish and self._bus is not None:
                self._staged.append(Publication(topic, codec.encode(message), qos=1, content_type=codec.CONTENT_TYPE))
            if port.local:
                self._staged_local.append(Publication(topic, message, qos=1))

    def outbox(self) -> tuple[list[tuple[str, int, str, bytes]], dict[str, int], dict[str, object]]:
        """For the journal: new outbox rows, floors up to which old ones may go, and counters. Clears the new rows."""
        fresh, self._fresh = self._fresh, []
        if not self._durable:
            return fresh, {}, {}
        floors = self._released = {name: window.floor for name, window in self._windows.items()}
        return fresh, floors, {"numbers": {name: window.next for name, window in self._windows.items()}}

    def take_staged(self) -> Staged:
        """What was staged so far; the caller passes it to :meth:`flush`."""
        upto = {name: window.next - 1 for name, window in self._windows.items()} if self._durable else {}
        staged = Staged(self._staged, self._staged_local, upto)
        self._staged, self._staged_local = [], []
        return staged

    async def flush(self, staged: Staged, mark: Mark | None = None) -> None:
        """Send what was staged; waits while a bus is full. With a durable outbox: it is committed."""
        remote, local = staged.remote, staged.local
        for name, last in staged.upto.items():
            self._windows[name].committed = last
        if local and self._local is not None:
            receipt = await self._local.publish(local)
            if not receipt.done():
                self._receipts.add(receipt)
                receipt.add_done_callback(self._local_done)
                if mark is not None:
                    mark.receipt(receipt)
        if remote and self._bus is not None:
            receipt = await self._bus.publish(remote)
            receipt.add_done_callback(self._published)

    async def knock(self) -> None:
        """Tell every remote consumer where our numbering begins; they answer with where they stand."""
        knocks = [
            Publication(topics.again(self._topology, consumer, self._node, port), pack(Knock(w.epoch, w.base)), qos=0)
            for port, w in self._windows.items()
            for consumer in w.peers
        ]
        if knocks and self._bus is not None:
            await self._bus.publish(knocks)

    async def _acknowledged(self, port: str, consumer: str, window: SendWindow, ack: Ack) -> None:
        knock, kept = window.heard(consumer, ack, time.time_ns())
        if not window.waiting:
            self._heard.set()
        if knock is not None and self._bus is not None:
            topic = topics.again(self._topology, consumer, self._node, port)
            await self._bus.publish([Publication(topic, pack(knock), qos=0)])
        if kept:
            await self._again(port, consumer, kept)

    async def _again(self, port: str, consumer: str, kept: Sequence[Kept]) -> None:
        if self._bus is None:
            return
        log.debug("sent again", node=self._node, port=port, consumer=consumer, messages=len(kept))
        topic = topics.again(self._topology, consumer, self._node, port)
        await self._bus.publish([Publication(topic, k.payload, qos=0) for k in kept])

    def _moved(self) -> None:
        if all(window.room for window in self._windows.values()):
            self._room.set()
        self._progress()

    def _local_done(self, receipt: Receipt) -> None:
        self._receipts.discard(receipt)
        if not receipt.cancelled() and (error := receipt.exception()) and not isinstance(error, ClosedError):
            log.warning("local hand-over failed", node=self._node, reason=str(error))
        self._progress()

    def _published(self, receipt: Receipt) -> None:
        if receipt.cancelled() or (error := receipt.exception()) is None or isinstance(error, ClosedError):
            return
        reasons: list[BusError] = (
            [e for _, e in error.failures] if isinstance(error, PublishFailedError) else [BusError(str(error))]
        )
        level = log.warning if all(isinstance(e, PacketTooLargeError) for e in reasons) else log.error
        level("the broker refused a message", node=self._node, count=len(reasons), reason=str(reasons[0]))
