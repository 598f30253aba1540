"""Memory that processes of one machine share: a ring of slots, written by one process and read by others without a copy.

The memory is a file in ``/dev/shm`` that never has a name: a reader opens it by way of ``/proc/<process>/fd``. So nothing
is left over by whoever is killed, and nobody has to clean up after anybody: the kernel frees it with its last user.

A slot is *leased*, not looked at twice: whoever reads a slot holds the kernel's lock on it, whoever writes it holds the same
lock alone, and a lock goes with its process. A generation says what is in a slot; it is 0 while a slot is written, so what
a killed writer left half done is never taken for whole. ``docs/decisions/0014-shared-memory.md`` says why it is done so.

A writer that has no room leaves word which generation it waits for, and whoever ends the lease of that one rings a bell: a
byte in a pipe, which a reader opens as it opens the memory. A bell may stay silent (its reader was killed, or read something
else), so whoever waits for it looks from time to time all the same.

Linux only; the locks are those of open files (``F_OFD_SETLK``). Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from schemas.detached import Place

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = "/dev/shm"  # noqa: S108 - where the system keeps memory that is shared
MOST_READERS = 32
MOST_SLOTS = 512
_FEWEST = 8
"""Slots that a ring has in use at least, if it has as many: half of them are written while the others are read."""
ALIGNMENT = 64
"""Bytes that the parts of a slot begin at multiples of: a cache line."""
ATTACHING = 2.0
"""Seconds for which a reader that has not come yet is waited for."""

_MAGIC = b"penstock"
_PAGE = mmap.PAGESIZE
_WANTED = 32
"""Word with the generation at whose end the bell is to be rung; 0: nobody waits."""
_SEEN = 64
"""Word at which the readers' marks begin; each has a cache line."""
_STRIDE = 8
_SLOTS_AT = 4096
"""First byte of the file whose lock stands for a slot; the bytes before stand for the readers."""
_LOCK = struct.Struct("hhqqi4x")
_MARK = 16
_HEAD = struct.Struct(f"8s{_MARK}sQQQ")


class UnreachableError(OSError):
    """There is no such ring, or we may not have it."""


class OverwrittenError(LookupError):
    """The slot has been given to something newer."""


@cache
def _asked(kind: int, at: int) -> bytes:
    return _LOCK.pack(kind, os.SEEK_SET, at, 1, 0)


def _lock(fd: int, kind: int, at: int) -> bool:
    """Take or give back the lock of one byte; False: somebody else has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _asked(kind, at))
    except (BlockingIOError, PermissionError):
        return False
    return True


def working(slots: int) -> int:
    """How many of a ring's slots are in use while readers keep up: the fewer, the more of them are in the processor's cache."""
    return min(slots, max(slots // 4, _FEWEST))


class Ring:
    """The writer's side. Not thread-safe.

    :param slots: how many messages it holds; memory is taken for a slot when it is used first.
    :param size: bytes of a slot, at most.
    :param waits: for each reader whether a slot is kept for it until it has seen it (True), or may be written anew before.
    :param patience: seconds for which a reader that has not come yet is waited for.
    :raises OSError: there is no memory of this kind, or it is full.
    :ivar reach: most slots that are in use; whoever finds them too few says more. Fewer where there is no more memory.
    :ivar bell: descriptor that is readable after :meth:`call`; :meth:`hush` when it is.
    """

    def __init__(self, slots: int, size: int, waits: Sequence[bool], *, patience: float = ATTACHING) -> None:
        if not 0 < slots <= MOST_SLOTS or len(waits) > MOST_READERS:
            raise ValueError(f"{slots} slots for {len(waits)} readers")
        self.slots = slots
        self.size = -(-size // _PAGE) * _PAGE
        self.mark = os.urandom(_MARK)
        self._waits = tuple(waits)
        self._fd = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._fd, 2 * _PAGE + slots * self.size)
            os.posix_fallocate(self._fd, 0, 2 * _PAGE)  # writing to what is not there would be the end of the process
            self._memory = mmap.mmap(self._fd, 2 * _PAGE + slots * self.size)
        except BaseException:
            os.close(self._fd)
            raise
        self.bell, self._rope = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _HEAD.pack_into(self._memory, 0, _MAGIC, self.mark, slots, self.size, self._rope)
        self._view = memoryview(self._memory)
        self._words = self._view[:_PAGE].cast("Q")
        self._generations = self._view[_PAGE : 2 * _PAGE].cast("Q")
        self.reach = working(slots)
        self._backed = 0
        self._held = [0] * slots  # generation of each slot
        self._sent: deque[int] = deque()  # slots by generation, of which some reader has not seen all
        self._used: deque[int] = deque()  # slots that were seen by all and are leased or pinned, or were
        self._claimed: list[int] = []
        self._pinned: dict[int, int] = {}
        self._until = [time.monotonic() + patience] * len(waits)
        self._come = [False] * len(waits)
        self.generation = 0

    @property
    def pinned(self) -> int:
        """Slots that are kept for sending again."""
        return len(self._pinned)

    @property
    def memory(self) -> int:
        """Bytes of slots that are really there."""
        return self._backed * self.size

    def claim(self, most: int = 1) -> int:
        """Get hold of up to ``most`` slots that every reader has seen; if there is none, of one that none waits for.

        :returns: how many are ready to be written.
        """
        claimed, sent, used, held = self._claimed, self._sent, self._used, self._held
        least = self._least()
        while sent and held[sent[0]] <= least:
            used.append(sent.popleft())
        for _ in range(len(used)):
            if len(claimed) >= most:
                break
            slot = used.popleft()
            if slot not in self._pinned and self._take(slot):
                claimed.append(slot)
            else:
                used.append(slot)
        while len(claimed) < most and self._backed < self.reach and (new := self._back()) is not None:
            claimed.append(new)
        if not claimed and (late := self._late()) is not None:
            claimed.append(late)
        return len(claimed)

    def call(self, most: int) -> None:
        """Have :attr:`bell` rung once ``most`` slots are likely to be there for :meth:`claim`, which is to be asked again then:
        whoever had one before this call rings no more.
        """
        missing = most - len(self._claimed)
        busy = sorted(self._held[slot] for slot in chain(self._used, self._sent) if slot not in self._pinned)
        self._words[_WANTED] = busy[min(missing, len(busy)) - 1] if missing > 0 and busy else 0

    def hush(self) -> None:
        """Take what was rung."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.bell, 4096)

    def put(self, parts: Sequence[Any], number: int = 0) -> tuple[Place, list[int]] | None:
        """Copy ``parts`` (C-contiguous buffers) into a slot.

        :param number: keep the slot until :meth:`release` is told this number; 0: it may go when its readers are done.
        :returns: where it is, and where each part begins in the slot; None: no slot is free, or it is too large.
        """
        views = [memoryview(part).cast("B") if memoryview(part).nbytes else b"" for part in parts]
        offsets, end = [], 0
        for view in views:
            offsets.append(end)
            end += -(-len(view) // ALIGNMENT) * ALIGNMENT
        if end > self.size or not (self._claimed or self.claim()):
            return None
        slot = self._claimed.pop()  # the one that got free last: the fewer are in use, the more of them are in a cache
        self._generations[slot] = 0
        base = 2 * _PAGE + slot * self.size
        for view, offset in zip(views, offsets, strict=True):
            self._view[base + offset : base + offset + len(view)] = view
        self.generation += 1
        self._generations[slot] = self._held[slot] = self.generation
        self._sent.append(slot)
        if number:
            self._pinned[slot] = number
        _lock(self._fd, fcntl.F_UNLCK, _SLOTS_AT + slot)
        return Place(os.getpid(), self._fd, self.mark, slot, self.generation), offsets

    def release(self, upto: int) -> None:
        """What was kept by a number up to this one need not be sent again."""
        if self._pinned:
            for slot in [slot for slot, number in self._pinned.items() if number <= upto]:
                del self._pinned[slot]

    def view(self, place: Place) -> memoryview:
        """What a kept slot holds.

        :raises OverwrittenError: something else.
        """
        if place.mark != self.mark or self._generations[place.slot] != place.generation:
            raise OverwrittenError(place.slot)
        base = 2 * _PAGE + place.slot * self.size
        return self._view[base : base + self.size].toreadonly()

    def close(self) -> None:
        """Give the memory up; readers keep theirs until they are done."""
        for part in (self._words, self._generations, self._view):
            part.release()
        self._memory.close()
        for fd in (self._fd, self.bell, self._rope):
            os.close(fd)

    def _least(self) -> int:
        """Every reader has seen the generations up to here."""
        seen = self._words[_SEEN : _SEEN + _STRIDE * len(self._waits) : _STRIDE].tolist()
        return min(seen, default=self.generation)

    def _late(self) -> int | None:
        """The oldest slot that no reader waits for, locked."""
        waited = [
            seen
            for i, waits in enumerate(self._waits)
            if waits and self._there(i, seen := self._words[_SEEN + _STRIDE * i])
        ]
        least = min(waited, default=self.generation)
        for slot in self._sent:
            if self._held[slot] > least:
                break
            if slot not in self._pinned and self._take(slot):
                self._sent.remove(slot)
                return slot
        return None

    def _take(self, slot: int) -> bool:
        return _lock(self._fd, fcntl.F_WRLCK, _SLOTS_AT + slot)

    def _back(self) -> int | None:
        """Get memory for one slot more, and lock it.

        :raises OSError: there is not even memory for the first.
        """
        slot = self._backed
        try:
            os.posix_fallocate(self._fd, 2 * _PAGE + slot * self.size, self.size)
        except OSError:
            if not slot:
                raise
            self.reach = self._backed
            return None
        self._backed += 1
        return slot if self._take(slot) else None

    def _there(self, reader: int, seen: int) -> bool:
        """Whether a reader is there, or has yet to come."""
        if not self._come[reader] and seen:
            self._come[reader] = True
        if not _lock(self._fd, fcntl.F_WRLCK, 1 + reader):
            return True
        _lock(self._fd, fcntl.F_UNLCK, 1 + reader)
        return not self._come[reader] and time.monotonic() < self._until[reader]


class _Mapping:
    """A ring as one reader has it open. Lives as long as a lease of it."""

    def __init__(self, place: Place, reader: int) -> None:
        self.mark = place.mark
        self.fd = self._rope = -1
        self._leases: dict[int, weakref.ref[Any]] = {}
        try:
            self.fd = _reopened(place.process, place.descriptor, os.O_RDWR, _is_memory)
            magic, mark, slots, size, rope = _HEAD.unpack(os.pread(self.fd, _HEAD.size, 0))
            if (magic, mark) != (_MAGIC, place.mark) or not 0 < slots <= MOST_SLOTS or size % _PAGE:
                raise UnreachableError("no ring of ours is there")
            whole = 2 * _PAGE + slots * size
            if os.fstat(self.fd).st_size != whole:
                raise UnreachableError("a ring of another size")
            self.slots, self.size = slots, size
            self._rope = _reopened(place.process, rope, os.O_WRONLY | os.O_NONBLOCK, _is_pipe)
            self._head = memoryview(mmap.mmap(self.fd, 2 * _PAGE))
            self._memory = mmap.mmap(self.fd, whole, prot=mmap.PROT_READ)
        except UnreachableError:
            raise
        except (OSError, struct.error, ValueError) as error:
            raise UnreachableError(str(error)) from None
        self._words = self._head[:_PAGE].cast("Q")
        self._generations = self._head[_PAGE:].cast("Q")
        self._seen = _SEEN + _STRIDE * reader
        _lock(self.fd, fcntl.F_RDLCK, 1 + reader)

    def __del__(self) -> None:
        for fd in (self.fd, self._rope):
            if fd >= 0:
                os.close(fd)

    def lease(self, place: Place) -> NDArray[Any]:
        import numpy as np

        slot = place.slot
        if not 0 <= slot < self.slots:
            raise OverwrittenError(slot)
        if not _lock(self.fd, fcntl.F_RDLCK, _SLOTS_AT + slot):
            raise OverwrittenError(slot)
        generation = self._generations[slot]
        if generation != place.generation:
            _lock(self.fd, fcntl.F_UNLCK, _SLOTS_AT + slot)
            raise OverwrittenError(slot)
        array = np.frombuffer(self._memory, np.uint8, self.size, 2 * _PAGE + slot * self.size)

        def over(_: object) -> None:  # perhaps in another thread: nobody leases this slot again before it is unlocked
            self._leases.pop(slot, None)
            _lock(self.fd, fcntl.F_UNLCK, _SLOTS_AT + slot)
            self._ring(generation)

        self._leases[slot] = weakref.ref(array, over)
        return array

    def saw(self, generation: int) -> None:
        if generation > self._words[self._seen]:
            self._words[self._seen] = generation

    def _ring(self, generation: int) -> None:
        """Tell the writer that this slot is free again, if it waits for that."""
        wanted = self._words[_WANTED]
        if wanted and generation >= wanted:
            self._words[_WANTED] = 0
            with contextlib.suppress(
                BlockingIOError, BrokenPipeError
            ):  # it is rung already, or nobody is there any more
                os.write(self._rope, b"\0")


class Reader:
    """One reader's side of the rings of one writer.

    :param number: its number among the readers of the ring.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._mapping: _Mapping | None = None
        self._last = 0

    def lease(self, place: Place) -> NDArray[Any]:
        """The slot's bytes, read-only and without a copy. It stays as it is as long as any view of the array is alive.

        A place is leased once: again it counts as overwritten.

        :raises OverwrittenError: something newer is there.
        :raises UnreachableError: the ring is gone, or not for us.
        """
        mapping = self._mapping
        if mapping is None or mapping.mark != place.mark:
            self._mapping = None
            mapping = self._mapping = _Mapping(place, self._number)
            self._last = 0
        if place.generation <= self._last:
            raise OverwrittenError(place.slot)
        self._last = place.generation
        try:
            return mapping.lease(place)
        finally:
            mapping.saw(place.generation)

    @property
    def slots(self) -> int:
        """How many of the ring are in use while all keep up; 0: no ring was seen."""
        return 0 if self._mapping is None else working(self._mapping.slots)

    def close(self) -> None:
        """Read no more; what is leased stays."""
        self._mapping = None


def _is_memory(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and not found.st_nlink


def _is_pipe(found: os.stat_result) -> bool:
    return stat.S_ISFIFO(found.st_mode)


def _reopened(process: int, descriptor: int, flags: int, ours: Callable[[os.stat_result], bool]) -> int:
    """What another process of our own user has open, opened by ourselves.

    :param ours: whether it is what it should be; a place may come from anybody, and nothing else is opened.
    """
    path = f"/proc/{process:d}/fd/{descriptor:d}"
    look = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(look)
        if not ours(found) or found.st_uid != os.geteuid():
            raise UnreachableError(f"{path} is no shared memory of ours")
        return os.open(f"/proc/self/fd/{look}", flags | os.O_CLOEXEC)
    finally:
        os.close(look)
