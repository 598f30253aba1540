"""Examples on their way to a pool, on the gateway's disk: chosen, within a budget, and gone when the trainer has them.

One SQLite file. A batch gets its number and its examples in one transaction and keeps them until it is done, so that it is the
same however often it is sent. What was given, and what was not chosen, is remembered by nothing but the counts and the hashes
of the last identities, against messages that come twice.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nodes.federated.examples import OVERHEAD, Example
from nodes.federated.pool_wire import MOST, ROWS, Bundle
from schemas.errors import RunError, SinkAwayError

_REMEMBERED = 20_000
"""Identities that are known to have been here."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS waiting (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, time INTEGER NOT NULL, label NOT NULL,
    form TEXT NOT NULL, x BLOB NOT NULL, batch INTEGER
);
CREATE INDEX IF NOT EXISTS by_batch ON waiting (batch);
CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS given (label PRIMARY KEY, many INTEGER NOT NULL) WITHOUT ROWID;
"""


class Outbox:
    """The file, or memory when ``path`` is None (tests). May be used by several threads; one has it at a time.

    :param size: bytes that may wait; what comes while so many do is not given.
    :param part: of the examples that are given, in (0, 1]; drawn by their identity.
    :param each: of each class that are given, in all; None: no limit.
    :param numbers: the labels are numbers, not classes; ``each`` is then of all.
    :raises RunError: the file cannot be opened or is not ours.
    :ivar count: examples that wait; ``bytes``: how many those are, about. To be looked at as often as one likes.
    :ivar life: when the consent began, ns; 0: there is none.
    :ivar until: when consent was withdrawn last, ns; 0: never.
    :ivar full: examples that were not given because there was no room, since this process began.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        size: int = 16 * 10**6,
        part: float = 1.0,
        each: int | None = None,
        numbers: bool = False,
    ) -> None:
        self._size, self._part, self._each, self._numbers = size, part, each, numbers
        self._lock = threading.Lock()
        self.full = self.count = self.bytes = 0
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            db = self._db = sqlite3.connect(
                ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
            )
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-512", "secure_delete=ON"):
                db.execute(f"PRAGMA {pragma}")
            db.executescript(_SCHEMA)
            meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
            self._recount()
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"the file {path} cannot be used: {error}") from error
        self.life: int = meta.get("life", 0)
        self.until: int = meta.get("until", 0)

    # -- consent -------------------------------------------------------------------------------------------------

    def consent(self, now: int) -> None:
        """From now on examples may be given, if not already."""
        if not self.life:
            self._write([], life=max(now, self.until + 1))

    def withdraw(self, now: int) -> None:
        """Nothing is given any more, and what waits is gone."""
        if self.life or not self.until:
            self._write(["waiting", "seen", "given"], life=0, until=max(now, self.life))

    def _write(self, emptied: Sequence[str], **values: int) -> None:
        with self._lock:
            db = self._db
            try:
                db.execute("BEGIN IMMEDIATE")
                for table in emptied:
                    db.execute(f"DELETE FROM {table}")  # noqa: S608 - our own text
                db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))
                db.execute("DELETE FROM meta WHERE key = 'batch' AND ?", (bool(emptied),))
                db.execute("COMMIT")
                if emptied:
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # it has pages of before
            except sqlite3.Error as error:
                self._failed(error)
            self.life, self.until = values.get("life", self.life), values.get("until", self.until)
            self._recount()

    # -- in ------------------------------------------------------------------------------------------------------

    def add(self, examples: Sequence[Example]) -> None:
        """Keep those that are to be given, as one transaction; without consent none.

        :raises SinkAwayError: the disk is full or away; nothing was changed, try again.
        """
        if not self.life or not examples:
            return
        with self._lock:
            db, room, full, count = self._db, self._size - self.bytes, 0, 0
            before = room
            try:
                db.execute("BEGIN IMMEDIATE")
                for example in examples:
                    if not self._chosen(example):
                        continue
                    x = np.ascontiguousarray(np.atleast_1d(example.x))
                    if (takes := x.nbytes + OVERHEAD) > room:
                        full += 1
                        continue
                    if self._put(example, x):
                        room, count = room - takes, count + 1
                db.execute(
                    "DELETE FROM seen WHERE number <= (SELECT max(number) FROM seen) - ?",
                    (_REMEMBERED,),
                )
                db.execute("COMMIT")
            except sqlite3.Error as error:
                self._failed(error)
            self.full += full
            self.count, self.bytes = self.count + count, self.bytes + before - room

    def _chosen(self, example: Example) -> bool:
        drawn = hashlib.blake2b(example.id.encode(), digest_size=8, person=b"pool").digest()
        return int.from_bytes(drawn, "big") < self._part * 2**64

    def _put(self, example: Example, x: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bool:
        db, label = self._db, 0 if self._numbers else example.y
        if self._each is not None:
            many = db.execute("SELECT many FROM given WHERE label = ?", (label,)).fetchone()
            if many is not None and many[0] >= self._each:
                return False
        ident = hashlib.blake2b(example.id.encode(), digest_size=16).digest()
        if not db.execute("INSERT OR IGNORE INTO seen (id) VALUES (?)", (ident,)).rowcount:
            return False
        form = f"{x.dtype.str}{'x'.join(map(str, x.shape))}"
        db.execute(
            "INSERT INTO waiting (id, time, label, form, x) VALUES (?, ?, ?, ?, ?)",
            (example.id, example.time, example.y, form, x.data),
        )
        db.execute("INSERT INTO given VALUES (?, 1) ON CONFLICT DO UPDATE SET many = many + 1", (label,))
        return True

    # -- out -----------------------------------------------------------------------------------------------------

    def next(self, done: int, most: int, *, bind: bool = True) -> Bundle | None:
        """The batch that is to be sent now, when those up to number ``done`` are at the trainer; None: nothing waits.

        :param most: bytes of its inputs, about.
        :param bind: make a new one if there is none.
        :raises SinkAwayError: the disk is full or away.
        """
        with self._lock:
            db = self._db
            try:
                db.execute("BEGIN IMMEDIATE")
                gone = db.execute("DELETE FROM waiting WHERE batch <= ?", (done,)).rowcount
                (number,) = db.execute("SELECT min(batch) FROM waiting").fetchone()
                if number is None and bind:
                    number = self._bind(min(most, MOST))
                db.execute("COMMIT")
            except sqlite3.Error as error:
                self._failed(error)
            if gone:
                self._recount()
            if number is None:
                return None
            sql = "SELECT id, time, label, form, x FROM waiting WHERE batch = ? ORDER BY number"
            return Bundle(number, [_example(*row) for row in db.execute(sql, (number,))])

    def _bind(self, most: int) -> int | None:
        """Give a number to the oldest examples, as many as there is room for, all of one form."""
        db, last, total, first = self._db, None, 0, ""
        sql = "SELECT number, form, length(x) FROM waiting ORDER BY number LIMIT ?"
        for number, form, size in db.execute(sql, (ROWS,)):
            total += size + OVERHEAD
            if last is not None and (form != first or total > most):
                break
            last, first = number, form
        if last is None:
            return None
        before = db.execute("SELECT value FROM meta WHERE key = 'batch'").fetchone()
        number = 1 if before is None else before[0] + 1
        db.execute("INSERT OR REPLACE INTO meta VALUES ('batch', ?)", (number,))
        db.execute("UPDATE waiting SET batch = ? WHERE number <= ?", (number, last))
        return number

    def _recount(self) -> None:
        sql = "SELECT count(*), coalesce(sum(length(x)), 0) FROM waiting"
        self.count, size = self._db.execute(sql).fetchone()
        self.bytes = size + OVERHEAD * self.count

    def _failed(self, error: sqlite3.Error) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        raise SinkAwayError(f"the examples for the pool cannot be stored: {error}") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _example(ident: str, time: int, label: float, form: str, x: bytes) -> Example:
    dtype, shape = form[:3], form[3:]
    array = np.frombuffer(x, dtype).reshape([int(size) for size in shape.split("x")])
    return Example(ident, time, array, label)
