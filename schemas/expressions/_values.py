"""What flows between the parts of an expression while it runs, and the errors of running.

A value is a column (1-d array, or list of texts) or one scalar for all rows (0-d array, text, or None for ``null``). NaN
and None are missing. A column that is all missing fits everywhere: senders cannot know its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from schemas.errors import PenstockError
from schemas.messages import Array, Column

Value: TypeAlias = "Array | list[str | None] | str | None"
Text: TypeAlias = list[str | None] | str | None


class ExpressionError(PenstockError):
    """Evaluating met data that the expression cannot work on; the operator rejects the message with ``reason``.

    :param reason: short stable word for the ledger: ``missing-field`` or ``wrong-type``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class MissingFieldError(ExpressionError):
    """The data have no column of this name.

    :param field: the name.
    """

    def __init__(self, field: str) -> None:
        super().__init__("missing-field", f"there is no field {field!r}")
        self.field = field


class WrongTypeError(ExpressionError):
    """A column has values of another type than the expression needs."""

    def __init__(self, detail: str) -> None:
        super().__init__("wrong-type", detail)


@dataclass(slots=True)
class Data:
    """The columns that an expression is evaluated on, each of n rows."""

    columns: Mapping[str, Column]
    n: int

    def field(self, name: str) -> Value:
        """The column ``name``.

        :raises MissingFieldError: there is none.
        :raises WrongTypeError: it is no column of n rows.
        """
        column = self.columns.get(name)
        if column is None:
            raise MissingFieldError(name)
        if not isinstance(column, list) and column.ndim == 1 and column.dtype.kind == "U":
            column = column.tolist()
        if len(column) != self.n or (
            not isinstance(column, list) and (column.ndim != 1 or column.dtype.kind not in "biuf")
        ):
            raise WrongTypeError(f"field {name!r} is not a column of {self.n} numbers, truth values or texts")
        return column


def number(value: Value, where: str) -> Array:
    """The value as float64 or int64 (bools become 0 and 1).

    :raises WrongTypeError: it is text; ``where`` says what needed a number.
    """
    if value is None:
        return np.array(np.nan)
    if isinstance(value, list):
        if any(v is not None for v in value):
            raise WrongTypeError(f"{where} needs a number and got text")
        return np.full(len(value), np.nan)
    if isinstance(value, str):
        raise WrongTypeError(f"{where} needs a number and got text")
    kind = value.dtype.kind
    if kind == "f" or value.dtype == np.uint64:
        return value.astype(np.float64, copy=False)
    return value.astype(np.int64, copy=False)


def real(value: Value, where: str) -> Array:
    """The value as float64.

    :raises WrongTypeError: it is text.
    """
    return number(value, where).astype(np.float64, copy=False)


def text(value: Value, where: str) -> Text:
    """The value as text.

    :raises WrongTypeError: it is not; ``where`` says what needed text.
    """
    if value is None or isinstance(value, (str, list)):
        return value
    if not bool(np.all(missing(value))):
        raise WrongTypeError(f"{where} needs text and got numbers")
    return None if value.ndim == 0 else [None] * len(value)


def truth(value: Value, where: str) -> Array:
    """The value as bool; numbers are true when present and not zero, what is missing is false.

    :raises WrongTypeError: it is text.
    """
    if not isinstance(value, np.ndarray):
        value = number(value, where)
    if value.dtype == np.bool_:
        return value
    return np.asarray((value != 0) & ~missing(value))


def missing(value: Value) -> Array:
    """Where the value is missing: bool, of the value's shape."""
    if isinstance(value, list):
        return np.array([v is None for v in value], np.bool_)
    if value is None or isinstance(value, str):
        return np.array(value is None)
    if value.dtype.kind == "f":
        return np.isnan(value)
    return np.zeros(value.shape, np.bool_)


def is_text(value: Value) -> bool:
    """Whether there is any text in the value."""
    return isinstance(value, str) or (isinstance(value, list) and any(v is not None for v in value))


def alike(values: Sequence[Value], where: str = "the expression") -> list[Any]:
    """The values in one common type: all text, all bool, all int64 or all float64.

    :raises WrongTypeError: texts and numbers are mixed.
    """
    if any(is_text(v) for v in values):
        return [text(v, where) for v in values]
    arrays = [v if isinstance(v, np.ndarray) else number(v, where) for v in values]
    if all(a.dtype == np.bool_ for a in arrays):
        return list(arrays)
    arrays = [number(a, where) for a in arrays]
    if any(a.dtype != np.int64 for a in arrays):
        arrays = [a.astype(np.float64, copy=False) for a in arrays]
    return list(arrays)


def spread(value: Text, n: int) -> list[str | None]:
    """Text as a list of n."""
    return value if isinstance(value, list) else [value] * n


def column(value: Value, n: int) -> Column:
    """The value as a column of n rows."""
    if isinstance(value, (str, list)):
        return spread(value, n)
    if value is None:
        return np.full(n, np.nan)
    return value if value.ndim == 1 else np.full(n, value, value.dtype)


def choose(condition: Array, yes: Value, no: Value, n: int, where: str = "'if'") -> Value:
    """Row by row ``yes`` where the condition holds, else ``no``."""
    yes, no = alike((yes, no), where)
    if isinstance(yes, np.ndarray) and isinstance(no, np.ndarray):
        return np.asarray(np.where(condition, yes, no))
    flags = np.broadcast_to(condition, n).tolist()
    texts = spread(text(yes, where), n), spread(text(no, where), n)
    return [a if c else b for c, a, b in zip(flags, *texts, strict=True)]
