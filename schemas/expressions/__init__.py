"""A small, safe, vectorised expression language over columns: ``temp > 80 and line in ('a', 'b')``.

Used by the steps of ``preprocess`` and by ``aggregate``. It is compiled when a topology is read, by a parser of its own:
no Python is ever evaluated, nothing has attributes, loops or side effects. docs/expressions.md is the user's page.

Missing values (NaN, None) make arithmetic missing and comparisons false. Numbers are float64; whole columns stay int64
under + and - so that times in ns keep their last digit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import numpy as np
from pydantic import BeforeValidator, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from schemas.errors import ConfigError, did_you_mean
from schemas.expressions._functions import FUNCTIONS
from schemas.expressions._lexer import MAX_LENGTH, fail
from schemas.expressions._operators import WORDS
from schemas.expressions._parser import MAX_DEPTH, MAX_NODES, Node, Parser
from schemas.expressions._values import Data, ExpressionError, MissingFieldError, WrongTypeError, column, truth
from schemas.messages import Column, Scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "FUNCTIONS",
    "MAX_DEPTH",
    "MAX_LENGTH",
    "MAX_NODES",
    "Call",
    "CallText",
    "ConditionText",
    "Expression",
    "ExpressionError",
    "ExpressionText",
    "MissingFieldError",
    "Number",
    "WrongTypeError",
    "constant",
    "expression",
    "parse_call",
]


class Expression:
    """A compiled expression.

    :param source: what the user wrote.
    :raises ConfigError: it is none; the problem's ``offset`` says where.
    """

    __slots__ = ("_fields", "_node", "fields", "kind", "source")

    source: str
    fields: frozenset[str]
    """Names of the columns that it reads."""
    kind: Literal["number", "bool", "text"] | None
    """What it evaluates to, where that is known without data."""

    def __init__(self, source: str) -> None:
        parser = Parser(source)
        self._set(source, parser.whole(), parser.fields)

    def _set(self, source: str, node: Node, fields: dict[str, int]) -> None:
        self.source = source
        self._node = node
        self._fields = fields
        self.fields = frozenset(fields)
        self.kind = None if node.kind == "null" else node.kind

    @property
    def constant(self) -> Scalar:
        """Value (float, bool or text) of an expression that reads no field; None where it reads one or is missing."""
        if self.fields:
            return None
        made = self({}, 1)
        if isinstance(made, list):
            return made[0]
        value = bool(made[0]) if made.dtype == np.bool_ else float(made[0])
        return None if value != value else value

    def check(self, fields: frozenset[str] | None) -> None:
        """Refuse fields that are not among ``fields`` (None: not known, anything goes).

        :raises ConfigError: at the unknown name, with what may be meant.
        """
        if fields is None:
            return
        for name, offset in self._fields.items():
            if name not in fields:
                fail(f"unknown field {name!r}{did_you_mean(name, fields)}", offset)

    def require(self, kind: Literal["number", "bool", "text"]) -> None:
        """Refuse the expression where it is known to be of another kind.

        :raises ConfigError: it is.
        """
        if self.kind not in (None, kind):
            fail(f"expected {WORDS[kind]}, this is {WORDS[str(self.kind)]}", self._node.offset)

    def __call__(self, columns: Mapping[str, Column], n: int) -> Column:
        """The value of every row: an array [n] of bool, int64 or float64 (a bare field keeps its dtype), or n texts.

        May be a column of ``columns`` itself: do not write to it.

        :raises MissingFieldError: a column is not there.
        :raises WrongTypeError: a column is of another type than is needed.
        """
        with np.errstate(all="ignore"):
            return column(self._node.run(Data(columns, n)), n)

    def mask(self, columns: Mapping[str, Column], n: int) -> NDArray[np.bool_]:
        """Where the condition holds: bool [n]; where it is missing it does not. Numbers other than 0 are true.

        :raises ConfigError: the expression is known to be no condition (see :data:`ConditionText` to have it earlier).
        :raises MissingFieldError: a column is not there.
        :raises WrongTypeError: a column is of another type than is needed.
        """
        self.require("bool")
        with np.errstate(all="ignore"):
            flags = truth(self._node.run(Data(columns, n)), "a condition")
        return flags if flags.ndim else np.broadcast_to(flags, (n,))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)

    def __repr__(self) -> str:
        return f"Expression({self.source!r})"

    def __reduce__(self) -> tuple[type[Expression], tuple[str]]:
        return Expression, (self.source,)


@dataclass(frozen=True, slots=True)
class Call:
    """``name(arguments)``, as an aggregate's fields are written.

    :param args: the arguments; positions in their problems count from the start of the whole call.
    :param offset: of the name.
    :param offsets: of each argument.
    """

    name: str
    args: tuple[Expression, ...]
    source: str
    offset: int
    offsets: tuple[int, ...]

    @property
    def fields(self) -> frozenset[str]:
        """Names of the columns that the arguments read."""
        return frozenset().union(*(a.fields for a in self.args))

    def check(self, fields: frozenset[str] | None) -> None:
        """As :meth:`Expression.check`, for all arguments."""
        for arg in self.args:
            arg.check(fields)

    def fail(self, message: str, arg: int | None = None) -> NoReturn:
        """Refuse the call, at its name or at an argument.

        :raises ConfigError: always.
        """
        fail(message, self.offset if arg is None else self.offsets[arg])


def parse_call(source: str) -> Call:
    """``quantile(t, 0.95)`` → name and arguments. Which names there are is the caller's business.

    :raises ConfigError: it is no call, or an argument is no expression.
    """
    parser = Parser(source)
    name = parser.expect("name", "a function's name")
    if parser.token.kind != "(":
        fail(f"expected '(' after {name.value!r}, found {parser.found()}", parser.token.offset)
    parser.advance()
    args: list[Expression] = []
    offsets: list[int] = []
    while parser.token.kind != ")":
        if args:
            parser.expect(",", "',' or ')'")
        start = parser.token.offset
        parser.fields = {}
        node = parser.expression(0)
        arg = Expression.__new__(Expression)
        arg._set(source[start : parser.token.offset].rstrip(), node, parser.fields)
        args.append(arg)
        offsets.append(start)
    parser.advance()
    if parser.token.kind != "end":
        fail(f"expected the end after the call, found {parser.found()}", parser.token.offset)
    return Call(name.value, tuple(args), source, name.offset, tuple(offsets))


def expression(value: Any) -> Expression:
    """An expression from what stands in a topology: text, or a number or truth value for a constant.

    :raises ConfigError: it is none of these, or no expression.
    """
    if isinstance(value, Expression):
        return value
    if isinstance(value, bool):
        return Expression(str(value).lower())
    if (isinstance(value, int) and value.bit_length() <= 1024) or (isinstance(value, float) and math.isfinite(value)):
        return Expression(repr(value))
    if isinstance(value, str):
        return Expression(value)
    raise ConfigError(f"expected an expression, got {type(value).__name__}")


_PLAIN = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(?: ?/ ?(\d{1,15}(?:\.\d{1,15})?))?", re.ASCII)
"""A constant as nearly all are written, 0.5 or 1/255: told without compiling an expression."""


def constant(value: Any) -> float:
    """A number, or a text with a constant expression such as ``1/255``.

    :raises ConfigError: it is neither, or not finite.
    """
    if type(value) is int and abs(value) < 2**53:
        return float(value)
    if isinstance(value, str) and (plain := _PLAIN.fullmatch(value)) and float(plain[2] or 1):
        return float(plain[1]) / float(plain[2] or 1)
    compiled = expression(value)
    if compiled.fields:
        name, offset = next(iter(compiled._fields.items()))
        fail(f"expected a number, found the name {name!r}", offset)
    number = compiled.constant
    if isinstance(number, (bool, str)) or number is None or not math.isfinite(number):
        raise ConfigError(f"expected a number, got {value!r}")
    return float(number)


def _condition(value: Any) -> Expression:
    compiled = expression(value)
    compiled.require("bool")
    return compiled


def _call(value: Any) -> Call:
    if isinstance(value, Call):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"expected a call such as mean(score), got {type(value).__name__}")
    return parse_call(value)


def _validator(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``convert`` for pydantic: its ConfigError becomes an error of type ``expression`` with the offset in its context."""

    def validate(value: Any) -> Any:
        try:
            return convert(value)
        except ConfigError as error:
            problem = error.problems[0]
            context = {"reason": problem.message, "offset": problem.offset}
            raise PydanticCustomError("expression", "{reason}", context) from None

    return validate


_TEXT = WithJsonSchema({"type": ["string", "number", "boolean"], "examples": ["temp * 2 + 1"]})
_SOURCE = PlainSerializer(lambda value: value.source, return_type=str)

ExpressionText = Annotated[Expression, PlainValidator(_validator(expression)), _TEXT, _SOURCE]
"""Pydantic type of an expression."""
ConditionText = Annotated[
    Expression,
    PlainValidator(_validator(_condition)),
    WithJsonSchema({"type": ["string", "boolean"], "examples": ["temp > 80 and line == 'a'"]}),
    _SOURCE,
]
"""Pydantic type of an expression that is true or false."""
CallText = Annotated[
    Call,
    PlainValidator(_validator(_call)),
    WithJsonSchema({"type": "string", "examples": ["mean(score)"]}),
    _SOURCE,
]
"""Pydantic type of a call."""
Number = Annotated[
    float,
    BeforeValidator(_validator(constant)),
    WithJsonSchema({"type": ["number", "string"], "examples": [0.5, "1/255"]}),
]
"""Pydantic type of a number that may be written as an expression, ``1/255``."""
