"""Put values where they are missing: ``{fill: {humidity: 0, label: none}}``; ``{fill: {previous: [temp], within: 1min}}``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from nodes.operator import Context, Flow
from nodes.steps._fields import full, known, pick
from nodes.steps._state import Memory
from nodes.steps._step import READINGS, RefusedError, StepOptions
from nodes.steps._table import RowStep, Table, by_source
from schemas.expressions import WrongTypeError
from schemas.messages import Column, Scalar
from schemas.units import Duration

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Config(StepOptions):
    """Options of ``fill``."""

    takes: ClassVar[frozenset[str]] = READINGS
    bare: ClassVar[dict[str, Any] | None] = {
        "type": "object",
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    }

    fields: dict[str, StrictBool | StrictInt | StrictFloat | StrictStr] = Field(
        default={}, description="field: value where it is missing; a field that is not there is added"
    )
    previous: list[str] = Field(default=[], description="fields that repeat the source's last value that was there")
    within: Duration = Field(default=0, description="how old a repeated value may be; 0: any age")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if full(value, "fields", "previous", "within") else {"fields": value}

    @model_validator(mode="after")
    def _some(self) -> Config:
        if not self.fields and not self.previous:
            raise ValueError("expected fields with values, or fields under 'previous'")
        return self

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.previous, "previous")
        return Flow(flow.type, None if flow.fields is None else flow.fields | set(self.fields))


def gone(column: Column) -> NDArray[np.bool_]:
    """Where a column is missing."""
    if isinstance(column, list):
        return np.array([v is None for v in column], np.bool_)
    if column.dtype.kind == "f":
        return np.isnan(column)
    return np.zeros(len(column), np.bool_)


def _constant(name: str, column: Column | None, value: float | str, n: int) -> Column:
    if column is None:
        return [value] * n if isinstance(value, str) else np.full(n, value)
    if isinstance(value, str):
        if isinstance(column, list):
            return [value if v is None else v for v in column]
        if not bool(gone(column).all()):
            raise WrongTypeError(f"field {name!r} has numbers and cannot be filled with text")
        return [value] * n
    if isinstance(column, list):
        if any(v is not None for v in column):
            raise WrongTypeError(f"field {name!r} has text and cannot be filled with {value!r}")
        column = np.full(n, np.nan)
    return np.where(np.isnan(column), column.dtype.type(value), column) if column.dtype.kind == "f" else column


class Fill(RowStep):
    """Same rows, fewer holes. State: the last value of each source and field, with its time."""

    def __init__(self, config: Config) -> None:
        self.fields = config.fields
        self.previous = config.previous
        self.within = config.within
        self.last: Memory[tuple[str, str], tuple[int, Scalar]] = Memory()

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        for name in self.previous:
            column = pick(table.columns, name)
            if len(table.messages) > 1 and not isinstance(column, list) and self._text(name, table):
                raise RefusedError("wrong-type", f"field {name!r} becomes text in some messages")  # then one by one
        columns = dict(table.columns)
        made = {
            k: _constant(k, columns.get(k), v, table.n) for k, v in self.fields.items()
        }  # refuses before state changes
        for name in self.previous:
            repeated = self._repeat(name, columns[name], table)
            made[name] = _constant(name, repeated, self.fields[name], table.n) if name in self.fields else repeated
        return table.with_columns(columns | made)

    def _text(self, name: str, table: Table) -> bool:
        """Whether a source's last value is text: then a column that is all missing becomes text too."""
        held = (self.last.get((source, name)) for source in table.sources[1])
        return any(last is not None and isinstance(last[1], str) for last in held)

    def _repeat(self, name: str, column: Column, table: Table) -> Column:
        holes = gone(column)
        out: Any = list(column) if isinstance(column, list) else column.copy()
        for source, index in by_source(table):
            hole, time = holes[index], table.time[index]
            before = self.last.get((source, name))
            here = np.where(hole, -1, np.arange(len(index)))
            latest = np.maximum.accumulate(here)  # per row: the last row at or before it that has a value
            for_old = hole & (latest < 0)
            from_here = hole & (latest >= 0)
            if self.within:
                from_here &= time - time[latest] <= self.within
            if before is not None:
                if self.within:
                    for_old &= time - before[0] <= self.within
                out = _put(out, index[for_old], [before[1]] * int(for_old.sum()))
            out = _put(out, index[from_here], [column[i] for i in index[latest[from_here]].tolist()])
            if len(index) and latest[-1] >= 0:
                i = int(index[latest[-1]])
                value = column[i] if isinstance(column, list) else column[i].item()
                self.last.set((source, name), (int(table.time[i]), value))
        return out if isinstance(out, list) else np.asarray(out)

    def snapshot(self) -> Any:
        return self.last.snapshot(list, list) if len(self.last) else None

    def restore(self, state: Any) -> None:
        self.last.restore(state, lambda v: (v[0], v[1]), lambda k: (k[0], k[1]))

    def begin(self) -> None:
        self.last.begin()

    def rollback(self) -> None:
        self.last.rollback()


def _put(out: Any, where: NDArray[np.int64], values: list[Any]) -> Any:
    """``values`` at ``where``; a column that was all missing becomes text when text is put."""
    if not values:
        return out
    if isinstance(out, list):
        for i, value in zip(where.tolist(), values, strict=True):
            out[i] = value if value is None or isinstance(value, str) else str(value)
        return out
    if isinstance(values[0], str):
        return _put([None if v != v else str(v) for v in out.tolist()], where, values)
    out[where] = values
    return out


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Fill(config)
