"""Windows as users write them: ``10s``, ``{sliding: {size: 1min, every: 10s}}``, ``{session: {gap: 30s}}``, ``{count: 100}``."""

from __future__ import annotations

from math import gcd
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from schemas.units import Duration

MAX_PANES = 4096
"""Most panes (greatest common divisor of size and step) of one sliding window."""
LONGEST = 3652 * 86400 * 10**9
"""Longest duration of a window, a delay or a lateness, ns: ten years, so that times stay within int64."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def span(value: int) -> int:
    """A duration above 0 and not absurd.

    :raises ValueError: it is not.
    """
    if value <= 0:
        raise ValueError("expected a duration above 0")
    return limited(value)


def limited(value: int) -> int:
    """A duration that is not absurd.

    :raises ValueError: it is.
    """
    if value > LONGEST:
        raise ValueError("expected a duration of at most 3652d (ten years)")
    return value


def _panes(size: int, every: int) -> None:
    if every > size:
        raise ValueError("every is longer than size: what lies between would be in no window; use every ≤ size")
    if size // gcd(size, every) > MAX_PANES:
        raise ValueError(f"size and every share too small a step: a window would have more than {MAX_PANES} parts")


class Sliding(_Part):
    """Windows of ``size`` that begin at every multiple of ``every``, so they overlap."""

    size: Duration = Field(description="length of each window")
    every: Duration = Field(description="time from the start of one window to that of the next, at most size")

    @model_validator(mode="after")
    def _fit(self) -> Sliding:
        span(self.size)
        span(self.every)
        _panes(self.size, self.every)
        return self


class Session(_Part):
    """A window lasts as long as rows of the key come less than ``gap`` apart."""

    gap: Duration = Field(description="silence, in event time, that ends a session")

    @model_validator(mode="after")
    def _fit(self) -> Session:
        span(self.gap)
        return self


class Count(_Part):
    """Windows of ``size`` rows of a key, in the order that they come; a new one after every ``every`` rows."""

    size: PositiveInt = Field(description="rows in each window", le=10**9)
    every: PositiveInt | None = Field(
        None, description="rows from the start of one window to that of the next; size", le=10**9
    )

    @model_validator(mode="after")
    def _fit(self) -> Count:
        _panes(self.size, self.step)
        return self

    @property
    def step(self) -> int:
        """Rows from the start of one window to that of the next."""
        return self.size if self.every is None else self.every


def _bare_count(value: Any) -> Any:
    return {"size": value} if isinstance(value, int) and not isinstance(value, bool) else value


class WindowSpec(_Part):
    """Exactly one of the four kinds of window."""

    tumbling: Duration | None = Field(
        None, description="windows of this length, one after the other, aligned to 1970-01-01"
    )
    sliding: Sliding | None = Field(None, description="overlapping windows: size and every")
    session: Session | None = Field(None, description="windows that end with silence: gap")
    count: Annotated[Count | None, BeforeValidator(_bare_count)] = Field(
        None, description="windows of a number of rows: a number, or size and every"
    )

    @model_validator(mode="after")
    def _one(self) -> WindowSpec:
        if len(self.model_fields_set) != 1 or getattr(self, next(iter(self.model_fields_set))) is None:
            raise ValueError("expected exactly one of tumbling, sliding, session, count")
        if self.tumbling is not None:
            span(self.tumbling)
        return self


def _bare_window(value: Any) -> Any:
    return {"tumbling": value} if isinstance(value, (str, int)) else value


Window = Annotated[WindowSpec, BeforeValidator(_bare_window)]
"""A window; a bare duration is a tumbling one."""
