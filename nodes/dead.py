"""The dead letters of a node, kept in a file beside its journal: what it refused, why, and the original bytes.

A letter is in the file before the message that it is of is acknowledged, and stays there, whatever becomes of the node or
the run, until somebody has it replayed (``penstock dead``) or room is needed for newer ones. The command and the node may
have the file open at the same time.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from nodes import log
from schemas.errors import RunError

LIMIT = 64 * 1024 * 1024
"""Bytes of letters kept per node; the oldest make room."""
SUFFIX = ".dead"
_OVERHEAD = 512
"""Bytes that a letter takes beside its payload, about; the triggers below know it too."""
_MOST_WAITING = 16_384
_RETRY = 1.0
_PATIENCE = 5.0
"""Seconds to wait for another process that writes."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT, first INTEGER NOT NULL, last INTEGER NOT NULL, times INTEGER NOT NULL,
    reason TEXT NOT NULL, detail TEXT NOT NULL, edge TEXT NOT NULL, position TEXT NOT NULL, rows INTEGER NOT NULL,
    digest BLOB NOT NULL, length INTEGER NOT NULL, payload BLOB NOT NULL, sent INTEGER, keep INTEGER, taken INTEGER,
    UNIQUE (edge, position, digest)
);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO totals VALUES ('bytes', 0), ('dropped', 0);
CREATE TRIGGER IF NOT EXISTS into_letters AFTER INSERT ON letters BEGIN
    UPDATE totals SET value = value + length(new.payload) + 512 WHERE name = 'bytes';
END;
CREATE TRIGGER IF NOT EXISTS out_of_letters AFTER DELETE ON letters BEGIN
    UPDATE totals SET value = value - length(old.payload) - 512 WHERE name = 'bytes';
END;
"""
_SELECT = (
    "SELECT id, first, last, times, reason, detail, edge, position, rows, length, payload, sent, taken FROM letters"
)
_SELECT_LIGHT = _SELECT.replace("payload", "x''")


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter.

    :param id: its number in the node's file, from 1; 0: not in it yet.
    :param first: when it was refused first, ns since the epoch; ``last``: when last, ``times`` so often.
    :param reason: short and stable, as the ledger counts it; ``detail``: for a person.
    :param edge: in-edge (``<node>.<port>``) that it came by; ``""``: a source read it, or the node made it itself.
    :param position: the message's id, or where the bytes came from (a topic, a file and its line).
    :param rows: rows that the ledger counts for it.
    :param length: bytes that it had; ``payload`` has fewer where the whole was too large to keep.
    :param sent: when it was sent to the node again, ns; None: it was not, or the node has answered.
    :param taken: when the node was done with it after it was sent again (only where it was to be kept).
    """

    first: int
    reason: str
    detail: str
    edge: str
    position: str
    payload: bytes
    rows: int = 1
    id: int = 0
    last: int = 0
    times: int = 1
    length: int = 0
    sent: int | None = None
    taken: int | None = None


class DeadLetters:
    """The file; made when there is something to put in. Safe to use from several threads.

    :param limit: bytes of letters kept; a letter larger than a quarter of that is kept in part.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path = path
        self._limit = limit
        self._db: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def add(self, letters: Iterable[Letter]) -> None:
        """Keep letters; on return they are on the disk. What is there already (same edge, position and bytes) counts on.

        :raises sqlite3.Error: the disk is full or away; nothing was changed, try again.
        """
        most = self._limit // 4
        rows = [
            (
                letter.first,
                letter.first,
                *map(_text, (letter.reason, letter.detail, letter.edge, letter.position)),
                letter.rows,
                hashlib.sha256(letter.payload).digest()[:16],
                len(letter.payload),
                letter.payload[:most],
            )
            for letter in letters
        ]
        with self._lock, self._open() as db:
            db.executemany(
                "INSERT INTO letters (first, last, times, reason, detail, edge, position, rows, digest, length, payload)"
                " VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (edge, position, digest) DO UPDATE SET"
                " last = excluded.last, times = times + 1, reason = excluded.reason, detail = excluded.detail,"
                " sent = NULL, taken = NULL",
                rows,
            )
            self._make_room(db)

    def done(self, letters: Iterable[tuple[str, str]]) -> None:
        """The node is done with messages that were sent to it again, by (edge, id): those letters go, if not to be kept.

        One that it refused once more was added since, is not *sent* any more, and so stays.
        """
        if self._db is None and not self.path.exists():
            return
        keys = list(letters)
        with self._lock, self._open() as db:
            db.executemany("DELETE FROM letters WHERE edge = ? AND position = ? AND sent > 0 AND keep = 0", keys)
            db.executemany(
                "UPDATE letters SET sent = NULL, taken = ? WHERE edge = ? AND position = ? AND sent > 0",
                [(time.time_ns(), *key) for key in keys],
            )

    def sending(self, ids: Sequence[int], *, keep: bool) -> None:
        """These letters are about to be sent to the node again."""
        with self._lock, self._open() as db:
            db.executemany(
                "UPDATE letters SET sent = ?, keep = ?, taken = NULL WHERE id = ?",
                [(time.time_ns(), int(keep), number) for number in ids],
            )

    def letters(self, ids: Sequence[int] | None = None) -> list[Letter]:
        """The letters of some ids; or all, oldest first and without their payloads."""
        if self._db is None and not self.path.exists():
            return []
        with self._lock, self._open() as db:
            if ids is None:
                found = db.execute(f"{_SELECT_LIGHT} ORDER BY id").fetchall()
            else:
                found = [row for number in ids for row in db.execute(f"{_SELECT} WHERE id = ?", (number,))]
        return [_letter(row) for row in found]

    def answers(self, ids: Sequence[int]) -> dict[int, bool | None]:
        """What became of letters that were sent: True: the node is done with it; False: refused again; None: no answer."""
        with self._lock, self._open() as db:
            found = {n: db.execute("SELECT sent, taken FROM letters WHERE id = ?", (n,)).fetchone() for n in ids}
        return {
            n: True if row is None else None if row[0] is not None else row[1] is not None for n, row in found.items()
        }

    @property
    def dropped(self) -> int:
        """Letters that made room for newer ones."""
        if self._db is None and not self.path.exists():
            return 0
        with self._lock, self._open() as db:
            return int(db.execute("SELECT value FROM totals WHERE name = 'dropped'").fetchone()[0])

    def close(self) -> None:
        """Close the file; it stays."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            try:
                self._db = self._connect()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                aside = self.path.with_name(f"{self.path.name}.damaged")
                log.error("the dead letters' file is damaged, moved aside", path=str(aside), reason=str(error))
                self.path.replace(aside)
                self._db = self._connect()
        return self._db

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=_PATIENCE, check_same_thread=False)
        try:
            _begin_log(db)
            db.execute("PRAGMA synchronous=FULL")
            db.execute(f"PRAGMA journal_size_limit={self._limit // 4}")
            db.executescript(_SCHEMA)
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _make_room(self, db: sqlite3.Connection) -> None:
        (total,) = db.execute("SELECT value FROM totals WHERE name = 'bytes'").fetchone()
        if total <= self._limit:
            return
        dropped = last = 0
        for number, times, size in db.execute("SELECT id, times, length(payload) FROM letters ORDER BY id"):
            total -= size + _OVERHEAD
            dropped, last = dropped + times, number
            if total <= self._limit:
                break
        db.execute("DELETE FROM letters WHERE id <= ?", (last,))
        db.execute("UPDATE totals SET value = value + ? WHERE name = 'dropped'", (dropped,))


def _begin_log(db: sqlite3.Connection) -> None:
    """Write-ahead logging. Where two open a new file at the same time, SQLite refuses one of them at once, without its
    usual patience (it could not be told from a deadlock).
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.005)
        else:
            return


class Burials:
    """A node's way to its file: letters gather here and are written by one call for each step. For the runtime."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self._file = DeadLetters(path, limit)
        self._waiting: list[Letter] = []
        self._writing = asyncio.Lock()

    def add(self, letter: Letter) -> None:
        """Remember a letter until the next :meth:`settle`. While the disk is full only so many of what others throw at us;
        a node's own steps wait for it, and so never have as many.
        """
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(letter)

    async def settle(self, node: str, *, patient: bool = True) -> None:
        """On return every letter added before is on the disk.

        :param patient: wait while the disk is full or away; otherwise try once and leave the letters for the next call.
        """
        if not patient and self._writing.locked():
            return
        async with self._writing:
            while self._waiting:
                letters = self._waiting[:]
                try:
                    await asyncio.to_thread(self._file.add, letters)
                except (sqlite3.Error, OSError) as error:
                    log.error("cannot keep dead letters, waiting", node=node, reason=str(error))
                    if not patient:
                        return
                    await asyncio.sleep(_RETRY)
                else:
                    del self._waiting[: len(letters)]

    async def done(self, node: str, letters: Sequence[tuple[str, str]]) -> None:
        """See :meth:`DeadLetters.done`; what cannot be noted is replayed again by whoever waits for it."""
        try:
            await asyncio.to_thread(self._file.done, letters)
        except (sqlite3.Error, OSError) as error:
            log.error("cannot note replayed dead letters", node=node, reason=str(error))

    async def close(self, node: str) -> None:
        """Write what waits and close the file."""
        await self.settle(node, patient=False)
        self._file.close()


def files(state: Path) -> dict[str, DeadLetters]:
    """The dead letters of every node that has some in a run's state folder, by node.

    :raises RunError: a file is none of ours.
    """
    out = {}
    for path in sorted(state.glob(f"*{SUFFIX}")):
        out[path.name.removesuffix(SUFFIX)] = kept = DeadLetters(path)
        try:
            kept.letters([])
            _ = kept.dropped
        except sqlite3.Error as error:
            raise RunError(f"{path} cannot be read: {error}") from error
    return out


def _letter(row: tuple[int, int, int, int, str, str, str, str, int, int, bytes, int | None, int | None]) -> Letter:
    number, first, last, times, reason, detail, edge, position, rows, length, payload, sent, taken = row
    return Letter(
        id=number,
        first=first,
        last=last,
        times=times,
        reason=reason,
        detail=detail,
        edge=edge,
        position=position,
        rows=rows,
        length=length,
        payload=payload,
        sent=sent,
        taken=taken,
    )


def _text(text: str) -> str:
    """What SQLite takes as a text: half a surrogate pair is none."""
    return text.encode("utf-8", "replace").decode()
