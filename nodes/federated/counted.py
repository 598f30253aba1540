"""Rows that wait to be counted, on a disk: of each only which counts it is part of, no value.

One SQLite file; one entry a message. Its number grows and is never used again, so that "counted up to there" is one number. The
identities of what was counted stay for a while: a message that is told again after that is known.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nodes.trainers._trainer import Examples
from schemas.errors import RunError, SinkAwayError
from schemas.messages import Array

REMEMBERED = 10_000
"""Messages that were counted whose identities are kept."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS form (said TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS held (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, n INTEGER NOT NULL, last INTEGER NOT NULL,
    times BLOB NOT NULL, places BLOB NOT NULL
);
"""
_AWAY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


@dataclass(frozen=True, slots=True)
class Rows:
    """Those of one message.

    :param times: ns since the epoch, int64 [n].
    :param places: int32 [n, questions].
    """

    id: str
    times: Array
    places: Array


class CountedRows:
    """The file. May be used by several threads; one has it at a time.

    :param form: says what is counted; rows of another form are forgotten.
    :param width: questions.
    :param keep: most rows; the oldest messages go first.
    :param window: ns that a row is counted for, by its own time; None: until :meth:`settle`.
    :raises RunError: the file cannot be opened or is not ours.
    """

    def __init__(self, path: Path | None, form: str, width: int, *, keep: int, window: int | None) -> None:
        self._width, self._keep, self._window = width, keep, window
        self._lock = threading.Lock()
        self.learnable = 0
        """Rows that are there; some of them may have been counted already, or be too old by now."""
        self.displaced = 0
        """Rows that went for want of room."""
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            db = self._db = sqlite3.connect(
                ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
            )
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(_SCHEMA)
            if db.execute("SELECT said FROM form").fetchall() != [(form,)]:
                db.execute("BEGIN IMMEDIATE")
                db.execute("DELETE FROM form")
                db.execute("UPDATE held SET n = 0, times = x'', places = x''")
                db.execute("INSERT INTO form VALUES (?)", (form,))
                db.execute("COMMIT")
            self.learnable = self._count()
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"the file {path} cannot be used: {error}") from error

    def add(self, messages: Sequence[Rows]) -> None:
        """Add rows, as one transaction; messages that were there already change nothing.

        :raises SinkAwayError: the disk is full or away; nothing was changed, try again.
        """
        if not messages:
            return
        sql = "INSERT OR IGNORE INTO held (id, n, last, times, places) VALUES (?, ?, ?, ?, ?)"
        rows = [
            (
                each.id,
                len(each.times),
                int(each.times.max(initial=0)),
                each.times.astype("<i8").tobytes(),
                each.places.astype("<i4").tobytes(),
            )
            for each in messages
        ]
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(sql, rows)
                if self._window is not None:
                    self._db.execute("DELETE FROM held WHERE last <= ?", (time.time_ns() - self._window,))
                gone = self._displace()
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _AWAY:
                    raise SinkAwayError(f"the rows cannot be stored: {error}") from error
                raise RunError(f"the rows cannot be stored: {error}") from error
            self.displaced += gone
            self.learnable = self._count()

    def _displace(self) -> int:
        """Forget the oldest messages while there are too many rows; gives how many rows went."""
        much = self._count() - self._keep
        gone = 0
        if much > 0:
            for number, n in self._db.execute("SELECT number, n FROM held WHERE n > 0 ORDER BY number").fetchall():
                if gone >= much:
                    break
                self._blank("number = ?", number)
                gone += int(n)
        return gone

    def _blank(self, which: str, number: int) -> None:
        self._db.execute(f"UPDATE held SET n = 0, times = x'', places = x'' WHERE n > 0 AND {which}", (number,))  # noqa: S608 - our own text

    def _count(self) -> int:
        return int(self._db.execute("SELECT coalesce(sum(n), 0) FROM held").fetchone()[0])

    def settle(self, upto: int) -> None:
        """Rows up to that number have been counted for good. Nothing depends on when this is done."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._blank("number <= ?", upto)
                self._db.execute("DELETE FROM held WHERE number <= ?", (upto - REMEMBERED,))
                self._db.execute("COMMIT")
            except sqlite3.Error:  # the disk is full: another time
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            self.learnable = self._count()

    def to_learn(self) -> Examples:
        """The rows as the trainer ``count`` takes them: their places, and the numbers of their messages."""
        with self._lock:
            found = self._db.execute("SELECT number, n, times, places FROM held WHERE n > 0 ORDER BY number").fetchall()
        if not found:
            return Examples(np.zeros((0, self._width), np.int32), np.zeros(0, np.int64))
        places = np.frombuffer(b"".join(row[3] for row in found), "<i4").reshape(-1, self._width)
        numbers = np.repeat([row[0] for row in found], [row[1] for row in found])
        if self._window is not None:
            times = np.frombuffer(b"".join(row[2] for row in found), "<i8")
            there = times > time.time_ns() - self._window
            places, numbers = places[there], numbers[there]
        return Examples(places, numbers)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
