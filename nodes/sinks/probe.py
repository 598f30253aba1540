"""Records of what arrived: identity, source, times and a digest of the content, in an SQLite file; for drills and tests.

``penstock drill`` puts it in the place of every sink. Like any sink of ours that writes by identity it holds a message once;
beside that it counts how often each was delivered.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pydantic import Field

from nodes.operator import Context, Flow, Sink
from nodes.options import Options
from schemas import codec
from schemas.errors import ConfigError, Problem, SinkAwayError
from schemas.messages import Aggregate, Body, Event, Message, Predictions, Readings, Scalar

_SCHEMA = """
CREATE TABLE IF NOT EXISTS arrivals (
    id TEXT NOT NULL, revision INTEGER NOT NULL, source TEXT NOT NULL, type TEXT NOT NULL, time INTEGER NOT NULL,
    rows INTEGER NOT NULL, digest BLOB NOT NULL, first INTEGER NOT NULL, deliveries INTEGER NOT NULL,
    PRIMARY KEY (id, revision)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS arrivals_first ON arrivals (first);
"""
_INSERT = """
INSERT INTO arrivals VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1)
ON CONFLICT (id, revision) DO UPDATE SET deliveries = deliveries + 1
"""


class Config(Options):
    """Options of the ``probe`` sink."""

    path: str = Field(description="the file; made if it is not there")

    def check(self, context: Context) -> None:
        path = context.path(self.path)
        if path.is_dir():
            raise ConfigError(Problem(("path",), f"a folder, not a file: {path}"))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {}


def build(config: Config, context: Context) -> Sink:
    """A :class:`ProbeSink`."""
    return ProbeSink(config, context)


class ProbeSink(Sink):
    """Table ``arrivals``: ``time`` is the event time, ns since the epoch; ``first`` when it was delivered first, ns of the
    machine's monotonic clock, which every process of the machine shares and no change of the time moves."""

    max_batch = 4096

    def __init__(self, config: Config, context: Context) -> None:
        self._path = context.path(config.path)
        self._db: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, "probe-sink")

    async def open(self) -> None:
        """:raises SinkAwayError: the file cannot be written just now."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def write(self, messages: Sequence[Message]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, messages)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)
            except (OSError, sqlite3.Error) as error:
                self._close()
                raise SinkAwayError(f"{self._path}: {error}") from error
        return self._db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _write(self, messages: Sequence[Message]) -> None:
        now = time.monotonic_ns()
        records = [
            (m.id, _revision(m.body), m.source, m.type, m.time, m.rows, digest(m), now)  # one line a message
            for m in messages
        ]
        db = self._open()
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                db.executemany(_INSERT, records)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            self._close()
            raise SinkAwayError(f"{self._path}: {error}") from error


def _revision(body: Body) -> int:
    return body.revision if isinstance(body, Aggregate) else 0


def digest(message: Message) -> bytes:
    """16 bytes that are equal when source, event time and content are.

    Left out is what differs from run to run though nothing is wrong: when it was read and inferred, and the last digits of
    fractions, which depend on the order of additions and the size of a model's batches.
    """
    alike = Message("", message.source, message.time, _settled(message.body))
    return hashlib.sha256(codec.encode(alike)).digest()[:16]


def _settled(body: Body) -> Body:
    match body:
        case Readings():
            columns = {name: _rounded(column) for name, column in body.columns.items()}
            return Readings(n=body.n, columns=columns, time=body.time, source=body.source)
        case Predictions():
            return Predictions(
                model=body.model,
                seen=body.seen,
                labels=body.labels,
                scores=_rounded(body.scores),
                boxes=_rounded(body.boxes),
                values=None if body.values is None else {name: _rounded(v) for name, v in body.values.items()},
                attributes={name: _short(value) for name, value in body.attributes.items()},
            )
        case Aggregate():
            values = {name: _short(value) for name, value in body.values.items()}
            return Aggregate(window=body.window, key=body.key, values=values, count=body.count, revision=body.revision)
        case Event():
            values = {name: _short(value) for name, value in body.values.items()}
            return Event(name=body.name, severity=body.severity, text=body.text, values=values)
        case _:
            return body


def _rounded(column: Any) -> Any:
    """Fractions with some three digits less than they have; everything else as it is."""
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":
        return column.astype("<f4") if column.dtype.itemsize > 4 else np.round(column.astype("<f4"), 4)
    return column


def _short(value: Scalar) -> Scalar:
    return float(f"{value:.9g}") if isinstance(value, float) else value
