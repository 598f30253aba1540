"""The expression language: what it answers, what it refuses and where, and how it meets what is missing."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, Field, ValidationError

from schemas.errors import ConfigError
from schemas.expressions import (
    FUNCTIONS,
    MAX_LENGTH,
    Call,
    CallText,
    ConditionText,
    Expression,
    ExpressionText,
    MissingFieldError,
    Number,
    WrongTypeError,
    constant,
    parse_call,
)
from schemas.messages import Column

NAN = math.nan
COLUMNS: dict[str, Column] = {
    "a": np.array([1, 2, 3]),
    "t": np.array([1.0, NAN, 90.0]),
    "small": np.array([200, 100, 255], np.uint8),
    "flag": np.array([True, False, True]),
    "label": ["ok", None, "defect"],
    "line": ["a", "b", "a"],
    "hole": np.full(3, NAN),
    "blank": [None, None, None],
    "stamp": np.array([1_700_000_000_000_000_001, 1_700_000_000_000_000_003, 1_700_000_000_000_000_007]),
    "motor.current": np.array([0.5, 1.5, 2.5]),
    "odd name!": np.array([1.0, 2.0, 3.0]),
}


def value(source: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Expression(source)(COLUMNS, 3)
    return made if isinstance(made, list) else made.tolist()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("1 + 2 * 3", [7] * 3),
        ("(1 + 2) * 3", [9] * 3),
        ("-2 ** 2", [-4] * 3),
        ("2 ** -1", [0.5] * 3),
        ("2 ** 3 ** 2", [512] * 3),
        ("7 // 2 + 7 % 4", [6] * 3),
        ("-7 // 2", [-4] * 3),
        ("10 - 3 - 2", [5] * 3),
        ("8 / 4 / 2", [1] * 3),
        ("a + 1", [2, 3, 4]),
        ("a * 2", [2, 4, 6]),
        ("t + 1", [2, NAN, 91]),
        ("small + small", [400, 200, 510]),
        ("small - 201", [-1, -101, 54]),
        ("1 / 0", [math.inf] * 3),
        ("0 / 0", [NAN] * 3),
        ("a % 0", [NAN] * 3),
        ("a // 0", [math.inf] * 3),
        ("1e3 + .5 + 2.", [1002.5] * 3),
        ("t > 80", [False, False, True]),
        ("t != 1", [False, False, True]),
        ("not (t > 80)", [True, True, False]),
        ("t == t", [True, False, True]),
        ("label == 'defect'", [False, False, True]),
        ("label != 'defect'", [True, False, False]),
        ("'b' > line", [True, False, True]),
        ("line == label", [False, False, False]),
        ("label in ('defect', \"ok\")", [True, False, True]),
        ("label not in ('defect')", [True, True, False]),
        ("a in (1, 3)", [True, False, True]),
        ("a not in (1, a)", [False, False, False]),
        ("a in ()", [False] * 3),
        ("a > 1 and flag", [False, False, True]),
        ("a == 1 or not flag", [True, True, False]),
        ("true and a > 2 or a == 1", [True, False, True]),
        ("not a > 2", [True, True, False]),
        ("flag and hole", [False] * 3),
        ("'x' if a > 1 else label", ["ok", "x", "x"]),
        ("1 if a == 1 else 2 if a == 2 else 3", [1, 2, 3]),
        ("t > 1 if a > 1 else null", [NAN, 0, 1]),
        ("label if flag else null", ["ok", None, "defect"]),
        ("coalesce(t, 0)", [1, 0, 90]),
        ("coalesce(label, line)", ["ok", "b", "defect"]),
        ("coalesce(blank, hole, 3)", [3] * 3),
        ("isnull(t)", [False, True, False]),
        ("isnull(label)", [False, True, False]),
        ("isnull(blank) and isnull(hole)", [True] * 3),
        ("blank == 'x'", [False] * 3),
        ("hole == 'x'", [False] * 3),
        ("blank + 1", [NAN] * 3),
        ("upper(label) + '!'", ["OK!", None, "DEFECT!"]),
        ("line + '/' + text(a)", ["a/1", "b/2", "a/3"]),
        ("text(t)", ["1", None, "90"]),
        ("text(1.5) + text(flag)", ["1.5true", "1.5false", "1.5true"]),
        ("number('2.5') + number(flag)", [3.5, 2.5, 3.5]),
        ("number('x')", [NAN] * 3),
        ("len(label)", [2, NAN, 6]),
        ("contains(label, 'e')", [False, False, True]),
        ("startswith(label, 'o') or endswith(label, 't')", [True, False, True]),
        ("contains('abc', line)", [True, True, True]),
        ("matches(label, 'd*t') or matches(label, '?k')", [True, False, True]),
        ("strip('  x ') == lower('X')", [True] * 3),
        ("abs(-a) + sign(-3)", [0, 1, 2]),
        ("min(a, 2) + max(a, 2, 3)", [4, 5, 5]),
        ("min(t, 5)", [1, NAN, 5]),
        ("clip(t, 2, 10)", [2, NAN, 10]),
        ("round(2.5) + round(3.5)", [6] * 3),
        ("round(1.239, 2)", [1.24] * 3),
        ("floor(-1.5) + ceil(1.2) + trunc(-1.7)", [-1] * 3),
        ("sqrt(-1)", [NAN] * 3),
        ("log(-1)", [NAN] * 3),
        ("hypot(3, 4) + log10(1000) + log2(8) + exp(0)", [12] * 3),
        ("c_to_f(100) + f_to_c(32) + c_to_k(0) - k_to_c(273.15)", [212 + 273.15] * 3),
        ("bar_to_pa(1) * pa_to_bar(1)", [1] * 3),
        ("isfinite(1 / 0) or isfinite(t)", [True, False, True]),
        ("stamp - 1700000000000000000", [1, 3, 7]),
        ("motor.current * 2", [1, 3, 5]),
        ("`odd name!` + `motor.current`", [1.5, 3.5, 5.5]),
        ("min", [4, 5, 6]),
        ("'it\\'s\\n'", ["it's\n"] * 3),
        ("null", [NAN] * 3),
        ("true", [True] * 3),
        ("9223372036854775807 + 1", [2.0**63] * 3),
    ],
)
def test_answers(source: str, expected: list[Any]) -> None:
    columns = {**COLUMNS, "min": np.array([4, 5, 6])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Expression(source)(columns, 3)
    got = made if isinstance(made, list) else made.tolist()
    assert len(got) == 3
    for g, e in zip(got, expected, strict=True):
        assert g == pytest.approx(e, nan_ok=True) if isinstance(e, float) and not isinstance(g, str) else g == e


@pytest.mark.parametrize(
    ("source", "offset", "part"),
    [
        ("", 0, "expected a value, found the end"),
        ("1 +", 3, "found the end"),
        ("(1", 2, "expected ')'"),
        ("a b", 2, "expected an operator"),
        ("'a' + 1", 6, "cannot join text and a number"),
        ("1 + 'a'", 0, "cannot join"),
        ("a * 'x'", 4, "'*' takes a number, not text"),
        ("-'x'", 1, "takes a number"),
        ("a + (b > 1)", 5, "takes a number, not a truth value"),
        ("abs('a')", 4, "abs() takes a number"),
        ("upper(3)", 6, "upper() takes text"),
        ("maxx(1, 2)", 0, "did you mean 'max'?"),
        ("clip(1, 2)", 0, "takes 3 arguments, got 2"),
        ("round(1, 2, 3)", 0, "takes 1 to 2 arguments"),
        ("round(x, y)", 9, "whole number of decimals"),
        ("round(x, 1.5)", 9, "whole number of decimals"),
        ("matches(x, y)", 11, "pattern in quotes"),
        ("1 < 2 < 3", 6, "do not chain"),
        ("a in (1) in (2)", 9, "do not chain"),
        ("x = 3", 2, "'=='"),
        ("x && y", 2, "'and'"),
        ("a || b", 2, "'or'"),
        ("!a", 0, "'not'"),
        ("a ^ 2", 2, "'**'"),
        ("x == null", 5, "isnull"),
        ("x == 1 and 3", 11, "'and' takes a truth value"),
        ("not 3", 4, "takes a truth value"),
        ("1 if 2 else 3", 5, "'if' takes a truth value"),
        ("1 if x", 6, "'else'"),
        ("1 if x else 'a'", 12, "mixes a number with text"),
        ("'a' == 1", 7, "mixes text with a number"),
        ("'a' in (1, 2)", 8, "mixes"),
        ("coalesce('a', 1)", 14, "mixes"),
        ("x in 3", 5, "expected '('"),
        ("x not 3", 6, "'in' after 'not'"),
        ("'abc", 0, "not closed"),
        ("`abc", 0, "not closed"),
        ("3x", 1, "runs into"),
        ("a @ b", 2, "'@' has no meaning"),
        ("a.__class__.b()", 0, "unknown function"),
        ("x[0]", 1, "'['"),
        ("__import__('os')", 0, "unknown function"),
        ("(" * 100 + "1", 64, "nested deeper"),
        ("-" * 100 + "1", 64, "nested deeper"),
        ("+".join("a" * 100), 0, "nested deeper"),
        (" " * (MAX_LENGTH + 1), MAX_LENGTH, "at most"),
        ("x in (" + ",".join("1" * 1100) + ")", 0, "more than 1000 parts"),
    ],
)
def test_refusals(source: str, offset: int, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Expression(source)
    (problem,) = caught.value.problems
    assert part in problem.message
    if part != "more than 1000 parts":
        assert problem.offset == offset


def test_kind_is_known_without_data() -> None:
    kinds = {
        s: Expression(s).kind
        for s in ("a + 1", "a > 1", "upper(a)", "a", "a + b", "a if b else 'x'", "null", "a + 'x'")
    }
    assert kinds == {
        "a + 1": "number",
        "a > 1": "bool",
        "upper(a)": "text",
        "a": None,
        "a + b": None,
        "a if b else 'x'": "text",
        "null": None,
        "a + 'x'": "text",
    }


def test_fields_and_check() -> None:
    expression = Expression("temp + humidity > 3 and len(`the line`) < 2")
    assert expression.fields == {"temp", "humidity", "the line"}
    expression.check(None)
    expression.check(frozenset({"temp", "humidity", "the line", "more"}))
    with pytest.raises(ConfigError) as caught:
        expression.check(frozenset({"temp", "humidty", "the line"}))
    (problem,) = caught.value.problems
    assert (problem.offset, problem.message) == (7, "unknown field 'humidity'; did you mean 'humidty'?")


def test_missing_field_and_wrong_types_when_running() -> None:
    with pytest.raises(MissingFieldError) as caught:
        value("a + nowhere")
    assert (caught.value.field, caught.value.reason) == ("nowhere", "missing-field")
    for source in (
        "label + 1",
        "upper(a)",
        "label > 3",
        "not label",
        "a if label else 1",
        "abs(label)",
        "coalesce(a, label)",
    ):
        with pytest.raises(WrongTypeError):
            value(source)
    with pytest.raises(WrongTypeError):
        Expression("a")({"a": np.zeros((3, 2))}, 3)
    with pytest.raises(WrongTypeError):
        Expression("a")({"a": np.zeros(2)}, 3)
    with pytest.raises(WrongTypeError):
        Expression("a")({"a": np.array([object()] * 3)}, 3)


def test_mask() -> None:
    assert Expression("t > 80").mask(COLUMNS, 3).tolist() == [False, False, True]
    assert Expression("t").mask(COLUMNS, 3).tolist() == [True, False, True]
    assert Expression("true").mask({}, 2).tolist() == [True, True]
    assert Expression("a > 1").mask({"a": np.zeros(0)}, 0).tolist() == []
    with pytest.raises(ConfigError):
        Expression("a + 1").mask(COLUMNS, 3)
    with pytest.raises(WrongTypeError):
        Expression("label").mask(COLUMNS, 3)


def test_a_bare_field_is_the_column_itself() -> None:
    column = np.array([1, 2], np.float32)
    assert Expression("x")({"x": column}, 2) is column


def test_columns_are_never_written_to() -> None:
    columns: dict[str, Column] = {"a": np.array([1.0, NAN]), "b": ["x", None]}
    columns["a"].flags.writeable = False  # type: ignore[union-attr]
    for source in (
        "abs(a)",
        "clip(a, 0, 1)",
        "coalesce(a, 1)",
        "coalesce(b, 'y')",
        "-a",
        "a if a > 1 else 0",
        "round(a)",
    ):
        Expression(source)(columns, 2)
    assert columns["b"] == ["x", None]


def test_joined_texts_stay_short() -> None:
    long = "x" * 40_000
    made = Expression("t + t + t")({"t": [long, "y"]}, 2)
    assert made == [None, "yyy"]


def test_matching_is_linear() -> None:
    pattern = "*a" * 100
    made = Expression(f"matches(t, '{pattern}b')")({"t": ["a" * 5000]}, 1)
    assert isinstance(made, np.ndarray)
    assert made.tolist() == [False]


def test_call() -> None:
    call = parse_call("quantile( t * 2, 0.95)")
    assert (call.name, call.offset, call.offsets, call.fields) == ("quantile", 0, (10, 17), frozenset("t"))
    assert [a.source for a in call.args] == ["t * 2", "0.95"]
    assert call.args[1].constant == 0.95
    assert call.args[0].constant is None
    assert call.args[0](COLUMNS, 3).tolist()[0] == 2  # type: ignore[union-attr]
    assert parse_call("count()").args == ()
    assert parse_call("count(label == 'defect')").args[0].kind == "bool"
    assert parse_call("mode('x', true)").args[0].constant == "x"
    with pytest.raises(ConfigError) as caught:
        call.check(frozenset({"u"}))
    assert caught.value.problems[0].offset == 10
    for source, offset in (
        ("mean", 4),
        ("mean(", 5),
        ("mean(t) + 1", 8),
        ("3", 0),
        ("mean(t u)", 7),
        ("mean('a' + 1)", 11),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_call(source)
        assert caught.value.problems[0].offset == offset
    with pytest.raises(ConfigError) as caught:
        call.fail("no such aggregate", 1)
    assert caught.value.problems[0].offset == 17


def test_constants() -> None:
    assert constant("1/255") == 1 / 255
    assert constant(3) == 3.0
    assert constant("-2 ** 2") == -4
    for wrong, part in (
        ("1/0", "expected a number"),
        ("x", "name 'x'"),
        ("'a'", "expected a number"),
        (True, "expected a number"),
    ):
        with pytest.raises(ConfigError, match=part):
            constant(wrong)
    with pytest.raises(ConfigError):
        constant(10**5000)
    assert constant(-(2**63) - 1) == -(2.0**63)
    with pytest.raises(ConfigError):
        constant([1])
    with pytest.raises(ConfigError):
        constant(NAN)


class _Model(BaseModel):
    e: ExpressionText = Expression("1")
    c: ConditionText = Expression("true")
    f: CallText = Call("count", (), "count()", 0, ())
    n: Number = 0.0


class _Bounded(BaseModel):
    n: Number = Field(gt=0)


def test_numbers_can_be_bounded() -> None:
    assert _Bounded.model_validate({"n": "1/4"}).n == 0.25
    with pytest.raises(ValidationError, match="greater than 0"):
        _Bounded.model_validate({"n": "1 - 1"})


class _Required(BaseModel):
    e: ExpressionText
    c: ConditionText
    f: CallText
    n: Number


def test_pydantic_types_keep_the_offset() -> None:
    model = _Model.model_validate({"e": "a + 1", "c": "a > 1", "f": "mean(a)", "n": "1/4"})
    assert (model.e.source, model.c.kind, model.f.name, model.n) == ("a + 1", "bool", "mean", 0.25)
    assert model.model_dump() == {"e": "a + 1", "c": "a > 1", "f": "mean(a)", "n": 0.25}
    assert _Model.model_validate({"e": 3, "c": False}).e(COLUMNS, 3).tolist() == [3] * 3  # type: ignore[union-attr]
    assert set(_Required.model_json_schema()["properties"]) == {"e", "c", "f", "n"}
    for field, wrong, offset in (
        ("e", "a +", 3),
        ("c", "1 + (a)", 0),
        ("f", "mean(a", 6),
        ("n", "1 / x", 4),
        ("e", None, 0),
    ):
        with pytest.raises(ValidationError) as caught:
            _Model.model_validate({field: wrong})
        (error,) = caught.value.errors()
        assert (error["type"], error["loc"], error["ctx"]["offset"]) == ("expression", (field,), offset)
        assert error["msg"] == error["ctx"]["reason"]


def test_equal_by_source_and_picklable() -> None:
    one = Expression("a + 1")
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301 - our own bytes
    assert hash(one) == hash(Expression("a + 1"))
    assert one != Expression("a + 2")


def test_every_function_is_documented() -> None:
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "expressions.md").read_text("utf-8")
    for name, function in FUNCTIONS.items():
        assert f"`{name}(" in page, name
        assert function.doc
