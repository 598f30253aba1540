"""Gather rows into windows and answer with statistics of each key.

``{aggregate: {window: 10s, by: source, fields: {t: mean(temp), hot: count(temp > 80)}}, from: sensors}``. Windows go by the
rows' event time; docs/aggregate.md says when they are answered, and what is done with late rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from nodes.operator import Context, Flow
from nodes.options import Options
from nodes.statistics import check_fields, compile_fields, output_names
from nodes.windowing.aggregator import Aggregator
from nodes.windowing.base import Windows
from nodes.windowing.counts import Counts
from nodes.windowing.groups import Groups
from nodes.windowing.keys import Keys
from nodes.windowing.panes import Panes
from nodes.windowing.sessions import Sessions
from nodes.windowing.spec import Window, WindowSpec, limited
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.expressions import CallText
from schemas.rows import ROW_TYPES
from schemas.units import Duration

RESERVED = frozenset({"key", "count", "start", "end"})
"""Fields that every answer has anyway; see :func:`schemas.rows.rows`."""


def _names(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Watermark(Options):
    """How event time is followed."""

    delay: Annotated[Duration, AfterValidator(limited)] = Field(
        0, description="how far event times may be out of order: windows wait so long, in event time"
    )


class Config(Options):
    """Options of ``aggregate``."""

    timed: ClassVar[bool] = True

    window: Window = Field(
        description="a duration (tumbling), or {tumbling: 10s}, {sliding: {size: 1min, every: 10s}}, {session: {gap: 30s}},"
        " {count: 100}, {count: {size: 100, every: 10}}"
    )
    by: Annotated[list[str], BeforeValidator(_names)] = Field(
        default_factory=list, description="field or fields to group by; source is the device; none: one group"
    )
    fields: dict[str, CallText] = Field(
        min_length=1,
        description="field → statistic, e.g. {t: mean(temp), hot: count(temp > 80), p95: quantile(ms, 0.95)}",
    )
    watermark: Watermark = Field(Watermark(delay=0), description="how event time is followed")
    lateness: Annotated[Duration, AfterValidator(limited)] = Field(
        0, description="how long, in event time, a window answered is kept for late rows, which make it answer anew"
    )
    idle: Annotated[Duration, AfterValidator(limited)] | Literal["never"] | None = Field(
        None,
        description="silence by the clock after which open windows answer with what they have; without it those of live"
        " data answer 5 s after their end; never: they wait for data",
    )
    limit: PositiveInt = Field(
        100_000, description="most open groups (windows x keys); rows that need one more are dropped", le=10_000_000
    )

    def whole(self) -> str | None:
        return None if "source" in self.by else "its groups hold rows of several sources; group by source"

    def accepts(self) -> frozenset[str] | None:
        return ROW_TYPES

    def check(self, context: Context) -> None:
        problems: list[Problem] = []
        try:
            compile_fields(self.fields)
        except ConfigError as error:
            problems.extend(error.under("fields").problems)
        problems.extend(
            Problem(("fields", name), f"every answer has {name!r} of its own; choose another name", on_key=True)
            for name in sorted(RESERVED & self.fields.keys())
        )
        problems.extend(
            Problem(("by", i), f"{name!r} is there twice") for i, name in enumerate(self.by) if name in self.by[:i]
        )
        spec = self.window
        if spec.count is not None and self.lateness:
            problems.append(Problem(("lateness",), "windows of a number of rows know no late rows"))
        if spec.count is not None and self.watermark.delay:
            problems.append(Problem(("watermark",), "windows of a number of rows have no watermark"))
        if self.idle == 0:
            problems.append(Problem(("idle",), "expected a duration above 0, or never"))
        if problems:
            raise ConfigError(*problems)

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        known = _together(inputs)
        problems: list[Problem] = []
        try:
            check_fields(self.fields, known)
        except ConfigError as error:
            problems.extend(error.under("fields").problems)
        if known is not None:
            choices = known | {"source"}
            problems.extend(
                Problem(("by", i), f"unknown field {name!r}{did_you_mean(name, choices)}")
                for i, name in enumerate(self.by)
                if name not in choices
            )
        if problems:
            raise ConfigError(*problems)
        return {"out": Flow("aggregate/1", output_names(self.fields) | RESERVED)}


def _together(inputs: Sequence[Flow]) -> frozenset[str] | None:
    """Fields that any input has; None where one is not known."""
    known: frozenset[str] = frozenset()
    for flow in inputs:
        if flow.fields is None:
            return None
        known |= flow.fields
    return known if inputs else None


def _windows(spec: WindowSpec, groups: Groups, lateness: int) -> Windows:
    if spec.tumbling is not None:
        return Panes(groups, lateness, spec.tumbling, spec.tumbling)
    if spec.sliding is not None:
        return Panes(groups, lateness, spec.sliding.size, spec.sliding.every)
    if spec.session is not None:
        return Sessions(groups, lateness, spec.session.gap)
    assert spec.count is not None  # noqa: S101 - narrows the type: one of the four is there
    return Counts(groups, spec.count.size, spec.count.step)


def build(config: Config, context: Context) -> Aggregator:
    """The operator."""
    plan = compile_fields(config.fields)
    keys = Keys()
    spans = config.window.session is not None or config.window.count is not None
    groups = Groups(plan, keys, config.limit, spans)
    return Aggregator(
        node=context.node,
        windows=_windows(config.window, groups, config.lateness),
        by=tuple(config.by),
        delay=config.watermark.delay,
        idle=config.idle if isinstance(config.idle, int) else None,
        follow=config.idle is None,
        edges=context.inputs,
        clock=time.time_ns,
    )
