"""Blobs over a :class:`~broker.bus.Bus`: carries the machines of :mod:`broker.blobs` for who has a bus and nothing else to do.

One to one, below a topic of the pair: :func:`send` and :func:`receive`; ``<topic>/offer``, ``/chunk`` and ``/ack``. One to many:
:func:`serving` and :func:`fetch`; ``<topic>/offer`` (retained), ``/chunk`` and ``/need``. Chunks and answers go at QoS 0: what a
broker drops is sent again by us.

Nothing here gives up by itself while the other side is away: ``async with asyncio.timeout(…)`` around it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from broker.blob_files import Blob
from broker.blob_format import Ack, BlobError, Buffer, NotAMessageError, Offer, chunk_size, offer
from broker.blob_hold import Hold
from broker.blob_pace import MS, Pace
from broker.blob_receive import Fetching, Incoming
from broker.blob_send import Broadcast, Outgoing, Source
from broker.bus import Bus, Delivery, Publication, Receipt, Subscription

ROOM = 64
"""Chunks that wait to be taken at most; more of them are dropped, and come again."""
_OFFER_AFTER = 1_000 * MS
_OFFER_AT_MOST = 30_000 * MS
_LONG = 1 << 20  # bytes whose digest is worth a thread


async def send(
    bus: Bus,
    topic: str,
    source: Buffer | Blob,
    *,
    chunk: int | None = None,
    pace: Pace | None = None,
) -> Outgoing:
    """Send a blob to the one who receives below ``topic``; returns when it has it, verified.

    :param chunk: bytes of a chunk; by default as :func:`broker.blob_format.chunk_size` says for this bus.
    :param pace: of the way there, from the blob before.
    :raises BlobError: ``refused`` by the receiver, or ``too-big`` for the broker.
    :raises PublishFailedError: a chunk is too large for the broker as it is after a reconnect.
    :raises DeniedError: the topics may not be subscribed to.
    :raises ClosedError: the bus was closed.
    """
    answers = await bus.subscribe([f"{topic}/ack"], qos=1, capacity=ROOM, overflow="latest", retained=False)
    try:
        wanted, read = await _offered(bus, topic, source, chunk)
        out = Outgoing(wanted, read, _now(), pace=pace)
        saying = Publication(f"{topic}/offer", wanted.encode())
        silence, due = _OFFER_AFTER, 0
        while not out.over:
            now = _now()
            if now >= due:
                await _publish(bus, saying)
                silence, due = min(2 * silence, _OFFER_AT_MOST), now + silence
            chunks = await asyncio.to_thread(out.send, now) if isinstance(source, Blob) else out.send(now)
            if chunks:
                await _publish(bus, *(Publication(f"{topic}/chunk", each) for each in chunks))
            wake = out.wake()
            for delivery in await _arrivals(answers, due if wake is None else min(due, wake)):
                if out.heard(delivery.payload, _now()):
                    silence, due = _OFFER_AFTER, _now() + _OFFER_AFTER
                elif _anybody(delivery.payload):
                    due = 0
    finally:
        await _leave(answers)
    if out.refused:
        raise BlobError("refused", f"{topic}: the receiver refuses the blob: {out.refused[:100]}")
    return out


async def receive(bus: Bus, topic: str, hold: Callable[[Offer], Hold]) -> Hold:
    """Receive the blob that is sent below ``topic``; returns where it is, whole. Close it when it is used.

    :param hold: where it goes: ``store.partial`` of a :class:`~broker.blob_store.BlobStore`, or ``lambda it: Memory(it, most)``.
    :raises BlobError: ``hold`` refused what was offered, or it came ``damaged`` again and again. The sender is told.
    :raises ClosedError: the bus was closed.
    """

    async def answer(said: bytes, *, last: bool) -> None:
        await _publish(bus, Publication(f"{topic}/ack", said, 1 if last else 0))

    hello = Ack("", ask=True).encode()  # so that a sender that waits says its offer now
    return await _take(bus, topic, hold, Incoming, answer, hello)


@asynccontextmanager
async def serving(
    bus: Bus, topic: str, source: Buffer | Blob, *, chunk: int | None = None, push: int = 0
) -> AsyncIterator[Broadcast]:
    """Have a blob for all who :func:`fetch` below ``topic``, as long as the block lasts.

    :param push: chunks published unasked at the beginning.
    :raises BlobError: ``too-big`` for the broker.
    """
    needs = await bus.subscribe([f"{topic}/need"], qos=0, capacity=16 * ROOM, overflow="latest", retained=False)
    task: asyncio.Task[None] | None = None
    saying = f"{topic}/offer"
    try:
        wanted, read = await _offered(bus, topic, source, chunk)
        out = Broadcast(wanted, read, _now(), push=push)
        await (await bus.publish([Publication(saying, wanted.encode(), 1, retain=True)]))
        task = asyncio.create_task(_serve(bus, f"{topic}/chunk", out, needs, thread=isinstance(source, Blob)))
        yield out
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if bus.connected:
                await _publish(bus, Publication(saying, b"", 1, retain=True))
        await _leave(needs)


async def fetch(bus: Bus, topic: str, hold: Callable[[Offer], Hold]) -> Hold:
    """Get the blob that is served below ``topic``, now or later; returns where it is, whole. As :func:`receive`."""

    async def ask(said: bytes, *, last: bool) -> None:
        del last
        await _publish(bus, Publication(f"{topic}/need", said))

    since = _now()
    return await _take(bus, topic, hold, lambda it, now: Fetching(it, now, since=since), ask, None)


async def _take(
    bus: Bus,
    topic: str,
    hold: Callable[[Offer], Hold],
    kind: Callable[[Hold, int], Incoming | Fetching],
    answer: Callable[..., Coroutine[Any, Any, None]],
    hello: bytes | None,
) -> Hold:
    filters = [f"{topic}/offer", f"{topic}/chunk"]
    arriving = await bus.subscribe(filters, qos=1, capacity=ROOM, overflow="sample")
    taker: Incoming | Fetching | None = None
    done = False
    try:
        if hello is not None:
            await answer(hello, last=False)
        while True:
            if taker is not None:
                said = taker.say(_now())
                if said is not None:
                    await answer(said, last=taker.over)
                if taker.refused:
                    raise BlobError("damaged", f"{topic}: what came is not what was offered, {taker.spoiled} times")
                if taker.whole:
                    done = True
                    return taker.hold
            deliveries = await _arrivals(arriving, None if taker is None else taker.wake())
            arriving.acknowledge(deliveries)
            chunks = []
            for delivery in deliveries:
                if delivery.topic == filters[1]:
                    chunks.append(delivery.payload)
                elif (found := _an_offer(delivery.payload)) is not None and (
                    taker is None or found != taker.offer or isinstance(taker, Incoming)
                ):
                    if taker is not None and found == taker.offer:
                        taker.linked(_now())  # it does not know where we stand
                        continue
                    if taker is not None:
                        taker.hold.close()
                        taker = None
                    try:
                        taker = kind(hold(found), _now())
                    except BlobError as error:
                        await answer(Ack(found.digest, life=_now(), seq=1, refused=error.reason).encode(), last=True)
                        raise
            if taker is not None and chunks:
                if taker.hold.blocking:
                    await asyncio.to_thread(_take_all, taker, chunks)
                else:
                    _take_all(taker, chunks)
    finally:
        if taker is not None and not done:
            taker.hold.close()
        await _leave(arriving)


def _take_all(taker: Incoming | Fetching, chunks: list[Buffer]) -> None:
    for chunk in chunks:
        taker.take(chunk, _now())


async def _serve(bus: Bus, topic: str, out: Broadcast, needs: Subscription, *, thread: bool) -> None:
    while True:
        while out.waiting:
            chunks = await asyncio.to_thread(out.send, _now()) if thread else out.send(_now())
            await _publish(bus, *(Publication(topic, each) for each in chunks))
            if needs.queued:
                break
        for delivery in await _arrivals(needs, _now() if out.waiting else None):
            out.heard(delivery.payload, _now())


async def _offered(bus: Bus, topic: str, source: Buffer | Blob, chunk: int | None) -> tuple[Offer, Buffer | Source]:
    most = chunk_size(bus.max_payload, topic=len(topic.encode()) + 8)
    size = most if chunk is None else min(chunk, most)
    if isinstance(source, Blob):
        return source.offer(size), source.read
    if memoryview(source).nbytes < _LONG:
        return offer(source, size), source
    return await asyncio.to_thread(offer, source, size), source


async def _arrivals(subscription: Subscription, until: int | None) -> list[Delivery]:
    """What has arrived, or nothing by ``until``."""
    if until is None:
        return await subscription.receive()
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, (until - _now()) / 1e9)):
            return await subscription.receive()
    return []


def _an_offer(payload: Buffer) -> Offer | None:
    try:
        return Offer.decode(payload)
    except NotAMessageError:
        return None


def _anybody(payload: Buffer) -> bool:
    """Whether a receiver asks what there is."""
    try:
        return Ack.decode(payload).digest == ""
    except NotAMessageError:
        return False


async def _publish(bus: Bus, *publications: Publication) -> None:
    """Accepted by the bus, in order.

    :raises PublishFailedError: one cannot be sent on this connection.
    """
    receipt = await bus.publish(publications)
    if receipt.done():
        receipt.result()
    else:
        receipt.add_done_callback(_looked_at)


def _looked_at(receipt: Receipt) -> None:
    """Nobody waits for it: what got lost is said again when the sender asks."""
    if not receipt.cancelled():
        receipt.exception()


async def _leave(subscription: Subscription) -> None:
    with suppress(Exception):  # the bus may be closed or away; the subscription ends with it
        await subscription.unsubscribe()


def _now() -> int:
    return time.monotonic_ns()
