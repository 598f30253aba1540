"""The file of :mod:`broker.embedded.sqlite_store`: its tables, and how it is opened for one broker."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

APPLICATION: Final = 0x50454E42  # "PENB"
VERSION: Final = 1
_PRAGMAS: Final = ("application_id", "user_version")

SCHEMA: Final = """
CREATE TABLE session (id INTEGER PRIMARY KEY, client TEXT NOT NULL UNIQUE, user TEXT, seconds INTEGER NOT NULL);
CREATE TABLE subscription (
    session INTEGER NOT NULL, pattern TEXT NOT NULL, qos INTEGER NOT NULL, no_local INTEGER NOT NULL,
    as_published INTEGER NOT NULL, identifier INTEGER, PRIMARY KEY (session, pattern)) WITHOUT ROWID;
CREATE TABLE delivery (
    id INTEGER PRIMARY KEY, packet INTEGER, qos INTEGER NOT NULL, retain INTEGER NOT NULL, identifiers TEXT NOT NULL,
    shared INTEGER, topic TEXT, body BLOB, start INTEGER, version INTEGER, published INTEGER, raw BLOB, expiry INTEGER,
    text INTEGER, received REAL);
CREATE TABLE message (
    id INTEGER PRIMARY KEY, topic TEXT, body BLOB, start INTEGER, version INTEGER, published INTEGER, raw BLOB,
    expiry INTEGER, text INTEGER, received REAL);
CREATE TABLE released (session INTEGER NOT NULL, packet INTEGER NOT NULL, place INTEGER NOT NULL,
    PRIMARY KEY (session, packet)) WITHOUT ROWID;
CREATE TABLE received (session INTEGER NOT NULL, packet INTEGER NOT NULL, PRIMARY KEY (session, packet)) WITHOUT ROWID;
CREATE TABLE will (
    session INTEGER PRIMARY KEY, delay INTEGER NOT NULL, retain INTEGER NOT NULL, topic TEXT, body BLOB, start INTEGER,
    version INTEGER, published INTEGER, raw BLOB, expiry INTEGER, text INTEGER, received REAL);
CREATE TABLE retained (
    topic TEXT PRIMARY KEY, body BLOB, start INTEGER, version INTEGER, published INTEGER, raw BLOB, expiry INTEGER,
    text INTEGER, received REAL);
"""


def opened(path: Path) -> sqlite3.Connection:
    """The file, made if it is missing; nobody else can use it until it is closed. Called by the store, once.

    :raises sqlite3.Error: it cannot be used, is damaged, of another program, of another version or in use.
    """
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.2)
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("BEGIN IMMEDIATE")
        application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in _PRAGMAS)
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables and not application:
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id={APPLICATION}")
            db.execute(f"PRAGMA user_version={VERSION}")
        elif application != APPLICATION:
            raise sqlite3.DatabaseError("it has tables of another program")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}, this broker reads version {VERSION}")
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA wal_autocheckpoint=2000")
        db.execute("PRAGMA journal_size_limit=8388608")
    except BaseException:
        db.close()
        raise
    return db
