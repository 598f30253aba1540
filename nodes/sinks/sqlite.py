"""Rows in a table of an SQLite file, each exactly once: the key is the message's id and the row's number in it.

The table is made and gets new columns as they come. Beside it stands the view ``<table>_iso`` with readable times.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import Field

from nodes.operator import Context, Flow, Sink
from nodes.options import Options
from nodes.sinks._sqlite_table import Table
from schemas.errors import ConfigError, Problem, RejectedError, RunError, SinkAwayError
from schemas.messages import Message
from schemas.rows import ROW_TYPES


class Config(Options):
    """Options of the ``sqlite`` sink."""

    path: str = Field(description="the file; made if it is not there")
    table: str | None = Field(None, min_length=1, max_length=64, description="the table; the node's name if left out")
    sync: Literal["full", "normal"] = Field(
        "full",
        description="full: a write survives a power cut; normal: it survives a crash of the process, and is faster",
    )
    max_columns: int = Field(500, ge=1, le=1900, description="most columns; messages that need more are rejected")
    wait: int = Field(5, ge=0, description="seconds to wait for another program that has the file locked")

    def check(self, context: Context) -> None:
        path = context.path(self.path)
        if path.is_dir():
            raise ConfigError(Problem(("path",), f"a folder, not a file: {path}"))
        name = self.table or ""
        if name.lower().startswith("sqlite_") or name.endswith("_iso"):
            raise ConfigError(Problem(("table",), f"{name!r} is reserved"))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {}

    def accepts(self) -> frozenset[str]:
        return ROW_TYPES


def build(config: Config, context: Context) -> Sink:
    """An :class:`SqliteSink`."""
    return SqliteSink(config, context)


_AWAY = {
    sqlite3.SQLITE_BUSY: "locked by another program",
    sqlite3.SQLITE_LOCKED: "locked by another program",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "input/output error",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_READONLY: "cannot be written to",
}
_BROKEN = {
    sqlite3.SQLITE_CORRUPT: "is damaged; restore it or move it away",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
}


class SqliteSink(Sink):
    """One thread owns the connection; one transaction a write."""

    max_batch = 4096

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._path = context.path(config.path)
        self._name = config.table or context.node
        self._db: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, "sqlite-sink")

    async def open(self) -> None:
        """:raises RunError: the file is damaged, no database, or its table is not ours.
        :raises SinkAwayError: it is locked, or its disk is full or gone.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def write(self, messages: Sequence[Message]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, messages)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _open(self) -> None:
        self._close()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = self._db = sqlite3.connect(
                self._path, timeout=self._config.wait, isolation_level=None, check_same_thread=False
            )
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={self._config.sync.upper()}")
            self._table = Table(db, self._name, self._config.max_columns)
        except sqlite3.Error as error:
            self._close()
            raise self._said(error) from error
        except OSError as error:
            raise SinkAwayError(f"{self._path}: {error.strerror}") from error

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _write(self, messages: Sequence[Message]) -> None:
        if self._db is None:
            self._open()
        db = self._db
        assert db is not None  # noqa: S101 - _open raises or sets it
        rejected: list[tuple[int, str]] = []
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                self._insert(db, messages, 0, rejected)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                self._table.reload()
                raise
        except sqlite3.Error as error:
            self._close()  # begin anew: a connection is of no use after some of these errors
            raise self._said(error) from error
        if rejected:
            raise RejectedError(sorted(rejected))

    def _insert(
        self, db: sqlite3.Connection, messages: Sequence[Message], base: int, rejected: list[tuple[int, str]]
    ) -> None:
        """Insert all; if the data of some are refused, halve until only those are left out."""
        db.execute("SAVEPOINT part")
        try:
            self._table.insert(messages)
        except (OverflowError, UnicodeError, TypeError, ValueError, sqlite3.DataError, sqlite3.IntegrityError) as error:
            db.execute("ROLLBACK TO part")
            db.execute("RELEASE part")
            self._table.reload()
            if len(messages) == 1:
                rejected.append((base, f"{self._name}: {error}"))
                return
            half = len(messages) // 2
            self._insert(db, messages[:half], base, rejected)
            self._insert(db, messages[half:], base + half, rejected)
        else:
            db.execute("RELEASE part")

    def _said(self, error: sqlite3.Error) -> SinkAwayError | RunError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _AWAY:
            return SinkAwayError(f"{self._path}: {_AWAY[code]} ({error})")
        return RunError(f"{self._path} {_BROKEN.get(code, 'cannot be used')}: {error}")
