"""What the operators of the expression language do: with kinds when an expression is compiled, with columns when it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from schemas.expressions._functions import MAX_TEXT, Kind, each, late, pairwise
from schemas.expressions._lexer import fail
from schemas.expressions._values import Text, Value, alike, is_text, missing, number, real, text, truth
from schemas.messages import Array

WORDS = {"number": "a number", "bool": "a truth value", "text": "text", "null": "null"}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_REAL: dict[str, Callable[[Any, Any], Any]] = {
    "*": late("multiply"),
    "/": late("divide"),
    "//": late("floor_divide"),
    "%": late("mod"),
    "**": late("power"),
}


def want(kind: Kind, wanted: Kind, where: str, offset: int) -> None:
    """Refuse a part whose kind is known and not ``wanted``.

    :raises ConfigError: at ``offset``.
    """
    if wanted is None or kind in (None, "null", wanted):
        return
    hint = "; write number(…)" if wanted == "number" else ""
    fail(f"{where} takes {WORDS[wanted]}, not {WORDS[str(kind)]}{hint}", offset)


def same(left: Kind, right: Kind, where: str, offset: int) -> Kind:
    """The kind that both have.

    :raises ConfigError: they are known and differ.
    """
    if left in (None, "null"):
        return right if right != "null" else left
    if right in (None, "null") or left == right:
        return left
    return fail(f"{where} mixes {WORDS[str(left)]} with {WORDS[str(right)]}", offset)


def arithmetic_kind(sign: str, left: Kind, right: Kind, at: tuple[int, int, int]) -> Kind:
    """The kind of ``left sign right``; ``at``: offsets of the left side, the sign and the right side.

    :raises ConfigError: the sign does not take such sides.
    """
    if sign == "+" and "text" in (left, right):
        for kind, offset in ((left, at[0]), (right, at[2])):
            if kind not in (None, "null", "text"):
                fail(f"'+' cannot join text and {WORDS[str(kind)]}; write text(…) or number(…)", offset)
        return "text"
    want(left, "number", f"'{sign}'", at[0])
    want(right, "number", f"'{sign}'", at[2])
    return None if sign == "+" and "number" not in (left, right) else "number"


def arithmetic(sign: str, left: Value, right: Value) -> Value:
    """``left sign right``; int64 stays int64 under + and - (times in ns), all else is float64.

    :raises WrongTypeError: text among numbers.
    """
    where = f"'{sign}'"
    if sign not in "+-":
        return np.asarray(_REAL[sign](real(left, where), real(right, where)))
    if sign == "+" and (is_text(left) or is_text(right)):
        joined: Text = pairwise(text(left, where), text(right, where), _join, None)
        return joined
    a, b = alike((number(left, where), number(right, where)))
    made = np.asarray(a + b if sign == "+" else a - b)
    if made.dtype == np.int64 and _wrapped(a, b if sign == "+" else ~b, made):
        a, b = real(a, where), real(b, where)
        return np.asarray(a + b if sign == "+" else a - b)
    return made


def _wrapped(a: Array, b: Array, made: Array) -> bool:
    """Whether any sum left the range of int64: both sides have the sign that the sum has not."""
    return bool((((a ^ made) & (b ^ made)) < 0).any())


def _join(a: str, b: str) -> str | None:
    return a + b if len(a) + len(b) <= MAX_TEXT else None


def negative(value: Value) -> Value:
    """``-value``."""
    return arithmetic("-", np.array(0), value)


def compare(sign: str, left: Value, right: Value) -> Value:
    """``left sign right``; false where a side is missing.

    :raises WrongTypeError: text against numbers.
    """
    function = COMPARISONS[sign]
    if _plain(left) and _plain(right) and sign != "!=":
        return np.asarray(function(left, right))
    where = f"'{sign}'"
    if is_text(left) or is_text(right):
        return np.asarray(pairwise(text(left, where), text(right, where), function, False), np.bool_)
    a, b = alike((left, right), where)
    if sign != "!=":
        return np.asarray(function(a, b))
    return np.asarray((a != b) & ~missing(a) & ~missing(b))


def _plain(value: Value) -> bool:
    """An array of float64 or int64: what nearly all are, and needs no looking at."""
    return type(value) is np.ndarray and value.dtype.char in "dl"


def among(value: Value, texts: frozenset[str]) -> Value:
    """Whether the text is one of ``texts``; false where it is missing.

    :raises WrongTypeError: it is not text.
    """
    return np.asarray(each(text(value, "'in'"), lambda v: v in texts, False), np.bool_)


def both(left: Value, right: Value) -> Value:
    """``left and right``."""
    return np.asarray(truth(left, "'and'") & truth(right, "'and'"))


def either(left: Value, right: Value) -> Value:
    """``left or right``."""
    return np.asarray(truth(left, "'or'") | truth(right, "'or'"))


def opposite(value: Value) -> Value:
    """``not value``."""
    return np.asarray(~truth(value, "'not'"))
