"""Foreign records (decoded JSON or msgpack) to columns: paths into them, and types that stay once they were seen."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nodes.sources._cells import CellType
from schemas.messages import Column

MAX_FIELDS = 256
"""Most fields of one record that are found without a mapping, and most that are remembered in all."""
_STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(-?[0-9]+)\]|\[\"([^\"\]]+)\"\]|\['([^'\]]+)'\]")
_TOPIC = re.compile(r"topic\[(-?[0-9]+)\]")
_BOOLS = {"true": True, "false": False, "on": True, "off": False, "yes": True, "no": False, "1": True, "0": False}

Getter = Callable[[Any, Sequence[str]], Any]
"""Given a record and the levels of its topic, a value; None where there is none."""


def is_path(text: str) -> bool:
    """Whether a text of the config is meant as a path: ``$.a.b``, ``topic[1]``."""
    return text.startswith(("$", "topic["))


def topic_level(path: str) -> int | None:
    """The level that ``topic[1]`` names; None: it is another path."""
    found = _TOPIC.fullmatch(path)
    return int(found[1]) if found else None


def getter(path: str) -> Getter:
    """Compile ``$.a.b[0]["x y"]`` (into the record) or ``topic[1]`` (a level of the topic, from 0; negative: from the end).

    :raises ValueError: neither; the text says where.
    """
    if (level := topic_level(path)) is not None:

        def of_topic(record: Any, levels: Sequence[str]) -> Any:
            del record
            return levels[level] if -len(levels) <= level < len(levels) else None

        return of_topic
    steps = steps_of(path)

    def of_record(record: Any, levels: Sequence[str]) -> Any:
        del levels
        for key in steps:
            if isinstance(record, dict):
                record = record.get(key)
            elif isinstance(record, list) and isinstance(key, int) and -len(record) <= key < len(record):
                record = record[key]
            else:
                return None
        return record

    return of_record


def steps_of(path: str) -> list[str | int]:
    """Keys of maps and places in lists that a path into a record goes by: ``$.a[0]`` is ``["a", 0]``.

    :raises ValueError: it is none.
    """
    if not path.startswith("$"):
        raise ValueError(f"expected a path such as $.temp or topic[1], got {path!r}")
    steps: list[str | int] = []
    at = 1
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            raise ValueError(f'expected .name, [0] or ["name"] at {path[at : at + 12]!r}')
        steps.append(int(step[2]) if step[2] else step[1] or step[3] or step[4])
        at = step.end()
    return steps


def flatten(
    record: dict[Any, Any], out: dict[str, Any] | None = None, prefix: str = "", depth: int = 0
) -> dict[str, Any]:
    """All single values of a record by name, those inside maps as ``outer.inner``; lists and bytes are left out.

    :raises ValueError: more than :data:`MAX_FIELDS`.
    """
    out = {} if out is None else out
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, (bool, int, float, str)):
            out[name] = value
        elif isinstance(value, dict) and depth < 4:
            flatten(value, out, f"{name}.", depth + 1)
        if len(out) > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields")
    return out


class Types:
    """Types of fields, given or found at the first value.

    :param given: field → type, by the user.
    """

    def __init__(self, given: dict[str, CellType]) -> None:
        self._types: dict[str, CellType] = dict(given)

    def known(self, name: str) -> CellType | None:
        """The type of a field, where it is known."""
        return self._types.get(name)

    def column(self, name: str, values: list[Any]) -> tuple[Column, dict[int, str]]:
        """A column, and the index of each value that does not fit → why. Those are missing in the column.

        :raises ValueError: a new field where there are :data:`MAX_FIELDS` already.
        """
        kind = self._types.get(name)
        if kind is None:
            kind = next((_kind(v) for v in values if v is not None), None)
            if kind is None:
                return np.full(len(values), np.nan), {}
            if len(self._types) >= MAX_FIELDS:
                raise ValueError(f"{name[:64]!r} would be field {MAX_FIELDS + 1}")
            self._types[name] = kind
        bad: dict[int, str] = {}
        match kind:
            case "text":
                return [_checked(v, _text, i, name, bad) for i, v in enumerate(values)], bad
            case "bool":
                if not all(isinstance(v, bool) for v in values):
                    values = [_checked(v, _bool, i, name, bad) for i, v in enumerate(values)]
                return np.array(values, np.float64 if None in values else np.bool_), bad
            case "int" | "float":
                try:
                    if not any(isinstance(v, str) for v in values):
                        return _numbers(values, kind), bad
                except (ValueError, TypeError, OverflowError):
                    pass
                convert = _number if kind == "float" else _whole
                return _numbers([_checked(v, convert, i, name, bad) for i, v in enumerate(values)], kind), bad


def _numbers(values: list[Any], kind: str) -> Column:
    """:raises ValueError: not all are numbers or None (TypeError, OverflowError likewise)."""
    whole = kind == "int" and None not in values
    if whole and not all(isinstance(v, int) for v in values):
        raise ValueError("not whole")
    column = np.array(values, np.int64 if whole else np.float64)
    if column.ndim != 1:
        raise ValueError("a list is no number")
    return column


def _checked(value: Any, convert: Callable[[Any], Any], index: int, name: str, bad: dict[int, str]) -> Any:
    if value is None:
        return None
    try:
        return convert(value)
    except (ValueError, TypeError, OverflowError, KeyError):
        bad[index] = f"field {name!r}: {str(value)[:40]!r} is {_SAID[convert]}"
        return None


def _kind(value: Any) -> CellType:
    return "bool" if isinstance(value, bool) else "float" if isinstance(value, (int, float)) else "text"


def _text(value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise TypeError
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: Any) -> float:
    if not isinstance(value, (str, int, float)) or (isinstance(value, str) and "_" in value):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    exact = int(value)
    if not -(2**63) <= exact < 2**63:
        raise OverflowError
    return exact


def _bool(value: Any) -> bool:
    return value if isinstance(value, bool) else _BOOLS[str(value).lower()]


_SAID: dict[Callable[[Any], Any], str] = {
    _text: "no text",
    _number: "no number",
    _whole: "no whole number",
    _bool: "no truth value",
}
