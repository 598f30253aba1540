"""What a party must not forget: the keys of its machine and the rows that it made, in one SQLite file.

A commit is one transaction and survives the death of the process. Those that are ``hard`` survive the machine's too: the first of
each start, which makes the coordinator's epoch grow, so that no epoch is ever used twice. What a power cut takes of the others is
what the protocol would recover from anyway: the last seconds of a round, which is then run again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from schemas.errors import RunError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS stream (name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, row BLOB NOT NULL);
"""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Store:
    """The file, or memory when ``path`` is None (tests). May be used by several threads; one has it at a time.

    :raises RunError: the file cannot be opened or is not ours.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "PRAGMA cache_size=-512"
            )  # models pass through once; nothing is gained by keeping their pages
            self._db.executescript(_SCHEMA)
            if self._db.execute("SELECT count(*) FROM stream").fetchone()[0] == 0:
                self._db.execute("INSERT INTO stream VALUES (?)", (os.urandom(4).hex(),))
            self.stream: str = self._db.execute("SELECT name FROM stream").fetchone()[0]
            """Eight hex digits, as long as the file lives: the name of the stream of its rows."""
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"the file {path} cannot be used: {error}") from error

    def commit(self, values: Mapping[str, Any], rows: Sequence[dict[str, Any]] = (), *, hard: bool = False) -> None:
        """One transaction.

        :param values: key → plain msgpack value; None forgets the key.
        :param rows: are numbered on from the last; one whose ``round`` is there already is a repeat.
        :raises sqlite3.OperationalError: the disk is full or away; nothing was changed, try again.
        """
        db = self._db
        with self._lock:
            if hard:
                db.execute("PRAGMA synchronous=FULL")
            try:
                db.execute("BEGIN IMMEDIATE")
                try:
                    for key, value in values.items():
                        if value is None:
                            db.execute("DELETE FROM kept WHERE key = ?", (key,))
                        else:
                            db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (key, _encode(value)))
                    new = [(str(row.get("round")), _encode(row)) for row in rows]
                    db.executemany("INSERT OR IGNORE INTO rows (name, row) VALUES (?, ?)", new)
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
            finally:
                if hard:
                    db.execute("PRAGMA synchronous=NORMAL")

    def kept(self) -> Kept:
        """What was committed last, by key: as it is when it is looked at, not as it was."""
        return Kept(self)

    def rows(self, after: int = 0, most: int = 256) -> list[tuple[int, dict[str, Any]]]:
        """(number, row) of the rows that were made after number ``after``, from 1 on, in order."""
        found = self.select("SELECT number, row FROM rows WHERE number > ? ORDER BY number LIMIT ?", (after, most))
        return [(number, _decode(row)) for number, row in found]

    def select(self, query: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """What the file answers."""
        with self._lock:
            return self._db.execute(query, parameters).fetchall()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


class Kept(Mapping[str, Any]):
    """The keys of a store, each read when it is asked for: updates of a whole round need not be in memory at once."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getitem__(self, key: str) -> Any:
        found = self._store.select("SELECT value FROM kept WHERE key = ?", (key,))
        if not found:
            raise KeyError(key)
        return _decode(found[0][0])

    def __iter__(self) -> Iterator[str]:
        return iter([key for (key,) in self._store.select("SELECT key FROM kept ORDER BY key")])

    def __len__(self) -> int:
        return int(self._store.select("SELECT count(*) FROM kept")[0][0])
