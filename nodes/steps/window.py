"""Cut readings into windows of n samples: ``{window: 1024}``, ``{window: {size: 1024, hop: 512, fields: [x, y, z]}}``.

Of each source by itself. A window is a ``frame/1`` of layout ``T`` (one field) or ``TC`` (several, in the order given), float32;
its time is its first sample's. What does not fill a window at the end is dropped (``incomplete``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from nodes.operator import Context, Emit, Flow
from nodes.steps._fields import known, pick
from nodes.steps._state import Memory
from nodes.steps._step import READINGS, RefusedError, Step, StepOptions
from nodes.steps._table import Table, by_source, tables
from schemas.expressions import ExpressionError, WrongTypeError
from schemas.messages import Array, Frame, Message
from schemas.units import Duration, Rate

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOURCES = 10_000
"""Most sources that have an open window; of the quietest one more the samples are dropped (``evicted``)."""


class Config(StepOptions):
    """Options of ``window``."""

    takes: ClassVar[frozenset[str]] = READINGS
    bare: ClassVar[dict[str, Any] | None] = {"type": "integer"}

    size: int = Field(ge=1, le=1 << 24, description="samples in a window")
    hop: int = Field(default=0, ge=0, le=1 << 24, description="samples from one window's start to the next; 0: size")
    fields: list[str] = Field(default=[], description="fields that become channels; none: all that are numbers")
    rate: Rate | None = Field(default=None, description="samples per second; left out: found from the samples' times")
    gap: Duration = Field(
        default=0, description="a longer hole between two samples starts anew (``gap``); 0: none does"
    )

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"size": value}

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.fields, "fields")
        return Flow("frame/1")


@dataclass(frozen=True, slots=True)
class _Open:
    """Samples of a source that are still needed.

    :param samples: float32 [k, channels].
    :param time: int64 [k].
    :param covered: how many of them were in a window already.
    :param skip: samples to leave out before the next window (hop longer than size).
    :param count: windows made so far.
    """

    fields: tuple[str, ...]
    samples: Array
    time: NDArray[np.int64]
    covered: int = 0
    skip: int = 0
    count: int = 0


class Window(Step):
    """State: the open samples of each source."""

    absorbs: ClassVar[bool] = True

    def __init__(self, config: Config, node: str) -> None:
        self.config = config
        self.size = config.size
        self.hop = config.hop or config.size
        self.node = node
        self.open: Memory[str, _Open] = Memory(SOURCES + 1)

    def process(self, messages: list[Message], emit: Emit) -> list[Message]:
        out: list[Message] = []
        for message in messages:
            (table,) = tables([message])
            try:
                taken = [(source, index, *self._channels(source, table, index)) for source, index in by_source(table)]
            except (ExpressionError, RefusedError) as error:
                emit.reject(message, error.reason, str(error))
                continue
            for source, index, fields, samples in taken:
                out.extend(self._take(source, fields, samples, table.time[index], message, emit))
        return out

    def _channels(self, source: str, table: Table, index: NDArray[np.int64]) -> tuple[tuple[str, ...], Array]:
        """The samples of one source as float32 [k, channels]."""
        before = self.open.get(source)
        fields = tuple(self.config.fields) or (before.fields if before else ())
        if not fields:
            fields = tuple(name for name, c in table.columns.items() if not isinstance(c, list))
        if not fields:
            raise RefusedError("missing-field", "there is no field with numbers")
        columns: list[Array] = []
        for name in fields:
            column = pick(table.columns, name)
            if isinstance(column, list):
                if any(v is not None for v in column):
                    raise WrongTypeError(f"field {name!r} has text, which is no sample")
                column = np.full(len(column), np.nan)
            columns.append(column[index].astype(np.float32))
        return fields, np.stack(columns, axis=1)

    def _take(
        self,
        source: str,
        fields: tuple[str, ...],
        samples: Array,
        time: NDArray[np.int64],
        origin: Message,
        emit: Emit,
    ) -> list[Message]:
        before = self.open.get(source) or _Open(fields, samples[:0], time[:0])
        if self.config.gap and len(time):
            previous = np.concatenate((before.time[-1:] if len(before.time) else time[:1], time[:-1]))
            cuts = np.flatnonzero(time - previous > self.config.gap).tolist()
        else:
            cuts = []
        out: list[Message] = []
        for start, end in zip([0, *cuts], [*cuts, len(time)], strict=True):
            if start in cuts:
                if lost := len(before.time) - before.covered:
                    emit.drop("gap", lost)
                before = _Open(fields, samples[:0], time[:0], count=before.count)
            before = self._fill(source, before, samples[start:end], time[start:end], origin, emit, out)
        self.open.set(source, before)
        if len(self.open) > SOURCES:
            quiet, left = next(self.open.items())
            if lost := len(left.time) - left.covered:
                emit.drop("evicted", lost)
            self.open.forget(quiet)
        return out

    def _fill(
        self,
        source: str,
        before: _Open,
        samples: Array,
        time: NDArray[np.int64],
        origin: Message,
        emit: Emit,
        out: list[Message],
    ) -> _Open:
        """Windows that are full with these samples; what stays open."""
        skipped = min(before.skip, len(time))
        if skipped:
            emit.filter(skipped)
            samples, time = samples[skipped:], time[skipped:]
        samples, time = np.concatenate((before.samples, samples)), np.concatenate((before.time, time))
        windows = max(0, (len(time) - self.size) // self.hop + 1) if before.skip == skipped else 0
        covered = before.covered
        for k in range(windows):
            start = k * self.hop
            end = start + self.size
            if start > covered:
                emit.filter(start - covered)
            emit.absorb(end - max(covered, start))
            covered = end
            out.append(self._window(source, samples[start:end], time[start:end], before.count + k, origin))
        done = windows * self.hop
        beyond = max(0, done - len(time))  # a hop longer than the size reaches into samples that have not come
        if windows and done > covered:
            emit.filter(min(done, len(time)) - covered)
        return _Open(
            before.fields,
            samples[done:].copy(),
            time[done:].copy(),
            max(0, covered - done),
            before.skip - skipped + beyond,
            before.count + windows,
        )

    def _window(self, source: str, samples: Array, time: NDArray[np.int64], number: int, origin: Message) -> Message:
        rate, long = self.config.rate, int(time[-1] - time[0])
        if rate is None and long > 0:
            rate = (len(time) - 1) * 1e9 / long
        one = samples.shape[1] == 1
        frame = Frame(data=samples[:, 0] if one else samples, layout="T" if one else "TC", rate=rate)
        start = int(time[0])
        return Message(f"{self.node}:{source}:{start}-{number}", source, start, frame, origin.trace, origin.born)

    def finish(self, emit: Emit) -> list[Message]:
        if lost := self.held():
            emit.drop("incomplete", lost)
        for source, _ in list(self.open.items()):
            self.open.forget(source)
        return []

    def held(self) -> int:
        return sum(len(o.time) - o.covered for _, o in self.open.items())

    def snapshot(self) -> Any:
        return (
            self.open.snapshot(
                lambda o: [list(o.fields), o.samples.tobytes(), o.time.tobytes(), o.covered, o.skip, o.count]
            )
            if len(self.open)
            else None
        )

    def restore(self, state: Any) -> None:
        self.open.restore(state, _restored)

    def begin(self) -> None:
        self.open.begin()

    def rollback(self) -> None:
        self.open.rollback()


def _restored(value: Any) -> _Open:
    fields, samples, time, covered, skip, count = value
    array = np.frombuffer(samples, np.float32).reshape(-1, len(fields))
    return _Open(tuple(fields), array, np.frombuffer(time, np.int64), covered, skip, count)


def build(config: Config, context: Context) -> Step:
    """The step."""
    return Window(config, context.node)
