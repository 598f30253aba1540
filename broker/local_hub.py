"""What a broker is, in memory, for the in-process bus: retained messages, subscriptions, sessions of client ids."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from broker.bus import Delivery, Overflow, Publication
from broker.session_outbox import Batch
from schemas.topics import matches

if TYPE_CHECKING:
    from broker.local import LocalBus

SPELL = 0.002
"""Seconds after which readers that are left have their turn when everybody else had one."""
ROUTES = 65536
"""Topics whose routes are remembered."""


class Unwatched:
    """Stands for the :class:`Batch` of a QoS 1 delivery for which no publisher waits (a will, a retained message)."""

    __slots__ = ()

    def done(self, count: int = 1) -> None:
        """Nobody is told."""


_UNWATCHED = Unwatched()


class Reader(Protocol):
    """Who takes payloads without their being queued, while he waits for some."""

    @property
    def ready(self) -> bool:
        """Whether he waits, and has nothing to do before what comes now."""

    def give(self, payloads: Sequence[object]) -> Callable[[], None]:
        """Take them; gives what is to be called when all readers have theirs."""


@dataclass(eq=False)
class Queue:
    """What one subscription has at the hub. Outlives its :class:`LocalSubscription` in a kept session."""

    key: tuple[tuple[str, ...], str | None]
    qos: int
    capacity: int
    overflow: Overflow
    waiting: deque[Delivery] = field(default_factory=deque)
    given: dict[int, Delivery] = field(default_factory=dict)  # by id(): received, unacknowledged, in order
    dropped: int = 0
    on_drop: Callable[[Delivery], None] | None = None
    on_arrival: Callable[[], None] | None = None
    reader: asyncio.Future[None] | None = None
    direct: Reader | None = None
    online: bool = True

    @property
    def full(self) -> bool:
        return len(self.waiting) + len(self.given) >= self.capacity

    @property
    def roomy(self) -> bool:
        """There is so much room that who waits for some is to be woken: for a quarter of all at once, not for each alone.

        Whoever reads acknowledges what it has without being given more, so it comes to that.
        """
        return len(self.waiting) + len(self.given) <= self.capacity - max(1, self.capacity // 4)

    def abandon(self) -> None:
        """Nobody will acknowledge these any more; they count as done."""
        left = [*self.given.values(), *self.waiting]
        self.given.clear()
        self.waiting.clear()
        for delivery in left:
            if delivery.handle is not None:
                delivery.handle, waiting = None, delivery.handle
                waiting.done()

    def wake(self) -> None:
        if self.on_arrival is not None:
            self.on_arrival()
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)


@dataclass
class Kept:
    """The session of one client id."""

    bus: LocalBus | None = None
    queues: dict[tuple[tuple[str, ...], str | None], Queue] = field(default_factory=dict)
    expiry: asyncio.TimerHandle | None = None


class Hub:
    """What a broker is, in memory: retained messages, subscriptions, sessions of client ids."""

    def __init__(self) -> None:
        self.sessions: dict[str, Kept] = {}
        self._retained: dict[str, Publication] = {}
        self._queues: list[Queue] = []
        self._routes: dict[str, tuple[tuple[Queue, ...], tuple[tuple[Queue, ...], ...]]] = {}
        self._turns: dict[tuple[str, tuple[Queue, ...]], int] = {}
        self._writers: deque[asyncio.Future[None]] = deque()
        self.giving = False  # somebody publishes
        self._due: list[Callable[[], None]] = []
        self._running = False
        self._asked = False

    # routing

    def add(self, queue: Queue) -> None:
        self._queues.append(queue)
        self._changed()

    def remove(self, queue: Queue) -> None:
        """Route nothing more to it."""
        if queue in self._queues:
            self._queues.remove(queue)
        self._changed()
        self.wake()

    def drop(self, queue: Queue) -> None:
        """The same, and what it has not acknowledged goes to another of its group, or counts as done."""
        self.remove(queue)
        others = [q for q in self._queues if q.key == queue.key] if queue.key[1] is not None else []
        if others:
            left = [repeated(d) for d in (*queue.given.values(), *queue.waiting)]
            queue.given.clear()
            queue.waiting.clear()
            for i, delivery in enumerate(left):
                self._put(others[i % len(others)], delivery)
        queue.abandon()
        self.wake()

    def _changed(self) -> None:
        self._routes.clear()
        self._turns.clear()

    def _route(self, topic: str) -> tuple[tuple[Queue, ...], tuple[tuple[Queue, ...], ...]]:
        """Queues that get a copy each, and groups of which one member gets it."""
        found = self._routes.get(topic)
        if found is None:
            single: list[Queue] = []
            groups: dict[tuple[tuple[str, ...], str | None], list[Queue]] = {}
            for queue in self._queues:
                filters, group = queue.key
                if any(matches(f, topic) for f in filters):
                    if group is None:
                        single.append(queue)
                    else:
                        groups.setdefault(queue.key, []).append(queue)
            if len(self._routes) >= ROUTES:
                self._changed()
            found = self._routes[topic] = (tuple(single), tuple(tuple(g) for g in groups.values()))
        return found

    def _targets(self, topic: str, qos: int) -> list[Queue]:
        single, groups = self._route(topic)
        targets = list(single)
        for members in groups:
            turn = self._turns[topic, members] = (self._turns.get((topic, members), -1) + 1) % len(members)
            order = [*members[turn:], *members[:turn]]
            # a member that is away or full is passed over where another can take it
            targets.append(next((q for q in order if q.online and not q.full), order[0]))
        return [q for q in targets if q.online or (qos and q.qos)]

    # passing on

    def offer(self, publication: Publication, batch: Batch | None, *, force: bool = False) -> bool:
        """Hand one publication to all that match, or to none: False where one that may not drop has no room."""
        targets = self._targets(publication.topic, publication.qos)
        for queue in targets:
            if force:
                break
            if queue.full and (queue.overflow == "block" or (publication.qos and queue.qos)):
                return False
        if publication.retain:
            payload = publication.payload
            if payload is None or (isinstance(payload, bytes) and not payload):
                self._retained.pop(publication.topic, None)
            else:
                self._retained[publication.topic] = publication
        waiting = 0
        for queue in targets:
            qos = min(publication.qos, queue.qos)
            delivery = Delivery(publication.topic, publication.payload, qos, False, False, publication.properties)
            if qos:
                delivery.handle = batch or _UNWATCHED
                waiting += 1
            self._put(queue, delivery)
        if batch is not None:
            if waiting:  # each delivery's acknowledgement counts one
                batch.remaining += waiting - 1
            else:
                batch.done()
        return True

    def offer_run(self, publications: Sequence[Publication], start: int, stop: int, batch: Batch) -> int:
        """:meth:`offer` for ``publications[start:stop]`` in order, until one has no room.

        The short way of most there is: one reader, online, with room.

        :returns: index of the first that was not handed over.
        """
        last: str | None = None
        queue: Queue | None = None
        woken: Queue | None = None
        room = 0
        for index in range(start, stop):
            publication = publications[index]
            topic = publication.topic
            if topic is not last:
                last = topic
                single, groups = self._route(topic)
                chosen = single[0] if len(single) == 1 and not groups and single[0].online else None
                if chosen is not queue:
                    queue = chosen
                    room = 0 if queue is None else queue.capacity - len(queue.waiting) - len(queue.given)
            if queue is None or room <= 0 or publication.retain:
                if not self.offer(publication, batch):
                    return index
                last = queue = None  # look at the queue anew
                continue
            room -= 1
            qos = 1 if publication.qos and queue.qos else 0
            queue.waiting.append(
                Delivery(topic, publication.payload, qos, False, False, publication.properties, batch if qos else None)
            )
            if queue is not woken:
                woken = queue
                queue.wake()
            if not qos:
                batch.done()
        return stop

    def hand(self, topic: str, payloads: Sequence[object]) -> bool:
        """:meth:`offer_run` at QoS 0 where every reader of ``topic`` waits for it: they have done what they do at once.

        :returns: False where a reader does not wait, or there is none: nothing was done.
        """
        single, groups = self._route(topic)
        if groups or not single:
            return False
        count = len(payloads)
        for queue in single:
            direct = queue.direct
            if direct is None or queue.waiting or count > queue.capacity or not queue.online or not direct.ready:
                return False
        due = self._due
        for queue in single:
            if queue.direct is not None and (act := queue.direct.give(payloads)) not in due:
                due.append(act)
        self.run()
        return True

    def _put(self, queue: Queue, delivery: Delivery) -> None:
        if delivery.handle is None and queue.full:
            latest = queue.overflow == "latest"
            oldest = next((i for i, d in enumerate(queue.waiting) if d.handle is None), None) if latest else None
            queue.dropped += 1
            if queue.on_drop is not None:
                queue.on_drop(delivery if oldest is None else queue.waiting[oldest])
            if oldest is None:
                return
            del queue.waiting[oldest]
        queue.waiting.append(delivery)
        queue.wake()

    def after(self, act: Callable[[], None]) -> bool:
        """Call ``act`` when what is being published is handed over; False where nobody publishes: nothing is done then."""
        if self.giving:
            if act not in self._due:
                self._due.append(act)
            return True
        return False

    def run(self) -> bool:
        """Do what was to be done after a publication; False: nothing was.

        One reader at once, and those who read from it; other readers of the same have their turn when what these have
        written has left.
        """
        due = self._due
        if self._running or not due:
            return False
        self._running = True
        try:
            others, until = len(due) - 1, monotonic() + SPELL
            while len(due) > others:
                due.pop()()
                if monotonic() > until:
                    break
        finally:
            self._running = False
        if due and not self._asked:
            self._asked = True
            asyncio.get_running_loop().call_soon(self._run_others)
        return True

    def _run_others(self) -> None:
        self._asked = False
        self.run()

    def recall(self, queue: Queue) -> None:
        """Put the retained messages that match before everything else."""
        for publication in self._retained.values():
            if any(matches(f, publication.topic) for f in queue.key[0]):
                qos = min(publication.qos, queue.qos)
                handle = _UNWATCHED if qos else None
                self._put(
                    queue,
                    Delivery(publication.topic, publication.payload, qos, True, False, publication.properties, handle),
                )

    async def room(self) -> None:
        """Until some queue has less in it. Several may wait; all are woken, in order."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writers.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._writers:
                self._writers.remove(waiter)

    def wake(self) -> None:
        writers, self._writers = self._writers, deque()
        for waiter in writers:
            if not waiter.done():
                waiter.set_result(None)

    # sessions

    def vanish(self, client_id: str) -> None:
        """As if the client's link were cut: its will is published and its bus is closed. Unknown ids are ignored."""
        kept = self.sessions.get(client_id)
        if kept is not None and kept.bus is not None:
            kept.bus.vanish()

    def end(self, client_id: str, kept: Kept) -> None:
        """The session is over."""
        if kept.expiry is not None:
            kept.expiry.cancel()
        for queue in tuple(kept.queues.values()):
            self.drop(queue)
        kept.queues.clear()
        if self.sessions.get(client_id) is kept:
            del self.sessions[client_id]


def repeated(delivery: Delivery) -> Delivery:
    """The same, marked as perhaps delivered before; the first one's acknowledgement is void."""
    handle, delivery.handle = delivery.handle, None
    return Delivery(delivery.topic, delivery.payload, delivery.qos, delivery.retain, True, delivery.properties, handle)


_HUBS: dict[str, Hub] = {}
NUMBERS = itertools.count(1)


def hub(name: str = "") -> Hub:
    """The process's hub of that name, made when first asked for."""
    return _HUBS.setdefault(name, Hub())
