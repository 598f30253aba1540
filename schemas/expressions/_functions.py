"""The functions of the expression language: one table. docs/expressions.md lists the same; a test compares them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np

from schemas.expressions._values import Data, Text, Value, alike, choose, missing, number
from schemas.messages import Array

Kind: TypeAlias = Literal["number", "bool", "text", "null"] | None
Run: TypeAlias = Callable[[Sequence[Value], Data], Value]

MAX_TEXT = 65536
"""Longest text that an expression makes; a longer one is missing."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function.

    :param takes: kind of each argument; None: any. The last stands for all further ones when ``most`` is larger.
    :param gives: kind of the answer; None: that of its arguments.
    :param run: (values, data) → value; the values are already of the kinds in ``takes``.
    :param constants: which arguments must be constants: position → ``text`` or ``digits``.
    """

    takes: tuple[Kind, ...]
    gives: Kind
    run: Run
    doc: str
    least: int = 1
    most: int = 1
    constants: tuple[tuple[int, str], ...] = ()


def late(name: str) -> Callable[..., Any]:
    """numpy's function ``name``, looked up when it is called: reading an expression needs no numpy (70 ms of a start)."""
    return lambda *values: getattr(np, name)(*values)


def _number(function: str | Callable[[Any], Any], doc: str) -> Function:
    """A function of one number; of numpy, or of our own."""
    ufunc = late(function) if isinstance(function, str) else function
    return Function(("number",), "number", lambda values, data: np.asarray(ufunc(_real(values[0]))), doc)


def _numbers(name: str, doc: str) -> Function:
    ufunc = late(name)

    def run(values: Sequence[Value], data: Data) -> Value:
        return np.asarray(ufunc(_real(values[0]), _real(values[1])))

    return Function(("number", "number"), "number", run, doc, 2, 2)


def _real(value: Value) -> Array:
    return np.asarray(value, np.float64)


def _extreme(name: str, doc: str) -> Function:
    ufunc = late(name)

    def run(values: Sequence[Value], data: Data) -> Value:
        first, *rest = alike(values)
        for other in rest:
            first = ufunc(first, other)
        return np.asarray(first)

    return Function(("number",), "number", run, doc, 2, 32)


def _absolute(values: Sequence[Value], data: Data) -> Value:
    made = np.abs(np.asarray(values[0]))
    return np.abs(_real(values[0])) if (made < 0).any() else np.asarray(made)  # |-2**63| is no int64


def _round(values: Sequence[Value], data: Data) -> Value:
    digits = int(np.asarray(values[1])) if len(values) > 1 else 0
    return np.asarray(np.round(_real(values[0]), digits))


def _clip(values: Sequence[Value], data: Data) -> Value:
    value, low, high = alike(values)
    return np.asarray(np.minimum(np.maximum(value, low), high))


def _coalesce(values: Sequence[Value], data: Data) -> Value:
    same = alike(values)
    answer: Value = same[-1]
    for value in reversed(same[:-1]):
        answer = choose(~missing(value), value, answer, data.n)
    return answer


def each(value: Text, function: Callable[[str], Any], otherwise: Any) -> Any:
    """``function`` of every text that is there, ``otherwise`` for the missing; a list for a list."""
    if isinstance(value, list):
        return [otherwise if v is None else function(v) for v in value]
    return otherwise if value is None else function(value)


def pairwise(left: Text, right: Text, function: Callable[[str, str], Any], otherwise: Any) -> Any:
    """``function`` of both texts where both are there; a list where one of them is a list."""
    if not isinstance(right, list):
        return (
            otherwise if right is None and not isinstance(left, list) else _with_one(left, right, function, otherwise)
        )
    whole = left if isinstance(left, list) else [left] * len(right)
    pairs = zip(whole, right, strict=True)
    return [otherwise if a is None or b is None else function(a, b) for a, b in pairs]


def _with_one(left: Text, right: str | None, function: Callable[[str, str], Any], otherwise: Any) -> Any:
    if right is None:
        return [otherwise] * len(left) if isinstance(left, list) else otherwise
    return each(left, lambda v: function(v, right), otherwise)


def _text(function: Callable[[str], str], doc: str) -> Function:
    return Function(("text",), "text", lambda values, data: _made(values[0], function), doc)


def _made(value: Any, function: Callable[[str], str]) -> Text:
    answer: Text = each(value, function, None)
    return answer


def _length(values: Sequence[Any], data: Data) -> Value:
    return np.asarray(each(values[0], len, np.nan), np.float64)


def _test(function: Callable[[str, str], bool], doc: str) -> Function:
    def run(values: Sequence[Any], data: Data) -> Value:
        return np.asarray(pairwise(values[0], values[1], function, False), np.bool_)

    return Function(("text", "text"), "bool", run, doc, 2, 2)


@lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    # translate() lets each star commit to its first match, so that no pattern takes longer than text × pattern
    return re.compile(translate(pattern))


def _matches(values: Sequence[Any], data: Data) -> Value:
    match = _glob(values[1]).match
    return np.asarray(each(values[0], lambda v: match(v) is not None, False), np.bool_)


def _parse_number(value: str) -> float:
    try:
        return float(value) if len(value) <= 64 and "_" not in value else float("nan")
    except ValueError:
        return float("nan")


def _to_number(values: Sequence[Value], data: Data) -> Value:
    value = values[0]
    if isinstance(value, (str, list)):
        return np.asarray(each(value, _parse_number, np.nan), np.float64)
    return number(value, "number()")


def _word(value: Any) -> str | None:
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 2**53
        return None if value != value else str(int(value)) if whole else repr(value)
    return str(value).lower()


def _to_text(values: Sequence[Value], data: Data) -> Value:
    value = values[0]
    if value is None or isinstance(value, (str, list)):
        return value
    words = [_word(v) for v in value.reshape(-1).tolist()]
    return words if value.ndim else words[0]


def _is_null(values: Sequence[Value], data: Data) -> Value:
    return missing(values[0])


def _is_finite(values: Sequence[Value], data: Data) -> Value:
    return np.asarray(np.isfinite(_real(values[0])))


def _linear(factor: float, before: float, after: float, doc: str) -> Function:
    """(x + before) · factor + after."""
    return _number(lambda x: (x + before) * factor + after, doc)


_NONE: tuple[Kind, ...] = (None,)

FUNCTIONS: dict[str, Function] = {
    "abs": Function(("number",), "number", _absolute, "the value without its sign"),
    "min": _extreme("minimum", "the smallest of its arguments, row by row"),
    "max": _extreme("maximum", "the largest of its arguments, row by row"),
    "clip": Function(("number",), "number", _clip, "clip(x, low, high): x kept within the two", 3, 3),
    "round": Function(
        ("number",),
        "number",
        _round,
        "the nearest whole number, halves to even; round(x, 2) keeps two decimals",
        1,
        2,
        ((1, "digits"),),
    ),
    "floor": _number("floor", "the whole number at or below"),
    "ceil": _number("ceil", "the whole number at or above"),
    "trunc": _number("trunc", "without its decimals"),
    "sign": _number("sign", "-1, 0 or 1"),
    "sqrt": _number("sqrt", "square root; missing below 0"),
    "exp": _number("exp", "e to the power of x"),
    "log": _number("log", "natural logarithm; missing below 0"),
    "log2": _number("log2", "logarithm to base 2"),
    "log10": _number("log10", "logarithm to base 10"),
    "sin": _number("sin", "sine of radians"),
    "cos": _number("cos", "cosine of radians"),
    "tan": _number("tan", "tangent of radians"),
    "asin": _number("arcsin", "radians whose sine this is"),
    "acos": _number("arccos", "radians whose cosine this is"),
    "atan": _number("arctan", "radians whose tangent this is"),
    "atan2": _numbers("arctan2", "atan2(y, x): angle of the point, radians"),
    "tanh": _number("tanh", "hyperbolic tangent"),
    "hypot": _numbers("hypot", "hypot(x, y): length of the vector"),
    "degrees": _number("degrees", "radians to degrees"),
    "radians": _number("radians", "degrees to radians"),
    "c_to_f": _linear(1.8, 0.0, 32.0, "°C to °F"),
    "f_to_c": _number(lambda x: (x - 32.0) / 1.8, "°F to °C"),
    "c_to_k": _linear(1.0, 0.0, 273.15, "°C to kelvin"),
    "k_to_c": _linear(1.0, -273.15, 0.0, "kelvin to °C"),
    "bar_to_pa": _linear(1e5, 0.0, 0.0, "bar to pascal"),
    "pa_to_bar": _number(lambda x: x / 1e5, "pascal to bar"),
    "psi_to_bar": _linear(0.06894757293168362, 0.0, 0.0, "pound per square inch to bar"),
    "bar_to_psi": _number(lambda x: x / 0.06894757293168362, "bar to pound per square inch"),
    "isnull": Function(_NONE, "bool", _is_null, "whether the value is missing"),
    "isfinite": Function(("number",), "bool", _is_finite, "whether it is a number and not infinite"),
    "coalesce": Function(_NONE, None, _coalesce, "the first of its arguments that is not missing", 2, 32),
    "number": Function(_NONE, "number", _to_number, "text or truth value as a number; missing where it is none"),
    "text": Function(_NONE, "text", _to_text, "number or truth value as text"),
    "lower": _text(str.lower, "text in small letters"),
    "upper": _text(str.upper, "text in capitals"),
    "strip": _text(str.strip, "text without white space at its ends"),
    "len": Function(("text",), "number", _length, "characters of the text"),
    "contains": _test(lambda v, p: p in v, "contains(text, part)"),
    "startswith": _test(str.startswith, "startswith(text, start)"),
    "endswith": _test(str.endswith, "endswith(text, end)"),
    "matches": Function(
        ("text", "text"),
        "bool",
        _matches,
        "matches(text, 'line-*/m?'): the whole text fits; * is any text, ? one character",
        2,
        2,
        ((1, "text"),),
    ),
}
