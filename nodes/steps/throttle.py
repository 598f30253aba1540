"""At most one row (or frame) of each source in a time: ``{throttle: 1s}``, by the time of the data.

The first goes on, and then the first that is at least that much later than the last that went on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from nodes.operator import Context, Emit
from nodes.steps._state import Memory
from nodes.steps._step import ANY, Step, StepOptions
from nodes.steps._table import RowStage, RowStep, Table, by_source
from schemas.messages import Message, Readings
from schemas.units import Duration

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Config(StepOptions):
    """Options of ``throttle``."""

    takes: ClassVar[frozenset[str]] = ANY
    bare: ClassVar[dict[str, Any] | None] = {"type": "string"}

    every: Duration = Field(gt=0, description="least time between two that go on, e.g. 1s")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"every": value}


def spaced(time: NDArray[np.int64], last: int | None, every: int) -> tuple[list[int], int | None]:
    """Indices of the rows that go on, and the time of the last that did. Work is in proportion to what goes on."""
    kept: list[int] = []
    latest = np.maximum.accumulate(time)  # ascending, and reaches a time where ``time`` first does
    i = 0 if last is None else int(np.searchsorted(latest, last + every))
    while i < len(time):
        kept.append(i)
        last = int(time[i])
        i = max(i + 1, int(np.searchsorted(latest, last + every)))
    return kept, last


class _Rows(RowStep):
    def __init__(self, every: int, last: Memory[str, int]) -> None:
        self.every = every
        self.last = last

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        keep = np.zeros(table.n, np.bool_)
        for source, index in by_source(table):
            kept, last = spaced(table.time[index], self.last.get(source), self.every)
            keep[index[kept]] = True
            if kept and last is not None:
                self.last.set(source, last)
        return table.pick(keep)


class Throttle(Step):
    """State: the time of the last of each source that went on."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.last: Memory[str, int] = Memory()
        self.rows = RowStage([_Rows(every, self.last)])

    def process(self, messages: list[Message], emit: Emit) -> list[Message]:
        if messages and all(isinstance(m.body, Readings) for m in messages):
            return self.rows.process(messages, emit)
        out: list[Message] = []
        for message in messages:
            if isinstance(message.body, Readings):
                out.extend(self.rows.process([message], emit))
                continue
            last = self.last.get(message.source)
            if last is None or message.time >= last + self.every:
                self.last.set(message.source, message.time)
                out.append(message)
            else:
                emit.filter(message.rows)
        return out

    def snapshot(self) -> Any:
        return self.last.snapshot() if len(self.last) else None

    def restore(self, state: Any) -> None:
        self.last.restore(state)

    def begin(self) -> None:
        self.last.begin()

    def rollback(self) -> None:
        self.last.rollback()


def build(config: Config, context: Context) -> Step:
    """The step."""
    return Throttle(config.every)
