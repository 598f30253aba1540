"""What travels of a blob: the offer, its chunks, and what a receiver says about them. Plain msgpack maps of bytes and numbers.

A blob is any bytes, named by their SHA-256. It is cut into chunks of one size, the last of them shorter, numbered from 0.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Self, TypeAlias

import msgspec

from schemas.errors import BusError, PenstockError

Buffer: TypeAlias = bytes | bytearray | memoryview

CHUNK = 64 * 1024
"""Bytes of a chunk where nothing asks for less."""
LEAST_CHUNK = 256
MOST_CHUNK = 1024 * 1024
MOST_CHUNKS = 1 << 20
"""Of one blob: their bitmap takes 128 KiB."""
HEAD = 160
"""Bytes of a chunk's message beside its data, at most; the topic comes on top."""
UNKNOWN_LIMIT = 128 * 1024
"""Largest publication, topic included, that every broker takes which does not say what it takes: AWS IoT Core's limit."""
ALIVE_SHARE = 4
"""A chunk takes at most this part of the keep-alive time on the link, so that pings and answers come through between them."""
MOST_BITS = 1024
"""Chunks behind the first one missing that an acknowledgement says something about."""

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
MOST_TURN = (1 << 60) - 1
_Turn: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 61)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class BlobError(BusError):
    """This blob cannot be had or taken: ``reason`` is a short stable word.

    :param reason: ``bad-offer``, ``too-big``, ``no-room``, ``damaged``, ``absent`` or, by the far end, ``refused``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class NotAMessageError(PenstockError):
    """These bytes are no message of this kind."""


def chunk_size(
    max_payload: int | None = None,
    *,
    topic: int = 128,
    rate: float | None = None,
    keep_alive: float | None = None,
    most: int = CHUNK,
) -> int:
    """How large the chunks of a blob are to be on a link.

    :param max_payload: what the bus says (:attr:`broker.bus.Bus.max_payload`); None: as small as any broker wants it.
    :param topic: bytes of the topic.
    :param rate: bytes per second that the link carries, if that is known.
    :param keep_alive: seconds, of the connection; 0: none.
    :raises BlobError: ``too-big``: the broker's limit leaves no room for a chunk.
    """
    room = (UNKNOWN_LIMIT if max_payload is None else max_payload) - topic - HEAD
    if room < LEAST_CHUNK:
        raise BlobError("too-big", f"the broker takes publications of {max_payload} bytes, a chunk needs more")
    size = min(most, room, MOST_CHUNK)
    if rate and keep_alive:
        size = min(size, int(rate * keep_alive / ALIVE_SHARE))
    size = max(size, LEAST_CHUNK)
    return size if size < 1024 else size // 1024 * 1024


class Plain(msgspec.Struct, frozen=True):
    """A message: a msgpack map of its fields. Unknown keys are passed over, so that one may be added later."""

    _decoder: ClassVar[msgspec.msgpack.Decoder[Self] | None] = None

    @classmethod
    def decode(cls, payload: Buffer) -> Self:
        """From what was received, whatever it is.

        :raises NotAMessageError: it is none of these.
        """
        decoder = cls.__dict__.get("_decoder")
        if decoder is None:
            decoder = cls._decoder = msgspec.msgpack.Decoder(cls)
        try:
            found: Self = decoder.decode(payload)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise NotAMessageError(f"no {cls.__name__.lower()}: {error}") from None
        return found

    def encode(self) -> bytes:
        """As it travels."""
        return _ENCODER.encode(self)


_ENCODER = msgspec.msgpack.Encoder()


class Offer(Plain, frozen=True):
    """A blob that can be had. :meth:`check` it before anything is done for it.

    :param digest: SHA-256, 64 hexadecimal digits in lower case.
    :param size: bytes in all.
    :param chunk: bytes of each chunk but the last.
    """

    digest: str
    size: _Count
    chunk: _Count = CHUNK

    @property
    def count(self) -> int:
        """How many chunks; a blob of no bytes has one, of no bytes."""
        return max(1, -(-self.size // self.chunk))

    def length(self, index: int) -> int:
        """Bytes of one chunk."""
        return min(self.chunk, self.size - index * self.chunk)

    def check(self, most: int) -> None:
        """Whether it can be one, and of at most ``most`` bytes.

        :raises BlobError: ``bad-offer`` or ``too-big``.
        """
        if not _DIGEST.fullmatch(self.digest):
            raise BlobError("bad-offer", f"the digest {self.digest[:80]!r} is not SHA-256 in 64 hexadecimal digits")
        if not LEAST_CHUNK <= self.chunk <= MOST_CHUNK:
            raise BlobError("bad-offer", f"chunks of {self.chunk} bytes; they may have {LEAST_CHUNK} to {MOST_CHUNK}")
        if self.count > MOST_CHUNKS:
            raise BlobError("bad-offer", f"{self.count} chunks; at most {MOST_CHUNKS}")
        if self.size > most:
            raise BlobError("too-big", f"a blob of {self.size} bytes; at most {most} are taken")


def offer(data: Buffer, chunk: int = CHUNK) -> Offer:
    """The offer of what is in memory. Takes the time of its SHA-256."""
    return Offer(hashlib.sha256(data).hexdigest(), memoryview(data).nbytes, chunk)


class Chunk(Plain, frozen=True, gc=False):
    """One piece of a blob.

    :param data: once decoded, a view on what was received.
    :param turn: grows with each chunk that a sender sends, repeats too, and from one sender to the next; 0: not said.
    """

    digest: str
    index: _Count
    data: memoryview
    turn: _Turn = 0


class Ack(Plain, frozen=True, gc=False):
    """What the only receiver of a blob has of it.

    :param upto: it has all chunks before this one.
    :param bits: which it has from there on: bit 0 of the first byte is chunk ``upto``.
    :param life: the incarnation of the receiver; another one may have less than the one before.
    :param seq: grows with each acknowledgement of an incarnation.
    :param last: ``turn`` of the chunk that it received last; 0: none yet.
    :param whole: it has all, verified and, where it keeps blobs on a disk, durable.
    :param ask: nothing came for a while, or it has just begun: it wants to be sent what is under way.
    :param refused: why it wants nothing of it, not now and not later; empty: it does.
    """

    digest: str
    upto: _Count = 0
    bits: bytes = b""
    life: int = 0
    seq: int = 0
    last: _Turn = 0
    whole: bool = False
    ask: bool = False
    refused: str = ""


class Need(Plain, frozen=True, gc=False):
    """What one of many receivers wants to be sent now, on the topic that all of them read.

    :param ranges: (first chunk, how many).
    :param last: ``turn`` of the chunk that it received last; 0: none yet. What was sent after that may be under way.
    :param since: ns that it has listened for; where it received nothing yet, what was sent before that passed it by.
    :param again: it waited long enough for these: they are not under way.
    """

    digest: str
    ranges: tuple[tuple[_Count, _Count], ...] = ()
    last: _Turn = 0
    since: _Count = 0
    again: bool = False


class Held:
    """Which of ``count`` chunks are there. ``bits``: eight chunks a byte, the lowest bit first."""

    __slots__ = ("bits", "count", "edge", "top", "total")

    def __init__(self, count: int, bits: Buffer = b"") -> None:
        self.count = count
        self.total = 0
        """How many."""
        self.edge = 0
        """All before this one are there."""
        self.top = 0
        """None from this one on is there."""
        self.bits = bytearray(-(-count // 8))
        if bits:
            size = min(len(bits), len(self.bits))
            self.bits[:size] = bits[:size]
            if count % 8:
                self.bits[-1] &= (1 << count % 8) - 1
            self.total = sum(byte.bit_count() for byte in self.bits)
            end = len(self.bits.rstrip(b"\0"))
            self.top = 8 * (end - 1) + self.bits[end - 1].bit_length() if end else 0
            self._advance()

    def __contains__(self, index: int) -> bool:
        return bool(self.bits[index >> 3] >> (index & 7) & 1)

    @property
    def full(self) -> bool:
        """All of them."""
        return self.total == self.count

    def add(self, index: int) -> bool:
        """Now this one is there; False: it was."""
        bit = 1 << (index & 7)
        if self.bits[index >> 3] & bit:
            return False
        self.bits[index >> 3] |= bit
        self.total += 1
        if index >= self.top:
            self.top = index + 1
        if index == self.edge:
            self._advance()
        return True

    def in_chunks(self, old: Offer, new: Offer) -> Held:
        """The same bytes in chunks of another size: those that are there from end to end."""
        out = Held(new.count)
        for index in range(new.count):
            first = index * new.chunk
            last = first + max(new.length(index), 1) - 1
            if all(i in self for i in range(first // old.chunk, last // old.chunk + 1)):
                out.add(index)
        return out

    def clear(self) -> None:
        """None is there any more."""
        self.bits = bytearray(len(self.bits))
        self.total = self.edge = self.top = 0

    def missing(self, start: int = 0) -> Iterator[int]:
        """Those that are not there, from ``start`` or the edge on."""
        index = max(start, self.edge)
        while index < self.count:
            if not index & 7 and self.bits[index >> 3] == 0xFF:
                index += 8
                continue
            if index not in self:
                yield index
            index += 1

    def tail(self) -> bytes:
        """The bits from the edge on, for an acknowledgement: at most :data:`MOST_BITS`."""
        end = min(self.top, self.edge + MOST_BITS)
        out = bytearray(-(-(end - self.edge) // 8)) if end > self.edge else bytearray()
        for index in range(self.edge, end):
            if index in self:
                at = index - self.edge
                out[at >> 3] |= 1 << (at & 7)
        return bytes(out)

    def _advance(self) -> None:
        bits, edge, count = self.bits, self.edge, self.count
        while edge < count:
            if not edge & 7 and bits[edge >> 3] == 0xFF:
                edge += 8
            elif bits[edge >> 3] >> (edge & 7) & 1:
                edge += 1
            else:
                break
        self.edge = min(edge, count)
