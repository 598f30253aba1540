"""One table of the ``sqlite`` sink: its columns, and rows into it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np

from nodes.sinks._json import row_numbers
from nodes.sinks._table import Names, quoted, row_key, with_revisions
from schemas.errors import RunError
from schemas.messages import Column, Message
from schemas.rows import Rows

KEYS = {"id": "TEXT NOT NULL", "row": "INTEGER NOT NULL", "source": "TEXT NOT NULL", "time": "INTEGER NOT NULL"}
"""Columns that every table begins with; ``time`` is in ns since the epoch."""


def sql_type(column: Column) -> str:
    """Type of the SQL column for a column of rows."""
    if isinstance(column, list):
        return "TEXT"
    return "REAL" if column.dtype.kind == "f" else "INTEGER"


class Table:
    """Made if it is not there. Fields have the names that :class:`~nodes.sinks._table.Names` gives them.

    :raises RunError: there is a table of that name that is not one of ours.
    """

    def __init__(self, db: sqlite3.Connection, name: str, max_columns: int) -> None:
        self._db = db
        self._name = name
        self._max = max_columns
        columns = ", ".join(f"{quoted(k)} {t}" for k, t in KEYS.items())
        db.execute(f"CREATE TABLE IF NOT EXISTS {quoted(name)} ({columns}, PRIMARY KEY (id, row))")
        self.reload()
        if lacking := KEYS.keys() - self._columns:
            raise RunError(f"the table {name!r} is there and has no column {min(lacking)!r}: choose another table")
        rest = "((time % 1000000000 + 1000000000) % 1000000000)"  # SQL's % has the sign of a time before 1970
        seconds = f"strftime('%Y-%m-%dT%H:%M:%S', (time - {rest}) / 1000000000, 'unixepoch')"
        columns = f"{seconds} || printf('.%09dZ', {rest}) AS time_iso, *"  # * takes in columns that come later
        select = f"SELECT {columns} FROM {quoted(name)}"  # noqa: S608 - the name is quoted
        db.execute(f"CREATE VIEW IF NOT EXISTS {quoted(name + '_iso')} AS {select}")

    def reload(self) -> None:
        """Read the columns from the file (at the start, after a rollback)."""
        info = self._db.execute(f"PRAGMA table_info({quoted(self._name)})").fetchall()
        self._columns = {str(row[1]) for row in info}
        self._names = Names(KEYS, self._columns, self._max)

    def insert(self, messages: Sequence[Message]) -> None:
        """Insert or replace all rows. Within the caller's transaction.

        An aggregate's row is replaced by one of the same or a later revision only.

        :raises ValueError: more columns than allowed.
        :raises TypeError: a message that has no rows.
        """
        table, columns, revised = with_revisions(messages)
        if not table.n:
            return
        names = [self._column(field, column) for field, column in columns.items()]
        statement = self._statement(names, revised)
        self._db.executemany(statement, zip(*self._keys(messages, table), *map(_cells, columns.values()), strict=True))

    def _keys(self, messages: Sequence[Message], table: Rows) -> list[list[Any]]:
        ids = [row_key(m) for m in messages]
        own = [ids[i] for i in table.message.tolist()]
        return [own, row_numbers(table).tolist(), table.source, table.time.tolist()]

    def _column(self, field: str, column: Column) -> str:
        """SQL name of a field; adds the column if it is new."""
        name = self._names.get(field)
        if name is None:
            name, new = self._names.find(field)
            if new:
                change = f"ADD COLUMN {quoted(name)} {sql_type(column)}"
                try:
                    self._db.execute(f"ALTER TABLE {quoted(self._name)} {change}")
                except sqlite3.OperationalError as error:
                    if "duplicate column" not in str(error):  # of another writer of the same table
                        raise
            self._names.use(field, name)
        return name

    def _statement(self, names: list[str], revised: bool) -> str:
        every = [*KEYS, *names]
        into = ", ".join(map(quoted, every))
        marks = ", ".join("?" * len(every))
        changes = ", ".join(f"{quoted(n)} = excluded.{quoted(n)}" for n in every[2:])
        newer = ""
        if revised:
            revision = quoted(self._names.get("revision") or "revision")
            newer = f" WHERE excluded.{revision} >= coalesce({quoted(self._name)}.{revision}, 0)"
        return (
            f"INSERT INTO {quoted(self._name)} ({into}) VALUES ({marks}) "  # noqa: S608 - names are quoted, values bound
            f"ON CONFLICT (id, row) DO UPDATE SET {changes}{newer}"
        )


def _cells(column: Column) -> list[Any]:
    """Values as SQLite takes them: NaN is NULL (sqlite3 does that), what is beyond 64 bits signed becomes a float."""
    if isinstance(column, list):
        return column
    if column.dtype.kind == "u" and column.size and int(column.max()) >= 2**63:
        column = column.astype(np.float64)
    values: list[Any] = column.tolist()
    return values
