"""What a spool is on the disk: its files, opened, written, forgotten and closed. What is kept and what goes is decided in
:mod:`broker.spool`.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path
from typing import Self

from broker.spool_figures import Count, Figures, NoRoomError
from broker.spool_segment import FRAME, NOTE, Notes, Segment
from schemas.errors import BusError

RESERVE = 16 * 1024
"""Bytes of the budget that are kept free for the notes of what is gone."""
SEGMENTS = 32
_COMPACT = 4 * 1024
DELIVERED, EVICTED, REFUSED, DAMAGED, _COUNTERS = 0, 3, 6, 9, 11
"""Where the notes count what: messages, bytes, weight; of the damaged no bytes."""


class Store:
    """The files in ``folder``, made if it is not there. One process at a time may have it open.

    :raises BusError: another process has it open, or the folder cannot be used.
    """

    def __init__(self, folder: Path, budget: int, *, durable: bool, spare: int) -> None:
        self.folder = folder
        self.budget = budget
        self.durable = durable
        self.spare = spare
        self.held: Sequence[tuple[int, int]] = ()
        """Runs of numbers (first, last) that ``drop-oldest`` spares, with their segments: they are on their way."""
        self.on_loss: Callable[[int, int, bool], None] | None = None
        """Told of runs (first, last) that were evicted, or (True) that the disk did not give back."""
        self.cut = 0
        """Bytes behind the last whole message that were found, and cut off, when it was opened."""
        self._piece = (budget - RESERVE) // SEGMENTS
        self._segments: deque[Segment] = deque()
        self._used = 0
        self._next = 1
        self._kept = [0, 0, 0]
        self._waiting = 0
        self._stale = False  # the disk did not take a note
        self._compact_at = _COMPACT
        self._notes = Notes(folder, _COUNTERS)
        self._lock = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError:
            self.close()
            raise BusError(f"the spool {folder} is in use by another process") from None
        except OSError as error:
            self.close()
            raise BusError(f"the spool {folder} cannot be used: {error.strerror or error}") from error

    def __len__(self) -> int:
        """Messages kept."""
        return self._kept[0]

    @property
    def waiting(self) -> int:
        """Messages kept that are not under way. May be asked by another thread, as may the figures."""
        return self._waiting

    @property
    def last(self) -> int:
        """Number of the message stored last; 0: none was."""
        return self._next - 1

    @property
    def room(self) -> int:
        """Bytes that records may have together; the rest is for the notes, of which there may be many with ``newest``."""
        return self.budget - max(RESERVE, self._compact_at + NOTE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def figures(self) -> Figures:
        """The books."""
        c = self._notes.counters
        return Figures(
            stored=self._next - 1,
            kept=Count(*self._kept),
            removed=Count(*c[DELIVERED : DELIVERED + 3]),
            evicted=Count(*c[EVICTED : EVICTED + 3]),
            refused=Count(*c[REFUSED : REFUSED + 3]),
            damaged=c[DAMAGED],
            disk=self._used + self._notes.size,
        )

    def erase(self) -> None:
        """Close it and delete its files, and the folder if nothing else is in it."""
        self._release()
        for path in (*self.folder.glob("*.seg"), *self.folder.glob("notes*"), self.folder / "lock"):
            if path.stem.isdecimal() or path.suffix in {"", ".new"}:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        self._unlock()

    def close(self) -> None:
        """Close the files. Nothing is lost that was appended."""
        self._release()
        self._unlock()

    def _release(self) -> None:
        for segment in self._segments:
            segment.close()
        self._segments.clear()
        self._notes.close()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # the segments

    def _write(self, frames: list[bytes]) -> None:
        """Append to the last segment, or to a new one where that is full."""
        size = sum(map(len, frames))
        if self.spare:
            disk = os.statvfs(self.folder)
            if disk.f_bavail * disk.f_frsize < self.spare + size:
                raise OSError(ENOSPC, os.strerror(ENOSPC))
        last = self._segments[-1] if self._segments else None
        # the file with the last number may be gone, as a whole, and the numbers of one file have no gaps
        if last is None or last.last + 1 != self._next or (last.size and last.size + size > self._piece):
            if last is not None:
                self._sync(last)
            self._segments.append(Segment(self.folder, self._next))
            self._sync_folder()
            if last is not None and not last.live:
                self._delete(last)
        segment = self._segments[-1]
        segment.append(frames)
        self._used += size
        self._kept[0] += len(frames)
        self._kept[1] += size - FRAME * len(frames)
        self._kept[2] += sum(map(segment.weight_of, range(self._next, self._next + len(frames))))
        self._next += len(frames)
        self._waiting += len(frames)

    def _delete(self, segment: Segment) -> None:
        self._segments.remove(segment)
        self._used -= segment.size
        segment.delete()
        if self._stale:
            self._note([])  # now there may be room for it

    # what is gone

    def _count(self, which: int, messages: int, size: int, weight: int) -> None:
        counters = self._notes.counters
        counters[which] += messages
        if which == DAMAGED:
            counters[which + 1] += weight
        else:
            counters[which + 1] += size
            counters[which + 2] += weight

    def _forget(self, first: int, last: int, which: int) -> int:
        gone, last = 0, min(last, self._next - 1)
        touched = [s for s in self._segments if s.first <= last and s.last >= first]
        for segment in touched:
            taken = segment.taken
            messages, size, weight = segment.forget(first, last)
            self._waiting -= messages - (taken - segment.taken)
            self._kept[0] -= messages
            self._kept[1] -= size
            self._kept[2] -= weight
            self._count(which, messages, size, weight)
            gone += messages
        if gone:
            self._note([(first, last)])
            if which in {EVICTED, DAMAGED} and self.on_loss is not None:
                self.on_loss(first, last, which == DAMAGED)
        for segment in touched:
            if segment is not self._segments[-1] and not segment.live:
                self._delete(segment)
        return gone

    def _note(self, runs: list[tuple[int, int]]) -> None:
        """Write down what is gone. If the disk has no room for that, it is done later: it may then come again."""
        try:
            if self._stale or self._notes.size > self._compact_at:
                self._notes.rewrite(self._gone(), sync=self.durable)
                self._compact_at = max(_COMPACT, 2 * self._notes.size)
            else:
                self._notes.add(runs)
            self._stale = False
        except OSError:
            self._stale = True

    def _gone(self) -> Iterator[tuple[int, int]]:
        """Every run of numbers that are not here any more."""
        before = 0
        for segment in self._segments:
            if segment.first > before:
                yield before, segment.first - 1
            yield from segment.holes()
            before = segment.last + 1
        if before < self._next:
            yield before, self._next - 1

    # opening

    def _load(self) -> None:
        runs = self._notes.load()
        for path in sorted(path for path in self.folder.glob("*.seg") if path.stem.isdecimal()):
            segment = Segment(self.folder, int(path.stem))
            self._segments.append(segment)
            self.cut += segment.load()
        ends = [last for _, last in runs] + [s.last for s in self._segments]
        self._next = max(ends, default=0) + 1
        for first, last in runs:
            for segment in self._segments:
                segment.forget(first, last)
        counters = self._notes.counters
        for segment in tuple(self._segments):
            if not segment.live:
                self._segments.remove(segment)
                segment.delete()
        for segment in self._segments:
            self._used += segment.size
            self._kept[0] += segment.live
            self._waiting += segment.live
            self._kept[1] += sum(map(segment.bytes_of, segment.wanted()))
            self._kept[2] += sum(map(segment.weight_of, segment.wanted()))
        accounted = self._kept[0] + counters[DELIVERED] + counters[EVICTED] + counters[DAMAGED]
        counters[DAMAGED] += max(0, self._next - 1 - accounted)
        self._stale = True
        self._note([])

    def _sync(self, segment: Segment) -> None:
        if self.durable:
            try:
                segment.sync()
            except OSError as error:
                raise NoRoomError(f"the disk of the spool {self.folder} fails: {error.strerror or error}") from error

    def _sync_folder(self) -> None:
        if self.durable:
            fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
