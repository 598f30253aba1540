"""One table of the ``sqlite`` sink: its columns, and rows into it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np

from nodes.sinks._json import row_numbers
from schemas.errors import RunError
from schemas.messages import Aggregate, Column, Message
from schemas.rows import Rows, rows

KEYS = {"id": "TEXT NOT NULL", "row": "INTEGER NOT NULL", "source": "TEXT NOT NULL", "time": "INTEGER NOT NULL"}
"""Columns that every table begins with; ``time`` is in ns since the epoch."""


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def sql_type(column: Column) -> str:
    """Type of the SQL column for a column of rows."""
    if isinstance(column, list):
        return "TEXT"
    return "REAL" if column.dtype.kind == "f" else "INTEGER"


class Table:
    """Made if it is not there.

    SQL names ignore case and fields do not: a field whose name is taken by another gets ``_2`` at its end, one that is
    called like a key column is ``field_<name>``.

    :raises RunError: there is a table of that name that is not one of ours.
    """

    def __init__(self, db: sqlite3.Connection, name: str, max_columns: int) -> None:
        self._db = db
        self._name = name
        self._max = max_columns
        columns = ", ".join(f"{quoted(k)} {t}" for k, t in KEYS.items())
        db.execute(f"CREATE TABLE IF NOT EXISTS {quoted(name)} ({columns}, PRIMARY KEY (id, row))")
        self.reload()
        if lacking := KEYS.keys() - self._columns.keys():
            raise RunError(f"the table {name!r} is there and has no column {min(lacking)!r}: choose another table")
        rest = "((time % 1000000000 + 1000000000) % 1000000000)"  # SQL's % has the sign of a time before 1970
        seconds = f"strftime('%Y-%m-%dT%H:%M:%S', (time - {rest}) / 1000000000, 'unixepoch')"
        columns = f"{seconds} || printf('.%09dZ', {rest}) AS time_iso, *"  # * takes in columns that come later
        select = f"SELECT {columns} FROM {quoted(name)}"  # noqa: S608 - the name is quoted
        db.execute(f"CREATE VIEW IF NOT EXISTS {quoted(name + '_iso')} AS {select}")

    def reload(self) -> None:
        """Read the columns from the file (at the start, after a rollback)."""
        info = self._db.execute(f"PRAGMA table_info({quoted(self._name)})").fetchall()
        self._columns = {row[1]: str(row[2]) for row in info}
        self._folded = {name.lower() for name in self._columns}
        self._of_field: dict[str, str] = {}

    def insert(self, messages: Sequence[Message]) -> None:
        """Insert or replace all rows. Within the caller's transaction.

        An aggregate's row is replaced by one of the same or a later revision only.

        :raises ValueError: more columns than allowed.
        :raises TypeError: a message that has no rows.
        """
        table = rows(messages)
        if not table.n:
            return
        columns = dict(table.columns)
        revised = any(isinstance(m.body, Aggregate) for m in messages)
        if revised:
            bodies = [m.body for m in messages]
            revisions = np.array([b.revision if isinstance(b, Aggregate) else 0 for b in bodies], np.int64)
            columns["revision"] = revisions[table.message]
        names = [self._column(field, column) for field, column in columns.items()]
        statement = self._statement(names, revised)
        self._db.executemany(statement, zip(*self._keys(messages, table), *map(_cells, columns.values()), strict=True))

    def _keys(self, messages: Sequence[Message], table: Rows) -> list[list[Any]]:
        ids = [_key(m) for m in messages]
        own = [ids[i] for i in table.message.tolist()]
        return [own, row_numbers(table).tolist(), table.source, table.time.tolist()]

    def _column(self, field: str, column: Column) -> str:
        """SQL name of a field; adds the column if it is new."""
        known = self._of_field.get(field)
        if known is not None:
            return known
        base = name = f"field_{field}" if field.lower() in KEYS else (field or "_")
        number = 1
        taken = set(self._of_field.values())
        while name in taken or (name not in self._columns and name.lower() in self._folded):
            number += 1
            name = f"{base}_{number}"
        if name not in self._columns:
            if len(self._columns) >= self._max:
                raise ValueError(
                    f"field {field[:64]!r} would be column {len(self._columns) + 1} of at most {self._max}"
                )
            if "\0" in name:
                raise ValueError(f"field {field[:64]!r} cannot be a column")
            kind = sql_type(column)
            self._db.execute(f"ALTER TABLE {quoted(self._name)} ADD COLUMN {quoted(name)} {kind}")
            self._columns[name] = kind
            self._folded.add(name.lower())
        self._of_field[field] = name
        return name

    def _statement(self, names: list[str], revised: bool) -> str:
        every = [*KEYS, *names]
        into = ", ".join(map(quoted, every))
        marks = ", ".join("?" * len(every))
        changes = ", ".join(f"{quoted(n)} = excluded.{quoted(n)}" for n in every[2:])
        newer = ""
        if revised:
            own = f"{quoted(self._name)}.{quoted(self._of_field['revision'])}"
            newer = f" WHERE excluded.{quoted(self._of_field['revision'])} >= coalesce({own}, 0)"
        return (
            f"INSERT INTO {quoted(self._name)} ({into}) VALUES ({marks}) "  # noqa: S608 - names are quoted, values bound
            f"ON CONFLICT (id, row) DO UPDATE SET {changes}{newer}"
        )


def _key(message: Message) -> str:
    """Key of a message's rows: its id; an aggregate's without the revision (``/<revision>``, then ``@<edge>`` where the
    runtime told two inputs apart), so that all revisions share one row.
    """
    body = message.body
    if not isinstance(body, Aggregate) or not body.revision:
        return message.id
    first, found, rest = message.id.rpartition(f"/{body.revision}")
    return first + rest if found and rest[:1] in ("", "@") else message.id


def _cells(column: Column) -> list[Any]:
    """Values as SQLite takes them: NaN is NULL (sqlite3 does that), what is beyond 64 bits signed becomes a float."""
    if isinstance(column, list):
        return column
    if column.dtype.kind == "u" and column.size and int(column.max()) >= 2**63:
        column = column.astype(np.float64)
    values: list[Any] = column.tolist()
    return values
