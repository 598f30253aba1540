"""What a party must not forget: the keys of its machine and the rows that it made, in an SQLite file and some beside it.

A commit is one transaction and survives the death of the process. Those that are ``hard`` survive the machine's too: the first of
each start, which makes the coordinator's epoch grow, so that no epoch is ever used twice. What a power cut takes of the others is
what the protocol would recover from anyway: the last seconds of a round, which is then run again.

A value of :data:`LARGE` bytes or more (a model, an update) is a file of its own, there before the commit that names it: SQLite
would write it twice, which took half of a round. One that a power cut took is known by its checksum, and its key is forgotten.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from schemas.errors import RunError

LARGE = 128 * 1024
"""Bytes from which on a value is a file."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS stream (name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB NOT NULL, file TEXT, sum INTEGER);
CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, row BLOB NOT NULL);
"""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Store:
    """The file, or memory when ``path`` is None (tests). May be used by several threads; one has it at a time.

    :param synced: keys without which nothing goes on: their files are on the disk before the commit is.
    :raises RunError: the file cannot be opened or is not ours.
    """

    def __init__(self, path: Path | None, *, synced: Sequence[str] = ()) -> None:
        self.path = path
        self._folder = None if path is None else path.with_suffix(".large")
        self._synced = frozenset(synced)
        self._lock = threading.Lock()
        try:
            if path is not None:
                path.with_suffix(".large").mkdir(parents=True, exist_ok=True)
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
            self._tidy()
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"the file {path} cannot be used: {error}") from error

    def commit(self, values: Mapping[str, Any], rows: Sequence[dict[str, Any]] = (), *, hard: bool = False) -> None:
        """One transaction.

        :param values: key → plain msgpack value; None forgets the key.
        :param rows: are numbered on from the last; one whose ``round`` is there already is a repeat.
        :raises sqlite3.OperationalError: the disk is full or away; nothing was changed, try again.
        """
        db, written = self._db, list[Path]()
        with self._lock:
            if hard:
                db.execute("PRAGMA synchronous=FULL")
            try:
                packed = {key: self._packed(key, value, written) for key, value in values.items()}
                db.execute("BEGIN IMMEDIATE")
                replaced = [self._set(key, row) for key, row in packed.items()]
                new = [(str(row.get("round")), _encode(row)) for row in rows]
                db.executemany("INSERT OR IGNORE INTO rows (name, row) VALUES (?, ?)", new)
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                for path in written:
                    path.unlink(missing_ok=True)
                if isinstance(error, OSError):
                    raise sqlite3.OperationalError(f"{error.filename or self.path}: {error.strerror}") from error
                raise
            finally:
                if hard:
                    db.execute("PRAGMA synchronous=NORMAL")
            self._remove(name for name in replaced if name is not None)

    def _packed(self, key: str, value: Any, written: list[Path]) -> tuple[bytes, str | None, int] | None:
        """A row: its value, or its file with a checksum. None: forget it."""
        if value is None:
            return None
        data = _encode(value)
        if self._folder is None or len(data) < LARGE:
            return data, None, 0
        path = self._folder / os.urandom(8).hex()
        written.append(path)
        with path.open("xb") as file:
            file.write(data)
            if key in self._synced:
                file.flush()
                os.fsync(file.fileno())
        return b"", path.name, zlib.crc32(data)

    def _set(self, key: str, row: tuple[bytes, str | None, int] | None) -> str | None:
        """Within a transaction; gives the file that is not needed any more."""
        found = self._db.execute("SELECT file FROM kept WHERE key = ?", (key,)).fetchone()
        if row is None:
            self._db.execute("DELETE FROM kept WHERE key = ?", (key,))
        else:
            self._db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?)", (key, *row))
        return None if found is None else found[0]

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            if self._folder is not None:
                (self._folder / name).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Remove files that no key names, and keys whose file is not whole."""
        if self._folder is None:
            return
        known = dict(self._db.execute("SELECT file, key FROM kept WHERE file IS NOT NULL").fetchall())
        self._remove(path.name for path in self._folder.iterdir() if path.name not in known)
        for name, key in known.items():
            data = self._read(name)
            (found,) = self._db.execute("SELECT sum FROM kept WHERE key = ?", (key,)).fetchone()
            if data is None or zlib.crc32(data) != found:
                self._db.execute("DELETE FROM kept WHERE key = ?", (key,))
                self._remove([name])

    def _read(self, name: str) -> bytes | None:
        try:
            return None if self._folder is None else (self._folder / name).read_bytes()
        except OSError:
            return None

    def value(self, key: str) -> Any:
        """What was committed last.

        :raises KeyError: there is no such key.
        """
        with self._lock:
            row = self._db.execute("SELECT value, file FROM kept WHERE key = ?", (key,)).fetchone()
            data = None if row is None else row[0] if row[1] is None else self._read(row[1])
        if data is None:
            raise KeyError(key)
        return _decode(data)

    def kept(self) -> Kept:
        """What was committed last, by key: as it is when it is looked at, not as it was."""
        return Kept(self)

    def rows(self, after: int = 0, most: int = 256) -> list[tuple[int, dict[str, Any]]]:
        """(number, row) of the rows that were made after number ``after``, from 1 on, in order."""
        found = self.select("SELECT number, row FROM rows WHERE number > ? ORDER BY number LIMIT ?", (after, most))
        return [(number, _decode(row)) for number, row in found]

    @property
    def last(self) -> int:
        """The number of the last row; 0: there is none."""
        return int(self.select("SELECT coalesce(max(number), 0) FROM rows")[0][0])

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
        return self._store.value(key)

    def __iter__(self) -> Iterator[str]:
        return iter([key for (key,) in self._store.select("SELECT key FROM kept ORDER BY key")])

    def __len__(self) -> int:
        return int(self._store.select("SELECT count(*) FROM kept")[0][0])


def look(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and the small keys of a store that another process may have open; nothing is changed.

    :raises RunError: it is not there, or no such store.
    """
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = [_decode(row) for (row,) in db.execute("SELECT row FROM rows ORDER BY number")]
            return rows, {key: _decode(v) for key, v in db.execute("SELECT key, value FROM kept WHERE file IS NULL")}
        finally:
            db.close()
    except (sqlite3.Error, msgspec.DecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
