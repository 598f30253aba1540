"""A row at every full period: ``{resample: 1s}``, ``{resample: {period: 1min, method: mean}}``; for each source by itself.

- ``last``: the last values at or before the instant;
- ``linear``: on the straight line between the rows around the instant;
- ``mean``: the mean of the period that begins at the instant; text: its last.

Instants are multiples of the period since the epoch. A row is made when data that settle it have come, never by the clock.
Rows that come out of order are dropped (``late``). No rows are made across a hole longer than ``gap``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from nodes.operator import Context, Emit
from nodes.steps._state import Memory
from nodes.steps._step import READINGS, Step, StepOptions
from nodes.steps._table import Table, by_source, tables
from nodes.steps.fill import gone
from nodes.steps.on_change import plain
from schemas.messages import Array, Column, Message, Readings, Scalar
from schemas.rows import from_scalars, take
from schemas.units import Duration

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST = 100_000
"""Most rows that two rows may make between them."""


class Config(StepOptions):
    """Options of ``resample``."""

    takes: ClassVar[frozenset[str]] = READINGS
    bare: ClassVar[dict[str, Any] | None] = {"type": "string"}

    period: Duration = Field(gt=0, description="time between two rows, e.g. 1s")
    method: Literal["last", "mean", "linear"] = Field(default="last", description="how a row's values are found")
    gap: Duration = Field(default=0, description="longest hole in the data that is bridged; 0: ten periods")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"period": value}

    @model_validator(mode="after")
    def _bounded(self) -> Config:
        if self.gap > MOST * self.period:
            raise ValueError(f"a gap may be at most {MOST} periods long")
        return self


@dataclass(frozen=True, slots=True)
class _Last:
    """What a source left behind: its last row, and for ``mean`` the sums of the open period."""

    time: int
    values: dict[str, Scalar]
    sums: dict[str, float]
    counts: dict[str, int]


class Resample(Step):
    """State: the last row of each source, and its open period."""

    absorbs: ClassVar[bool] = True

    def __init__(self, config: Config, node: str) -> None:
        self.period = config.period
        self.method = config.method
        self.gap = config.gap or 10 * config.period
        self.node = node
        self.last: Memory[str, _Last] = Memory()

    def process(self, messages: list[Message], emit: Emit) -> list[Message]:
        out: list[Message] = []
        for message in messages:  # what one message settles is one message more, so that ids do not depend on the call
            if isinstance(message.body, Readings) and message.body.n == 1 and self._within(message, message.body):
                emit.absorb(1)
                continue
            (table,) = tables([message])
            made = [
                (source, rows)
                for source, index in by_source(table)
                if (rows := self._source(source, table, index, emit))
            ]
            for part, (source, (time, columns)) in enumerate(made):
                body = Readings(n=len(time), columns=columns, time=time)
                ident = message.id if len(made) == 1 else f"{message.id}/{part}"
                out.append(Message(ident, source, int(time[0]), body, message.trace, message.born))
        return out

    def finish(self, emit: Emit) -> list[Message]:
        out: list[Message] = []
        for source, last in list(self.last.items()):
            self.last.forget(source)
            if self.method == "mean":
                at, values = last.time // self.period * self.period, last.values | _quotients(last.sums, last.counts)
            elif last.time % self.period == 0:
                at, values = last.time, last.values
            else:
                continue
            columns = {name: from_scalars([value]) for name, value in values.items()}
            body = Readings(n=1, columns=columns, time=np.array([at], np.int64))
            out.append(Message(f"{self.node}:{source}:{at}", source, at, body))
        return out

    def _within(self, message: Message, body: Readings) -> bool:
        """Take a single row that settles nothing, without a table: most rows of a fast sensor are such. False: it is not."""
        source = message.source if body.source is None else body.source[0]
        time = message.time if body.time is None else int(body.time[0])
        before = self.last.get(source)
        if before is None or time < before.time:
            return False
        values = {name: plain(column, 0) for name, column in body.columns.items()}
        if self.method != "mean":
            if (time - 1) // self.period != (before.time - 1) // self.period:
                return False
            self.last.set(source, _Last(time, values, {}, {}))
            return True
        if time // self.period != before.time // self.period:
            return False
        sums, counts = dict[str, float](), dict[str, int]()
        for name, column in body.columns.items():
            if not isinstance(column, list):
                value = values.pop(name)
                there = value is not None
                sums[name] = before.sums.get(name, 0.0) + (float(value or 0) if there else 0.0)
                counts[name] = before.counts.get(name, 0) + there
        self.last.set(source, _Last(time, values, sums, counts))
        return True

    def _source(
        self, source: str, table: Table, index: NDArray[np.int64], emit: Emit
    ) -> tuple[NDArray[np.int64], dict[str, Column]] | None:
        """Take rows of one source; the rows that they settle."""
        if not len(index):
            return None
        time, before = table.time[index], self.last.get(source)
        first = int(time[0]) if before is None else before.time
        on_time = time >= np.maximum.accumulate(np.concatenate(([first], time)))[:-1]
        if late := int((~on_time).sum()):
            emit.drop("late", late)
            time, index = time[on_time], index[on_time]
            if not len(index):
                return None
        emit.absorb(len(index))
        columns = {name: take(column, index) for name, column in table.columns.items()}
        made = self._periods if self.method == "mean" else self._instants
        return made(source, before, time, columns)

    def _instants(
        self, source: str, before: _Last | None, time: NDArray[np.int64], columns: dict[str, Column]
    ) -> tuple[NDArray[np.int64], dict[str, Column]] | None:
        """The instants from each row up to the next; the last row's own waits, as more rows of its time may come."""
        if before is not None:
            time = np.concatenate(([before.time], time))
            columns = {name: _after(before.values.get(name), column) for name, column in columns.items()}
        self.last.set(source, _Last(int(time[-1]), {name: plain(c, -1) for name, c in columns.items()}, {}, {}))
        start, end = time[:-1], time[1:]
        count = (end - 1) // self.period - (start - 1) // self.period
        count = np.where(end - start > self.gap, (start % self.period == 0).astype(np.int64), count)
        left = np.repeat(np.arange(len(start)), count)
        if not len(left):
            return None
        nth = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
        at = (start[left] + self.period - 1) // self.period * self.period + nth * self.period
        if self.method == "last":
            return at, {name: take(column, left) for name, column in columns.items()}
        share = (at - start[left]) / np.maximum(end - start, 1)[left]
        return at, {name: _between(column, left, share) for name, column in columns.items()}

    def _periods(
        self, source: str, before: _Last | None, time: NDArray[np.int64], columns: dict[str, Column]
    ) -> tuple[NDArray[np.int64], dict[str, Column]] | None:
        """The means of all periods but the last, which is open."""
        period = time // self.period
        starts = np.concatenate(([0], np.flatnonzero(period[1:] != period[:-1]) + 1))
        ends = np.concatenate((starts[1:], [len(time)])) - 1
        open_before = None if before is None else before.time // self.period
        joined = open_before == period[0]
        front = before is not None and not joined
        at = period[starts[:-1]] * self.period
        if front and open_before is not None:
            at = np.concatenate(([open_before * self.period], at))
        made: dict[str, Column] = {}
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name, column in columns.items():
            if isinstance(column, list):
                made[name] = take(column, ends[:-1])
                if front and before is not None:
                    made[name] = _after(before.values.get(name), made[name])
                continue
            there = ~gone(column)
            total = np.add.reduceat(np.where(there, column, 0).astype(np.float64), starts)
            count = np.add.reduceat(there.astype(np.int64), starts)
            if before is not None:
                held = before.sums.get(name, 0.0), before.counts.get(name, 0)
                if joined:
                    total[0] += held[0]
                    count[0] += held[1]
                else:
                    total, count = np.concatenate(([held[0]], total)), np.concatenate(([held[1]], count))
            with np.errstate(all="ignore"):
                made[name] = total[:-1] / count[:-1]
            sums[name], counts[name] = float(total[-1]), int(count[-1])
        texts = {name: c[-1] for name, c in columns.items() if isinstance(c, list)}
        self.last.set(source, _Last(int(time[-1]), dict(texts), sums, counts))
        return (at, made) if len(at) else None

    def snapshot(self) -> Any:
        return self.last.snapshot(lambda v: [v.time, v.values, v.sums, v.counts]) if len(self.last) else None

    def restore(self, state: Any) -> None:
        self.last.restore(state, lambda v: _Last(*v))

    def begin(self) -> None:
        self.last.begin()

    def rollback(self) -> None:
        self.last.rollback()


def _quotients(sums: dict[str, float], counts: dict[str, int]) -> dict[str, Scalar]:
    return {name: total / counts[name] if counts[name] else None for name, total in sums.items()}


def _after(value: Scalar, column: Column) -> Column:
    """``column`` with one value before it."""
    if isinstance(column, list):
        return [value if value is None or isinstance(value, str) else str(value), *column]
    if isinstance(value, str):
        return [value, *(None if v != v else str(v) for v in column.tolist())]
    if value is None:
        return np.concatenate(([np.nan], column))
    return np.concatenate((np.array([value], column.dtype if column.dtype.kind == "f" else None), column))


def _between(column: Column, left: NDArray[np.int64], share: Array) -> Column:
    """On the line from row ``left`` to the next; text holds its value."""
    if isinstance(column, list):
        return take(column, left)
    a, b = column[left].astype(np.float64), column[left + 1].astype(np.float64)
    return np.where(share == 0, a, a + (b - a) * share)


def build(config: Config, context: Context) -> Step:
    """The step."""
    return Resample(config, context.node)
