"""A Pratt parser: tokens to a tree of nodes, each with what it evaluates to.

Pratt, V. R., *Top down operator precedence*, POPL 1973. Bounded in nodes and depth, so that neither compiling nor
evaluating can use much stack or time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from schemas.errors import did_you_mean
from schemas.expressions import _operators as ops
from schemas.expressions._functions import FUNCTIONS, Function, Kind
from schemas.expressions._lexer import Token, fail, tokens
from schemas.expressions._values import Data, ExpressionError, Value, choose, number, text, truth

MAX_DEPTH = 64
"""Deepest nesting."""
MAX_NODES = 1000
"""Most parts of one expression."""

_NOT, _COMPARE, _UNARY, _POWER = 30, 40, 70, 80
_BINDS = {"if": 5, "or": 10, "and": 20, "in": _COMPARE, "not": _COMPARE, "+": 50, "-": 50}
_BINDS |= dict.fromkeys(ops.COMPARISONS, _COMPARE) | dict.fromkeys(("*", "/", "//", "%"), 60) | {"**": _POWER}

_NUMBER_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an expression.

    :param kind: what it evaluates to, as far as it is known.
    :param constant: it names no field.
    """

    kind: Kind
    offset: int
    depth: int
    constant: bool
    run: Callable[[Data], Value]


class Parser:
    """Parses one source; :attr:`fields` gathers field names with the offset of their first use."""

    def __init__(self, source: str) -> None:
        self.tokens = tokens(source)
        self.at = 0
        self.level = 0
        self.nodes = 0
        self.fields: dict[str, int] = {}

    @property
    def token(self) -> Token:
        """The next token."""
        return self.tokens[self.at]

    def advance(self) -> Token:
        """Take the next token."""
        token = self.token
        self.at += 1
        return token

    def expect(self, kind: str, meaning: str) -> Token:
        """Take a token of this kind.

        :raises ConfigError: another stands there.
        """
        if self.token.kind != kind:
            fail(f"expected {meaning}, found {self.found()}", self.token.offset)
        return self.advance()

    def found(self) -> str:
        """The next token in words."""
        kind, value, _ = self.token
        return "the end" if kind == "end" else repr(value if len(value) <= 40 else value[:40] + "…")

    def whole(self) -> Node:
        """The whole source as one expression."""
        node = self.expression(0)
        if self.token.kind != "end":
            hint = "; texts are written in quotes, odd field names in backquotes" if self.token.kind == "name" else ""
            fail(f"expected an operator or the end, found {self.found()}{hint}", self.token.offset)
        return node

    def expression(self, binding: int) -> Node:
        """An expression whose operators bind tighter than ``binding``."""
        self.level += 1
        if self.level > MAX_DEPTH:
            fail(f"nested deeper than {MAX_DEPTH}", self.token.offset)
        left = self.prefix()
        while _BINDS.get(self.token.kind, -1) > binding:
            left = self.infix(left)
        self.level -= 1
        return left

    def node(self, kind: Kind, offset: int, parts: tuple[Node, ...], run: Callable[[Data], Value]) -> Node:
        """A node over ``parts``."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            fail(f"the expression has more than {MAX_NODES} parts", offset)
        depth = 1 + max((p.depth for p in parts), default=0)
        if depth > MAX_DEPTH:
            fail(f"nested deeper than {MAX_DEPTH}; round brackets around halves of a long chain help", offset)
        return Node(kind, offset, depth, all(p.constant for p in parts), run)

    def computed(self, kind: Kind, offset: int, parts: tuple[Node, ...], run: Callable[[Data], Value]) -> Node:
        """A node that is computed once and for all where its parts are constants."""
        made = self.node(kind, offset, parts, run)
        return replace(made, run=_once(run)) if made.constant else made

    def literal(self, kind: Kind, offset: int, value: Value) -> Node:
        """A constant."""
        return self.node(kind, offset, (), lambda data: value)

    # -- what may stand at the beginning ---------------------------------------------------------------------------

    def prefix(self) -> Node:
        """A value, a sign or ``not`` with what follows, or round brackets."""
        kind, value, offset = token = self.advance()
        if kind == "number":
            whole = value.isdigit() and int(value) < _NUMBER_LIMIT
            return self.node("number", offset, (), _once(lambda _: np.array(int(value) if whole else float(value))))
        if kind == "text":
            return self.literal("text", offset, value)
        if kind in ("true", "false"):
            return self.node("bool", offset, (), _once(lambda _: np.array(kind == "true")))
        if kind == "null":
            return self.literal("null", offset, None)
        if kind == "name":
            return self.call(token) if self.token.kind == "(" else self.field(token)
        if kind == "(":
            inner = self.expression(0)
            self.expect(")", "')'")
            return inner
        if kind in ("-", "+"):
            part = self.expression(_UNARY)
            ops.want(part.kind, "number", f"'{kind}'", part.offset)
            return (
                part if kind == "+" else self.computed("number", offset, (part,), lambda d: ops.negative(part.run(d)))
            )
        if kind == "not":
            part = self.expression(_NOT)
            ops.want(part.kind, "bool", "'not'", part.offset)
            return self.node("bool", offset, (part,), lambda d: ops.opposite(part.run(d)))
        self.at -= 1
        return fail(f"expected a value, found {self.found()}", offset)

    def field(self, token: Token) -> Node:
        """A field's name."""
        name = token.value
        self.fields.setdefault(name, token.offset)
        node = self.node(None, token.offset, (), lambda data: data.field(name))
        return Node(None, node.offset, 1, False, node.run)

    def arguments(self) -> tuple[Node, ...]:
        """What stands between the round brackets of a call."""
        self.expect("(", "'('")
        parts: list[Node] = []
        while self.token.kind != ")":
            if parts:
                self.expect(",", "',' or ')'")
            parts.append(self.expression(0))
        self.advance()
        return tuple(parts)

    def call(self, token: Token) -> Node:
        """A function with its arguments."""
        name, function = token.value, FUNCTIONS.get(token.value)
        if function is None:
            fail(f"unknown function {name!r}{did_you_mean(name, FUNCTIONS)}", token.offset)
        parts = self.arguments()
        if not function.least <= len(parts) <= function.most:
            few, many = function.least, function.most
            fail(
                f"{name}() takes {few if few == many else f'{few} to {many}'} arguments, got {len(parts)}", token.offset
            )
        wanted = [function.takes[min(i, len(function.takes) - 1)] for i in range(len(parts))]
        for part, kind in zip(parts, wanted, strict=True):
            ops.want(part.kind, kind, f"{name}()", part.offset)
        for position, what in function.constants:
            if position < len(parts):
                _constant(parts[position], what, name)
        given = function.gives
        if given is None:
            for part in parts:
                given = ops.same(given, part.kind, f"{name}()", part.offset)
        return self.node(given, token.offset, parts, _runner(f"{name}()", function, parts, wanted))

    # -- what may stand after a value ------------------------------------------------------------------------------

    def infix(self, left: Node) -> Node:
        """``left``, an operator and what follows."""
        kind, _, offset = self.advance()
        if kind == "if":
            return self.ternary(left, offset)
        if kind in ("and", "or"):
            return self.logical(kind, left)
        if kind in ("in", "not"):
            return self.membership(left, offset, negated=kind == "not")
        if kind in ops.COMPARISONS:
            right = self.comparable(offset)
            for part in (left, right):
                if part.kind == "null":
                    fail("nothing equals null; write isnull(…)", part.offset)
            ops.same(left.kind, right.kind, f"'{kind}'", right.offset)
            return self.node("bool", left.offset, (left, right), lambda d: ops.compare(kind, left.run(d), right.run(d)))
        right = self.expression(_POWER - 11 if kind == "**" else _BINDS[kind])
        found = ops.arithmetic_kind(kind, left.kind, right.kind, (left.offset, offset, right.offset))
        run = ops.arithmetic
        return self.computed(found, left.offset, (left, right), lambda d: run(kind, left.run(d), right.run(d)))

    def comparable(self, offset: int) -> Node:
        """The right side of a comparison, which no other comparison may follow."""
        right = self.expression(_COMPARE)
        if _BINDS.get(self.token.kind) == _COMPARE:
            fail("comparisons do not chain; write a < b and b < c", self.token.offset)
        return right

    def logical(self, kind: str, left: Node) -> Node:
        """``left and/or …``."""
        right = self.expression(_BINDS[kind])
        for part in (left, right):
            ops.want(part.kind, "bool", f"'{kind}'", part.offset)
        run = ops.both if kind == "and" else ops.either
        return self.node("bool", left.offset, (left, right), lambda d: run(left.run(d), right.run(d)))

    def membership(self, left: Node, offset: int, *, negated: bool) -> Node:
        """``left in (…)``, ``left not in (…)``."""
        if negated:
            self.expect("in", "'in' after 'not'")
        if self.token.kind != "(":
            fail(f"expected '(' with the values after 'in', found {self.found()}", self.token.offset)
        options = self.arguments()
        if _BINDS.get(self.token.kind) == _COMPARE:
            fail("comparisons do not chain; write a < b and b < c", self.token.offset)
        for option in options:
            ops.same(left.kind, option.kind, "'in'", option.offset)
        if options and all(o.constant and o.kind == "text" for o in options):
            texts = frozenset(v for o in options if isinstance(v := o.run(_NOTHING), str))
            node = self.node("bool", left.offset, (left, *options), lambda d: ops.among(left.run(d), texts))
        else:

            def run(data: Data) -> Value:
                value = left.run(data)
                answer: Value = np.array(False)
                for option in options:
                    answer = ops.either(answer, ops.compare("==", value, option.run(data)))
                return answer

            node = self.node("bool", left.offset, (left, *options), run)
        return self.node("bool", left.offset, (node,), lambda d: ops.opposite(node.run(d))) if negated else node

    def ternary(self, yes: Node, offset: int) -> Node:
        """``yes if condition else no``."""
        condition = self.expression(_BINDS["if"])
        ops.want(condition.kind, "bool", "'if'", condition.offset)
        self.expect("else", "'else' and the other value")
        no = self.expression(_BINDS["if"] - 1)
        kind = ops.same(yes.kind, no.kind, "'if … else'", no.offset)
        if kind == "bool" and "null" in (yes.kind, no.kind):
            kind = "number"  # a truth value has no missing; 1, 0 and missing have

        def run(data: Data) -> Value:
            return choose(truth(condition.run(data), "'if'"), yes.run(data), no.run(data), data.n)

        return self.node(kind, yes.offset, (yes, condition, no), run)


_NOTHING = Data({}, 1)


def _once(run: Callable[[Data], Value]) -> Callable[[Data], Value]:
    """``run`` of constants, whose answer is kept where it is one value for all rows. Not sooner than it is wanted: reading an
    expression makes no arrays, so that who only reads does not load numpy."""
    kept: Value | None = None

    def first(data: Data) -> Value:
        nonlocal kept
        if kept is not None:
            return kept
        value = run(data)
        if isinstance(value, np.ndarray) and not value.ndim:
            kept = value
        return value

    return first


def _runner(name: str, function: Function, parts: tuple[Node, ...], wanted: list[Kind]) -> Callable[[Data], Value]:
    def run(data: Data) -> Value:
        values: list[Value] = []
        for part, kind in zip(parts, wanted, strict=True):
            value = part.run(data)
            if kind == "number":
                value = number(value, name)
            elif kind == "text":
                value = text(value, name)
            values.append(value)
        return function.run(values, data)

    return run


def _constant(part: Node, what: str, name: str) -> None:
    """Refuse an argument that must be a constant and is none."""
    try:
        value = part.run(_NOTHING) if part.constant else None
    except ExpressionError as error:
        fail(str(error), part.offset)
    if what == "text" and not isinstance(value, str):
        fail(f"{name}() takes a pattern in quotes here", part.offset)
    if what == "digits":
        digits = float(value) if isinstance(value, np.ndarray) else np.nan
        if not (abs(digits) <= 15 and digits == int(digits)):
            fail(f"{name}() takes a whole number of decimals from -15 to 15 here", part.offset)
