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

Space comes back by whole segments too.

Who keeps books of his own says with :meth:`Spool.take` what is under way, and with :meth:`Spool.remove` or :meth:`Spool.evict`
what became of it when his books are safe; he opens it with ``block`` and asks :meth:`Spool.victims` what has to go.

Not safe for threads: one caller at a time (a thread of its own, if the disk is slow).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from broker.spool_figures import Count, Figures, Item, NoRoomError, Run
from broker.spool_segment import FRAME, Segment, frame
from broker.spool_store import DAMAGED, DELIVERED, EVICTED, REFUSED, RESERVE, Store
from schemas.errors import BusError, ConfigError
from schemas.keeping import LEAST, Order, Overflow

__all__ = ["LEAST", "RESERVE", "Count", "Figures", "Item", "NoRoomError", "Order", "Overflow", "Run", "Spool"]


class Spool(Store):
    """The store in ``folder``, made if it is not there. One process at a time may have it open.

    :param budget: most bytes that the files may have together, :data:`LEAST` or more.
    :param overflow: what happens when the budget is used up.
    :param order: ``oldest`` or ``newest``: what :meth:`read` gives first.
    :param durable: :meth:`append` returns when the messages are on the disk; otherwise they survive the death of the
        process, not of the machine.
    :param spare: bytes of the disk that are left to others: with fewer free it counts as full.
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
        spare: int = 0,
    ) -> None:
        if budget < LEAST:
            raise ConfigError(f"a spool of {budget} bytes, at least {LEAST}")
        super().__init__(folder, budget, durable=durable, spare=spare)
        self.overflow = overflow
        self.order = order

    def append(
        self,
        batch: Sequence[tuple[str, bytes | memoryview]],
        weights: Sequence[int] | None = None,
        *,
        refused: list[int] | None = None,
        overflow: Overflow | None = None,
    ) -> int:
        """Store (topic, payload) in order; durable, with one wait for the disk, when it returns.

        :param weights: what each counts as; 1 if left out.
        :param refused: gets the indices of those that were dropped (``drop-newest``, larger than the budget).
        :param overflow: another policy for this call.
        :returns: how many of ``batch``, from its beginning, are dealt with: stored, or dropped as the policy says. Fewer than
            all only with ``block``, a full disk, or where all that could be evicted is held: offer the others again when
            there is room.
        :raises NoRoomError: the disk is full or away, and not even one was dealt with.
        """
        overflow = overflow or self.overflow
        names = [topic.encode() for topic, _ in batch]
        if any(len(name) > 0xFFFF for name in names):
            raise ValueError("a topic of more than 65535 bytes")
        done = 0  # of batch: written, or dropped; what comes after is in frames, or counted in dropped
        frames: list[bytes] = []
        waiting = 0
        dropped = [0, 0, 0]
        dropping: list[int] = []
        before = self.last

        def flush(upto: int) -> None:
            nonlocal done, waiting
            if frames:
                self._write(frames)
            if dropped[0]:
                self._count(REFUSED, *dropped)
                self._note([(0, 0)])
                if refused is not None:
                    refused.extend(dropping)
            done, waiting, dropped[:] = upto, 0, [0, 0, 0]
            frames.clear()
            dropping.clear()

        try:
            for i, (name, (_, payload)) in enumerate(zip(names, batch, strict=True)):
                size, weight = FRAME + len(name) + len(payload), 1 if weights is None else weights[i]
                if frames and self._active_size() + waiting + size > self._piece:
                    flush(i)
                if self._used + waiting + size > self.room:
                    if frames:
                        flush(i)
                    if not self.fits(size) or not self._reclaim(size):
                        if overflow == "drop-newest" or not self.fits(size):
                            dropped = [dropped[0] + 1, dropped[1] + size - FRAME, dropped[2] + weight]
                            dropping.append(i)
                            continue
                        while overflow == "drop-oldest" and self._used + size > self.room and self._evict():
                            pass
                        if self._used + size > self.room:
                            break
                frames.append(frame(self._next + len(frames), name, payload, weight))
                waiting += size
            else:
                i = len(batch)
            flush(i)
            if self._segments:
                self._sync(self._segments[-1])
        except OSError as error:
            if not done:
                raise NoRoomError(f"the spool {self.folder} takes no more: {error.strerror or error}") from error
            self._settle(before)
        except NoRoomError:
            self._give_up(before)
            raise
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
            out.append(Item(number, *got, segment.weight_of(number)))
        for number in damaged:
            self._forget(number, number, DAMAGED)
        return out

    def after(self, number: int) -> Iterator[Item]:
        """What is stored beyond ``number``, the oldest first whatever the order. Not to be changed meanwhile.

        :raises OSError: the disk does not let us read.
        """
        damaged = []
        for segment in self._segments:
            for each in segment.wanted(beyond=number) if segment.last > number else ():
                if (got := segment.read(each)) is None:
                    damaged.append(each)
                else:
                    yield Item(each, *got, segment.weight_of(each))
        for each in damaged:
            self._forget(each, each, DAMAGED)

    def take(self, first: int, last: int) -> int:
        """Messages ``first`` to ``last`` are under way: they are not read again, and still here after a crash. Gives how
        many were not under way before.
        """
        first, last = min(first, last), max(first, last)
        taken = sum(segment.take(first, last) for segment in self._segments)
        self._waiting -= taken
        return taken

    def remove(self, first: int, last: int) -> int:
        """Messages ``first`` to ``last`` were delivered; those of them that are still here are taken out. Gives how many."""
        return self._forget(min(first, last), max(first, last), DELIVERED)

    def evict(self, first: int, last: int) -> int:
        """Like :meth:`remove` of what is dropped, as :meth:`victims` said."""
        return self._forget(min(first, last), max(first, last), EVICTED)

    def fits(self, size: int) -> bool:
        """Whether a record of ``size`` bytes may be stored at all."""
        return size <= self.budget - RESERVE

    def victims(self, size: int) -> list[Run]:
        """The oldest files, as wholes, that must go for ``size`` bytes more, as far as nothing in them is under way."""
        lacking = self._used + size - self.room - sum(s.size for s in self._segments if not s.live)
        out = []
        for segment in self._segments:
            if lacking <= 0:
                break
            if segment.live and not segment.taken:
                numbers = list(segment.wanted())
                weight = sum(map(segment.weight_of, numbers))
                out.append(Run(segment.first, segment.last, len(numbers), weight))
                lacking -= segment.size
        return out

    def sync(self) -> None:
        """Have what was removed on the disk: no power cut brings it back.

        :raises OSError: the disk is full or away.
        """
        if self._stale:
            self._note([])
        self._notes.sync()
        self._sync_folder()

    # the segments

    def _active_size(self) -> int:
        return self._segments[-1].size if self._segments else 0

    def _reclaim(self, size: int) -> bool:
        """Delete the files in which nothing is wanted any more, the last one too; gives whether there is room now."""
        for segment in [s for s in self._segments if s.size and not s.live]:
            self._delete(segment)
        return self._used + size <= self.room

    def _settle(self, before: int) -> None:
        """Have the part that was written before the disk was full on the disk."""
        try:
            if self._segments:
                self._sync(self._segments[-1])
        except NoRoomError:
            self._give_up(before)
            raise

    def _give_up(self, before: int) -> None:
        """The disk did not confirm what was written after number ``before``: it will be offered again."""
        self._forget(before + 1, self.last, DAMAGED)

    def _evict(self) -> bool:
        """Drop the oldest segment of which nothing is held; False if there is none."""
        for oldest in self._segments:
            if not any(first <= oldest.last and last >= oldest.first for first, last in self.held):
                break
        else:
            return False
        self._forget(oldest.first, oldest.last, EVICTED)
        if oldest in self._segments:  # it was the last one
            self._delete(oldest)
        return True

    def _wanted(self, beyond: int | None) -> Iterator[tuple[Segment, int]]:
        newest = self.order == "newest"
        for segment in reversed(self._segments) if newest else self._segments:
            for number in segment.wanted(newest=newest, beyond=beyond):
                yield segment, number
