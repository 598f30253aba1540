"""The in-process bus: nodes of one process hand messages over in memory, objects as they are.

Same semantics as a broker, and one better: a QoS 1 receipt is done when every matching consumer has acknowledged, and
QoS 1 publishing waits while a consumer's queue is at capacity. So a slow consumer slows its producers and nothing is lost.
Everything happens in one event loop; a :class:`Hub` must not be shared between loops that run at the same time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar

from broker.bus import Bus, Delivery, Overflow, Publication, Receipt, Subscription
from broker.local_hub import NUMBERS, Hub, Kept, Queue, Unwatched, hub, repeated
from broker.session_names import filter_fault, topic_fault
from broker.session_options import Options
from broker.session_outbox import TURN, Batch
from schemas.errors import BusError, ClosedError, DeniedError

fault = lru_cache(maxsize=65536)(topic_fault)
_QOS = frozenset({0, 1})


class LocalSubscription(Subscription):
    """Made by :meth:`LocalBus.subscribe`."""

    def __init__(self, bus: LocalBus, queue: Queue) -> None:
        self._bus = bus
        self.queue = queue
        queue.on_drop = self._lost
        queue.on_arrival = None
        self._left: list[Delivery] = []
        self._detached = False
        self.closed = False

    @property
    def dropped(self) -> int:  # type: ignore[override] # read from the queue, which may outlive us
        return self.queue.dropped

    def _lost(self, delivery: Delivery) -> None:
        if self.on_drop is not None:
            self.on_drop(delivery)

    @property
    def queued(self) -> int:
        return len(self._left) if self._detached else len(self.queue.waiting)

    async def arrived(self) -> None:
        queue = self.queue
        while not self.queued:
            if self._detached or self.closed:
                raise ClosedError("the subscription is closed")
            queue.reader = asyncio.get_running_loop().create_future()
            try:
                await queue.reader
            finally:
                queue.reader = None

    def tell(self, arrived: Callable[[], None]) -> None:
        """Call ``arrived`` whenever something is queued, and when it ends. For who has several and calls :meth:`take`."""
        self.queue.on_arrival = arrived

    async def receive(self) -> list[Delivery]:
        await self.arrived()
        return self.take()

    def take(self) -> list[Delivery]:
        """What :meth:`receive` gives, without waiting; nothing, if nothing is queued."""
        if self._detached:
            taken, self._left = self._left, []
            return taken
        queue = self.queue
        taken = list(queue.waiting)
        queue.waiting.clear()
        kept = len(queue.given)
        if queue.qos:
            queue.given.update((id(delivery), delivery) for delivery in taken if delivery.handle is not None)
        if len(queue.given) - kept < len(taken):  # what is to be acknowledged goes on taking room
            self._bus.hub.wake()
        return taken

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        given = self.queue.given
        run: Batch | Unwatched | None = None
        done = 0
        for delivery in deliveries:
            batch: Batch | Unwatched | None = delivery.handle
            if batch is not None:
                delivery.handle = None
                given.pop(id(delivery), None)
                if batch is run:
                    done += 1
                else:
                    if run is not None:
                        run.done(done)
                    run, done = batch, 1
        if run is not None:
            run.done(done)
        if self.queue.roomy:
            self._bus.hub.wake()

    async def unsubscribe(self) -> None:
        if not self.closed:
            self.closed = True
            self._bus.forget(self.queue)
            self.queue.wake()

    def detach(self) -> None:
        """The bus is closed: what is queued can be received, without the right to acknowledge."""
        self.closed = self._detached = True
        queue = self.queue
        self._left = [Delivery(d.topic, d.payload, d.qos, d.retain, d.duplicate, d.properties) for d in queue.waiting]
        queue.wake()


class LocalBus(Bus):
    """One client of a :class:`Hub`.

    Of the options it heeds ``client_id``, ``session_expiry``, ``clean_start``, ``will`` and ``on_state``. A second bus of the
    same client id takes the session over, as at a broker.
    """

    encoded: ClassVar[bool] = False

    def __init__(self, at: Hub | str = "", options: Options | None = None) -> None:
        self.hub = hub(at) if isinstance(at, str) else at
        self.options = options or Options()
        self.client_id = self.options.client_id or f"local-{next(NUMBERS)}"
        self._kept: Kept | None = None
        self._subscriptions: list[LocalSubscription] = []
        self._receipts: set[Receipt] = set()  # not done
        self._order = asyncio.Lock()
        self._closed = False
        self._since_turn = 0

    @property
    def connected(self) -> bool:
        return self._kept is not None and not self._closed

    async def open(self) -> None:
        if self._closed:
            raise ClosedError("the bus is closed")
        if self._kept is not None:
            raise BusError("the bus is open already")
        sessions = self.hub.sessions
        kept = sessions.get(self.client_id)
        if kept is not None and kept.bus is not None:
            kept.bus.vanish()
            kept = sessions.get(self.client_id)
        if kept is not None and self.options.fresh:
            self.hub.end(self.client_id, kept)
            kept = None
        if kept is None:
            kept = sessions[self.client_id] = Kept()
        elif kept.expiry is not None:
            kept.expiry.cancel()
        kept.bus = self
        self._kept = kept
        self.options.report("connected", "session resumed" if kept.queues else "new session")

    async def close(self) -> None:
        self._leave()

    def vanish(self) -> None:
        """As if the link were cut: the will is published, the bus is closed. For tests, and for a takeover."""
        if self._closed or self._kept is None:
            return
        self._leave()
        will = self.options.will
        if will is not None:
            # nobody waits here, so a full queue that may not drop gets it beyond its capacity
            self.hub.offer(Publication(will.topic, will.payload, will.qos, will.retain), None, force=True)
        self.options.report("disconnected", "the session was taken over or cut")

    def _leave(self) -> None:
        kept, self._closed = self._kept, True
        if kept is None or kept.bus is not self:
            return
        kept.bus = None
        for subscription in self._subscriptions:
            subscription.detach()
        for receipt in tuple(self._receipts):
            if not receipt.done():
                receipt.set_exception(ClosedError("the bus was closed before the consumers acknowledged"))
        for subscription in self._subscriptions:
            if subscription.queue not in kept.queues.values():
                subscription.queue.abandon()
        if self.options.session_expiry:
            for queue in kept.queues.values():
                queue.online = False
            loop = asyncio.get_running_loop()
            kept.expiry = loop.call_later(self.options.session_expiry, self.hub.end, self.client_id, kept)
        else:
            self.hub.end(self.client_id, kept)
        self.hub.wake()

    async def publish(self, publications: Sequence[Publication]) -> Receipt:
        loop = asyncio.get_running_loop()
        receipt: Receipt = loop.create_future()
        if not publications:
            receipt.set_result(None)
            return receipt
        batch, accepted, read = Batch(receipt, len(publications)), 0, False
        try:
            if not self._order.locked() and self._since_turn < TURN:
                accepted = self._accept(publications, 0, batch)
                read = self.hub.run()
            if accepted < len(publications):
                async with self._order:
                    if read:
                        await asyncio.sleep(0)
                    await self._accept_all(publications, accepted, batch)
        except BaseException:
            receipt.cancel()
            raise
        if not receipt.done():
            self._receipts.add(receipt)
            receipt.add_done_callback(self._receipts.discard)
        return receipt

    async def _accept_all(self, publications: Sequence[Publication], index: int, batch: Batch) -> None:
        """Those from ``index`` on; waits where there is no room, and gives others their turn."""
        while True:
            if self._since_turn >= TURN:
                self._since_turn = 0
                await asyncio.sleep(0)
            index = self._accept(publications, index, batch)
            read = self.hub.run()
            if index == len(publications):
                return
            if read:  # there may be room already; nobody will wake us for it
                await asyncio.sleep(0)
            elif self._since_turn < TURN:
                await self.hub.room()

    def _accept(self, publications: Sequence[Publication], index: int, batch: Batch) -> int:
        """Those from ``index`` on, as far as there is room and our turn lasts; the first that was not handed over."""
        count = len(publications)
        while index < count and self._since_turn < TURN:
            stop = min(count, index + TURN - self._since_turn)
            sound = index
            last: str | None = None
            while sound < stop:
                publication = publications[sound]
                topic = publication.topic
                if publication.qos not in _QOS or (topic is not last and fault(topic)):
                    break
                last = topic
                sound += 1
            if index < sound:
                if not self.connected:
                    raise ClosedError("the bus is closed" if self._closed else "the bus is not open")
                self.hub.giving = True
                try:
                    reached = self.hub.offer_run(publications, index, sound, batch)
                finally:
                    self.hub.giving = False
                self._since_turn += reached - index
                index = reached
                if index < sound:
                    break
            if index < stop:
                self._refuse(publications[index], batch, index)
                index += 1
        return index

    def _refuse(self, publication: Publication, batch: Batch, index: int) -> None:
        """It is no publication of ours: its receipt says so, the others go on."""
        if publication.qos not in _QOS:
            batch.fail(index, DeniedError(publication.topic, 155, "we publish with QoS 0 or 1"))
        else:
            batch.fail(index, DeniedError(publication.topic, 144, fault(publication.topic)))

    async def subscribe(
        self,
        filters: Sequence[str],
        *,
        qos: int = 1,
        capacity: int = 1024,
        overflow: Overflow = "block",
        group: str | None = None,
        retained: bool = True,
    ) -> LocalSubscription:
        kept = self._kept
        if kept is None or self._closed:
            raise ClosedError("the bus is closed" if self._closed else "the bus is not open")
        for each in filters:
            if text := filter_fault(each, group):
                raise DeniedError(each, 143, text)
        key = (tuple(filters), group)
        queue = kept.queues.get(key)
        if (
            queue is not None and not queue.online
        ):  # left by the session's last bus: comes again, the unacknowledged first
            queue.qos, queue.capacity, queue.overflow = qos, capacity, overflow
            queue.waiting = deque([*map(repeated, queue.given.values()), *queue.waiting])
            queue.given.clear()
            queue.online = True
        else:
            queue = Queue(key, qos, capacity, overflow)
            kept.queues[key if key not in kept.queues else (key[0], f"{group}\0{next(NUMBERS)}")] = queue
            self.hub.add(queue)
        if retained and group is None:
            self.hub.recall(queue)
        subscription = LocalSubscription(self, queue)
        self._subscriptions.append(subscription)
        return subscription

    def forget(self, queue: Queue) -> None:
        """A subscription ended: the hub routes nothing more to it."""
        self.hub.remove(queue)
        if self._kept is not None:
            for key in [k for k, q in self._kept.queues.items() if q is queue]:
                del self._kept.queues[key]
