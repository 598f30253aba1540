"""One side of a transfer for ``benchmarks/workloads/blobs.py``: ``python -m benchmarks.blob_side ROLE URL SIZE COUNT``.

Each role says ``ready``, waits for a line, and says when it began or ended (the machine's monotonic clock, which all
processes share) and its resident memory. ``plain`` publishes the same chunks and counts them, and nothing else: no digest, no
acknowledgement, nothing sent again.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from broker.blob_format import Chunk, Offer, chunk_size
from broker.blob_hold import Memory
from broker.blob_port import fetch, receive, send, serving
from broker.blob_store import BlobStore
from broker.bus import Bus, Publication, Subscription
from broker.connect import connect

MOST = 1 << 40


def content(size: int) -> bytes:
    """The same in every process."""
    piece = random.Random(0).randbytes(min(size, 8_000_000))
    return (piece * (size // len(piece) + 1))[:size]


def say(**what: object) -> None:
    """A line for who started us."""
    print(json.dumps(what), flush=True)


async def begin() -> float:
    """Ready; gives the time when the others are too."""
    say(ready=True)
    await asyncio.to_thread(sys.stdin.readline)
    return time.monotonic()


async def give(bus: Bus, size: int, number: int) -> None:
    """``send`` to topic ``number``."""
    data = content(size)
    began = await begin()
    out = await send(bus, f"blobs/{number}", data)
    say(began=began, sent=out.sent / out.offer.count)


async def take(bus: Bus, size: int, count: int) -> None:
    """``receive`` from so many."""
    say(ready=True)
    got = await asyncio.gather(*(receive(bus, f"blobs/{i}", lambda it: Memory(it, size)) for i in range(count)))
    say(ended=time.monotonic(), memory=_memory())
    assert len(got) == count  # noqa: S101 # a benchmark


async def serve(bus: Bus, size: int, count: int) -> None:
    """``serving`` to all."""
    del count
    data = content(size)
    began = await begin()
    async with serving(bus, "blobs/all", data, push=8) as out:
        say(began=began)
        await asyncio.to_thread(sys.stdin.readline)
        say(sent=out.sent / out.offer.count)


async def get(bus: Bus, size: int, count: int) -> None:
    """``fetch``."""
    del count
    say(ready=True)
    await fetch(bus, "blobs/all", lambda it: Memory(it, size))
    say(ended=time.monotonic(), memory=_memory())


async def plain_give(bus: Bus, size: int, number: int) -> None:
    """The same chunks, as fast as the bus takes them."""
    data = memoryview(content(size))
    offer = Offer("0" * 64, size, chunk_size())
    began = await begin()
    for first in range(0, offer.count, 8):
        await bus.publish(
            [
                Publication(
                    f"blobs/{number}",
                    Chunk(offer.digest, i, data[i * offer.chunk : i * offer.chunk + offer.length(i)], i).encode(),
                )
                for i in range(first, min(first + 8, offer.count))
            ]
        )
    say(began=began, sent=1.0)


async def plain_take(bus: Bus, size: int, count: int) -> None:
    """Counts what comes of so many. A broker may drop some of it: then it never ends, and its rate is 0."""
    subscription: Subscription = await bus.subscribe(["blobs/+"], qos=0, capacity=64)
    say(ready=True)
    left = size * count
    try:
        while left > 0:
            async with asyncio.timeout(5):
                arrived = await subscription.receive()
            left -= sum(len(Chunk.decode(delivery.payload).data) for delivery in arrived)
        say(ended=time.monotonic(), memory=_memory())
    except TimeoutError:
        say(ended=float("inf"), memory=_memory())


async def disk_give(bus: Bus, size: int, number: int) -> None:
    """``send`` from a file."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, BlobStore(Path(folder), MOST, durable=False) as store:
        digest = store.put(content(size))
        with store.open(digest) as blob:
            began = await begin()
            out = await send(bus, f"blobs/{number}", blob)
            say(began=began, sent=out.sent / out.offer.count)


async def disk_take(bus: Bus, size: int, count: int) -> None:
    """``receive`` into a file; not synced to the disk, whose speed is not what is measured."""
    del size, count
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, BlobStore(Path(folder), MOST, durable=False) as store:
        say(ready=True)
        before = _memory()
        with await receive(bus, "blobs/0", store.partial):
            say(ended=time.monotonic(), memory=_memory() - before)


def _memory() -> float:
    """Most megabytes resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


ROLES = {
    "give": give,
    "take": take,
    "serve": serve,
    "get": get,
    "plain-give": plain_give,
    "plain-take": plain_take,
    "disk-give": disk_give,
    "disk-take": disk_take,
}


async def main(role: str, url: str, size: int, count: int) -> None:
    """Entry."""
    async with connect(url, prompt=True) as bus:
        await ROLES[role](bus, size, count)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
