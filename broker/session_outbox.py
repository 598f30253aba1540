"""What a client sends: packet identifiers, the window, the broker's limits, and sending again."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import mqtt5

from broker.bus import Publication, Receipt
from broker.session_names import topic_fault
from schemas.errors import BusError, ClosedError, DeniedError, PublishFailedError

LARGEST = 268_435_455 + 5
"""Bytes of the largest packet that MQTT can express."""
TURN = 512
"""Publications written before others get their turn of the event loop."""

_TOPICS = 4096
_NOBODY = mqtt5.PubAckReasonCode.NO_MATCHING_SUBSCRIBERS.value


class Batch:
    """One ``publish`` call: its receipt is done when nothing remains."""

    __slots__ = ("failures", "receipt", "remaining")

    def __init__(self, receipt: Receipt, size: int) -> None:
        self.receipt = receipt
        self.remaining = size
        self.failures: list[tuple[int, BusError]] = []

    def done(self, count: int = 1) -> None:
        self.remaining -= count
        if self.remaining == 0 and not self.receipt.done():
            if self.failures:
                self.failures.sort(key=lambda failure: failure[0])
                self.receipt.set_exception(PublishFailedError(self.failures))
            else:
                self.receipt.set_result(None)

    def fail(self, index: int, error: BusError) -> None:
        self.failures.append((index, error))
        self.done()


class Gate(Protocol):
    """What is asked of a link before sending."""

    congested: bool
    """The write buffer is full."""
    closing: bool
    """Nothing is sent any more."""


class Outbox(ABC):
    """Publications on their way out. The rest is :meth:`_send`."""

    def __init__(self) -> None:
        self.inflight: dict[int, tuple[Publication, Batch, int]] = {}  # by packet id, in the order of sending
        self.since_turn = 0
        self._link: Gate | None = None
        self._again: deque[int] = deque()  # packet ids to be sent again on this connection
        self._next = 0
        self._taken: set[int] = set()  # packet ids of SUBSCRIBE and UNSUBSCRIBE
        self._window = 0
        self.largest = LARGEST
        self._qos1 = True
        self._retain = True
        self._seen: set[str] = set()  # valid topics published before
        self._waiter: asyncio.Future[None] | None = None

    # life of a connection

    def attach(self, link: Gate, connack: mqtt5.ConnAckPacket) -> None:
        """A connection stands: take over the broker's limits; everything unacknowledged is to be sent again."""
        self._link = link
        self._window = connack.receive_max
        self.largest = min(connack.max_packet_size or LARGEST, LARGEST)
        self._qos1 = connack.max_qos.value > 0
        self._retain = connack.retain_available
        self._again = deque(self.inflight)
        self.progress()

    def detach(self) -> None:
        self._link = None
        self._again.clear()

    def close(self) -> None:
        """Fail what is unacknowledged and who waits."""
        error = ClosedError("the bus was closed before the broker acknowledged")
        inflight, self.inflight = self.inflight, {}
        for _, batch, _ in inflight.values():
            if not batch.receipt.done():
                batch.receipt.set_exception(error)
        self.wake()

    # packet identifiers

    def new_id(self) -> int:
        """A free packet identifier."""
        while True:
            self._next = self._next % 65535 + 1
            if self._next not in self.inflight and self._next not in self._taken:
                return self._next

    def take_id(self) -> int:
        """A packet identifier for a SUBSCRIBE or UNSUBSCRIBE; give it back with :meth:`free_id`."""
        found = self.new_id()
        self._taken.add(found)
        return found

    def free_id(self, packet_id: int) -> None:
        self._taken.discard(packet_id)

    @abstractmethod
    def _send(self, publication: Publication, packet_id: int, *, duplicate: bool = False) -> BusError | None:
        """Encode and write one publication; why not, where it cannot be."""

    def _run(self, publications: Sequence[Publication], start: int, most: int) -> int:
        """Write those at ``start`` that are as nearly all are, in one go, if that is worth it; where the others begin."""
        del publications, most
        return start

    # the window

    @property
    def ready(self) -> bool:
        """Whether a QoS 0 publication can be written now, in its order."""
        link = self._link
        return link is not None and not link.congested and not link.closing and not self._again

    async def wait(self) -> None:
        """Until something may have changed. One task at a time."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def progress(self) -> None:
        """Acknowledgements came, or the write buffer drained: send again what is due, then let publishers go on."""
        link = self._link
        if link is None or link.closing:
            return
        while self._again and not link.congested and len(self.inflight) - len(self._again) < self._window:
            packet_id = self._again.popleft()
            entry = self.inflight.get(packet_id)
            if entry is None:
                continue
            publication, batch, index = entry
            fault = self._fault(publication) or self._send(publication, packet_id, duplicate=True)
            if fault is not None:  # this connection's limits are other ones
                del self.inflight[packet_id]
                batch.fail(index, fault)
        self.wake()

    def write(self, publications: Sequence[Publication], start: int, batch: Batch) -> int:
        """Write from ``start`` on as far as there is room; where it stopped."""
        link = self._link
        if link is None:
            return start
        inflight, send, seen = self.inflight, self._send, self._seen
        index = begun = self._run(publications, start, TURN - self.since_turn) if self.ready else start
        plain = begun - start
        self.since_turn += plain
        for index in range(begun, len(publications)):
            if link.congested or link.closing or self.since_turn >= TURN:
                break
            publication = publications[index]
            if publication.topic not in seen or publication.qos or publication.retain:
                fault = self._fault(publication)
                if fault is not None:
                    batch.fail(index, fault)
                    continue
            self.since_turn += 1
            if not publication.qos:
                fault = send(publication, 0)
                if fault is None:
                    plain += 1
                else:
                    batch.fail(index, fault)
                continue
            if len(inflight) >= self._window or len(inflight) + len(self._taken) >= 65535:
                break
            packet_id = self.new_id()
            fault = send(publication, packet_id)
            if fault is None:
                inflight[packet_id] = (publication, batch, index)
            else:
                batch.fail(index, fault)
        else:
            index = len(publications)
        if plain:
            batch.done(plain)
        return index

    def acknowledged(self, packet_id: int, code: int = 0, reason: str = "") -> bool:
        """PUBACK; False where nothing was waiting for it."""
        entry = self.inflight.pop(packet_id, None)
        if entry is None:
            return False
        publication, batch, index = entry
        if code >= 128:
            batch.fail(index, DeniedError(publication.topic, code, reason))
        else:
            batch.done()
        if publication.heard is not None:
            publication.heard(code != _NOBODY)
        return True

    # limits

    def _fault(self, publication: Publication) -> BusError | None:
        """Why this may not be sent on this connection."""
        topic = publication.topic
        if topic not in self._seen:
            if text := topic_fault(topic):
                return DeniedError(topic, mqtt5.PubAckReasonCode.TOPIC_NAME_INVALID.value, text)
            if len(self._seen) >= _TOPICS:
                self._seen.clear()
            self._seen.add(topic)
        if publication.qos:
            if publication.qos != 1:
                return DeniedError(
                    topic, mqtt5.DisconnectReasonCode.QOS_NOT_SUPPORTED.value, "we publish with QoS 0 or 1"
                )
            if not self._qos1:
                return DeniedError(
                    topic, mqtt5.DisconnectReasonCode.QOS_NOT_SUPPORTED.value, "the broker takes QoS 0 only"
                )
        if publication.retain and not self._retain:
            return DeniedError(
                topic, mqtt5.DisconnectReasonCode.RETAIN_NOT_SUPPORTED.value, "the broker keeps no retained messages"
            )
        return None
