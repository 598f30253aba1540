"""Labelled examples on a disk, within a budget, as the arrays that a trainer wants.

One SQLite file. Each example has a rank that follows from itself alone, and those of the highest ranks stay: its time
(``latest``), or a hash of its identity (``reservoir``: the k highest of many hashes are a uniform sample, whatever came
how often). So adding the same again changes nothing, whether it is still there or was displaced, and a crash between a write and
its acknowledgement costs nothing. ``balanced`` ranks as ``reservoir`` and displaces from the class that has most.

A commit survives the death of the process; a power cut may take the last ones.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from nodes.trainers._trainer import Examples
from schemas.errors import ConfigError, RunError, SinkAwayError
from schemas.messages import Array

Policy: TypeAlias = Literal["latest", "reservoir", "balanced"]

OVERHEAD = 64
"""Bytes that an example takes beside its numbers, about."""
CACHED = 32 * 2**20
"""Bytes of arrays that are kept between trainings."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS examples (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, rank INTEGER NOT NULL, label NOT NULL,
    held INTEGER NOT NULL, x BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_rank ON examples (label, rank);
"""
_AWAY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


class MisshapenError(ValueError):
    """An example is not of the form of those that are there."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example.

    :param id: its identity: of the message, and of the row in it.
    :param time: ns since the epoch.
    :param x: numbers of any dtype and shape; all examples of a store have the same.
    :param y: its class, or a number.
    """

    id: str
    time: int
    x: Array
    y: int | float


class _Form(msgspec.Struct):
    """What all examples have in common."""

    dtype: str
    shape: list[int]


class ExampleStore:
    """The file, or memory when ``path`` is None (tests). May be used by several threads; one has it at a time.

    :param keep: most examples.
    :param size: most bytes of examples.
    :param policy: what is kept when there are more.
    :param numbers: the labels are numbers, not classes.
    :param held: share of the examples that are set aside for evaluating and never trained on.
    :param factor: the values are multiplied by this when they are read.
    :raises RunError: the file cannot be opened or is not ours.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        keep: int = 5000,
        size: int = 64 * 10**6,
        policy: Policy = "latest",
        numbers: bool = False,
        held: float = 0.0,
        factor: float = 1.0,
    ) -> None:
        self._keep, self._size, self._policy = keep, size, policy
        self._numbers, self._held, self._factor = numbers, held, factor
        self._lock = threading.Lock()
        self._cache: dict[int, tuple[Examples, Array]] = {}
        self.version = 0
        """Grows with each change."""
        self.learnable = 0
        """How many may be trained on; to be looked at as often as one likes."""
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            db = self._db = sqlite3.connect(
                ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
            )
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA cache_size=-1024")
            db.executescript(_SCHEMA)
            self._counts = self._counted()
            self._set_aside: int = db.execute("SELECT count(*) FROM examples WHERE held = 1").fetchone()[0]
            found = db.execute("SELECT value FROM meta WHERE key = 'form'").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"the file {path} cannot be used: {error}") from error
        self.learnable = self._total - self._set_aside
        self._form = None if found is None else msgspec.msgpack.decode(found[0], type=_Form)
        if numbers and policy == "balanced":
            raise ConfigError("labels that are numbers have no classes to balance")

    # -- in ------------------------------------------------------------------------------------------------------

    @property
    def form(self) -> tuple[str, tuple[int, ...]] | None:
        """(dtype, shape) of each example; None: there was none yet."""
        return None if self._form is None else (self._form.dtype, tuple(self._form.shape))

    def add(self, examples: Sequence[Example]) -> None:
        """Add examples, as one transaction; those that are there already change nothing.

        :raises MisshapenError: one is not of the form of the others; nothing was changed.
        :raises SinkAwayError: the disk is full or away; nothing was changed, try again.
        """
        if not examples:
            return
        with self._lock:
            form = self._form or _Form(examples[0].x.dtype.str, list(examples[0].x.shape))
            for example in examples:
                if [*example.x.shape] != form.shape or example.x.dtype.str != form.dtype:
                    got = f"{example.x.dtype} {list(example.x.shape)}"
                    raise MisshapenError(f"{got}; the examples before are {np.dtype(form.dtype)} {form.shape}")
            before = dict(self._counts), self._set_aside
            try:
                self._insert(examples, form)
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._counts, self._set_aside = before
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _AWAY:
                    raise SinkAwayError(f"the examples cannot be stored: {error}") from error
                raise RunError(f"the examples cannot be stored: {error}") from error
            self._form = form
            self.learnable = self._total - self._set_aside

    def _insert(self, examples: Sequence[Example], form: _Form) -> None:
        db = self._db
        most = self._most(examples[0].x.nbytes)
        db.execute("BEGIN IMMEDIATE")
        if self._form is None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('form', ?)", (msgspec.msgpack.encode(form),))
        floor = self._floor() if self._total >= most else None
        changed = False
        for example in examples:
            rank, held = self._rank(example)
            if floor is not None and rank < floor:
                continue  # it would be displaced at once
            row = (example.id, rank, example.y, held, np.ascontiguousarray(example.x).data)
            sql = "INSERT OR IGNORE INTO examples (id, rank, label, held, x) VALUES (?, ?, ?, ?, ?)"
            if db.execute(sql, row).rowcount:
                self._count(example.y, held, 1)
                changed = True
        self._displace(self._total - most)
        db.execute("COMMIT")
        if changed:
            self.version += 1
            self._cache.clear()

    def _most(self, nbytes: int) -> int:
        return max(1, min(self._keep, self._size // (nbytes + OVERHEAD)))

    def _rank(self, example: Example) -> tuple[int, int]:
        """What stays before others, and whether it is set aside: both from the example alone."""
        drawn = hashlib.blake2b(example.id.encode(), digest_size=16).digest()
        held = int.from_bytes(drawn[8:], "big") < self._held * 2**64
        rank = example.time if self._policy == "latest" else int.from_bytes(drawn[:8], "big") >> 1
        return rank, int(held)

    def _floor(self) -> int | None:
        """The lowest rank, where nothing of a lower one has a chance."""
        if self._policy == "balanced":
            return None
        return int(self._db.execute("SELECT min(rank) FROM examples").fetchone()[0])

    def _displace(self, many: int) -> None:
        """Remove so many of the lowest ranks."""
        if many <= 0:
            return
        if self._policy == "balanced":
            for _ in range(many):
                label = max(self._counts, key=lambda each: (self._counts[each], each))
                self._delete("SELECT number FROM examples WHERE label = ? ORDER BY rank, number LIMIT 1", (label,))
        else:
            self._delete("SELECT number FROM examples ORDER BY rank, number LIMIT ?", (many,))

    def _delete(self, which: str, parameters: tuple[int | float | str, ...]) -> None:
        sql = f"DELETE FROM examples WHERE number IN ({which}) RETURNING label, held"  # noqa: S608 - our own text
        for label, held in self._db.execute(sql, parameters).fetchall():
            self._count(label, held, -1)

    def _count(self, label: float, held: int, by: int) -> None:
        self._set_aside += held * by
        key = 0 if self._numbers else label
        self._counts[key] = self._counts.get(key, 0) + by
        if not self._counts[key]:
            del self._counts[key]

    def _counted(self) -> dict[int | float, int]:
        if self._numbers:
            total = self._db.execute("SELECT count(*) FROM examples").fetchone()[0]
            return {0: total} if total else {}
        return dict(self._db.execute("SELECT label, count(*) FROM examples GROUP BY label").fetchall())

    @property
    def _total(self) -> int:
        return sum(self._counts.values())

    # -- out -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """All of them, those that are set aside too."""
        with self._lock:
            return self._total

    def counts(self) -> dict[int | float, int]:
        """How many there are of each class; of numbers all under 0."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def to_learn(self) -> Examples:
        """What may be trained on, in the order of their ranks (``latest``: of their times), then as they came."""
        return self._read(0)[0]

    def held_out(self) -> Examples:
        """What is set aside."""
        return self._read(1)[0]

    def numbered(self) -> tuple[Examples, Array]:
        """As :meth:`to_learn`, with the number of each, int64 [n]: those that came later have greater ones."""
        return self._read(0)

    def came_after(self, number: int) -> int:
        """How many came after the one of that number that may be trained on and are still there."""
        sql = "SELECT count(*) FROM examples WHERE number > ? AND held = 0"
        with self._lock:
            return int(self._db.execute(sql, (number,)).fetchone()[0])

    def _read(self, held: int) -> tuple[Examples, Array]:
        with self._lock:
            if held in self._cache:
                return self._cache[held]
            if self._form is None:
                none = np.zeros(0, np.float32 if self._numbers else np.int64)
                return Examples(np.zeros((0, 1), np.float32), none), np.zeros(0, np.int64)
            n = self._db.execute("SELECT count(*) FROM examples WHERE held = ?", (held,)).fetchone()[0]
            dtype = np.dtype(self._form.dtype)
            x = np.empty((n, *self._form.shape), np.float32)
            y = np.empty(n, np.float32 if self._numbers else np.int64)
            numbers = np.empty(n, np.int64)
            flat = x.reshape(n, math.prod(self._form.shape))
            sql = "SELECT x, label, number FROM examples WHERE held = ? ORDER BY rank, number"
            for i, (data, label, number) in enumerate(self._db.execute(sql, (held,))):
                flat[i] = np.frombuffer(data, dtype)
                y[i], numbers[i] = label, number
            version = self.version
        if self._factor != 1:
            x *= np.float32(self._factor)
        found = Examples(x, y), numbers
        if x.nbytes <= CACHED:
            with self._lock:
                if version == self.version:  # what was removed meanwhile is not kept
                    self._cache[held] = found
        return found

    def remove(self, prefix: str) -> int:
        """Forget all examples whose identity begins so, also on the disk; what their bytes were is overwritten.

        :returns: how many they were.
        :raises SinkAwayError: the disk is full or away; nothing was changed, try again.
        """
        db = self._db
        with self._lock:
            before = dict(self._counts), self._set_aside
            try:
                db.execute("PRAGMA secure_delete=ON")
                db.execute("BEGIN IMMEDIATE")
                gone = self._total
                self._delete("SELECT number FROM examples WHERE substr(id, 1, ?) = ?", (len(prefix), prefix))
                gone -= self._total
                db.execute("COMMIT")
                if gone:
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # it has pages of before
            except sqlite3.Error as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                self._counts, self._set_aside = before
                raise SinkAwayError(f"the examples cannot be removed: {error}") from error
            finally:
                db.execute("PRAGMA secure_delete=OFF")
            self.version += 1
            self._cache.clear()
            self.learnable = self._total - self._set_aside
        return gone

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
