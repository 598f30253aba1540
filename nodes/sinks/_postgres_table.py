"""One table of the ``postgres`` sink: its columns and their types, and rows into it.

All rows of a statement travel as one array for each column (``INSERT … SELECT FROM unnest``): one round trip, whatever
their number, and the key decides what is new and what is a repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np

from nodes.sinks._json import row_numbers
from nodes.sinks._table import Names, quoted, row_key, with_revisions
from schemas.errors import RunError
from schemas.messages import Aggregate, Column, Message, Readings

KEYS = {"id": "text NOT NULL", "row": "bigint NOT NULL", "source": "text NOT NULL", "time": "bigint NOT NULL"}
"""Columns that every table begins with; ``time`` is in ns since the epoch."""
MOMENT = "timestamp"
"""A column that the database makes of ``time`` (timestamptz, to the microsecond), for tools that want a date."""

Family: TypeAlias = Literal["bool", "int", "float", "text", "other"]
_FAMILIES: dict[str, Family] = {
    "boolean": "bool",
    "smallint": "int",
    "integer": "int",
    "bigint": "int",
    "real": "float",
    "double precision": "float",
    "numeric": "float",
    "text": "text",
    "character varying": "text",
    "character": "text",
}
_TYPES: dict[Family, str] = {"bool": "boolean", "int": "bigint", "float": "double precision", "text": "text"}
_ORDER: tuple[Family, ...] = ("bool", "int", "float")
"""Each holds what those before it hold."""
_LONGEST = 63
"""Bytes of a name in PostgreSQL."""
_MOST_ROWS = 20_000
"""Rows of one statement, about."""

_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, NULL), format_type(a.atttypid, a.atttypmod)
FROM pg_attribute a WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""
_KEYED = """
SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = $1::text::regclass AND i.indisunique AND i.indpred IS NULL AND
  (SELECT array_agg(a.attname::text ORDER BY a.attname) FROM pg_attribute a
   WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)) = ARRAY['id', 'row'])
"""


class Table:
    """The table on one connection; :meth:`prepare` first.

    :param name: ``table`` or ``schema.table``.
    :param timeout: seconds for one statement.
    """

    def __init__(self, connection: Any, name: str, max_columns: int, timeout: float) -> None:
        self._connection = connection
        self._name = ".".join(quoted(part) for part in name.split(".", 1))
        self._max = max_columns
        self._timeout = timeout

    async def prepare(self) -> None:
        """Make the table if it is not there.

        :raises RunError: there is one that is not ours.
        """
        db, name = self._connection, self._name
        if await db.fetchval("SELECT to_regclass($1::text)", name, timeout=self._timeout) is None:
            columns = ", ".join(f"{quoted(k)} {t}" for k, t in KEYS.items())
            made = f'{quoted(MOMENT)} timestamptz GENERATED ALWAYS AS (to_timestamp("time" / 1e9)) STORED'
            async with db.transaction():  # one of several writers makes it
                await db.execute("SELECT pg_advisory_xact_lock(hashtext($1))", name, timeout=self._timeout)
                await db.execute(
                    f"CREATE TABLE IF NOT EXISTS {name} ({columns}, {made}, PRIMARY KEY (id, row))",
                    timeout=self._timeout,
                )
        await self._reload()
        if lacking := KEYS.keys() - self._families.keys():
            raise RunError(f"the table {name} is there and has no column {min(lacking)!r}: choose another table")
        if not await db.fetchval(_KEYED, name, timeout=self._timeout):
            raise RunError(f"the table {name} is there and has no unique key (id, row): choose another table")

    async def _reload(self) -> None:
        found = await self._connection.fetch(_COLUMNS, self._name, timeout=self._timeout)
        self._families: dict[str, Family] = {column: _FAMILIES.get(plain, "other") for column, plain, _ in found}
        self._casts = {column: full for column, _, full in found}
        self._names = Names({*KEYS, MOMENT}, self._families, self._max, _LONGEST)

    async def insert(self, messages: Sequence[Message]) -> None:
        """Insert or replace all rows of messages with different keys, in one statement.

        An aggregate's row is replaced by one of the same or a later revision only.

        :raises ValueError: a value does not fit its column, or there are more columns than allowed.
        :raises TypeError: a message that has no rows.
        """
        table, columns, revised = with_revisions(messages)
        if not table.n:
            return
        names, kinds, cells = [], [], []
        for field, column in columns.items():
            name = await self._column(field, column)
            kind, values = fitted(column, self._families[name], name)
            names.append(name)
            kinds.append(kind)
            cells.append(values)
        keys = [row_key(m) for m in messages]
        own = [keys[i] for i in table.message.tolist()]
        values = [own, row_numbers(table).tolist(), table.source, table.time.tolist(), *cells]
        await self._connection.execute(self._statement(names, kinds, revised), *values, timeout=self._timeout)

    async def _column(self, field: str, column: Column) -> str:
        """SQL name of a field; adds its column if it is new, widens it if its type cannot hold the values."""
        name, new = self._names.get(field), False
        if name is None:
            name, new = self._names.find(field)
        if new:
            await self._alter(f"ADD COLUMN IF NOT EXISTS {quoted(name)} {_TYPES[family_of(column)]}")
        elif (wider := _wider(column, self._families[name])) is not None:
            old = self._families[name]
            using = f" USING {quoted(name)}::int" if old == "bool" else ""
            await self._alter(f"ALTER COLUMN {quoted(name)} TYPE {_TYPES[wider]}{using}")
            return await self._column(field, column)
        self._names.use(field, name)
        return name

    async def _alter(self, change: str) -> None:
        await self._connection.execute(f"ALTER TABLE {self._name} {change}", timeout=self._timeout)
        known = self._names
        await self._reload()  # another writer may have been first, with another type
        self._names.keep(known)

    def _statement(self, names: list[str], kinds: list[str], revised: bool) -> str:
        every = [*KEYS, *names]
        arrays = ["text[]", "bigint[]", "text[]", "bigint[]", *kinds]
        into = ", ".join(map(quoted, every))
        given = ", ".join(f"${i}::{kind}" for i, kind in enumerate(arrays, 1))
        cells = ", ".join(
            f"c{i}::{self._casts[name]}" if self._families[name] == "other" else f"c{i}" for i, name in enumerate(every)
        )
        labels = ", ".join(f"c{i}" for i in range(len(every)))
        changes = ", ".join(f"{quoted(n)} = excluded.{quoted(n)}" for n in every[2:])
        newer = ""
        if revised:
            revision = quoted(self._names.get("revision") or "revision")
            newer = f" WHERE excluded.{revision} >= coalesce(t.{revision}, 0)"
        return (
            f"INSERT INTO {self._name} AS t ({into}) SELECT {cells} FROM unnest({given}) AS u ({labels}) "  # noqa: S608 - names are quoted, values bound
            f"ON CONFLICT (id, row) DO UPDATE SET {changes}{newer}"
        )


def family_of(column: Column) -> Family:
    """What a new column for these values is."""
    if isinstance(column, list):
        return "text"
    match column.dtype.kind:
        case "b":
            return "bool"
        case "u" if column.size and int(column.max()) >= 2**63:
            return "float"
        case "i" | "u":
            return "int"
    return "float"


def _wider(column: Column, family: Family) -> Family | None:
    """The family that the database's column must become for the values; None: it holds them, or never can."""
    if isinstance(column, list) or family not in _ORDER:
        return None
    wanted = family_of(column)
    if _ORDER.index(wanted) <= _ORDER.index(family):
        return None
    known = column[np.isfinite(column)] if wanted == "float" else column
    if wanted == "float" and known.size == np.count_nonzero(~np.isnan(column)):
        whole = bool(np.all(known == np.trunc(known)) and np.all(np.abs(known) < 2.0**63))
        wanted = "int" if whole else "float"  # a whole column in which some are missing arrives as floats
    if family == "bool" and wanted == "int" and np.isin(known, (0, 1)).all():
        return None
    return wanted if _ORDER.index(wanted) > _ORDER.index(family) else None


def fitted(column: Column, family: Family, name: str) -> tuple[str, list[Any]]:
    """(array type, values) of a column for the database's column; NaN and None are NULL.

    :raises ValueError: texts for a column of numbers.
    """
    if isinstance(column, list):
        if family in _ORDER and any(value is not None for value in column):
            raise ValueError(f"a text for column {name!r}, which is {_TYPES[family]}")
        return ("text[]" if family not in _ORDER else f"{_TYPES[family]}[]"), column
    missing = np.isnan(column) if column.dtype.kind == "f" else None
    if family in _ORDER:
        if missing is None:
            to = {"bool": np.bool_, "int": np.int64, "float": np.float64}[family]
            return f"{_TYPES[family]}[]", column.astype(to, copy=False).tolist()
        if family == "float":
            values = column.tolist()
        else:
            whole = np.where(missing, 0, column).astype(np.bool_ if family == "bool" else np.int64)
            values = whole.tolist()
        return f"{_TYPES[family]}[]", _nulls(values, missing)
    texts = [str(value) for value in column.tolist()]
    return "text[]", texts if missing is None else _nulls(texts, missing)


def _nulls(values: list[Any], missing: Any) -> list[Any]:
    for i in np.flatnonzero(missing).tolist():
        values[i] = None
    return values


def rounds(messages: Sequence[Message]) -> list[list[int]]:
    """Indices of messages in statements, one after the other: in one there are no two of one key (a statement may touch a
    row once), all have the same fields of the same types (so that what one lacks makes no NULL and no float of another's),
    and there are not too many rows.
    """
    turns: dict[str, int] = {}
    parts: dict[tuple[int, Any], list[list[int]]] = {}
    rows: dict[tuple[int, Any], int] = {}
    for i, message in enumerate(messages):
        key = row_key(message)
        turn = turns[key] = turns.get(key, -1) + 1
        shape = (turn, _shape(message))
        if shape not in parts or rows[shape] + message.rows > _MOST_ROWS:
            parts.setdefault(shape, []).append([])
            rows[shape] = 0
        parts[shape][-1].append(i)
        rows[shape] += message.rows
    return list(chain.from_iterable(parts[shape] for shape in sorted(parts, key=lambda shape: shape[0])))


def _shape(message: Message) -> Any:
    body = message.body
    if isinstance(body, Readings):
        return tuple([(k, "t" if isinstance(c, list) else c.dtype.kind) for k, c in body.columns.items()])
    extra: Any = getattr(body, "values", None) or {}
    tags: Any = getattr(body, "attributes", None) or {}
    scalars = tuple((k, type(v).__name__) for k, v in chain(extra.items(), tags.items()))
    return message.type, isinstance(body, Aggregate), scalars, getattr(body, "boxes", None) is None
