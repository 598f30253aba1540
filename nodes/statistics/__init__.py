"""Statistics of groups of rows: what ``aggregate`` computes. docs/aggregate.md lists the same; a test compares them.

:func:`compile_fields` turns ``{name: call}`` into a :class:`Plan`: the expressions to evaluate on each batch, the
accumulators that take their values (shared by calls of one expression), and how the answers are read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nodes.statistics.curve import Curve
from nodes.statistics.simple import Count, Ends, Extremes, Histogram, Moments, NumberEnds
from nodes.statistics.sketches import Distinct, Mode, Values
from nodes.statistics.state import Accumulator, Result, Slots, Times
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.expressions import Call, Expression, MissingFieldError, WrongTypeError
from schemas.messages import Array, Column, Scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["STATISTICS", "Plan", "Series", "Statistic", "check_fields", "compile_fields", "output_names"]

Output: TypeAlias = tuple[str, Result]


@dataclass(frozen=True, slots=True)
class Series:
    """The values of one expression for a batch: those present, and which rows they are of (None: all)."""

    values: Array
    present: Array | None

    def pick(self, slots: Slots, time: Times, index: Array | None) -> tuple[Slots, Times, Array]:
        """Slots, times and values of the rows ``index`` (positions; None: all) that are present.

        :param slots: of the rows of ``index``; ``time`` likewise.
        """
        if index is None:
            if self.present is None:
                return slots, time, self.values
            return slots[self.present], time[self.present], self.values[self.present]
        values = self.values[index]
        if self.present is None:
            return slots, time, values
        there = self.present[index]
        return slots[there], time[there], values[there]


@dataclass
class Plan:
    """Compiled fields.

    :param accumulators: (index into ``expressions``, accumulator); index -1 takes every row.
    :param outputs: (field, how it is read), in the order that the user wrote.
    """

    expressions: list[Expression] = field(default_factory=list)
    accumulators: list[tuple[int, Accumulator]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    _known: dict[tuple[str, str], Accumulator] = field(default_factory=dict)
    _numeric: set[int] = field(default_factory=set)
    _places: dict[tuple[str, bool], int] = field(default_factory=dict)

    def need(self, source: Expression | None, key: str, make: Callable[[], Accumulator]) -> Accumulator:
        """The accumulator ``key`` of an expression (None: of the rows themselves), made at the first time."""
        text = "" if source is None else source.source
        made = self._known.get((text, key))
        if made is None:
            made = self._known[text, key] = make()
            at = -1
            if source is not None:
                # a condition may be counted as it is and averaged as 0 and 1: then it is there twice
                shared = text, made.numeric or source.kind == "number"
                if shared not in self._places:
                    self._places[shared] = len(self.expressions)
                    self.expressions.append(source)
                at = self._places[shared]
                if made.numeric:
                    self._numeric.add(at)
            self.accumulators.append((at, made))
        return made

    @property
    def fields(self) -> frozenset[str]:
        """Columns that the expressions read."""
        return frozenset().union(*(e.fields for e in self.expressions))

    def evaluate(self, columns: Mapping[str, Column], n: int) -> list[Series]:
        """Values of every expression. A column that is not there is missing in every row.

        :raises WrongTypeError: texts where numbers are needed.
        """
        out = []
        for at, source in enumerate(self.expressions):
            while True:
                try:
                    column = source(columns, n)
                    break
                except MissingFieldError as error:
                    columns = {**columns, error.field: np.full(n, np.nan)}
            out.append(_series(column, at in self._numeric, source))
        return out

    def results(self, slots: Slots, seconds: NDArray[np.float64]) -> dict[str, list[Scalar]]:
        """field → one value a slot."""
        with np.errstate(all="ignore"):
            return {name: read(slots, seconds) for name, read in self.outputs}


def _series(column: Column, numeric: bool, source: Expression) -> Series:
    if isinstance(column, list):
        there = np.array([v is not None for v in column], np.bool_)
        if numeric:
            if there.any():
                raise WrongTypeError(f"{source.source} is text; a number is needed")
            return Series(np.zeros(len(column)), there)
        values = np.empty(len(column), object)
        values[:] = column
        return Series(values, None if there.all() else there)
    if column.dtype.kind == "f":
        array = column if column.dtype == np.float64 else column.astype(np.float64)
        gone = np.isnan(array)
        return Series(array, ~gone if gone.any() else None)
    return Series(column.astype(np.float64) if numeric else column, None)


Make: TypeAlias = Callable[[Plan, str, Call], Sequence[Output]]


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic.

    :param form: how it is written.
    :param least: fewest arguments.
    :param most: most arguments.
    """

    form: str
    doc: str
    make: Make
    least: int = 1
    most: int = 1
    numeric: bool = True


def _of(key: str, kind: Callable[[], Accumulator], read: str) -> Make:
    """A statistic that is one method of one accumulator."""

    def make(plan: Plan, name: str, call: Call) -> Sequence[Output]:
        return [(name, getattr(plan.need(call.args[0], key, kind), read))]

    return make


def _moments(read: str, *, squares: bool = False) -> Make:
    return _of(f"moments{squares:d}", partial(Moments, squares), read)


def _count(read: str) -> Make:
    def make(plan: Plan, name: str, call: Call) -> Sequence[Output]:
        return [(name, getattr(plan.need(call.args[0] if call.args else None, "count", Count), read))]

    return make


def _rate(plan: Plan, name: str, call: Call) -> Sequence[Output]:
    if not call.args or call.args[0].kind == "bool":
        return _count("share")(plan, name, call)
    return _of("ends-number", NumberEnds, "slope")(plan, name, call)


def _quantile(plan: Plan, name: str, call: Call) -> Sequence[Output]:
    q = 0.5 if len(call.args) == 1 else _number(call, 1, "the quantile, a number from 0 to 1")
    if not 0 <= q <= 1:
        call.fail(f"the quantile is a number from 0 to 1, got {q:g}{_percent(q)}", 1)
    values = plan.need(call.args[0], "values", Values)
    assert isinstance(values, Values)  # noqa: S101 - narrows the type: the key names this kind

    def read(slots: Slots, _seconds: NDArray[np.float64]) -> list[Scalar]:
        return values.quantiles(slots, q)

    return [(name, read)]


def _percent(q: float) -> str:
    return f"; did you mean {q / 100:g}?" if 1 < q <= 100 else ""


def _number(call: Call, arg: int, what: str) -> float:
    value = call.args[arg].constant
    if isinstance(value, (bool, str)) or value is None or not np.isfinite(value):
        call.fail(f"expected {what}", arg)
    return float(value)


def _histogram(plan: Plan, name: str, call: Call) -> Sequence[Output]:
    edges = tuple(_number(call, i, "an edge, a number") for i in range(1, len(call.args)))
    for i in range(1, len(edges)):
        if edges[i] <= edges[i - 1]:
            call.fail(f"edges rise: {edges[i]:g} comes after {edges[i - 1]:g}", i + 1)
    histogram = plan.need(call.args[0], f"histogram{edges}", partial(Histogram, edges))
    assert isinstance(histogram, Histogram)  # noqa: S101 - narrows the type: the key names this kind

    def read(i: int, slots: Slots, _seconds: NDArray[np.float64]) -> list[Scalar]:
        return histogram.bin(i, slots)

    texts = [f"{e:g}" for e in edges]
    names = [f"lt_{texts[0]}", *(f"{a}_{b}" for a, b in pairwise(texts)), f"ge_{texts[-1]}"]
    return [(f"{name}_{suffix}", partial(read, i)) for i, suffix in enumerate(names)]


STATISTICS: dict[str, Statistic] = {
    "count": Statistic(
        "count(), count(condition), count(x)", "rows; rows where the condition holds; values that are there",
        _count("count"), 0, numeric=False,
    ),
    "sum": Statistic("sum(x)", "sum", _moments("sum")),
    "mean": Statistic("mean(x)", "arithmetic mean", _moments("mean")),
    "variance": Statistic("variance(x)", "sample variance, n - 1 below", _moments("variance", squares=True)),
    "stddev": Statistic("stddev(x)", "its square root", _moments("stddev", squares=True)),
    "min": Statistic("min(x)", "least", _of("extremes", Extremes, "min")),
    "max": Statistic("max(x)", "greatest", _of("extremes", Extremes, "max")),
    "range": Statistic("range(x)", "greatest minus least", _of("extremes", Extremes, "range")),
    "first": Statistic("first(x)", "value at the earliest event time", _of("ends", Ends, "at_first"), numeric=False),
    "last": Statistic("last(x)", "value at the latest event time", _of("ends", Ends, "at_last"), numeric=False),
    "delta": Statistic("delta(x)", "last minus first", _of("ends-number", NumberEnds, "delta")),
    "rate": Statistic(
        "rate(), rate(condition), rate(x)",
        "rows a second; rows a second where the condition holds; delta by the seconds between first and last",
        _rate, 0, numeric=False,
    ),
    "median": Statistic("median(x)", "the 0.5 quantile", _quantile),
    "quantile": Statistic("quantile(x, q)", "value below which a share q lies", _quantile, 2, 2),
    "distinct": Statistic("distinct(x)", "how many different values", _of("distinct", Distinct, "distinct"), numeric=False),
    "mode": Statistic("mode(x)", "most frequent value, the least of equals", _of("mode", Mode, "mode"), numeric=False),
    "histogram": Statistic(
        "histogram(x, edge, …)", "counts between edges, a field each: name_lt_0, name_0_10, name_ge_10",
        _histogram, 2, 65,
    ),
    "integral": Statistic("integral(x)", "area under x over time, in x times seconds", _of("curve", Curve, "integral")),
    "time_mean": Statistic("time_mean(x)", "mean weighted by time", _of("curve", Curve, "time_mean")),
}  # fmt: skip
"""Every statistic by name."""


def _compile(plan: Plan, name: str, call: Call) -> Sequence[Output]:
    kind = STATISTICS.get(call.name)
    if kind is None:
        call.fail(f"unknown statistic {call.name!r}{_meant(call.name)}")
    if not kind.least <= len(call.args) <= kind.most:
        call.fail(f"{call.name} is written {kind.form}")
    if kind.numeric and call.args[0].kind == "text":
        call.fail(f"{call.name} needs a number, this is text", 0)
    return kind.make(plan, name, call)


def _meant(name: str) -> str:
    usual = {"avg": "mean", "average": "mean", "std": "stddev", "var": "variance", "percentile": "quantile"}
    usual |= {"minimum": "min", "maximum": "max", "total": "sum", "unique": "distinct", "nunique": "distinct"}
    return f"; did you mean {usual[name]!r}?" if name in usual else did_you_mean(name, STATISTICS)


def compile_fields(fields: Mapping[str, Call]) -> Plan:
    """A plan with new, empty accumulators.

    :raises ConfigError: with every problem found, each under its field.
    """
    plan = Plan()
    problems: list[Problem] = []
    seen: set[str] = set()
    for name, call in fields.items():
        try:
            made = _compile(plan, name, call)
        except ConfigError as error:
            problems.extend(error.under(name).problems)
            continue
        for output, _ in made:
            if output in seen:
                problems.append(Problem((name,), f"the field {output!r} is there twice"))
            seen.add(output)
        plan.outputs.extend(made)
    if problems:
        raise ConfigError(*problems)
    return plan


def output_names(fields: Mapping[str, Call]) -> frozenset[str]:
    """Fields that come out; a histogram makes several."""
    return frozenset(name for name, _ in compile_fields(fields).outputs)


def check_fields(fields: Mapping[str, Call], known: frozenset[str] | None) -> None:
    """Refuse calls that read fields which the input does not have.

    :raises ConfigError: with every problem found, each under its field.
    """
    problems: list[Problem] = []
    for name, call in fields.items():
        try:
            call.check(known)
        except ConfigError as error:
            problems.extend(error.under(name).problems)
    if problems:
        raise ConfigError(*problems)
