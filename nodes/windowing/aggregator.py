"""The operator of ``aggregate``: rows into windows, windows into answers.

Its answers do not depend on how rows are batched: which rows are late is decided row by row, sums are added in the order
of arrival, and an answer's id is made of node, key and window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nodes.operator import Emit, Operator
from nodes.statistics import Series
from nodes.statistics.state import Slots
from nodes.windowing.base import FLOOR, FOREVER, HORIZON, Due, Windows, bounds
from nodes.windowing.intake import Batch, gather
from nodes.windowing.keys import Kids, join, texts_of
from nodes.windowing.watermark import Watermark
from schemas.messages import Aggregate, Message, Readings, Window

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIVE = 60 * 10**9
"""Event time follows the clock when the newest row is within this of it, ns."""
GRACE = 5 * 10**9
"""How long after its end, by the clock, a window of live data answers when no row comes that would end it, ns."""


class Aggregator(Operator):
    """See :mod:`nodes.aggregate`.

    :param follow: windows of live data answer by the clock.
    :param clock: ns since the epoch; only silence is measured with it.
    """

    absorbs: ClassVar[bool] = True

    def __init__(
        self,
        *,
        node: str,
        windows: Windows,
        by: tuple[str, ...],
        delay: int,
        idle: int | None,
        follow: bool,
        edges: Iterable[str],
        clock: Callable[[], int],
    ) -> None:
        self.node = node
        self.windows = windows
        self.groups = windows.groups
        self.keys = windows.keys
        self.by = by
        self.idle = idle
        self.follow = follow
        self.clock = clock
        self.watermark = Watermark(delay, idle, edges)
        self._fields = sorted(self.groups.plan.fields | (set(by) - {"source"}))
        self._heard = 0
        self._open = False
        self._told = FLOOR
        self._born = 0

    # -- rows in ------------------------------------------------------------------------------------------------

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        """Take rows in, answer the windows that they end.

        :raises WrongTypeError: texts where numbers are needed.
        """
        work: list[tuple[list[Message], Batch, list[Series], Kids]] = []
        for part in _parts(messages):
            batch = gather(part, self._fields)
            least, newest = bounds(batch.time) if batch.n else (0, 0)
            if not -HORIZON < least <= newest < HORIZON:
                raise ValueError("an event time is not between 1824 and 2116")
            work.append((part, batch, self.groups.plan.evaluate(batch.columns, batch.n), self._kids(batch)))
        now = self.clock()
        self._born = messages[-1].born if messages else 0
        for part, batch, series, kid in work:
            fate = self._take(batch, series, kid, edge, now, emit)
            _book(part, batch, fate, emit)
            if not batch.n:  # a frame in which nothing was found: time goes on all the same
                newest = part[-1].time
                self._advance(edge, newest, self.watermark.after(edge, newest, now), now, emit)
        self.keys.collect()

    def _kids(self, batch: Batch) -> Kids:
        if not self.by:
            return np.repeat(self.keys.lookup([""]), batch.n)
        if self.by == ("source",):
            kid = self.keys.lookup(batch.source)
            return np.repeat(kid, batch.lengths) if batch.by_message and batch.n != len(kid) else kid
        columns = []
        for name in self.by:
            column = batch.columns.get(name)
            if name == "source" and column is None:
                columns.append(batch.sources())
            else:
                columns.append([""] * batch.n if column is None else texts_of(column, batch.n))
        return self.keys.lookup(join(columns))

    def _take(
        self, batch: Batch, series: Sequence[Series], kid: Kids, edge: str, now: int, emit: Emit
    ) -> NDArray[np.int8] | None:
        """Add all rows of a batch, in pieces within which no window ends that a later row of the piece belongs to.

        :returns: per row 0 taken, 1 late, 2 no room; None: all were taken.
        """
        time = batch.time
        if not batch.n:
            return None
        windows = self.windows
        fate: NDArray[np.int8] | None = None
        at = 0
        while at < batch.n:
            rest = time[at:]
            _, newest = bounds(rest)
            mark = self.watermark.after(edge, newest, now)
            take = len(rest)
            if mark > windows.mark and take > 1 and not bool((rest[1:] >= rest[:-1]).all()):
                marks, _ = self.watermark.before(edge, rest, now)
                take = max(windows.split(kid[at:], rest, marks), 1)
                if take < len(rest):
                    _, newest = bounds(rest[:take])
                    mark = self.watermark.after(edge, newest, now)
            whole = take == batch.n
            piece = slice(None) if whole else slice(at, at + take)
            added = windows.add(kid[piece], time[piece])
            slots = added.slots
            moment = time[piece]
            index = None if whole else np.arange(at, at + take)
            lost = slots < 0
            if lost.any():
                if fate is None:
                    fate = np.zeros(batch.n, np.int8)
                fate[piece][lost] = 2
                if added.late is not None:
                    fate[piece][added.late] = 1
                index = (np.arange(at, at + take) if index is None else index)[~lost]
                slots, moment = slots[~lost], moment[~lost]
            if len(slots):
                self.groups.update(slots, moment, series, index)
                self._open = True
                self._told = FLOOR
            if added.again:
                self._answer(windows.find(added.again), emit, late=True)
            self._advance(edge, newest, mark, now, emit)
            at += take
        return fate

    def _advance(self, edge: str, newest: int, mark: int, now: int, emit: Emit) -> None:
        self.watermark.advance(edge, newest, mark, now)
        self._heard = now
        self._end(mark, emit)

    def _end(self, mark: int, emit: Emit) -> None:
        """Answer what ends by this watermark, and forget what nobody can change any more."""
        self._answer(self.windows.due(mark), emit, keep=self.windows.lateness > 0)
        self.windows.purge()

    # -- answers out --------------------------------------------------------------------------------------------

    def _answer(self, due: Due, emit: Emit, *, late: bool = False, keep: bool = True, by_key: bool = False) -> None:
        """Send answers for groups with rows that no answer has had yet, by end and key.

        An answer's revision is the number of rows that came after the first answer, so one id stands for one set of rows.

        :param late: the rows came after the windows' end: a window that has only such was never answered.
        :param keep: remember what was answered.
        :param by_key: answers go by end and key in any case.
        """
        if not len(due.slots):
            return
        answered = self.windows.answered
        counts = self.groups.count[due.slots].tolist()
        names = [self.keys.texts[k] for k in due.kid.tolist()]
        windows = list(zip(due.number.tolist(), due.kid.tolist(), strict=True))
        results = self.groups.plan.results(due.slots, (due.end - due.start) / 1e9)
        starts, ends = due.start.tolist(), due.end.tolist()
        order: Iterable[int] = range(len(counts))
        if by_key or not self.windows.in_order:
            order = sorted(order, key=lambda i: (ends[i], names[i], starts[i]))
        for i in order:
            known = answered.get(windows[i]) if answered else None
            if known is not None and known[1] == counts[i]:
                continue
            base = known[0] if known is not None else 1 if late else counts[i]
            if keep:
                answered[windows[i]] = (base, counts[i])
            body = Aggregate(
                window=Window(start=starts[i], end=ends[i]),
                key=names[i],
                values={name: column[i] for name, column in results.items()},
                count=counts[i],
                revision=counts[i] - base,
            )
            ident = f"{self.node}:{names[i]}:{windows[i][0]}"
            if body.revision:
                ident = f"{ident}/{body.revision}"
            emit.send(Message(ident, self._source(names[i]), ends[i] - 1, body, None, self._born))
        if due.temporary:
            self.groups.close(due.slots)

    def _source(self, key: str) -> str:
        """The device that an answer speaks of: the key's where rows are grouped by it, else this node."""
        if "source" not in self.by:
            return self.node
        if len(self.by) == 1:
            return key or self.node
        part = key.split("/")[self.by.index("source")]
        return part.replace("%2F", "/").replace("%25", "%") or self.node

    # -- time ---------------------------------------------------------------------------------------------------

    def _clock_wake(self) -> int | None:
        """When, by the clock, the next open window of live data should have ended."""
        watermark = self.watermark
        if not self.follow or abs(self._heard - watermark.newest) > LIVE:
            return None
        end = self.windows.next_end(self._told)
        return None if end is None else self._heard + (end - watermark.newest) + watermark.delay + GRACE

    def wake(self) -> int | None:
        """When silence will have lasted long enough for open windows to answer."""
        if not self._open:
            return None
        return self._clock_wake() if self.idle is None else self._heard + self.idle

    def tick(self, now: int, emit: Emit) -> None:
        """Open windows answer with what they have. They stay open: rows that come yet make them answer anew."""
        due = self.wake()
        if due is None or now < due:
            return
        self._born = 0
        if self.idle is None:
            horizon = self.watermark.newest + (now - self._heard) - self.watermark.delay - GRACE
            self._told = horizon
        else:
            horizon = FOREVER
            self._open = False
        self._answer(self.windows.unended(horizon), emit, by_key=True)

    def advance(self, edge: str, time: int, emit: Emit) -> int:
        """Time goes on without rows; our answers have come as far as the watermark."""
        if -HORIZON < time < HORIZON:
            self._born = 0
            now = self.clock()
            self._advance(edge, time, self.watermark.after(edge, time, now), now, emit)
        return self.watermark.mark

    def ended(self, edge: str, emit: Emit) -> None:
        """The edge's stream is complete: it holds the watermark back no more."""
        self._born = 0
        self._end(self.watermark.end(edge), emit)

    def finish(self, emit: Emit) -> None:
        """Every window answers with what it has."""
        self._born = 0
        self._answer(self.windows.finish(), emit, by_key=True)
        self.windows.purge()
        self.windows.mark = self.watermark.mark
        self._open = False

    # -- state --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Any:
        """Keys, groups, windows and watermark, as plain msgpack types."""
        slots: Slots = self.windows.live()
        held = np.flatnonzero(self.keys.refs[: len(self.keys)] > 0).tolist()
        return {
            "keys": [[k, self.keys.texts[k]] for k in held],
            "groups": self.groups.snapshot(slots),
            "windows": self.windows.snapshot(),
            "answered": [[*window, *answer] for window, answer in self.windows.answered.items()],
            "watermark": self.watermark.snapshot(),
            "open": self._open,
        }

    def restore(self, state: Any) -> None:
        """Continue. Silence is counted from now."""
        numbers = [k for k, _ in state["keys"]]
        renumber = np.zeros(max(numbers, default=0) + 1, np.int64)
        if numbers:
            renumber[numbers] = self.keys.lookup([text for _, text in state["keys"]])
        self.groups.restore(state["groups"], renumber)
        self.windows.restore(state["windows"], renumber)
        self.windows.answered = {
            (number, int(renumber[kid])): (base, count) for number, kid, base, count in state["answered"]
        }
        self.watermark.restore(state["watermark"])
        self._open = state["open"]
        self._heard = self.clock()


def _parts(messages: list[Message]) -> list[list[Message]]:
    """Messages in runs; one that may have no rows (nothing detected) stands alone, for it moves the time by itself."""
    if all(type(m.body) is Readings and m.body.n for m in messages):
        return [messages] if messages else []
    runs: list[list[Message]] = []
    alone = True
    for message in messages:
        body = message.body
        empty = body.n == 0 if isinstance(body, Readings) else message.type == "predictions/1" and not _boxes(body)
        if alone or empty:
            runs.append([])
        runs[-1].append(message)
        alone = empty
    return runs


def _boxes(body: Any) -> bool:
    return body.boxes is None or len(body.labels) > 0


_REASONS = {1: "late", 2: "too-many-groups"}


def _book(messages: Sequence[Message], batch: Batch, fate: NDArray[np.int8] | None, emit: Emit) -> None:
    """Account for every row, as the ledger counts them: a message that is no readings is one row."""
    if fate is None:
        emit.absorb(batch.n if batch.readings else len(messages))
        return
    at = 0
    taken = 0
    for message, n in zip(messages, batch.lengths, strict=True):
        mine = fate[at : at + n]
        at += n
        if isinstance(message.body, Readings):
            taken += int((mine == 0).sum())
            for code, reason in _REASONS.items():
                if count := int((mine == code).sum()):
                    emit.drop(reason, count)
        elif n == 0 or bool((mine == 0).any()):
            taken += 1
        else:
            emit.drop(_REASONS[int(mine[0])], 1)
    emit.absorb(taken)
