"""The receiving side of a node: its edges, decoding, order, repeats, and what is told to the producers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from broker.bus import Bus, Delivery, Overflow, Publication, Subscription
from broker.window import pack, unpack_knock
from nodes.assignment import InEdge
from nodes.edge import REPLAYED, Edge, Item, Stream
from nodes.journal import Journal
from nodes.lanes import TAKEOVER, newest
from nodes.merge import FLOOR, Merge
from schemas import codec, topics
from schemas.errors import PayloadError
from schemas.messages import End, Progress, State

if TYPE_CHECKING:
    from broker.local import LocalBus, LocalSubscription
    from nodes.sharing import Reading

_HEARTBEAT = 0.3
"""Seconds after which a producer hears of arrivals whose effects are not done yet."""
_MOST_AHEAD = 16 * 1024 * 1024
"""Bytes of ``fast`` edges taken from their subscriptions before anybody asked for them."""


class Inputs:
    """All edges of one node; a bounded queue of :class:`Item`, oldest first.

    :param control: the connection that also sends; acknowledgements go by it.
    :param data: the connection that data come by; another one when an edge may pause reading.
    :param rooted: our state keeps our part of the work with us, see :class:`~broker.window.Ack`.
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
        local: LocalBus | None,
        journal: Journal,
        undecodable: Callable[[str, str, Any, PayloadError], None],
        rooted: bool = False,
        most_queued: int = 2048,
    ) -> None:
        seen = journal.seen()
        self._topology = topology
        self._node = node
        self._control = control
        self._data = data
        self._local = local
        self._undecodable = undecodable
        self._rooted = rooted
        self._most = most_queued
        self._queue: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._space = asyncio.Event()
        self._hungry = asyncio.Event()
        self._ahead = 0  # bytes of fast edges in the queue; nobody else bounds those
        self._again: Subscription | None = None
        self.edges = {
            spec.name: Edge(spec, journal, seen.get(spec.name, ()), seen.get(f"{REPLAYED}:{spec.name}", ()))
            for spec in edges
        }
        self._near: list[tuple[Edge, LocalSubscription]] = []
        self._sharing = [edge for edge in self.edges.values() if edge.spec.shared is not None]
        self.streams = {stream.name: stream for edge in self.edges.values() for stream in edge.streams}
        self.repeated: dict[str, int] = {}
        self.prompt: Callable[[], None] | None = None
        """Called where something was handed over while :attr:`parked`: by nodes of this process only."""
        self.parked = False
        """Somebody waits in :meth:`take` for the first item, and for no more than that."""

    @property
    def ended(self) -> bool:
        """The ends of all streams have been taken from the queue."""
        for edge in self.edges.values():
            if not edge.ended:
                return False
        return bool(self.edges)

    @property
    def queued(self) -> int:
        """Messages that wait, those that are still in their subscriptions too."""
        return len(self._queue) + sum(e.queued for e in self.edges.values() if e.near is not None or not e.spec.safe)

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
        if spec.private:
            return
        patterns = [f"{base}/#"]
        if spec.shared is not None:
            patterns = [topics.shared(self._topology, spec.producer, spec.port)]
        if spec.lane:
            patterns = [topics.lane(self._topology, self._node, stream.producer, spec.port) for stream in edge.streams]
        if not edge.remote:
            await self._subscribe_near(edge, base)
            return
        if self._data is None:
            raise ValueError(f"{self._node}: no bus for {edge.name}")
        # on a safe edge what does not fit is left out here and sent again: reading never stops for it
        overflow: Overflow = "sample" if spec.safe else spec.overflow
        size = 2 * spec.queue if spec.safe else spec.queue
        edge.subscription = await self._data.subscribe(
            patterns, qos=0, capacity=size, overflow=overflow, retained=False
        )
        if not spec.safe:
            edge.subscription.on_drop = edge.lost
        if spec.shared is not None:
            from nodes.sharing import Reading

            edge.shared = Reading(self._node, edge, spec.shared, edge.out_of_reach.set)
            if not spec.safe:
                edge.subscription.on_drop = edge.shared.lost

    async def _subscribe_near(self, edge: Edge, base: str) -> None:
        """The same for an edge within the process. It is read by :meth:`take` itself, and needs no task."""
        spec, local = edge.spec, self._local
        if local is None:
            raise ValueError(f"{self._node}: no bus for {edge.name}")
        if spec.safe:
            edge.near = await local.subscribe([f"{base}/#"], qos=1, capacity=spec.queue)
        else:
            # the end must not be dropped where data may be: it comes by a queue of its own
            edge.near = await local.subscribe([f"{base}/+"], qos=0, capacity=spec.queue, overflow=spec.overflow)
            edge.near.on_drop = edge.lost
            edge.near.queue.direct = _Direct(self, edge)
            edge.endings = await local.subscribe([base], qos=1, capacity=4)
            edge.endings.tell(self._arrived.set)
        edge.near.tell(partial(self._came, edge))
        edge.subscription = edge.near
        self._near.append((edge, edge.near))

    async def receive_public(self, edge: Edge) -> None:
        """Should the producer's memory be out of reach: read what is sent to everybody; a task of the runtime's."""
        if edge.shared is None or self._data is None:
            return
        await edge.out_of_reach.wait()
        spec = edge.spec
        pattern = f"{topics.output(self._topology, spec.producer, spec.port)}/#"
        overflow: Overflow = "sample" if spec.safe else spec.overflow
        size = 2 * spec.queue if spec.safe else spec.queue
        subscription = await self._data.subscribe([pattern], qos=0, capacity=size, overflow=overflow, retained=False)
        if not spec.safe:
            subscription.on_drop = edge.lost
        await self.receive(edge, subscription)

    async def receive(self, edge: Edge, subscription: Subscription | None = None) -> None:
        """Take a remote edge's deliveries for ever; a task of the runtime's.

        :param subscription: another than the edge's own.
        """
        own = subscription is None
        subscription = edge.subscription if own else subscription
        if subscription is None:
            return
        spec = edge.spec
        # what waits is to wait where the overflow policy sees it; reading on a little only spares stopping the link
        waits = not spec.safe and spec.overflow != "block"
        while True:
            if waits:
                await self._hungry.wait()
                await subscription.arrived()
                if not self._hungry.is_set():  # somebody else's messages came first
                    continue
            while len(self._queue) >= self._most or self._ahead >= _MOST_AHEAD:
                self._space.clear()
                await self._space.wait()
            batch = await subscription.receive()
            if not spec.safe:
                self._ahead += sum(len(delivery.payload) for delivery in batch)
            if own and edge.shared is not None:
                self._take_shared(edge, edge.shared, batch)
            else:
                self._take(edge, batch)
            self._arrived.set()  # whoever is to stop waits for what was queued, even if nothing came of it

    async def _drained(self, edge: Edge) -> None:
        while edge.subscription is not None and edge.subscription.queued:  # noqa: ASYNC110 - rare, and over soon
            await asyncio.sleep(0.01)

    async def receive_again(self) -> None:
        """Take what producers send again, and answer their knocks, for ever; a task of the runtime's."""
        while self._again is not None:
            knocked: dict[str, Stream] = {}
            for delivery in await self._again.receive():
                parts = delivery.topic.split("/")
                name = f"{parts[3]}.{parts[4]}" if len(parts) == 5 else ""
                if (stream := self.streams.get(name)) is not None:
                    edge = stream.edge
                elif (found := self.edges.get(name)) is not None:  # a dead letter: it knows the edge only
                    edge, stream = found, found.streams[0]
                else:
                    continue
                if edge.remote and (knock := unpack_knock(delivery.payload)) is not None:
                    knocked[stream.name] = stream
                    stream.rooted = knock.rooted
                    self._put(stream, stream.window.knocked(knock))
                else:
                    if not edge.spec.safe:
                        await self._drained(edge)
                    self._take(edge, [delivery], again=True)
            if knocked:
                await asyncio.sleep(0)  # what came with the knock is to be taken first
                await self._answer(list(knocked.values()))

    async def _answer(self, streams: Sequence[Stream]) -> None:
        """Tell producers that knocked where we stand. What we have not looked at yet they need not send again."""
        if self._control is None:
            return
        acks = [
            Publication(
                topics.ack(self._topology, stream.producer, stream.edge.spec.port, self._node),
                pack(stream.window.ack(rooted=self._rooted, answer=not stream.edge.queued)),
                qos=1,
            )
            for stream in streams
        ]
        (await self._control.publish(acks)).add_done_callback(_ignore)

    async def watch(self) -> None:
        """See which replicas among the producers of merged streams are away, for ever; a task of the runtime's."""
        merged = [stream for stream in self.streams.values() if stream.edge.merge is not None]
        if not merged or self._control is None:
            return
        states = [topics.state(self._topology, stream.producer) for stream in merged]
        told = await self._control.subscribe(states, qos=1, capacity=4096, overflow="latest")
        listening = asyncio.create_task(self._listen(told, merged))
        try:
            while True:
                await asyncio.sleep(_HEARTBEAT)
                for stream in merged:
                    self._release(stream)
        finally:
            listening.cancel()

    async def _listen(self, states: Subscription, merged: Sequence[Stream]) -> None:
        while True:
            for delivery in (batch := await states.receive()):
                try:
                    body = codec.decode(delivery.payload).body
                except PayloadError:
                    continue
                for stream in merged:
                    if isinstance(body, State) and stream.producer == body.node:
                        gone = body.status in {"offline", "stopped"}
                        stream.away = (stream.away or time.monotonic()) if gone else None
            states.acknowledge(batch)

    def _release(self, stream: Stream) -> None:
        """Wait no more for a stream whose replica has been away for so long that others have its part."""
        merge = stream.edge.merge
        if merge is None or stream.away is None or stream.rooted or time.monotonic() - stream.away < TAKEOVER:
            return
        side = merge.sides[stream.edge.streams.index(stream)]
        if not side.away:
            side.away = True
            self._queue.extend(merge.free())
            self._arrived.set()

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
                topics.ack(self._topology, stream.producer, stream.edge.spec.port, self._node),
                pack(stream.window.ack(hello=hello, rooted=self._rooted)),
                qos=1 if kept else 0,
                retain=kept,
            )
            for stream in self.streams.values()
            if stream.edge.remote and (kept or stream.window.changed)
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
        for edge in self._sharing:
            most = min(most, edge.shared.at_once) if edge.shared is not None else most
        self._hungry.set()
        self._pull(most)
        if not queue:
            self.parked = not linger and not self._sharing
            try:
                await self._arrival(deadline)
            finally:
                self.parked = False
            self._pull(most)
        if linger and queue and len(queue) < most:
            until = asyncio.get_running_loop().time() + linger
            try:
                async with asyncio.timeout_at(until):
                    while len(queue) < most:
                        self._hungry.set()
                        await self._arrival(None)
                        self._pull(most)
            except TimeoutError:
                pass
        self._hungry.clear()
        return self._given(most)

    def take_now(self, most: int) -> list[Item]:
        """What :meth:`take` would give whoever waits in it; he goes on waiting."""
        self._pull(most)
        return self._given(most)

    def _given(self, most: int) -> list[Item]:
        queue = self._queue
        if len(queue) <= most:
            items = list(queue)
            queue.clear()
            self._ahead = 0
        else:
            items = [queue.popleft() for _ in range(most)]
        self._space.set()
        return items

    async def _arrival(self, deadline: float | None) -> None:
        """Wait for something to arrive, or to be woken, until ``deadline`` (``time.monotonic``)."""
        self._arrived.clear()
        if deadline is None:
            await self._arrived.wait()
            return
        timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._arrived.set)
        try:
            await self._arrived.wait()
        finally:
            timer.cancel()

    def _pull(self, most: int) -> None:
        """Take what nodes of this process have handed over, if there is not enough. Until then overflow policies see it."""
        if len(self._queue) >= most:
            return
        for edge, near in self._near:
            if near.queued:
                self._take_near(edge, near.take())
            if edge.endings is not None and edge.endings.queued:  # after all that was sent before it
                self._take_near(edge, edge.endings.take())

    def _came(self, edge: Edge) -> None:
        edge.since = edge.since or time.time_ns()
        if not self.parked or self.prompt is None or self._local is None or not self._local.hub.after(self.prompt):
            self._arrived.set()

    def _take_near(self, edge: Edge, batch: Sequence[Delivery]) -> None:
        arrived, stream = edge.since or time.time_ns(), edge.streams[0]
        edge.since = 0
        self._queue.extend([Item(stream, delivery.payload, arrived, None, delivery) for delivery in batch])

    @property
    def free(self) -> bool:
        """Whoever waits in :meth:`take` can be given something at once."""
        return self.parked and self.prompt is not None and not self._queue

    def give(self, stream: Stream, messages: Sequence[Any]) -> Callable[[], None]:
        """Messages of a ``fast`` edge within the process, while we are :attr:`free`; gives what begins the step."""
        now = time.time_ns()
        self._queue.extend([Item(stream, message, now) for message in messages])
        return self.prompt or self.wake

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
        now, first = time.time_ns(), edge.streams[0]
        numbered, single = edge.spec.safe, len(edge.streams) == 1
        decode = codec.decode_sequenced
        for delivery in batch:
            trace = next((value for key, value in delivery.properties if key == "traceparent"), None)
            try:
                message, epoch, seq = decode(delivery.payload, trace=trace)
            except PayloadError as error:
                self._undecodable(edge.name, delivery.topic, delivery.payload, error)
                continue
            stream = first if single else edge.stream(epoch)
            item = Item(stream, message, now, (epoch, seq) if seq else None)
            if again and not seq:
                item.foreign = item.again = True
                self._put(stream, [item])
            elif not edge.remote:
                continue
            elif seq and numbered:
                self._put(stream, stream.window.accept(epoch, seq, item))
            elif isinstance(message.body, End):
                if seq and stream.window.jump(epoch, seq):
                    self._put(stream, [item])
            else:
                item.number = None
                item.foreign = numbered
                self._put(stream, [item])

    def _take_shared(self, edge: Edge, shared: Reading, batch: Sequence[Delivery]) -> None:
        """:meth:`_take` for what came by the topic of those that share the producer's memory; it has no replicas."""
        now, stream, numbered = time.time_ns(), edge.streams[0], edge.spec.safe
        for delivery in batch:
            trace = next((value for key, value in delivery.properties if key == "traceparent"), None)
            try:
                found = shared.decode(delivery.payload, trace)
            except PayloadError as error:
                self._undecodable(edge.name, delivery.topic, delivery.payload, error)
                continue
            if not numbered and not any(seq or isinstance(message.body, End) for message, _, seq in found):
                self._put(stream, [Item(stream, message, now) for message, _, _ in found])
                continue
            for message, epoch, seq in found:
                item = Item(stream, message, now, (epoch, seq) if seq else None)
                if seq and numbered:
                    self._put(stream, stream.window.accept(epoch, seq, item))
                elif not isinstance(message.body, End):
                    item.number, item.foreign = None, numbered
                    self._put(stream, [item])
                elif seq and stream.window.jump(epoch, seq):
                    self._put(stream, [item])

    def _put(self, stream: Stream, items: Sequence[Item]) -> None:
        if items:
            stream.away = None
            if (merge := stream.edge.merge) is not None and not items[0].foreign:
                number = stream.edge.streams.index(stream)
                merge.sides[number].away = False
                for item in items:
                    _merge(merge, number, item)
                items = merge.free()
            self._queue.extend(items)
            self._hungry.clear()
            self._arrived.set()
        if stream.window.repeated:
            name = stream.edge.name
            self.repeated[name] = self.repeated.get(name, 0) + stream.window.repeated
            stream.window.repeated = 0


class _Direct:
    """A ``fast`` edge within the process, as the local bus's hub knows it."""

    __slots__ = ("_inputs", "_stream")

    def __init__(self, inputs: Inputs, edge: Edge) -> None:
        self._inputs = inputs
        self._stream = edge.streams[0]

    @property
    def ready(self) -> bool:
        return self._inputs.free

    def give(self, payloads: Sequence[Any]) -> Callable[[], None]:
        return self._inputs.give(self._stream, payloads)


def _merge(merge: Merge[Item], number: int, item: Item) -> None:
    body = item.message.body
    if isinstance(body, End):
        item.mark = merge.put(number, FLOOR, item)
        merge.sides[number].over = True
    else:
        item.mark = merge.put(number, body.time if isinstance(body, Progress) else newest(item.message), item)


def _ignore(receipt: asyncio.Future[None]) -> None:
    if not receipt.cancelled():
        receipt.exception()
