"""What a node must not forget: one small SQLite file per node, written by group commit.

One transaction holds the positions, the books, the identities taken last, an operator's state and the outbox, so that a
restart continues exactly where the last commit stood. Acknowledgements are sent only after the commit that they speak of.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from schemas.errors import RunError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY, edge TEXT NOT NULL, count INTEGER NOT NULL, ids BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    port TEXT NOT NULL, seq INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL, PRIMARY KEY (port, seq)
) WITHOUT ROWID;
"""
_TRIM = """
DELETE FROM seen WHERE number IN (
    SELECT number FROM (SELECT number, sum(count) OVER (PARTITION BY edge ORDER BY number DESC) - count AS newer FROM seen)
    WHERE newer >= ?
)
"""
_TIDY_EVERY = 512
"""Commits after which one also forgets identities that are too old. Who cannot wait for that does it before, in a thread."""
SEEN = 8192
"""Identities kept per edge, at least; see :class:`broker.window.RecentIds`."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def packed(values: Mapping[str, Any]) -> dict[str, bytes]:
    """Values as they are now. An operator's snapshot may hold what it goes on changing while a commit is under way."""
    return {key: _encode(value) for key, value in values.items()}


class Journal:
    """The file, or memory when ``path`` is None (tests).

    :param durable: each commit is on the disk when it returns (``synchronous=FULL``: survives a power cut); otherwise it
        survives the death of the process, not of the machine.
    :raises RunError: the file cannot be opened or is not ours.
    """

    def __init__(self, path: Path | None, *, durable: bool = False) -> None:
        self.path = path
        self.durable = durable
        self._untidied = 0
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"the state file {path} cannot be used: {error}") from error

    def get(self, key: str) -> Any:
        """A value as it was last committed, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else _decode(row[0])

    def seen(self) -> dict[str, list[str]]:
        """Identities taken last, by edge, oldest first."""
        out: dict[str, list[str]] = {}
        for edge, ids in self._db.execute("SELECT edge, ids FROM seen ORDER BY number"):
            out.setdefault(edge, []).extend(_decode(ids))
        return out

    def outbox(self, port: str) -> list[tuple[int, str, bytes]]:
        """(number, topic, payload) of what is not yet done at every consumer, in order."""
        return self._db.execute(
            "SELECT seq, topic, payload FROM outbox WHERE port = ? ORDER BY seq", (port,)
        ).fetchall()

    def commit(
        self,
        values: Mapping[str, bytes],
        *,
        seen: Sequence[tuple[str, list[str]]] = (),
        outbox: Iterable[tuple[str, int, str, bytes]] = (),
        floors: dict[str, int] | None = None,
    ) -> None:
        """One transaction: set ``values``, remember ``seen``, add to the ``outbox``, forget it up to its ``floors``.

        :param values: as :func:`packed` gave them at the moment that the commit speaks of.
        :raises sqlite3.OperationalError: the disk is full or away; nothing was changed, try again.
        """
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                list(values.items()),
            )
            if seen:
                rows = [(edge, len(ids), _encode(ids)) for edge, ids in seen]
                db.executemany("INSERT INTO seen (edge, count, ids) VALUES (?, ?, ?)", rows)
            db.executemany("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?)", outbox)
            for port, floor in (floors or {}).items():
                db.execute("DELETE FROM outbox WHERE port = ? AND seq <= ?", (port, floor))
            self._untidied += 1
            if self._untidied >= _TIDY_EVERY:
                self._trim()
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    @property
    def untidy(self) -> bool:
        """It is time for :meth:`tidy`."""
        return self._untidied >= _TIDY_EVERY // 2

    def tidy(self) -> None:
        """Forget identities that are too old, and move what was committed from SQLite's log to the file proper.

        It waits for the disk, for some milliseconds, which a commit of a journal that is not ``durable`` does not otherwise; to
        be called in a thread, between commits. Never necessary: what is not done here is done by a commit, some time.

        :raises sqlite3.OperationalError: the disk is full or away; nothing is lost.
        """
        self._trim()
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _trim(self) -> None:
        self._untidied = 0
        self._db.execute(_TRIM, (SEEN,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def remove(self) -> None:
        """The run is complete: close and delete the file, so that the next run begins anew."""
        self.close()
        if self.path is not None:
            self.erase(self.path)

    @staticmethod
    def erase(path: Path) -> None:
        """Delete a journal that nobody has open, if it is there."""
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
