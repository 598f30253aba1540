"""The spool of a node beside its journal: used by a thread of its own, and changed only as the journal's commits say.

See :mod:`nodes.spooling` for what is done in which order, and why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from broker.spool import Count, Item, Overflow, Run, Spool
from broker.spool_segment import FRAME
from nodes.uplink import Spool as Options
from schemas import codec
from schemas.errors import PayloadError
from schemas.messages import Message

T = TypeVar("T")

_AT_ONCE = 1 << 20
"""Bytes read at once, and so under way at most, but for a single larger message."""
_SPARE = 1 << 20
"""Bytes of the disk left free, so that the journals on it, ours too, can go on."""
_MOST_RUNS = 64


class Record(msgspec.Struct, array_like=True, gc=False):
    """What is stored of a message beside its edge, which is the topic.

    :param arrived: ns since the epoch.
    """

    arrived: int
    trace: str | None
    message: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def pack(message: Message, arrived: int) -> bytes:
    """A message as it is stored.

    :raises TypeError: ValueError, OverflowError: it cannot be encoded (a nodes' own object within one process).
    """
    return _encode(Record(arrived, message.trace, codec.encode(message)))


def unpack(payload: bytes) -> tuple[Message, int]:
    """The message, and when it had arrived.

    :raises PayloadError: this is none; another version of us wrote it.
    """
    try:
        record = _decode(payload)
    except msgspec.DecodeError as error:
        raise PayloadError("bad-body", f"not a record of a spool: {error}") from None
    return codec.decode(record.message, trace=record.trace), record.arrived


class Shelf:
    """The spool and what the journal is to say of it.

    :param thread: name of the thread.
    :ivar high: number of the last message whose arrival is in the books; what comes after is not read.
    """

    def __init__(self, folder: Path, options: Options, thread: str) -> None:
        self.high = 0
        self._folder = folder
        self._options = options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=thread)
        self._going: list[tuple[int, int, bool]] = []  # gone by the books (True: evicted); not committed
        self._committing: list[tuple[int, int, bool]] = []
        self._gone: list[tuple[int, int]] = []  # committed; a power cut may still bring them back

    async def open(self) -> None:
        """Open the folder.

        :raises BusError: it cannot be used, or another process does.
        """
        self._spool = await self._do(self._open)

    def _open(self) -> Spool:
        # what is evicted goes when the journal has it, see evict(): to the spool that is "block"
        policy: Overflow = "drop-newest" if self._options.overflow == "drop-newest" else "block"
        return Spool(self._folder, self._options.size, overflow=policy, order=self._options.order, spare=_SPARE)

    @property
    def kept(self) -> Count:
        """Messages, bytes and rows that are in it."""
        return self._spool.figures.kept

    @property
    def cut(self) -> int:
        """Bytes of its end that were damaged when it was opened."""
        return self._spool.cut

    @property
    def waiting(self) -> int:
        """Messages that may be read."""
        return self._spool.waiting

    @property
    def moving(self) -> bool:
        """Something is gone by the books and not yet from the disk."""
        return bool(self._going or self._committing)

    def size(self, topic: str, payload: bytes) -> int:
        """Bytes that a message takes; more than :meth:`fits` allows: it can never be stored."""
        return FRAME + len(topic) + len(payload)

    def fits(self, size: int) -> bool:
        """Whether so large a message can be stored at all."""
        return self._spool.fits(size)

    # -- after a start

    async def reconcile(self, position: Any) -> list[tuple[str, str, int]]:
        """Take out what the journal says is gone; gives (topic, id, rows) of what is stored and not in the journal.

        :param position: as :meth:`position` gave it to the last commit; None: there was none.
        """
        known: dict[str, Any] = position or {"high": 0, "gone": []}
        last = self._spool.last
        # numbers that a damaged end took with it are used again
        runs = [(first, min(end, last)) for first, end in known["gone"] if first <= last]

        def settle() -> list[tuple[str, str, int]]:
            for run in runs:
                self._spool.remove(*run)
            return [(it.topic, _ident(it.payload), it.weight) for it in self._spool.after(known["high"])]

        found = await self._do(settle)
        self._gone = [] if await self._do(self._sync) else runs
        self.high = self._spool.last
        return found

    # -- in and out

    async def append(
        self, batch: Sequence[tuple[str, bytes]], rows: Sequence[int], *, drop: bool = False
    ) -> tuple[int, list[int]]:
        """Store messages; how many are dealt with, and the indices of those that were dropped.

        :param drop: what does not fit is dropped, whatever the policy.
        :raises NoRoomError: the disk is full; nothing is stored.
        """
        refused: list[int] = []
        overflow: Overflow | None = "drop-newest" if drop else None
        done = await self._do(lambda: self._spool.append(batch, rows, refused=refused, overflow=overflow))
        return done, refused

    def booked(self) -> None:
        """The arrival of all that is stored is in the books."""
        self.high = self._spool.last

    async def read(self, most: int) -> tuple[list[Item], int]:
        """The next messages, under way from now on; and the rows that the disk has lost.

        :raises BusError: the disk does not let us read.
        """
        high, size = self.high, min(_AT_ONCE, self._spool.room // 8)

        def read() -> tuple[list[Item], int]:
            before = self.kept.weight
            batch = [item for item in self._spool.read(most, size) if item.number <= high]
            for run in runs_of(batch):
                self._spool.take(*run)
            return batch, before - self.kept.weight

        return await self._do(read)

    async def doom(self, size: int) -> list[Run]:
        """The oldest files that must go for ``size`` more bytes; what is in them is not read any more."""

        def doom() -> list[Run]:
            runs = self._spool.victims(size)
            for run in runs:
                self._spool.take(run.first, run.last)
            return runs

        return await self._do(doom)

    def gone(self, batch: Sequence[Item]) -> None:
        """The books say that these were written, or rejected."""
        self._going += [(*run, False) for run in runs_of(batch)]

    def evicted(self, runs: Sequence[Run]) -> None:
        """The books say that these were dropped."""
        self._going += [(run.first, run.last, True) for run in runs]

    # -- commits

    def position(self) -> dict[str, Any]:
        """What the commit that is being made says of the spool."""
        self._committing, self._going = self._going, []
        return {"high": self.high, "gone": merged([*self._gone, *(run[:2] for run in self._committing)])}

    async def committed(self) -> None:
        """That commit is there: what it says is gone goes."""
        runs = self._committing

        def forget() -> None:
            for first, last, evicted in runs:
                (self._spool.evict if evicted else self._spool.remove)(first, last)

        await self._do(forget)
        self._gone = merged([*self._gone, *(run[:2] for run in runs)])
        self._committing = []
        if len(self._gone) > _MOST_RUNS and await self._do(self._sync):
            self._gone = []

    async def close(self, *, erase: bool) -> None:
        """Close the files; or delete them, since nothing is in them and the run is complete."""
        await self._do(self._spool.erase if erase else self._spool.close)
        self._thread.shutdown(wait=False)

    def _sync(self) -> bool:
        try:
            self._spool.sync()
        except OSError:
            return False
        return True

    async def _do(self, act: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)


def _ident(payload: bytes) -> str:
    try:
        return unpack(payload)[0].id
    except PayloadError:  # it goes to the dead letters when its turn comes
        return ""


def runs_of(batch: Sequence[Item]) -> list[tuple[int, int]]:
    """The numbers of a batch as runs without gaps."""
    return merged([(item.number, item.number) for item in batch])


def merged(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same runs in order, neighbours made one."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], last))
        else:
            out.append((first, last))
    return out
