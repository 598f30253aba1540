"""What a relay that keeps has on disk for one port: the spool, and a journal that makes it exact.

The spool has the messages; the journal has what they do not say: identities taken last, numbers, the books, the end of
the stream, and which messages are under way to the readers. They are two files, so each act is in an order that a kill
at any moment leaves repairable:

- *take*: append, then the journal, then the acknowledgement. What is in the spool and not in the journal yet is found again
  when it is opened; it was not sent on, nor evicted, before the journal knew it.
- *send on*: the journal has it as under way before it leaves, and what is under way is never evicted. So a message was
  either dropped or sent, and the books say which.
- *delivered*: the journal first, then the spool; a removal that was cut short is done when it is opened.

Without I/O on a bus, and not safe for threads: :mod:`nodes.relay_port` calls it from one thread of its own.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from broker.spool import RESERVE, Item, NoRoomError, Order, Spool
from broker.spool_segment import FRAME
from broker.window import RecentIds
from nodes import log
from nodes.journal import SEEN, Journal, packed
from nodes.relay_books import JOURNAL, SPOOL, Close, State, Taken, plus, spooled, unlabel
from schemas import codec
from schemas.errors import PayloadError

_SCAN = 1024
_TRIM = 65_536
_COMPLAIN_EVERY = 30.0
_EDGE = "in"
_EVER = 1 << 62


class Store:
    """The files of one port in ``folder``, made if they are not there.

    :param readers: for the books.
    :param budget: bytes for the spool; ``overflow`` and ``order``: of the topology's ``relay``.
    :raises BusError: another process has it open, or the folder cannot be used.
    :raises RunError: the journal cannot be used.
    """

    def __init__(
        self, folder: Path, readers: Sequence[str], budget: int, overflow: str, order: Order, *, durable: bool = True
    ) -> None:
        self.folder = folder
        self.repeated = 0
        self._readers = list(readers)
        self._drops = overflow != "block"
        self._newest = order == "newest"
        self._largest = budget - RESERVE
        self.spool = Spool(
            folder / SPOOL,
            budget,
            # what does not fit is dropped here, not there: it has to be in the journal before what comes after it
            overflow="drop-oldest" if overflow == "drop-oldest" else "block",
            order=order,
            durable=durable,
        )
        try:
            self.journal = Journal(folder / JOURNAL)
            kept = self.journal.get("state")
            epochs: list[int] = self.journal.get("epochs") or []
            self.ids = RecentIds(SEEN, self.journal.seen().get(_EDGE, ()))
        except BaseException:
            self.spool.close()
            raise
        self.state = State() if kept is None else msgspec.convert(kept, State)
        self.epochs = [*epochs[-15:], max(time.time_ns(), (epochs[-1] if epochs else 0) + 1)]
        self._fresh: list[str] = []  # identities that the journal does not have yet
        self._rows = array("I")  # rows + 1 of the messages from number _first on; 0: gone
        self._first = 1
        self._cursor: int | None = None
        self._way: set[int] = set()
        self._dirty = self._owed = self._tight = False
        self._complained = float("-inf")
        self._again = self._recover()
        self._committed = self.spool.figures.stored
        self._hold()
        self.spool.on_loss = self._lost
        self.journal.commit(packed({"epochs": self.epochs, "readers": self._readers}))
        self._commit()
        self.books = spooled(self.state, self._readers, self.spool.figures.disk)

    @property
    def unsent(self) -> int:
        """Messages in the spool that are not under way."""
        return len(self.spool) - len(self._way)

    # -- taking ----------------------------------------------------------------------------------------------------

    def take(self, batch: Sequence[Taken]) -> int:
        """Keep what is new of ``batch``, or drop it as the policy says; durable when it returns.

        :returns: how many, from the beginning, are dealt with. Fewer than all where the producer has to wait: the spool is
            full and may not drop, or the disk is full.
        """
        at = 0
        while at < len(batch):
            taken = batch[at]
            if taken.id in self.ids:
                self.repeated += not self._owed
            elif _size(taken) > self._largest:
                self._refuse(taken)
            else:
                run, stop = self._run(batch, at)
                if self._dirty and not self._commit():
                    return 0
                before = self.spool.figures.stored
                try:
                    stored = self.spool.append([(t.label, t.payload) for t in run])
                except NoRoomError as error:
                    self._complain(str(error))
                    self._enter(run[: self.spool.figures.stored - before])  # written, but not safely on the disk
                    break
                self._enter(run[:stored])
                self._tight = stored < len(run)
                if stored:
                    at = stop if not self._tight else next(i for i in range(at, stop) if batch[i] is run[stored])
                    self._dealt(batch[at - 1])
                    if not self._commit():
                        return 0
                    continue
                if not self._drops:
                    break
                self._refuse(batch[at])
            self._dealt(batch[at])
            at += 1
        if self._dirty and not self._commit():
            return 0
        self._tell()
        return at

    def end(self, close: Close, epoch: int, seq: int) -> bool:
        """The stream has ended, with number ``seq``; False: the disk does not take that now."""
        self.state.end = close
        self.state.floor = (epoch, seq)
        return self._commit()

    def _run(self, batch: Sequence[Taken], at: int) -> tuple[list[Taken], int]:
        """New messages from ``at`` on that go in one append, and where the next begins.

        At most a quarter of the spool at once: so what it makes room for is never what the journal does not know yet.
        """
        run: list[Taken] = []
        here: set[str] = set()
        size = 0
        while at < len(batch):
            taken = batch[at]
            if taken.id not in self.ids and taken.id not in here:
                more = _size(taken)
                if run and (self._tight or size + more > self._largest // 4):
                    break
                size += more
                run.append(taken)
                here.add(taken.id)
            else:
                self.repeated += not self._owed
            at += 1
        return run, at

    def _enter(self, run: Sequence[Taken]) -> None:
        """They are in the spool, with the last numbers of it."""
        if not run:
            return
        first = self.spool.figures.stored - len(run) + 1
        if not self._rows:
            self._first = first
        self._rows.frombytes(
            bytes(4 * (first - self._first - len(self._rows)))
        )  # the last ones before a restart are gone
        for taken in run:
            self._rows.append(taken.rows + 1)
            self._came(taken)

    def _came(self, taken: Taken) -> None:
        self.ids.add(taken.id)
        self._fresh.append(taken.id)
        self.state.received = plus(self.state.received, 1, taken.rows)
        self._dirty = True

    def _refuse(self, taken: Taken) -> None:
        self._came(taken)
        self.state.refused = plus(self.state.refused, 1, taken.rows)

    def _dealt(self, taken: Taken) -> None:
        self.state.floor = (taken.epoch, taken.seq)
        self._dirty = True

    # -- sending on ------------------------------------------------------------------------------------------------

    def next(self, messages: int, size: int) -> list[Item]:
        """The next ones to be sent; they count as under way, and are not evicted, until :meth:`done`.

        :param messages: most of them; ``size``: most bytes, but one message in any case.
        :raises BusError: the disk does not let us read.
        """
        found = self._pick(messages, size)
        items = [item for item in found if item.number <= self._committed]
        if items:
            self._way.update(item.number for item in items)
            if not self._newest:
                self._cursor = max(self._cursor or 0, items[-1].number)
            self._hold()
            self._commit()
        return items

    def done(self, numbers: Sequence[int], *, dead: bool = False) -> None:
        """Every reader is done with these, or (``dead``) they cannot travel: out of the spool."""
        gone = self._gone(numbers)
        if dead:
            self.state.dead = plus(self.state.dead, *gone)
        else:
            self.state.given = plus(self.state.given, *gone)
        self._way.difference_update(numbers)
        self.state.removing = _runs(numbers)
        self._hold()
        self._commit()  # if the disk is too full for that: the removal makes room
        for first, last in self.state.removing:
            self.spool.remove(first, last)
        self._trim()
        self._tell()

    def _pick(self, messages: int, size: int) -> list[Item]:
        if self._again:
            chosen, self._again = self._again[:messages], self._again[messages:]
            step = 1 if self._newest else -1
            items = [item for n in chosen for item in self.spool.read(1, beyond=n + step) if item.number == n]
            if not self._newest:
                self._cursor = chosen[-1]
            return items
        if not self._newest:
            return self.spool.read(messages, size, beyond=self._cursor)
        out: list[Item] = []
        beyond = self.spool.figures.stored + 1
        for first, last in reversed([(0, 0), *_runs(self._way)]):
            if beyond - last > 1 and len(out) < messages:
                between = self.spool.read(messages - len(out), size, beyond=beyond)
                out += [item for item in between if item.number > last]
            beyond = first
        return out

    # -- the end of it ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files; what is kept is kept."""
        self.spool.close()
        self.journal.close()

    def remove(self) -> None:
        """Delete the files, which are closed: the stream is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _recover(self) -> list[int]:
        """Mend what a kill left half done; gives what was under way, in the order of sending."""
        state, spool = self.state, self.spool
        for first, last in state.removing:
            spool.remove(first, last)
        state.removing = []
        rows: dict[int, int] = {}
        new: list[Item] = []
        beyond = None
        while items := spool.read(_SCAN, beyond=beyond):
            beyond = items[-1].number
            for item in items:
                rows[item.number] = unlabel(item.topic)[1]
                if item.number > state.number:
                    new.append(item)
        if rows:
            self._first = min(rows)
            self._rows = array("I", bytes(4 * (max(rows) - self._first + 1)))
            for number, count in rows.items():
                self._rows[number - self._first] = count + 1
        for item in sorted(new, key=lambda item: item.number):
            try:
                message, epoch, seq = codec.decode_sequenced(item.payload)
            except PayloadError:  # it was one when it came, and the checksum is right
                continue
            self._came(Taken(epoch, seq, message.id, rows[item.number], item.topic, item.payload))
            state.floor = max(state.floor, (epoch, seq))
        self._settle(sum(rows.values()), len(rows))
        under_way = {n for first, last in state.sent for n in range(first, last + 1) if n in rows}
        return sorted(under_way, reverse=self._newest)

    def _settle(self, rows: int, messages: int) -> None:
        """What is missing in the books was evicted or damaged since they were committed. The spool knows how many
        messages; rows follow from what is left.
        """
        state, figures = self.state, self.spool.figures
        gone = [
            state.received[i] - state.given[i] - state.dead[i] - state.refused[i] - kept
            for i, kept in enumerate((messages, rows))
        ]
        damaged = min(max(0, gone[0]), figures.damaged)
        more = damaged - state.damaged[0]
        spread = gone[1] - state.evicted[1] - state.damaged[1]
        whole = gone[0] - damaged == state.evicted[0]  # nothing was evicted
        state.damaged = (damaged, state.damaged[1] + (spread if whole else min(more, spread)))
        state.evicted = (gone[0] - damaged, gone[1] - state.damaged[1])

    def _lost(self, first: int, last: int, damaged: bool) -> None:
        gone = self._gone(range(first, last + 1))
        self._way.difference_update(range(first, last + 1))
        if damaged:
            self.state.damaged = plus(self.state.damaged, *gone)
        else:
            self.state.evicted = plus(self.state.evicted, *gone)
        self._dirty = True

    def _gone(self, numbers: Iterable[int]) -> tuple[int, int]:
        """Messages and rows of those that were here; they are not any more."""
        messages = rows = 0
        for number in numbers:
            i = number - self._first
            if 0 <= i < len(self._rows) and self._rows[i]:
                messages, rows = messages + 1, rows + self._rows[i] - 1
                self._rows[i] = 0
        return messages, rows

    def _trim(self) -> None:
        """Forget the beginning of what is gone, now and then."""
        if not len(self.spool):
            del self._rows[:]
        elif len(self._rows) > _TRIM and not any(self._rows[: _TRIM // 2]):
            del self._rows[: _TRIM // 2]
            self._first += _TRIM // 2

    def _hold(self) -> None:
        self.state.sent = _runs(self._way.union(self._again))
        self._spare()

    def _spare(self) -> None:
        """What is under way, and what the journal does not know yet, is not evicted."""
        self.spool.held = [*self.state.sent, (self._committed + 1, _EVER)]

    def _commit(self) -> bool:
        """Write the journal; False if the disk is too full for it (then it is tried again with the next)."""
        number, before = self.spool.figures.stored, self.state.number
        self.state.number = number
        seen = [(_EDGE, self._fresh)] if self._fresh else []
        try:
            self.journal.commit(packed({"state": self.state}), seen=seen)
        except sqlite3.OperationalError as error:
            self.state.number, self._owed = before, True
            self._complain(f"{self.folder / JOURNAL}: {error}")
            return False
        self._fresh, self._committed = [], number
        self._spare()
        self._dirty = self._owed = False
        return True

    def _complain(self, reason: str) -> None:
        if time.monotonic() - self._complained > _COMPLAIN_EVERY:
            self._complained = time.monotonic()
            log.error("the relay cannot write, the producers wait", reason=reason)

    def _tell(self) -> None:
        self.books = spooled(self.state, self._readers, self.spool.figures.disk)


def _size(taken: Taken) -> int:
    return FRAME + len(taken.label.encode()) + len(taken.payload)


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as runs (first, last), ascending."""
    out: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if out and number == out[-1][1] + 1:
            out[-1] = (out[-1][0], number)
        else:
            out.append((number, number))
    return out
