"""Source text to tokens, each with its offset. Linear in the length of the text."""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from schemas.errors import ConfigError, Problem

MAX_LENGTH = 4096
"""Longest source, in characters."""

KEYWORDS = frozenset({"and", "or", "not", "in", "if", "else", "true", "false", "null"})

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
      | (?P<name>[^\W\d]\w*(?:\.\w+)*)
      | `(?P<quoted>[^`]+)`
      | (?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
      | (?P<operator>\*\*|//|==|!=|<=|>=|[-+*/%<>(),])
    """,
    re.VERBOSE | re.DOTALL,
)
_HINTS = (
    ("&&", "'&&' is written 'and' here"),
    ("||", "'||' is written 'or' here"),
    ("!", "'!' is written 'not' here"),
    ("=", "'=' is written '==' here"),
    ("^", "'^' is written '**' here"),
    ("'", "the text is not closed"),
    ('"', "the text is not closed"),
    ("`", "the field name is not closed"),
    ("[", "'[' has no meaning here; a list of values is written in round brackets"),
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


class Token(NamedTuple):
    """One word of the source: ``kind`` is ``number``, ``text``, ``name``, ``end``, or the operator or keyword itself."""

    kind: str
    value: str
    offset: int


def fail(message: str, offset: int) -> NoReturn:
    """Refuse the source.

    :raises ConfigError: always.
    """
    raise ConfigError(Problem((), message, offset))


def tokens(source: str) -> list[Token]:
    """All tokens and one ``end``.

    :raises ConfigError: a character that means nothing here, an open quote, or a source that is too long.
    """
    if len(source) > MAX_LENGTH:
        fail(f"the expression has {len(source)} characters, at most {MAX_LENGTH}", MAX_LENGTH)
    found: list[Token] = []
    at = 0
    while at < len(source):
        m = _TOKEN.match(source, at)
        if m is None or m.lastgroup is None:
            for start, hint in _HINTS:
                if source.startswith(start, at):
                    fail(hint, at)
            fail(f"{source[at]!r} has no meaning here", at)
        kind, value = m.lastgroup, m[m.lastgroup]
        if kind == "number" and m.end() < len(source) and (source[m.end()].isalnum() or source[m.end()] in "_."):
            fail(
                f"{value!r} runs into {source[m.end()]!r}; field names that begin with a digit go in backquotes",
                m.end(),
            )
        if kind == "text":
            value = _ESCAPE.sub(lambda e: _ESCAPES.get(e[1], e[1]), value[1:-1])
        elif kind == "quoted":
            kind = "name"
        elif kind == "operator" or (kind == "name" and value in KEYWORDS):
            kind = value
        if kind != "space":
            found.append(Token(kind, value, at))
        at = m.end()
    found.append(Token("end", "", len(source)))
    return found
