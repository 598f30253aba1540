"""Change units or number types: ``{convert: {temp: °C -> °F, pressure: bar -> Pa, count: int32}}``."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from nodes.operator import Context, Flow
from nodes.options import Options
from nodes.steps._fields import full, known, pick
from nodes.steps._step import READINGS, RefusedError, StepOptions
from nodes.steps._table import RowStep, Table
from nodes.steps._units import conversion
from schemas.expressions import WrongTypeError
from schemas.messages import Array, Column

_ARROW = re.compile(r"\s*(.+?)\s*(?:->|→)\s*(.+?)\s*")

Dtype = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"
]


class Conversion(Options):
    """What happens to one field: a unit, then a number type."""

    start: str | None = Field(default=None, alias="from", description="unit of the values that come in")
    to: str | None = Field(default=None, description="unit of the values that go on")
    dtype: Dtype | None = Field(
        default=None, description="number type that goes on; whole numbers are rounded and clipped"
    )

    @model_validator(mode="after")
    def _units(self) -> Conversion:
        if (self.start is None) != (self.to is None):
            raise ValueError("a unit needs both 'from' and 'to'")
        if self.start is None and self.dtype is None:
            raise ValueError("expected units ('from' and 'to') or a 'dtype'")
        if self.start is not None and self.to is not None:
            conversion(self.start, self.to)
        return self


def _conversion(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if m := _ARROW.fullmatch(value):
        return {"from": m[1], "to": m[2]}
    return {"dtype": value}


class Config(StepOptions):
    """Options of ``convert``."""

    takes: ClassVar[frozenset[str]] = READINGS
    bare: ClassVar[dict[str, Any] | None] = {"type": "object", "additionalProperties": {"type": ["string", "object"]}}

    fields: dict[str, Annotated[Conversion, BeforeValidator(_conversion)]] = Field(
        min_length=1, description="field: '<unit> -> <unit>', a number type, or {from, to, dtype}"
    )

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if full(value, "fields") else {"fields": value}

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.fields, "fields", keys=True)
        return flow


def _cast(name: str, values: Array, dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iub" and values.dtype.kind == "f" and bool(np.isnan(values).any()):
        raise RefusedError("missing-value", f"field {name!r} has missing values, which {dtype.name} cannot say")
    if dtype.kind == "b":
        return np.asarray(values != 0)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if values.dtype.kind != "f":
            return np.clip(values, *_shared(limits, values.dtype)).astype(dtype)
        top = np.nextafter(float(limits.max) + 1, 0)  # the largest float64 that fits: 2**63 - 1 itself is none
        return np.clip(np.rint(values.astype(np.float64)), float(limits.min), top).astype(dtype)
    return values.astype(dtype)


def _shared(limits: np.iinfo[Any], dtype: np.dtype[Any]) -> tuple[int, int]:
    """The bounds of ``limits`` that values of ``dtype`` can reach."""
    if dtype.kind == "b":
        return 0, 1
    own = np.iinfo(dtype)
    return max(int(limits.min), int(own.min)), min(int(limits.max), int(own.max))


class Convert(RowStep):
    """Same names, other values."""

    def __init__(self, fields: dict[str, Conversion]) -> None:
        self.fields = [
            (
                name,
                None if c.start is None or c.to is None else conversion(c.start, c.to),
                None if c.dtype is None else np.dtype(c.dtype),
            )
            for name, c in fields.items()
        ]

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        columns: dict[str, Column] = dict(table.columns)
        with np.errstate(all="ignore"):
            for name, scale, dtype in self.fields:
                column = pick(columns, name)
                if isinstance(column, list):
                    if any(v is not None for v in column):
                        raise WrongTypeError(f"field {name!r} has text, which has no unit or number type")
                    column = np.full(len(column), np.nan)
                if scale is not None:
                    kept = column.dtype if column.dtype.kind == "f" else np.dtype(np.float64)
                    column = (column.astype(np.float64) * scale[0] + scale[1]).astype(kept)
                columns[name] = column if dtype is None else _cast(name, column, dtype)
        return table.with_columns(columns)


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Convert(config.fields)
