"""Leave out what was there already: ``dedupe``, ``{dedupe: {by: [serial], within: 10min}}``.

A row is a duplicate when one of the same source with the same values of ``by`` went on less than ``within`` before or after
it, by the time of the data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from nodes.operator import Context, Flow
from nodes.steps._fields import known, pick
from nodes.steps._state import Memory
from nodes.steps._step import ROWS, StepOptions
from nodes.steps._table import RowStep, Table
from schemas.messages import Column, Scalar
from schemas.units import Duration

Key = tuple[str, tuple[Scalar, ...]]


class Config(StepOptions):
    """Options of ``dedupe``."""

    takes: ClassVar[frozenset[str]] = ROWS
    bare: ClassVar[dict[str, Any] | None] = {"type": "array", "items": {"type": "string"}}

    by: list[str] = Field(default=[], description="fields that make rows the same; none: all that a row has")
    within: Duration = Field(default=10 * 10**9, gt=0, description="time in which the same is a duplicate")
    remember: int = Field(default=100_000, ge=1, le=10_000_000, description="most different rows remembered")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"by": value}

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.by, "by")
        return flow


def values(column: Column) -> list[Scalar]:
    """A column as plain values, NaN as None so that missing equals missing."""
    if isinstance(column, list):
        return list(column)
    plain: list[Scalar] = column.tolist()
    return [None if v != v else v for v in plain] if column.dtype.kind == "f" else plain


class Dedupe(RowStep):
    """State: when each different row last went on. Those that are too old to matter are forgotten."""

    ordered: ClassVar[bool] = True  # forgetting goes by the time of whatever source comes

    def __init__(self, config: Config) -> None:
        self.by = config.by
        self.within = config.within
        self.seen: Memory[Key, int] = Memory(config.remember)

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        parts = [values(pick(table.columns, name)) for name in self.by or sorted(table.columns)]
        keys = zip(table.source, zip(*parts, strict=True) if parts else [()] * table.n, strict=True)
        keep = np.zeros(table.n, np.bool_)
        # one dictionary look-up a row: values of any type have no order that numpy could sort by
        for i, (key, time) in enumerate(zip(keys, table.time.tolist(), strict=True)):
            last = self.seen.get(key)
            if last is None or abs(time - last) >= self.within:
                self.seen.set(key, time)
                keep[i] = True
                self._expire(time)
        return table.pick(keep)

    def _expire(self, now: int) -> None:
        """Forget at most two of the oldest: enough to keep up, and never long."""
        for _ in range(2):
            key, time = next(iter(self.seen.items()))
            if now - time < self.within:
                return
            self.seen.forget(key)

    def snapshot(self) -> Any:
        return self.seen.snapshot(key=lambda k: [k[0], list(k[1])]) if len(self.seen) else None

    def restore(self, state: Any) -> None:
        self.seen.restore(state, key=lambda k: (k[0], tuple(k[1])))

    def begin(self) -> None:
        self.seen.begin()

    def rollback(self) -> None:
        self.seen.rollback()


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Dedupe(config)
