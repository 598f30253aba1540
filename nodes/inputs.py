"""The receiving side of a node: its edges, decoding, order, repeats, and what is told to the producers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from broker.bus import Bus, Delivery, Overflow, Publication, Subscription
from broker.window import ReceiveWindow, RecentIds, pack, unpack_knock
from nodes.assignment import InEdge
from nodes.journal import SEEN, Journal
from schemas import codec, topics
from schemas.errors import PayloadError
from schemas.messages import End, Message

_HEARTBEAT = 0.3
"""Seconds after which a producer hears of arrivals whose effects are not done yet."""
FOREIGN = "foreign"
"""The ledger's edge of what somebody else published on a topic of ours."""
REPLAYED = "replayed"
"""The ledger's edge of dead letters that somebody had sent to us again."""


class Item(msgspec.Struct, gc=False):
    """A message on its way through a node.

    :param number: (epoch, seq) on a numbered edge.
    :param delivery: the local bus's, to be acknowledged.
    :param arrived: ns since the epoch.
    :param foreign: not of the producer's numbered stream; taken whatever its identity.
    :param again: foreign, and a dead letter of ours that is replayed.
    """

    edge: Edge
    message: Message
    arrived: int
    number: tuple[int, int] | None = None
    delivery: Delivery | None = None
    foreign: bool = False
    again: bool = False


class Edge:
    """One edge that the node reads, and what is known of it."""

    def __init__(self, spec: InEdge, journal: Journal, known: Sequence[str], replayed: Sequence[str]) -> None:
        self.spec = spec
        self.name = spec.name
        epoch, done = (journal.get("floors") or {}).get(spec.name, (0, 0))
        self.window = ReceiveWindow(epoch=epoch, done=done)
        self.ids = RecentIds(SEEN, known)
        self.replayed = RecentIds(SEEN, replayed)
        self.subscription: Subscription | None = None
        self.endings: Subscription | None = None
        self.dropped = 0
        self.ended = False

    @property
    def remote(self) -> bool:
        """Whether it comes by MQTT, and so has a window and acknowledgements."""
        return self.spec.carrier != "local"


class Inputs:
    """All edges of one node; a bounded queue of :class:`Item`, oldest first.

    :param control: the connection that also sends; acknowledgements go by it.
    :param data: the connection that data come by; another one when an edge may pause reading.
    :param undecodable: called with (edge name, topic, payload, error) for what is no message.
    """

    def __init__(
        self,
        topology: str,
        node: str,
        edges: Sequence[InEdge],
        *,
        control: Bus | None,
        data: Bus | None,
        local: Bus | None,
        journal: Journal,
        undecodable: Callable[[str, str, Any, PayloadError], None],
        most_queued: int = 2048,
    ) -> None:
        seen = journal.seen()
        self._topology = topology
        self._node = node
        self._control = control
        self._data = data
        self._local = local
        self._undecodable = undecodable
        self._most = most_queued
        self._queue: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._space = asyncio.Event()
        self._again: Subscription | None = None
        self.edges = {
            spec.name: Edge(spec, journal, seen.get(spec.name, ()), seen.get(f"{REPLAYED}:{spec.name}", ()))
            for spec in edges
        }
        self.repeated: dict[str, int] = {}

    @property
    def ended(self) -> bool:
        """The ends of all streams have been taken from the queue."""
        return bool(self.edges) and all(edge.ended for edge in self.edges.values())

    @property
    def queued(self) -> int:
        """Messages that wait."""
        return len(self._queue)

    async def start(self) -> None:
        """Subscribe, and tell the producers that we are here and where we stand."""
        remote = [edge for edge in self.edges.values() if edge.remote]
        for edge in self.edges.values():
            await self._subscribe(edge)
        if self.edges and self._control is not None:
            pattern = f"{self._topology}/{self._node}/again/#"
            self._again = await self._control.subscribe([pattern], qos=0, capacity=4096, overflow="sample")
            if remote:
                await self.acknowledge(hello=True)

    async def _subscribe(self, edge: Edge) -> None:
        spec, base = edge.spec, topics.output(self._topology, edge.spec.producer, edge.spec.port)
        bus = self._data if edge.remote else self._local
        if bus is None:
            raise ValueError(f"{self._node}: no bus for {edge.name}")
        if edge.remote:
            # on a safe edge what does not fit is left out here and sent again: reading never stops for it
            overflow: Overflow = "sample" if spec.safe else spec.overflow
            size = 2 * spec.queue if spec.safe else spec.queue
            edge.subscription = await bus.subscribe(
                [f"{base}/#"], qos=0, capacity=size, overflow=overflow, retained=False
            )
        elif spec.safe:
            edge.subscription = await bus.subscribe([f"{base}/#"], qos=1, capacity=spec.queue)
        else:
            # the end must not be dropped where data may be: it comes by a queue of its own
            edge.subscription = await bus.subscribe([f"{base}/+"], qos=0, capacity=spec.queue, overflow=spec.overflow)
            edge.endings = await bus.subscribe([base], qos=1, capacity=4)

    async def receive(self, edge: Edge) -> None:
        """Take an edge's deliveries for ever; a task of the runtime's."""
        subscription = edge.subscription
        if subscription is None:
            return
        while True:
            while len(self._queue) >= self._most:
                self._space.clear()
                await self._space.wait()
            batch = await subscription.receive()
            edge.dropped = subscription.dropped if not edge.spec.safe else 0
            self._take(edge, batch)

    async def receive_end(self, edge: Edge) -> None:
        """Take the end of a local ``fast`` edge, after all that was sent before it; a task of the runtime's."""
        if edge.endings is not None:
            for delivery in await edge.endings.receive():
                await self._drained(edge)
                self._put(edge, [Item(edge, delivery.payload, time.time_ns(), None, delivery)])

    async def _drained(self, edge: Edge) -> None:
        while edge.subscription is not None and edge.subscription.queued:  # noqa: ASYNC110 - rare, and over soon
            await asyncio.sleep(0.01)

    async def receive_again(self) -> None:
        """Take what producers send again, and their knocks, for ever; a task of the runtime's."""
        while self._again is not None:
            knocked = False
            for delivery in await self._again.receive():
                parts = delivery.topic.split("/")
                edge = self.edges.get(f"{parts[3]}.{parts[4]}") if len(parts) == 5 else None
                if edge is None:
                    continue
                if edge.remote and (knock := unpack_knock(delivery.payload)) is not None:
                    knocked = True
                    self._put(edge, edge.window.knocked(knock))
                else:
                    if not edge.spec.safe:
                        await self._drained(edge)
                    self._take(edge, [delivery], again=True)
            if knocked:
                await self.acknowledge(hello=True)

    async def heartbeat(self) -> None:
        """Tell producers of arrivals, for ever; a task of the runtime's."""
        while any(edge.remote for edge in self.edges.values()):
            await asyncio.sleep(_HEARTBEAT)
            await self.acknowledge()

    async def acknowledge(self, *, hello: bool = False, final: bool = False) -> None:
        """Tell the producers of remote edges where we stand, if that changed.

        :param hello: we have just subscribed; also kept by the broker for producers that come later.
        :param final: all is done and we leave; kept by the broker likewise.
        """
        if self._control is None:
            return
        kept = hello or final
        acks = [
            Publication(
                topics.ack(self._topology, edge.spec.producer, edge.spec.port, self._node),
                pack(edge.window.ack(hello=hello)),
                qos=1 if kept else 0,
                retain=kept,
            )
            for edge in self.edges.values()
            if edge.remote and (kept or edge.window.changed)
        ]
        if acks:
            receipt = await self._control.publish(acks)
            if final:
                await receipt
            else:
                receipt.add_done_callback(_ignore)

    async def take(self, most: int, linger: float, deadline: float | None) -> list[Item]:
        """Up to ``most`` items; waits for one until ``deadline`` (``time.monotonic``), and ``linger`` for more."""
        queue = self._queue
        if not queue:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(
                    deadline and asyncio.get_running_loop().time() + deadline - time.monotonic()
                ):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        if linger and len(queue) < most:
            until = asyncio.get_running_loop().time() + linger
            try:
                async with asyncio.timeout_at(until):
                    while len(queue) < most:
                        self._arrived.clear()
                        await self._arrived.wait()
            except TimeoutError:
                pass
        if len(queue) <= most:
            items = list(queue)
            queue.clear()
        else:
            items = [queue.popleft() for _ in range(most)]
        self._space.set()
        return items

    def wake(self) -> None:
        """Let :meth:`take` look again (we are to stop)."""
        self._arrived.set()

    def is_new(self, item: Item) -> bool:
        """Whether its identity was not seen on its edge; remembers it. ``fast`` edges do not repeat."""
        if item.again:
            if item.edge.replayed.add(item.message.id):
                return True
            self.repeated[REPLAYED] = self.repeated.get(REPLAYED, 0) + 1
            return False
        if not item.edge.spec.safe or item.foreign or item.edge.ids.add(item.message.id):
            return True
        self.repeated[item.edge.name] = self.repeated.get(item.edge.name, 0) + 1
        return False

    def knows(self, item: Item) -> bool:
        """Whether :meth:`is_new` would say no; remembers nothing."""
        if item.again:
            return item.message.id in item.edge.replayed
        return item.edge.spec.safe and not item.foreign and item.message.id in item.edge.ids

    def _take(self, edge: Edge, batch: Sequence[Delivery], *, again: bool = False) -> None:
        now = time.time_ns()
        if not edge.remote and not again:
            self._put(edge, [Item(edge, d.payload, now, None, d) for d in batch])
            return
        window, numbered = edge.window, edge.spec.safe
        for delivery in batch:
            trace = next((value for key, value in delivery.properties if key == "traceparent"), None)
            try:
                message, epoch, seq = codec.decode_sequenced(delivery.payload, trace=trace)
            except PayloadError as error:
                self._undecodable(edge.name, delivery.topic, delivery.payload, error)
                continue
            item = Item(edge, message, now, (epoch, seq) if seq else None)
            if again and not seq:
                item.foreign = item.again = True
                self._put(edge, [item])
            elif not edge.remote:
                continue
            elif seq and numbered:
                self._put(edge, window.accept(epoch, seq, item))
            elif isinstance(message.body, End):
                if seq and window.jump(epoch, seq):
                    self._put(edge, [item])
            else:
                item.number = None
                item.foreign = numbered
                self._put(edge, [item])

    def _put(self, edge: Edge, items: Sequence[Item]) -> None:
        if items:
            self._queue.extend(items)
            self._arrived.set()
        if edge.window.repeated:
            self.repeated[edge.name] = self.repeated.get(edge.name, 0) + edge.window.repeated
            edge.window.repeated = 0


def _ignore(receipt: asyncio.Future[None]) -> None:
    if not receipt.cancelled():
        receipt.exception()
