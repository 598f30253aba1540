"""One port through a relay that keeps: the consumer of what its producer sends below, the producer of its readers above.

Below it takes under the names of all its readers, so the producer need not know of it: one
:class:`~broker.window.ReceiveWindow`, whose acknowledgements go out once for each of them. *Done* is said when the spool has
it on the disk. Above it numbers anew, in an epoch of its own, and keeps what is under way in a
:class:`~broker.window.SendWindow` until every reader is done with it; so a message crosses the link once, however many read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from broker.bus import Bus, Delivery, Publication, Receipt
from broker.spool import Item
from broker.throttle import Throttle
from broker.window import Kept, Knock, ReceiveWindow, SendWindow, pack, unpack_ack, unpack_knock
from nodes import log
from nodes.assignment import RelayPort
from nodes.relay_books import Close, Taken, label, unlabel
from nodes.relay_store import Store
from nodes.signs import Signs
from schemas import codec, topics
from schemas.errors import BusError, ClosedError, PayloadError
from schemas.messages import End, Message, Spooled

T = TypeVar("T")

WINDOW = 1024
"""Messages under way above; a reader knows the identities of its last 8,192 (:class:`broker.window.RecentIds`)."""
_WINDOW_BYTES = 64 * 1024 * 1024
_BATCH = 256
_HEARTBEAT = 0.3
_RESEND_CHECK = 0.25
_PATIENCE = 5.0
_LINGER = 0.01
_RETRY = 0.5
_MOST_STRAYS = 64


class Hop:
    """See the module.

    :param name: the relay's, for the log.
    :param lower: the connection to the producer's broker, ``upper``: to the readers'; opened when :meth:`below` and
        :meth:`above` are called.
    :param throttle: shared by the ports of the relay; None: no limit.
    """

    def __init__(
        self,
        topology: str,
        name: str,
        spec: RelayPort,
        store: Store,
        *,
        lower: Bus,
        upper: Bus,
        throttle: Throttle | None,
        signs: Signs,
    ) -> None:
        self.edge = f"{spec.producer}.{spec.port}"
        self.complete = asyncio.Event()
        self._topology = topology
        self._name = name
        self._spec = spec
        self._store = store
        self._lower = lower
        self._upper = upper
        self._throttle = throttle
        self._signs = signs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.edge)
        epoch, done = store.state.floor
        self._below = ReceiveWindow(epoch=epoch, done=done)
        size = min(_WINDOW_BYTES, store.spool.budget // 4)
        readers = dict.fromkeys(spec.consumers, False)
        self._above = SendWindow(store.epochs[-1], readers, messages=WINDOW, size=size, earlier=store.epochs[:-1])
        self._size = size
        self._arrived: deque[tuple[int, int, Taken | Close]] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._go = asyncio.Event()
        self._moved = asyncio.Event()
        self._way: deque[tuple[int, int]] = deque()  # (number above, number in the spool)
        self._last = 0  # number above of the end, once it is sent
        self._open = False
        self._strays: set[asyncio.Task[None]] = set()
        self.repeated = 0

    @property
    def books(self) -> Spooled:
        """As they were committed last."""
        return self._store.books

    # -- life ------------------------------------------------------------------------------------------------------

    async def below(self) -> None:
        """Subscribe at the producer's broker, and tell the producer where we stand."""
        spec, base = self._spec, topics.output(self._topology, self._spec.producer, self._spec.port)
        again = [topics.again(self._topology, reader, spec.producer, spec.port) for reader in spec.consumers]
        # what does not fit is left out here and sent again: reading never stops for it
        self._data = await self._lower.subscribe(
            [f"{base}/#"], qos=0, capacity=2 * WINDOW, overflow="sample", retained=False
        )
        self._sent_again = await self._lower.subscribe(again, qos=0, capacity=4 * WINDOW, overflow="sample")
        await self.greet_below()

    async def above(self) -> None:
        """Listen for the readers, and make ourselves known to them; the far broker is there."""
        spec = self._spec
        acks = [topics.ack(self._topology, spec.producer, spec.port, reader) for reader in spec.consumers]
        self._acks = await self._upper.subscribe(acks, qos=1, capacity=4 * WINDOW, overflow="latest")
        self._open = True
        await self.greet_above()

    async def greet_below(self) -> None:
        """Say where we stand: the link is new."""
        await self._acknowledge(hello=True)

    async def greet_above(self) -> None:
        """Say where our numbering begins: the link is new."""
        if self._open:
            self._above.anew(time.monotonic_ns())
            await self._ask(self._spec.consumers)
            self._go.set()

    async def _ask(self, readers: Sequence[str]) -> None:
        """Knock at these readers; they answer with where they stand."""
        knock = pack(Knock(self._above.epoch, self._above.base))
        await self._upper.publish([Publication(self._again_topic(reader), knock, qos=0) for reader in readers])

    def left(self, reader: str) -> None:
        """A reader has ended and left."""
        self._above.left(reader)
        self._freed()

    def tasks(self) -> list[Any]:
        """What runs below, as long as the relay does."""
        return [self._receive(), self._receive_again(), self._keep(), self._heartbeat(), self._remove()]

    def tasks_above(self) -> list[Any]:
        """What runs above, once :meth:`above` has returned."""
        return [self._listen(), self._send(), self._resend()]

    async def close(self) -> None:
        """Close the files, after what the disk is doing just now; tasks are cancelled."""
        for task in self._strays:
            task.cancel()
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        self._store.close()

    def remove(self) -> None:
        """The stream is complete, and everybody knows: the next run begins anew."""
        self._store.remove()

    async def farewell(self) -> None:
        """The stream is complete: leave word of it for a producer that comes back."""
        self._below.ended = True
        await self._acknowledge(final=True)

    # -- below -----------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            await self._take(await self._data.receive())

    async def _receive_again(self) -> None:
        while True:
            knocked = False
            for delivery in await self._sent_again.receive():
                if (knock := unpack_knock(delivery.payload)) is not None:
                    knocked = True
                    self._put(self._below.knocked(knock))
                else:
                    await self._take([delivery], again=True)
            if knocked:
                await asyncio.sleep(0)  # what came with the knock is to be taken first
                await self._acknowledge(answer=not self._data.queued)

    async def _take(self, batch: Sequence[Delivery], *, again: bool = False) -> None:
        strange: list[Delivery] = []
        for delivery in batch:
            trace = next((value for key, value in delivery.properties if key == "traceparent"), None)
            try:
                message, epoch, seq = codec.decode_sequenced(delivery.payload, trace=trace)
            except PayloadError:
                strange.append(delivery)
                continue
            if not seq:
                strange.append(delivery)
            elif isinstance(message.body, End):
                close = Close(message.id, message.source, message.time)
                self._put(self._below.accept(epoch, seq, (epoch, seq, close)))
            else:
                source = message.source or self._spec.producer
                text = label(
                    topics.output(self._topology, self._spec.producer, self._spec.port, source), message.rows, trace
                )
                taken = Taken(epoch, seq, message.id, message.rows, text, delivery.payload)
                self._put(self._below.accept(epoch, seq, (epoch, seq, taken)))
        if strange and not again and len(self._strays) < _MOST_STRAYS:
            task = asyncio.get_running_loop().create_task(self._pass_on(strange))
            self._strays.add(task)
            task.add_done_callback(self._strays.discard)

    async def _pass_on(self, strange: Sequence[Delivery]) -> None:
        """What somebody else published on the port's topic goes on as through any relay, and is not kept."""
        if self._open and self._upper.connected and not self._spec.private:
            limit = self._upper.max_payload
            sent = [
                Publication(d.topic, d.payload, qos=0, properties=d.properties)
                for d in strange
                if limit is None or len(d.payload) + len(d.topic) <= limit
            ]
            with contextlib.suppress(TimeoutError, BusError):  # should the link go just now: they are not kept
                async with asyncio.timeout(_RETRY):
                    await self._upper.publish(sent)

    def _put(self, items: Iterable[tuple[int, int, Taken | Close]]) -> None:
        self._arrived.extend(items)
        self.repeated += self._below.repeated
        self._below.repeated = 0
        if self._arrived:
            self._news.set()

    async def _keep(self) -> None:
        """What has arrived goes to the disk; then it is done, for the producer."""
        arrived = self._arrived
        while True:
            while not arrived:
                self._news.clear()
                await self._news.wait()
            batch: list[Taken] = []
            dealt = 0
            for _, _, item in arrived:
                if isinstance(item, Close) or len(batch) == WINDOW:
                    break
                batch.append(item)
            if batch:
                dealt = await self._disk(self._store.take, batch)
                self.repeated, self._store.repeated = self.repeated + self._store.repeated, 0
            elif isinstance(close := arrived[0][2], Close):
                dealt = int(await self._disk(self._store.end, close, *arrived[0][:2]))
            if dealt:
                epoch, seq, _ = arrived[dealt - 1]
                for _ in range(dealt):
                    arrived.popleft()
                self._below.finish(epoch, seq)
                await self._acknowledge()
                self._go.set()
            if dealt < max(1, len(batch)):  # full: the producer waits, and so do we
                self._room.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY):
                        await self._room.wait()

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT)
            if self._below.changed:
                await self._acknowledge()

    async def _acknowledge(self, *, hello: bool = False, answer: bool = False, final: bool = False) -> None:
        kept = hello or final
        payload = pack(self._below.ack(hello=hello, answer=answer))
        spec = self._spec
        acks = [
            Publication(
                topics.ack(self._topology, spec.producer, spec.port, reader), payload, qos=1 if kept else 0, retain=kept
            )
            for reader in spec.consumers
        ]
        receipt = await self._lower.publish(acks)
        if final:
            await receipt
        else:
            receipt.add_done_callback(_ignore)

    # -- above -----------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        by_topic = {topics.level(reader): reader for reader in self._spec.consumers}
        while True:
            for delivery in (batch := await self._acks.receive()):
                reader = by_topic.get(delivery.topic.rpartition("/")[2])
                if reader is None or (ack := unpack_ack(delivery.payload)) is None:
                    continue
                knock, kept = self._above.heard(reader, ack, time.monotonic_ns())
                if knock is not None:
                    await self._upper.publish([Publication(self._again_topic(reader), pack(knock), qos=0)])
                if kept:
                    await self._send_again(reader, kept)
            self._acks.acknowledge(batch)
            self._freed()

    async def _send(self) -> None:
        """What the spool has, at the rate, while every reader has said that it is there."""
        while True:
            self._go.clear()
            ready = self._upper.connected and not self._above.waiting and self._above.room
            if ready and self._store.unsent > 0:
                if not await self._send_some():
                    await self._pause()
            elif ready and self._store.state.end is not None and not self._last and not self._arrived:
                await self._send_end(self._store.state.end)
            else:
                await self._pause()

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY):
                await self._go.wait()

    async def _send_some(self) -> bool:
        count = min(_BATCH, WINDOW - len(self._above.kept))
        if (throttle := self._throttle) is not None:
            count = max(1, min(count, int(throttle.burst)))
            await self._turn(throttle, count)
        try:
            items = await self._disk(self._store.next, count, max(1, self._size - self._above.bytes))
        except BusError as error:
            log.error("the relay cannot read", node=self._name, reason=str(error))
            await asyncio.sleep(_RETRY)
            return True
        if throttle is not None:
            throttle.spend(len(items))
        publications, large = self._number(items)
        if publications:
            receipt = await self._upper.publish(publications)
            receipt.add_done_callback(self._published)
        if large:
            await self._signs.send_foreign()  # the letters are in the file before the messages are gone
            await self._disk(lambda: self._store.done(large, dead=True))
        if self._way and self._way[0][0] <= self._above.floor:  # readers that have left need no acknowledgement
            self._freed()
        return bool(items)

    async def _turn(self, throttle: Throttle, count: int) -> None:
        """Wait until so many may go; other ports spend from it too."""
        while (pause := throttle.wait(count, time.monotonic())) > 0:  # noqa: ASYNC110 - time has no event
            await asyncio.sleep(pause)

    def _number(self, items: Sequence[Item]) -> tuple[list[Publication], list[int]]:
        """Publications of what goes, and spool's numbers of what is too large to go."""
        out: list[Publication] = []
        large: list[int] = []
        window, now, limit = self._above, time.monotonic_ns(), self._upper.max_payload
        for item in items:
            topic, rows, trace = unlabel(item.topic)
            ident, payload = codec.renumber(item.payload, window.epoch, window.next)
            to = self._private() if self._spec.private else [topic]
            if limit is not None and len(payload) + max(map(len, to)) > limit:
                detail = f"{len(payload)} bytes, the broker beyond takes at most {limit}"
                letter = self._signs.letter("too-large", detail, self.edge, ident, item.payload, rows)
                self._signs.foreign.append(letter)
                large.append(item.number)
                continue
            self._way.append((window.next, item.number))
            window.push(topic, payload, now)
            properties = (("traceparent", trace),) if trace else ()
            out += [
                Publication(name, payload, qos=1, properties=properties, content_type=codec.CONTENT_TYPE) for name in to
            ]
        return out, large

    async def _send_end(self, close: Close) -> None:
        """All was sent; readers take the end last, by its number. It counts what they were sent."""
        window, books = self._above, self._store.books
        count = books.given.messages + books.held.messages
        message = Message(close.id, close.source, close.time, End(messages=count))
        payload = codec.encode(message, epoch=window.epoch, seq=window.next)
        topic = topics.output(self._topology, self._spec.producer, self._spec.port)
        self._last = window.next
        window.push(topic, payload, time.monotonic_ns(), final=True)
        to = self._private() if self._spec.private else [topic]
        receipt = await self._upper.publish(
            [Publication(name, payload, qos=1, content_type=codec.CONTENT_TYPE) for name in to]
        )
        receipt.add_done_callback(self._published)
        self._freed()

    async def _resend(self) -> None:
        quiet = time.monotonic() + _PATIENCE
        while True:
            await asyncio.sleep(_RESEND_CHECK)
            if not self._upper.connected:
                continue
            if asked := self._above.due(time.monotonic_ns()):
                await self._ask(asked)
            if self._above.waiting and time.monotonic() > quiet:
                quiet = time.monotonic() + 6 * _PATIENCE
                log.info("waiting for readers", node=self._name, edge=self.edge, readers=", ".join(self._above.waiting))
                await self.greet_above()

    async def _send_again(self, reader: str, kept: Sequence[Kept]) -> None:
        log.debug("sent again", node=self._name, port=self.edge, consumer=reader, messages=len(kept))
        if self._throttle is not None:
            self._throttle.spend(len(kept))
        topic = self._again_topic(reader)
        await self._upper.publish([Publication(topic, k.payload, qos=0) for k in kept])

    def _freed(self) -> None:
        """More may be done above."""
        self._moved.set()
        self._go.set()

    async def _remove(self) -> None:
        """What every reader is done with leaves the spool."""
        while True:
            await self._moved.wait()
            await asyncio.sleep(_LINGER)
            self._moved.clear()
            floor, numbers = self._above.floor, []
            while self._way and self._way[0][0] <= floor:
                numbers.append(self._way.popleft()[1])
            if numbers:
                await self._disk(self._store.done, numbers)
                self._room.set()
                self._go.set()
            if self._last and floor >= self._last and not self._way:
                self.complete.set()

    def _private(self) -> list[str]:
        return [self._again_topic(reader) for reader in self._spec.consumers]

    def _again_topic(self, reader: str) -> str:
        return topics.again(self._topology, reader, self._spec.producer, self._spec.port)

    async def _disk(self, act: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act, *args)

    def _published(self, receipt: Receipt) -> None:
        if receipt.cancelled() or (error := receipt.exception()) is None or isinstance(error, ClosedError):
            return
        log.error("the broker refused a message", node=self._name, reason=str(error)[:200])


def _ignore(receipt: Receipt) -> None:
    if not receipt.cancelled():
        receipt.exception()
