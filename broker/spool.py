"""A durable first-in-first-out store of messages on disk, within a byte budget, for a far end that may be away.

Uplinks and relays append what arrives, read it in order (or newest first), and remove what was delivered. What was appended
survives SIGKILL, and a power cut when ``durable``; removals survive SIGKILL, and a power cut may bring some back: what was
delivered may then be delivered again, so the far end must know repeats.

The store is a folder of segment files, each a 32nd of the budget. Measured against a table in SQLite (WAL) in batches of 50:
each byte of 200-byte messages is written 1.1 times (durable: 1.5) against 8 times, which is what wears SD cards out; durable
appends are about as fast. See ``docs/decisions/0010-spool-in-segments.md``.

What the budget bounds is the sum of the lengths of the files, whatever the policy:

- ``drop-oldest``: the oldest segment goes, as a whole, as often as it takes (what is :attr:`Spool.held` stays); so the newest
  messages are kept: of the budget less :data:`RESERVE`, all but a 32nd, where messages are much smaller than a segment.
- ``drop-newest``: a message that does not fit is dropped.
- ``block``: the caller keeps what does not fit, and offers it again later.

Space comes back by whole segments too. Not safe for threads: one caller at a time (:func:`asyncio.to_thread`, if the disk is
slow).
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self, TypeAlias

import msgspec

from broker.spool_segment import FRAME, Notes, Segment, frame
from schemas.errors import BusError, ConfigError

Overflow: TypeAlias = Literal["drop-oldest", "drop-newest", "block"]
Order: TypeAlias = Literal["oldest", "newest"]
RESERVE = 16 * 1024
"""Bytes of the budget that are kept free for the notes of what is gone."""
LEAST = 128 * 1024
"""Smallest budget."""
_SEGMENTS = 32
_COMPACT = 4 * 1024
_DELIVERED, _EVICTED, _REFUSED, _DAMAGED = 0, 2, 4, 6


class Item(msgspec.Struct, frozen=True, gc=False):
    """One message in the store. ``number`` grows by one with each message stored, and is never used again."""

    number: int
    topic: str
    payload: bytes


class Count(msgspec.Struct, frozen=True):
    """Messages, and bytes of their topics and payloads."""

    messages: int = 0
    bytes: int = 0


class Figures(msgspec.Struct, frozen=True):
    """The books since the store was made. ``stored == kept + removed + evicted``, but for what the disk lost.

    :param stored: messages that were taken in.
    :param kept: what is here now.
    :param removed: taken out by :meth:`Spool.remove`.
    :param evicted: dropped by ``drop-oldest``.
    :param refused: dropped by ``drop-newest``, or larger than the whole budget.
    :param damaged: messages that were stored and that the disk did not give back.
    :param disk: bytes that the files have now.
    """

    stored: int
    kept: Count
    removed: Count
    evicted: Count
    refused: Count
    damaged: int
    disk: int


class NoRoomError(BusError):
    """The disk refuses to take more. What is stored is kept; try again when there is room."""


class Spool:
    """The store in ``folder``, made if it is not there. One process at a time may have it open.

    :param budget: most bytes that the files may have together, :data:`LEAST` or more.
    :param overflow: what happens when the budget is used up.
    :param order: ``oldest`` or ``newest``: what :meth:`read` gives first.
    :param durable: :meth:`append` returns when the messages are on the disk; otherwise they survive the death of the
        process, not of the machine.
    :raises ConfigError: the budget is too small.
    :raises BusError: another process has it open, or the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        *,
        overflow: Overflow = "drop-oldest",
        order: Order = "oldest",
        durable: bool = True,
    ) -> None:
        if budget < LEAST:
            raise ConfigError(f"a spool of {budget} bytes, at least {LEAST}")
        self.folder = folder
        self.budget = budget
        self.overflow = overflow
        self.order = order
        self.durable = durable
        self.held: Sequence[tuple[int, int]] = ()
        """Runs of numbers (first, last) that ``drop-oldest`` spares, with their segments: they are on their way."""
        self.on_loss: Callable[[int, int, bool], None] | None = None
        """Told of runs (first, last) that were evicted, or (True) that the disk did not give back."""
        self.cut = 0
        """Bytes behind the last whole message that were found, and cut off, when it was opened."""
        self._room = budget - RESERVE
        self._piece = self._room // _SEGMENTS
        self._segments: deque[Segment] = deque()
        self._used = 0
        self._next = 1
        self._kept = [0, 0]
        self._stale = False  # the disk did not take a note
        self._compact_at = _COMPACT
        self._notes = Notes(folder, 7)
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
            removed=Count(c[_DELIVERED], c[_DELIVERED + 1]),
            evicted=Count(c[_EVICTED], c[_EVICTED + 1]),
            refused=Count(c[_REFUSED], c[_REFUSED + 1]),
            damaged=c[_DAMAGED],
            disk=self._used + self._notes.size,
        )

    def append(self, batch: Sequence[tuple[str, bytes | memoryview]]) -> int:
        """Store (topic, payload) in order; durable, with one wait for the disk, when it returns.

        :returns: how many of ``batch``, from its beginning, are dealt with: stored, or dropped as the policy says. Fewer than
            all only with ``block``, a full disk, or where all that could be evicted is held: offer the others again when
            there is room.
        :raises NoRoomError: the disk is full or away, and not even one was dealt with.
        """
        names = [topic.encode() for topic, _ in batch]
        if any(len(name) > 0xFFFF for name in names):
            raise ValueError("a topic of more than 65535 bytes")
        done = 0  # of batch: written, or dropped; what comes after is in frames, or counted in dropped
        frames: list[bytes] = []
        waiting = 0
        dropped = [0, 0]

        def flush(upto: int) -> None:
            nonlocal done, waiting
            if frames:
                self._write(frames)
            if dropped[0]:
                self._count(_REFUSED, *dropped)
                self._note([(0, 0)])
            done, waiting, dropped[:] = upto, 0, [0, 0]
            frames.clear()

        try:
            for i, (name, (_, payload)) in enumerate(zip(names, batch, strict=True)):
                size = FRAME + len(name) + len(payload)
                if frames and self._active_size() + waiting + size > self._piece:
                    flush(i)
                if self._used + waiting + size > self._room:
                    if frames:
                        flush(i)
                    if size > self._room or not self._reclaim(size):
                        if size > self._room or self.overflow == "drop-newest":
                            dropped = [dropped[0] + 1, dropped[1] + size - FRAME]
                            continue
                        while self.overflow == "drop-oldest" and self._used + size > self._room and self._evict():
                            pass
                        if self._used + size > self._room:
                            break
                frames.append(frame(self._next + len(frames), name, payload))
                waiting += size
            else:
                i = len(batch)
            flush(i)
        except OSError as error:
            if not done:
                raise NoRoomError(f"the spool {self.folder} takes no more: {error.strerror or error}") from error
        if self._segments:
            self._sync(self._segments[-1])
        return done

    def read(self, messages: int, size: int = 1 << 20, *, beyond: int | None = None) -> list[Item]:
        """The next ones in the chosen order; they stay stored.

        :param messages: most of them.
        :param size: most bytes of payload together; one message is given in any case.
        :param beyond: number of the last one read before: only those that follow it (in the chosen order) are given, so that
            several batches can be under way. What came meanwhile and belongs before it is given by a read without.
        :raises BusError: the disk does not let us read.
        """
        out: list[Item] = []
        damaged = []
        for segment, number in self._wanted(beyond):
            if len(out) >= messages:
                break
            try:
                got = segment.read(number)
            except OSError as error:
                if out:
                    break
                raise BusError(f"the spool {self.folder} cannot be read: {error.strerror or error}") from error
            if got is None:
                damaged.append(number)
                continue
            size -= len(got[1])
            if out and size < 0:
                break
            out.append(Item(number, *got))
        for number in damaged:
            self._forget(number, number, _DAMAGED)
        return out

    def remove(self, first: int, last: int) -> int:
        """Messages ``first`` to ``last`` were delivered; those of them that are still here are taken out. Gives how many."""
        return self._forget(min(first, last), max(first, last), _DELIVERED)

    def close(self) -> None:
        """Close the files. Nothing is lost that was appended."""
        for segment in self._segments:
            segment.close()
        self._segments.clear()
        self._notes.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # the segments

    def _active_size(self) -> int:
        return self._segments[-1].size if self._segments else 0

    def _reclaim(self, size: int) -> bool:
        """Delete the files in which nothing is wanted any more, the last one too; gives whether there is room now."""
        for segment in [s for s in self._segments if s.size and not s.live]:
            self._delete(segment)
        return self._used + size <= self._room

    def _write(self, frames: list[bytes]) -> None:
        """Append to the last segment, or to a new one where that is full."""
        size = sum(map(len, frames))
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
        self._next += len(frames)
        self._used += size
        self._kept[0] += len(frames)
        self._kept[1] += size - FRAME * len(frames)

    def _evict(self) -> bool:
        """Drop the oldest segment of which nothing is held; False if there is none."""
        for oldest in self._segments:
            if not any(first <= oldest.last and last >= oldest.first for first, last in self.held):
                break
        else:
            return False
        self._forget(oldest.first, oldest.last, _EVICTED)
        if oldest in self._segments:  # it was the last one
            self._delete(oldest)
        return True

    def _delete(self, segment: Segment) -> None:
        self._segments.remove(segment)
        self._used -= segment.size
        segment.delete()
        if self._stale:
            self._note([])  # now there may be room for it

    def _wanted(self, beyond: int | None) -> Iterator[tuple[Segment, int]]:
        newest = self.order == "newest"
        for segment in reversed(self._segments) if newest else self._segments:
            for number in segment.wanted(newest=newest, beyond=beyond):
                yield segment, number

    # what is gone

    def _count(self, which: int, messages: int, size: int) -> None:
        self._notes.counters[which] += messages
        if which != _DAMAGED:
            self._notes.counters[which + 1] += size

    def _forget(self, first: int, last: int, which: int) -> int:
        gone, last = 0, min(last, self._next - 1)
        touched = [s for s in self._segments if s.first <= last and s.last >= first]
        for segment in touched:
            messages, size = segment.forget(first, last)
            self._kept[0] -= messages
            self._kept[1] -= size
            self._count(which, messages, size)
            gone += messages
        if gone:
            self._note([(first, last)])
            if which in {_EVICTED, _DAMAGED} and self.on_loss is not None:
                self.on_loss(first, last, which == _DAMAGED)
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
            self._kept[1] += sum(map(segment.bytes_of, segment.wanted()))
        accounted = self._kept[0] + counters[_DELIVERED] + counters[_EVICTED] + counters[_DAMAGED]
        counters[_DAMAGED] += max(0, self._next - 1 - accounted)
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
