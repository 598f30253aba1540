"""Blobs over any bus: large content in small chunks, with a window, acknowledged by the receiver and not by the broker.

Both sides are machines without I/O and without a clock: who carries them publishes what they give and hands them what
arrives, with the time in ns. Bytes only; what is in a blob is not looked at. ``docs/blobs.md`` has the protocol,
:mod:`broker.blob_format` the messages, :mod:`broker.blob_store` what keeps blobs on a disk, :mod:`broker.blob_port` carries
both sides over a :class:`~broker.bus.Bus`.

**One to one.** The sender makes the :class:`~broker.blob_format.Offer` known, in a message of its carrier's own. The receiver
answers with an :class:`~broker.blob_format.Ack` of what it has already; then :class:`Outgoing` sends chunks to
:class:`Incoming`, which acknowledges::

    sender    out = Outgoing(offer(data), data, now)       receiver  come = Incoming(Memory(offer, most), now)
              out.heard(ack, now)                                    come.take(chunk, now)
              publish each of out.send(now)                          publish come.say(now), if there is something
              again at out.wake(), until out.over                    again at come.wake(), until come.over

**One to many.** :class:`Broadcast` publishes on a topic that all receivers read; each has a :class:`Fetching`, which asks for
what it misses (:class:`~broker.blob_format.Need`). A chunk that one asked for reaches all. The calls are the same.
"""

from __future__ import annotations

from broker.blob_format import (
    Ack,
    BlobError,
    Chunk,
    Need,
    NotAMessageError,
    Offer,
    chunk_size,
    offer,
)
from broker.blob_hold import Hold, Memory
from broker.blob_pace import Pace
from broker.blob_receive import Fetching, Incoming, Took
from broker.blob_send import Broadcast, Outgoing, Source

__all__ = [
    "Ack",
    "BlobError",
    "Broadcast",
    "Chunk",
    "Fetching",
    "Hold",
    "Incoming",
    "Memory",
    "Need",
    "NotAMessageError",
    "Offer",
    "Outgoing",
    "Pace",
    "Source",
    "Took",
    "chunk_size",
    "offer",
]
