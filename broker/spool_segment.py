"""The files of a spool: segments of framed records, and the small file that says what of them is gone.

A record is ``length (u32) | CRC-32 (u32) | weight (u32) | topic length (u16) | topic | payload``, little endian; the length
counts what follows the checksum, and the checksum is seeded with the record's number, so that neither zeros nor old blocks of a
file system pass for a record. A segment's name is the number of its first record.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_HEAD = struct.Struct("<IIIH")
_NOTE = struct.Struct("<13Q")
FRAME = _HEAD.size
"""Bytes that a record has beside topic and payload."""
NOTE = _NOTE.size + 4
"""Bytes of a note."""
GONE, WANTED, TAKEN = 0, 1, 2
"""What a record is: not here any more; to be read; here, but under way, so that it is not read again."""


def frame(number: int, topic: bytes, payload: bytes | memoryview, weight: int = 1) -> bytes:
    """A record as it lies on the disk."""
    body = b"".join((weight.to_bytes(4, "little"), len(topic).to_bytes(2, "little"), topic, payload))
    return b"".join((len(body).to_bytes(4, "little"), _crc(body, number).to_bytes(4, "little"), body))


def _crc(body: bytes | memoryview, number: int) -> int:
    return zlib.crc32(body, number & 0xFFFFFFFF)


class Segment:
    """One file: records ``first``, ``first + 1``, …; which of them are still wanted.

    :ivar size: bytes of the file that hold whole records.
    :ivar live: records that are here: wanted, or taken.
    :ivar taken: those of them that are under way.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.path = folder / f"{first:020d}.seg"
        self.first = first
        self.size = 0
        self.live = 0
        self.taken = 0
        self._starts = array("Q")
        self._weights = array("I")
        self._alive = bytearray()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def last(self) -> int:
        """Number of the last record; ``first - 1`` when there is none."""
        return self.first + len(self._alive) - 1

    def load(self) -> int:
        """Find the records of the file; what follows the last whole one is cut off. Gives how many bytes that were."""
        data = memoryview(Path(self.path).read_bytes())
        at, end = 0, len(data)
        while at + FRAME <= end:
            length, crc, weight, topic = _HEAD.unpack_from(data, at)
            stop = at + 8 + length
            if length < FRAME - 8 + topic or stop > end or _crc(data[at + 8 : stop], self.last + 1) != crc:
                break
            self._starts.append(at)
            self._weights.append(weight)
            self._alive.append(WANTED)
            at = stop
        self.size = at
        self.live = len(self._alive)
        if at < end:
            os.ftruncate(self._fd, at)
        return end - at

    def append(self, frames: Sequence[bytes]) -> None:
        """Write records at the end.

        :raises OSError: the disk is full or away; the file is as it was.
        """
        try:
            data = memoryview(b"".join(frames))
            at = self.size
            while data:
                written = os.pwrite(self._fd, data, at)
                at, data = at + written, data[written:]
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        for each in frames:
            self._starts.append(self.size)
            self._weights.append(int.from_bytes(each[8:12], "little"))
            self.size += len(each)
        self._alive += bytes([WANTED]) * len(frames)
        self.live += len(frames)

    def sync(self) -> None:
        """Have it on the disk."""
        os.fdatasync(self._fd)

    def read(self, number: int) -> tuple[str, bytes] | None:
        """Topic and payload of a record; None if the disk does not give back what was written.

        :raises OSError: the disk is away.
        """
        i = number - self.first
        stop = self._starts[i + 1] if i + 1 < len(self._starts) else self.size
        data = os.pread(self._fd, stop - self._starts[i], self._starts[i])
        if len(data) != stop - self._starts[i]:
            return None
        _, crc, _, topic = _HEAD.unpack_from(data)
        if _crc(memoryview(data)[8:], number) != crc:
            return None
        return data[FRAME : FRAME + topic].decode(), data[FRAME + topic :]

    def bytes_of(self, number: int) -> int:
        """Bytes of topic and payload of a record."""
        i = number - self.first
        return (self._starts[i + 1] if i + 1 < len(self._starts) else self.size) - self._starts[i] - FRAME

    def weight_of(self, number: int) -> int:
        """What the writer counts a record as."""
        return self._weights[number - self.first]

    def wanted(self, *, newest: bool = False, beyond: int | None = None) -> Iterator[int]:
        """Numbers of the records to be read, in order; ``beyond``: only those after it (before it, if ``newest``)."""
        alive = self._alive
        if newest:
            i = len(alive) if beyond is None else max(0, min(len(alive), beyond - self.first))
            while (i := alive.rfind(WANTED, 0, i)) >= 0:
                yield self.first + i
            return
        i = -1 if beyond is None else max(-1, beyond - self.first)
        while (i := alive.find(WANTED, i + 1)) >= 0:
            yield self.first + i

    def take(self, first: int, last: int) -> int:
        """Records ``first`` to ``last`` are under way; gives how many that are now and were not."""
        a, b = self._within(first, last)
        taken = self._alive.count(WANTED, a, b)
        self._alive[a:b] = self._alive[a:b].replace(bytes([WANTED]), bytes([TAKEN]))
        self.taken += taken
        return taken

    def forget(self, first: int, last: int) -> tuple[int, int, int]:
        """Records ``first`` to ``last`` are not wanted any more; gives how many were here, their bytes and their weight."""
        a, b = self._within(first, last)
        gone = [i for i in range(a, b) if self._alive[i]]
        size = sum(self.bytes_of(self.first + i) for i in gone)
        weight = sum(self._weights[i] for i in gone)
        self.taken -= self._alive.count(TAKEN, a, b)
        self._alive[a:b] = bytes(b - a)
        self.live -= len(gone)
        return len(gone), size, weight

    def _within(self, first: int, last: int) -> tuple[int, int]:
        """The part of a run that is in this file, as a slice."""
        a = max(first, self.first) - self.first
        return a, max(a, min(last, self.last) + 1 - self.first)

    def holes(self) -> Iterator[tuple[int, int]]:
        """Runs of records that are gone."""
        alive, i = self._alive, 0
        while (i := alive.find(GONE, i)) >= 0:
            here = [at for state in (WANTED, TAKEN) if (at := alive.find(state, i)) >= 0]
            stop = min(here, default=len(alive))
            yield self.first + i, self.first + stop - 1
            i = stop

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def delete(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)


class Notes:
    """The file of what is gone: each note is a run of records and the counters as they stand after it.

    A note that a power cut loses brings records back that were delivered: they are sent again, never lost.
    """

    def __init__(self, folder: Path, counters: int) -> None:
        self.path = folder / "notes"
        self.counters = [0] * counters
        self.size = 0
        self._fd = -1

    def load(self) -> list[tuple[int, int]]:
        """The runs that were noted; the counters are those of the last note."""
        runs: list[tuple[int, int]] = []
        data = self.path.read_bytes() if self.path.exists() else b""
        width = _NOTE.size + 4
        while len(data) - self.size >= width:
            body = data[self.size : self.size + _NOTE.size]
            if zlib.crc32(body, 1) != int.from_bytes(data[self.size + _NOTE.size : self.size + width], "little"):
                break
            first, last, *counters = _NOTE.unpack(body)
            runs.append((first, last))
            self.counters = list(counters[: len(self.counters)])
            self.size += width
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, self.size)
        return runs

    def add(self, runs: Iterable[tuple[int, int]]) -> None:
        """Note runs of records that are gone.

        :raises OSError: the disk is full or away; the file is as it was.
        """
        data = self._pack(runs)
        try:
            if os.pwrite(self._fd, data, self.size) < len(data):
                raise OSError(28, "No space left on device")
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += len(data)

    def rewrite(self, runs: Iterable[tuple[int, int]], *, sync: bool) -> None:
        """Replace all notes, at one stroke.

        :raises OSError: the disk is full or away; the file is as it was.
        """
        data = self._pack(runs)
        other = self.path.with_suffix(".new")
        fd = os.open(other, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.pwrite(fd, data, 0) < len(data):
                raise OSError(28, "No space left on device")
            if sync:
                os.fdatasync(fd)
            other.rename(self.path)
        except OSError:
            os.close(fd)
            other.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd, self.size = fd, len(data)

    def sync(self) -> None:
        """Have them on the disk.

        :raises OSError: the disk is full or away.
        """
        os.fdatasync(self._fd)

    def _pack(self, runs: Iterable[tuple[int, int]]) -> bytes:
        bodies = [_NOTE.pack(first, last, *self.counters) for first, last in runs]
        return b"".join(body + zlib.crc32(body, 1).to_bytes(4, "little") for body in bodies)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
