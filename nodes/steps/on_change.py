"""Keep a row only when a field differs from the source's row before: ``on-change``, ``{on-change: [door, mode]}``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from nodes.operator import Context, Flow
from nodes.steps._fields import known, pick
from nodes.steps._state import Memory
from nodes.steps._step import ROWS, StepOptions
from nodes.steps._table import RowStep, Table, by_source
from schemas.messages import Column, Scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Config(StepOptions):
    """Options of ``on-change``."""

    takes: ClassVar[frozenset[str]] = ROWS
    bare: ClassVar[dict[str, Any] | None] = {"type": ["array", "string"], "items": {"type": "string"}}

    fields: list[str] = Field(default=[], description="fields that are looked at; none: all that a row has")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"fields": [value] if isinstance(value, str) else value}

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.fields, "fields")
        return flow


def _codes(column: Column) -> NDArray[Any]:
    """Numbers that are equal where the texts are."""
    if not isinstance(column, list):
        return column
    known: dict[str | None, int] = {}
    return np.array([known.setdefault(v, len(known)) for v in column], np.int64)


def plain(column: Column, i: int) -> Scalar:
    """One value, NaN as None."""
    if isinstance(column, list):
        return column[i]
    value: Scalar = column[i].item()
    return None if value != value else value


class OnChange(RowStep):
    """State: the last row of each source."""

    def __init__(self, fields: list[str]) -> None:
        self.fields = fields
        self.last: Memory[str, dict[str, Scalar]] = Memory()

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        columns = {name: pick(table.columns, name) for name in self.fields or table.columns}
        keep = np.zeros(table.n, np.bool_)
        codes = [_codes(c) for c in columns.values()]
        for source, index in by_source(table):
            if not len(index):
                continue
            changed = np.zeros(len(index), np.bool_)
            for code in codes:
                own = code[index]
                different = own[1:] != own[:-1]
                if own.dtype.kind == "f":
                    different &= ~(np.isnan(own[1:]) & np.isnan(own[:-1]))
                changed[1:] |= different
            first, last = int(index[0]), int(index[-1])
            changed[0] = self.last.get(source) != {name: plain(c, first) for name, c in columns.items()}
            keep[index] = changed
            self.last.set(source, {name: plain(c, last) for name, c in columns.items()})
        return table.pick(keep)

    def snapshot(self) -> Any:
        return self.last.snapshot() if len(self.last) else None

    def restore(self, state: Any) -> None:
        self.last.restore(state)

    def begin(self) -> None:
        self.last.begin()

    def rollback(self) -> None:
        self.last.rollback()


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return OnChange(config.fields)
