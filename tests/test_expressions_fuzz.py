"""Whatever is written, compiling raises ConfigError or nothing; whatever the data are, running raises our errors or nothing."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ConfigError, Problem
from schemas.expressions import FUNCTIONS, Expression, ExpressionError, parse_call
from schemas.messages import Column

QUIET = settings(deadline=None, derandomize=True, max_examples=300)

WORDS = st.sampled_from(
    [*"+-*/%(),<>'\"`", "**", "//", "==", "!=", "<=", ">=", "and", "or", "not", "in", "if", "else", "true", "null", "1", "2.5",
     "x", "y", "t", "'a'", "''", "9223372036854775807", "1e308", "0", *FUNCTIONS]
)  # fmt: skip
SOURCES = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=25).map(" ".join))
COLUMN: st.SearchStrategy[Column] = st.one_of(
    st.lists(st.floats(width=64), min_size=3, max_size=3).map(lambda v: np.array(v, np.float64)),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3).map(lambda v: np.array(v, np.int64)),
    st.lists(st.booleans(), min_size=3, max_size=3).map(lambda v: np.array(v, np.bool_)),
    st.lists(st.one_of(st.none(), st.text(max_size=5)), min_size=3, max_size=3),
)


def leaves() -> st.SearchStrategy[str]:
    return st.sampled_from(["x", "y", "t", "1", "2.5", "'a'", "true", "null", "0"])


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.sampled_from(["+", "-", "*", "/", "%", "**", "//", "==", "!=", "<", ">=", "and", "or"])
    return st.one_of(
        st.tuples(inner, binary, inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} if {p[1]} else {p[2]})"),
        st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} in ({p[1]}, {p[2]}))"),
        inner.map(lambda p: f"(not {p})"),
        inner.map(lambda p: f"(-{p})"),
        st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.lists(inner, min_size=1, max_size=3)).map(
            lambda p: f"{p[0]}({', '.join(p[1])})"
        ),
    )


@given(SOURCES)
@QUIET
def test_only_config_errors_leave_the_compiler(source: str) -> None:
    for compile_ in (Expression, parse_call):
        problems: tuple[Problem, ...] = ()
        try:
            compile_(source)
        except ConfigError as error:
            problems = error.problems
        for problem in problems:
            assert 0 <= problem.offset <= len(source)
            assert problem.message
            assert "\n" not in problem.message


@given(st.recursive(leaves(), grown, max_leaves=12), COLUMN, COLUMN, COLUMN)
@QUIET
def test_only_our_errors_leave_a_run(source: str, x: Column, y: Column, t: Column) -> None:
    try:
        expression = Expression(source)
    except ConfigError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            made = expression({"x": x, "y": y, "t": t}, 3)
            assert len(made) == 3
            if expression.kind == "bool":
                assert isinstance(made, np.ndarray)
                assert made.dtype == np.bool_
            if expression.kind == "text":
                assert isinstance(made, list) or bool(np.isnan(made).all())
            if expression.kind in (None, "bool"):
                assert expression.mask({"x": x, "y": y, "t": t}, 3).shape == (3,)
        except ExpressionError:
            pass


@given(
    st.recursive(leaves(), grown, max_leaves=8),
    st.lists(st.tuples(st.floats(), st.integers(-5, 5), st.sampled_from(["a", "b", None])), max_size=6),
    st.integers(0, 6),
)
@QUIET
def test_rows_do_not_know_each_other(source: str, rows: list[tuple[float, int, str | None]], cut: int) -> None:
    """Evaluating in two parts is evaluating the whole."""

    def columns(part: list[tuple[float, int, str | None]]) -> dict[str, Column]:
        return {
            "x": np.array([r[0] for r in part], np.float64),
            "y": np.array([r[1] for r in part], np.int64),
            "t": [r[2] for r in part],
        }

    try:
        expression = Expression(source)
        whole = expression(columns(rows), len(rows))
        parts = [expression(columns(p), len(p)) for p in (rows[:cut], rows[cut:])]
    except (ConfigError, ExpressionError):
        return
    together = [v for p in parts for v in (p if isinstance(p, list) else p.tolist())]
    flat = whole if isinstance(whole, list) else whole.tolist()
    assert [str(v) for v in map(_plain, flat)] == [str(v) for v in map(_plain, together)]


def _plain(value: object) -> object:
    """Missing is missing, and a number a number, whatever the dtype."""
    if value is None or value != value:
        return None
    return float(value) if isinstance(value, (int, float)) else value


@pytest.mark.parametrize(
    ("sign", "function"),
    [
        ("+", operator.add),
        ("-", operator.sub),
        ("*", operator.mul),
        ("<", operator.lt),
        ("==", operator.eq),
        (">=", operator.ge),
    ],
)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_agrees_with_python(sign: str, function: Callable[[float, float], float], a: float, b: float) -> None:
    made = Expression(f"a {sign} b")({"a": np.array([a]), "b": np.array([b])}, 1)
    assert isinstance(made, np.ndarray)
    assert made[0] == function(a, b)
