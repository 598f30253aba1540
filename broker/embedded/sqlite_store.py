"""A :class:`~broker.embedded.store.Store` in one SQLite file.

What a turn of the broker's loop changed is one batch, written in one transaction by a thread of its own (WAL,
``synchronous=FULL``: the commit returns when the disk has it). What a batch undoes before it was written never reaches
the disk. Each delivery is one row; only large messages for several sessions stand by themselves, written once.

When the disk is full: a file of some bytes is kept beside the database (``ballast``) and given up at the first failure, so that
what was taken can still be committed and what is acknowledged can be deleted; from then on :attr:`SqliteStore.full` has the
broker refuse what is new, until there is room again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from broker.embedded.messages import Kind, Message, Properties
from broker.embedded.sqlite_file import opened
from broker.embedded.store import Batch, Store, StoredDelivery, StoredSession, StoredSubscription, StoredWill
from schemas.errors import ConfigError, Problem

log = logging.getLogger(__name__)

FILE: Final = "broker.db"
_BALLAST: Final = "ballast"
_SHIFT: Final = 40
"""A delivery's rowid is its session's number and its sequence number: no index beside the table is needed."""
_MAX_SESSIONS: Final = 1 << 22
_SHARED_FROM: Final = 4096
"""Bodies of this size and more are stored once for all sessions that get them."""

Row: TypeAlias = tuple[Any, ...]

_DELIVERY: Final = "INSERT OR REPLACE INTO delivery VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
_MESSAGE: Final = "INSERT OR REPLACE INTO message VALUES (?,?,?,?,?,?,?,?,?,?)"
_WILL: Final = "INSERT OR REPLACE INTO will VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"
_RETAIN: Final = "INSERT OR REPLACE INTO retained VALUES (?,?,?,?,?,?,?,?,?)"
_NOTHING: Final = (None,) * 9


@dataclass(slots=True)
class _Batch(Batch):
    """Changes that are committed together: first ``steps`` in their order, then the rest in any."""

    steps: list[tuple[str, Row]] = field(default_factory=list)
    messages: dict[int, Row] = field(default_factory=dict)
    deliveries: dict[int, list[Any]] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    done: list[tuple[int]] = field(default_factory=list)
    freed: list[tuple[int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.steps or self.deliveries or self.sent or self.done or self.messages or self.freed)


class SqliteStore(Store):
    """The durable store.

    :param folder: where ``broker.db`` is, made if it is missing. One broker at a time can use it.
    :param most_bytes: size of the database at which new messages are refused; None for the disk's own limit.
    :param spare_bytes: free disk space below which new messages are refused, and the size of the ballast.
    :raises ConfigError: the folder cannot be used, the file is damaged, of another program or in use.
    """

    durable = True

    def __init__(self, folder: Path, *, most_bytes: int | None = None, spare_bytes: int = 4 << 20) -> None:
        self.path = folder / FILE
        self._ballast = folder / _BALLAST
        self._most = most_bytes
        self._spare = spare_bytes
        self._batch = _Batch()
        self._failed: list[_Batch] = []
        self._numbers: dict[str, int] = {}
        self._next = 1
        self._uses: dict[int, int] = {}
        """Shared message -> how many deliveries need it."""
        self._of: dict[int, int] = {}
        """Delivery -> its shared message."""
        self._keys: dict[int, tuple[Message, int]] = {}
        """``id`` of a shared message met in this batch -> it, and its key."""
        self._next_message = 1
        self._place = 0
        """Of the last PUBREL that is owed: they are sent again oldest first."""
        self._offset = 0.0
        """Wall-clock time minus broker time."""
        self.commits = 0
        self.seconds = 0.0
        """Time spent in commits so far."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = opened(self.path)
        except (OSError, sqlite3.Error) as error:
            raise self._refusal(error) from None
        with suppress(OSError, sqlite3.Error):
            self._look()

    def _refusal(self, error: Exception) -> ConfigError:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            why = "in use by another broker"
        elif isinstance(error, sqlite3.DatabaseError) and (
            "no such" in str(error) or not isinstance(error, sqlite3.OperationalError)
        ):
            why = f"damaged, or not a broker's database ({error}); move it away to begin with an empty one"
        else:
            why = f"cannot be used: {error}"
        return ConfigError(Problem(("data",), f"{self.path}: {why}"))

    # What the broker calls in its loop

    def load(self, now: float) -> tuple[Iterable[StoredSession], Iterable[Message]]:
        self._offset = time.time() - now
        try:
            return self._load(now)
        except (sqlite3.Error, LookupError, TypeError, ValueError, AttributeError) as error:
            self._db.close()
            raise self._refusal(error if isinstance(error, sqlite3.Error) else sqlite3.DatabaseError(error)) from None

    def save_session(self, client_id: str, user: str | None, seconds: int) -> None:
        number = self._numbers.get(client_id)
        if number is None:
            used = set(self._numbers.values()) if self._next >= _MAX_SESSIONS else ()
            self._next = self._next if self._next < _MAX_SESSIONS else 1
            while self._next in used:
                self._next += 1
            number = self._numbers[client_id] = self._next
            self._next += 1
        self._batch.steps.append(
            ("INSERT OR REPLACE INTO session VALUES (?,?,?,?)", (number, client_id, user, seconds))
        )

    def drop_session(self, client_id: str) -> None:
        number = self._numbers.pop(client_id, None)
        if number is None:
            return
        low, high = number << _SHIFT, (number + 1) << _SHIFT
        batch = self._batch
        for rows in (batch.deliveries, batch.sent):
            for key in [k for k in rows if low <= k < high]:
                del rows[key]
        for key in [k for k in self._of if low <= k < high]:
            self._free(key)
        batch.steps.append(("DELETE FROM delivery WHERE id >= ? AND id < ?", (low, high)))
        batch.steps += [(statement, (number,)) for statement in _DROP]

    def subscribed(self, client_id: str, subscription: StoredSubscription) -> None:
        s = subscription
        row = (self._numbers[client_id], s.pattern, s.qos, s.no_local, s.retain_as_published, s.identifier)
        self._batch.steps.append(("INSERT OR REPLACE INTO subscription VALUES (?,?,?,?,?,?)", row))

    def unsubscribed(self, client_id: str, pattern: str) -> None:
        row = (self._numbers[client_id], pattern)
        self._batch.steps.append(("DELETE FROM subscription WHERE session = ? AND pattern = ?", row))

    def queued(self, client_id: str, delivery: StoredDelivery) -> None:
        key = self._numbers[client_id] << _SHIFT | delivery.sequence
        message = delivery.message
        identifiers = ",".join(map(str, delivery.identifiers)) if delivery.identifiers else ""
        head = [key, delivery.packet_id, delivery.qos, delivery.retain, identifiers]
        if len(message.body) < _SHARED_FROM:
            self._batch.deliveries[key] = [*head, None, *self._columns(message)]
            return
        known = self._keys.get(id(message))
        if known is None:
            number = self._next_message
            self._next_message += 1
            self._keys[id(message)] = message, number
            self._batch.messages[number] = (number, *self._columns(message))
        else:
            number = known[1]
        self._uses[number] = self._uses.get(number, 0) + 1
        self._of[key] = number
        self._batch.deliveries[key] = [*head, number, *_NOTHING]

    def sent(self, client_id: str, sequence: int, packet_id: int) -> None:
        key = self._numbers[client_id] << _SHIFT | sequence
        row = self._batch.deliveries.get(key)
        if row is not None:
            row[1] = packet_id
        else:
            self._batch.sent[key] = packet_id

    def done(self, client_id: str, sequence: int) -> None:
        key = self._numbers[client_id] << _SHIFT | sequence
        if key in self._of:
            self._free(key)
        if self._batch.deliveries.pop(key, None) is None:
            self._batch.sent.pop(key, None)
            self._batch.done.append((key,))

    def _free(self, key: int) -> None:
        number = self._of.pop(key)
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._uses[number]
            self._batch.freed.append((number,))
            # The same object may be queued once more (a shared subscription passes it on): it is then written anew.
            self._keys = {k: v for k, v in self._keys.items() if v[1] != number}

    def released(self, client_id: str, packet_id: int) -> None:
        number = self._numbers[client_id]
        self._place += 1
        row = (number, packet_id, self._place)
        self._batch.steps.append(("INSERT OR REPLACE INTO released VALUES (?,?,?)", row))

    def completed(self, client_id: str, packet_id: int) -> None:
        row = (self._numbers[client_id], packet_id)
        self._batch.steps.append(("DELETE FROM released WHERE session = ? AND packet = ?", row))

    def received(self, client_id: str, packet_id: int) -> None:
        self._batch.steps.append(
            ("INSERT OR REPLACE INTO received VALUES (?,?)", (self._numbers[client_id], packet_id))
        )

    def forgotten(self, client_id: str, packet_id: int) -> None:
        row = (self._numbers[client_id], packet_id)
        self._batch.steps.append(("DELETE FROM received WHERE session = ? AND packet = ?", row))

    def will(self, client_id: str, will: StoredWill | None) -> None:
        number = self._numbers[client_id]
        if will is None:
            self._batch.steps.append(("DELETE FROM will WHERE session = ?", (number,)))
        else:
            row = (number, will.delay, will.message.retain, *self._columns(will.message))
            self._batch.steps.append((_WILL, row))

    def retain(self, message: Message) -> None:
        if message.empty:
            self.unretain(message.topic)
        else:
            self._batch.steps.append((_RETAIN, self._columns(message)))

    def unretain(self, topic: str) -> None:
        self._batch.steps.append(("DELETE FROM retained WHERE topic = ?", (topic,)))

    def _columns(self, m: Message) -> Row:
        kind = m.kind
        raw, expiry, alias, text = kind.properties
        received = m.received + self._offset
        if alias:  # it stands in the body, and means nothing to anybody else
            return (kind.topic, m.payload, 0, 4, m.qos, raw, expiry, text, received)
        return (kind.topic, m.body, len(kind.block), kind.version, m.qos, raw, expiry, text, received)

    @property
    def pending(self) -> bool:
        return bool(self._batch)

    def seal(self) -> Batch:
        batch, self._batch = self._batch, _Batch()
        self._keys.clear()
        return batch

    def close(self) -> None:
        if self.pending or self._failed:
            try:
                self.write(self.seal())
            except OSError as error:
                log.error("%s: the last changes could not be written: %s", self.path, error)
        self._db.close()

    # What runs in the writer's thread

    def write(self, batch: Batch) -> None:
        assert isinstance(batch, _Batch)  # noqa: S101 - of seal
        self._failed.append(batch)
        begin = time.perf_counter()
        try:
            try:
                self._write()
            except sqlite3.OperationalError as error:
                if "full" not in str(error) or not self._ballast.exists():
                    raise
                log.warning("%s: the disk is full; new messages for sessions that are kept are refused", self.path)
                self._ballast.unlink()
                self.full = True
                self._write()
            self._failed.clear()
            self.commits += 1
            self.seconds += time.perf_counter() - begin
            self._look()
        except (sqlite3.Error, OSError) as error:
            self.full = True
            raise OSError(f"{self.path}: {error}") from error

    def _write(self) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            for batch in self._failed:
                for statement, row in batch.steps:
                    db.execute(statement, row)
                db.executemany(_MESSAGE, batch.messages.values())
                db.executemany(_DELIVERY, batch.deliveries.values())
                db.executemany("UPDATE delivery SET packet = ? WHERE id = ?", [(p, k) for k, p in batch.sent.items()])
                db.executemany("DELETE FROM delivery WHERE id = ?", batch.done)
                db.executemany("DELETE FROM message WHERE id = ?", batch.freed)
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # some errors have rolled it back already
                db.execute("ROLLBACK")
            raise

    def _look(self) -> None:
        """See whether there is room, now and then; keep the ballast."""
        if not self.full and self.commits % 16:
            return
        pages, free, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in _SIZES)
        used = (pages - free) * size
        disk = os.statvfs(self.path.parent)
        room = disk.f_bavail * disk.f_frsize + (self._ballast.stat().st_size if self._ballast.exists() else 0)
        part = 7 / 8 if self.full else 1.0  # not on and off with every message
        wanted = self._spare * (3 if self.full else 2)
        full = room < wanted or (self._most is not None and used >= self._most * part)
        if full != self.full:
            log.warning("%s: %s", self.path, "full; new messages are refused" if full else "there is room again")
        self.full = full
        if not full and not self._ballast.exists():
            self._ballast.write_bytes(bytes(self._spare))

    # What a restart finds

    def _load(self, now: float) -> tuple[list[StoredSession], list[Message]]:
        db = self._db
        sessions: dict[int, StoredSession] = {}
        for number, client, user, seconds in db.execute("SELECT * FROM session"):
            sessions[number] = StoredSession(client, user, seconds)
            self._numbers[client] = number
            self._next = max(self._next, number + 1)
        for number, *rest in db.execute("SELECT * FROM subscription"):
            pattern, qos, no_local, as_published, identifier = rest
            sessions[number].subscriptions.append(
                StoredSubscription(pattern, qos, bool(no_local), bool(as_published), identifier)
            )
        shared = {number: self._message(row, now) for number, *row in db.execute("SELECT * FROM message")}
        self._next_message = max(shared, default=0) + 1
        for row in db.execute("SELECT * FROM delivery ORDER BY id"):
            key, packet, qos, retain, identifiers, other = row[:6]
            if other is not None:
                self._of[key] = other
                self._uses[other] = self._uses.get(other, 0) + 1
            sessions[key >> _SHIFT].deliveries.append(
                StoredDelivery(
                    key & (1 << _SHIFT) - 1,
                    self._message(row[6:], now) if other is None else shared[other],
                    qos,
                    bool(retain),
                    tuple(int(n) for n in identifiers.split(",")) if identifiers else (),
                    packet,
                )
            )
        for number, packet, self._place in db.execute("SELECT * FROM released ORDER BY place"):
            sessions[number].released.append(packet)
        for number, packet in db.execute("SELECT * FROM received"):
            sessions[number].received.add(packet)
        for number, delay, retain, *row in db.execute("SELECT * FROM will"):
            sessions[number].will = StoredWill(self._message(row, now, retain=bool(retain)), delay)
        retained = [self._message(row, now, retain=True) for row in db.execute("SELECT * FROM retained")]
        return list(sessions.values()), retained

    def _message(self, row: Iterable[Any], now: float, *, retain: bool = False) -> Message:
        topic, body, start, version, qos, raw, expiry, text, received = row
        name = topic.encode()
        # A clock that was set back must not make a message younger than new.
        at = min(received - self._offset, now)
        properties = Properties(raw, expiry, 0, bool(text))
        kind = Kind(topic, len(name).to_bytes(2, "big") + name, properties, version, body[:start])
        return Message(kind, body, qos, retain, at)


_SIZES: Final = ("page_count", "freelist_count", "page_size")
_DROP: Final = (
    "DELETE FROM subscription WHERE session = ?",
    "DELETE FROM released WHERE session = ?",
    "DELETE FROM received WHERE session = ?",
    "DELETE FROM will WHERE session = ?",
    "DELETE FROM session WHERE id = ?",
)
