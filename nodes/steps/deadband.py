"""Keep a row only when a value has moved enough: ``{deadband: {temp: 0.5, flow: 2%}}``; or while it is outside a band:
``{deadband: {level: [20, 80]}}``.

- a number: it differs by more than that from the last row that went on;
- a percentage: by more than that share of the last value;
- two numbers: it is outside of them, or has just come back inside.

One field is enough; the first row of a source always goes on, and so does one where a value begins or ceases to be missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field

from nodes.operator import Context, Flow
from nodes.steps._fields import full, known, pick
from nodes.steps._state import Memory
from nodes.steps._step import ROWS, StepOptions
from nodes.steps._table import RowStep, Table, by_source
from schemas.expressions import WrongTypeError
from schemas.messages import Array

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")
_STRIDE = 8


@dataclass(frozen=True, slots=True)
class Band:
    """What a field must leave.

    :param low: and ``high``: the fixed band; None for a band around the last value.
    """

    absolute: float = 0.0
    share: float = 0.0
    low: float | None = None
    high: float | None = None


def _band(value: Any) -> Band:
    if isinstance(value, Band):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return Band(absolute=float(value))
    if isinstance(value, str) and (m := _PERCENT.fullmatch(value)):
        return Band(share=float(m[1]) / 100)
    if (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
        and value[0] < value[1]
    ):
        return Band(low=float(value[0]), high=float(value[1]))
    raise ValueError(f"expected a number from 0, a percentage such as 2%, or [low, high], got {value!r}")


class Config(StepOptions):
    """Options of ``deadband``."""

    takes: ClassVar[frozenset[str]] = ROWS
    bare: ClassVar[dict[str, Any] | None] = {
        "type": "object",
        "additionalProperties": {"type": ["number", "string", "array"]},
    }

    fields: dict[str, Annotated[Any, BeforeValidator(_band)]] = Field(
        min_length=1,
        description="field: how far it must move (number or percentage), or [low, high] that it must leave",
    )

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if full(value, "fields") else {"fields": value}

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.fields, "fields", keys=True)
        return flow


class Deadband(RowStep):
    """State: of each source the values of the last row that went on and, for fixed bands, of the last row at all."""

    def __init__(self, bands: dict[str, Band]) -> None:
        self.moving = {name: band for name, band in bands.items() if band.low is None}
        self.fixed = {name: band for name, band in bands.items() if band.low is not None}
        self.absolute = np.array([[b.absolute] for b in self.moving.values()])
        self.share = np.array([[b.share] for b in self.moving.values()])
        self.limits = [(b.absolute, b.share) for b in self.moving.values()]
        self.last: Memory[str, tuple[list[float], list[float]]] = Memory()

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        moving = [_numbers(table, name) for name in self.moving]
        fixed = [_numbers(table, name) for name in self.fixed]
        keep = np.zeros(table.n, np.bool_)
        for source, index in by_source(table):
            if not len(index):
                continue
            keep[index] = self._source(source, [c[index] for c in moving], [c[index] for c in fixed])
        return table.pick(keep)

    def _source(self, source: str, moving: list[Array], fixed: list[Array]) -> NDArray[np.bool_]:
        before = self.last.get(source)
        n = len((moving or fixed)[0])
        news = np.zeros(n, np.bool_)
        for k, (band, column) in enumerate(zip(self.fixed.values(), fixed, strict=True)):
            inside = (column >= band.low) & (column <= band.high)
            previous = np.concatenate(([_inside(band, before[1][k]) if before else False], inside[:-1]))
            absent = np.isnan(column)
            was_absent = np.concatenate(([before is not None and before[1][k] != before[1][k]], absent[:-1]))
            news |= np.where(absent, ~was_absent, ~inside | ~previous)
        news[0] |= before is None
        reference = np.array(before[0] if before else [np.nan] * len(moving))
        if moving:
            news, reference = self._move(np.stack(moving), news, reference)
        self.last.set(source, (reference.tolist(), [float(c[-1]) for c in fixed]))
        return news

    def _move(self, values: Array, news: NDArray[np.bool_], reference: Array) -> tuple[NDArray[np.bool_], Array]:
        """From each row that goes on to the next: row by row at first, then in ever longer stretches while nothing moves."""
        keep = np.zeros(len(news), np.bool_)
        rows, fresh = values.T.tolist(), news.tolist()
        start, stride = 0, _STRIDE
        while start < len(news):
            if stride == _STRIDE:  # where rows move often, a few comparisons cost less than one call of numpy
                held_row, near = reference.tolist(), min(start + _STRIDE, len(rows))
                while start < near and not (fresh[start] or self._far(rows[start], held_row)):
                    start += 1
                if start < near:
                    keep[start] = True
                    reference = values[:, start]
                    start += 1
                else:
                    stride *= 4
                continue
            stretch = values[:, start : start + stride]
            held = reference[:, None]
            far = np.abs(stretch - held) > self.absolute + self.share * np.abs(held)
            far |= np.isnan(stretch) != np.isnan(held)
            hits = far.any(axis=0) | news[start : start + stride]
            i = int(hits.argmax())
            if hits[i]:
                keep[start + i] = True
                reference = stretch[:, i]
                start, stride = start + i + 1, _STRIDE
            else:
                start, stride = start + stretch.shape[1], stride * 4
        return keep, reference

    def _far(self, row: list[float], held: list[float]) -> bool:
        """As the columns are compared below, for one row."""
        for value, last, (absolute, share) in zip(row, held, self.limits, strict=True):
            if abs(value - last) > absolute + share * abs(last) or (value != value) != (last != last):
                return True
        return False

    def snapshot(self) -> Any:
        return self.last.snapshot(list) if len(self.last) else None

    def restore(self, state: Any) -> None:
        self.last.restore(state, lambda v: (v[0], v[1]))

    def begin(self) -> None:
        self.last.begin()

    def rollback(self) -> None:
        self.last.rollback()


def _inside(band: Band, value: float) -> bool:
    return band.low is not None and band.high is not None and band.low <= value <= band.high


def _numbers(table: Table, name: str) -> Array:
    column = pick(table.columns, name)
    if isinstance(column, list):
        if any(v is not None for v in column):
            raise WrongTypeError(f"field {name!r} has text, which has no deadband")
        return np.full(len(column), np.nan)
    return column.astype(np.float64)


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Deadband(config.fields)
