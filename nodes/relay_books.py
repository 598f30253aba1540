"""What a relay that keeps knows of one port beside the messages themselves, and its books made of that."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import msgspec

from schemas.messages import Flow, Ledger, Spooled

SPOOL, JOURNAL = "spool", "journal"
"""Names in a port's folder."""


class Taken(msgspec.Struct, gc=False):
    """A message that came: its place on the producer's port, its identity, and what is kept of it.

    :param label: topic, and if need be rows and trace, as :func:`label` writes them.
    :param payload: as it came.
    """

    epoch: int
    seq: int
    id: str
    rows: int
    label: str
    payload: bytes | memoryview


class Close(msgspec.Struct, frozen=True):
    """The end of the stream, as it came: kept beside the spool, whatever the order."""

    id: str
    source: str
    time: int


class State(msgspec.Struct):
    """What the journal knows; pairs are (messages, rows).

    :param number: last number of the spool that it knows of.
    :param floor: (epoch, number) of the last message dealt with.
    :param refused: dropped because they did not fit; ``evicted``: dropped later, to make room.
    :param sent: runs of numbers that are under way.
    :param removing: runs that are booked as given or dead, and may still be in the spool.
    """

    number: int = 0
    floor: tuple[int, int] = (0, 0)
    received: tuple[int, int] = (0, 0)
    given: tuple[int, int] = (0, 0)
    dead: tuple[int, int] = (0, 0)
    refused: tuple[int, int] = (0, 0)
    evicted: tuple[int, int] = (0, 0)
    damaged: tuple[int, int] = (0, 0)
    sent: list[tuple[int, int]] = []
    removing: list[tuple[int, int]] = []
    end: Close | None = None


def label(topic: str, rows: int, trace: str | None) -> str:
    """What is kept beside a payload: mostly the topic alone. A topic has no line break."""
    return topic if rows == 1 and not trace else f"{topic}\n{rows}\n{trace or ''}"


def unlabel(text: str) -> tuple[str, int, str]:
    """Topic, rows and trace (or ``""``) of a :func:`label`."""
    topic, _, rest = text.partition("\n")
    rows, _, trace = rest.partition("\n")
    return topic, int(rows) if rows else 1, trace


def spooled(state: State, readers: list[str], disk: int) -> Spooled:
    """The books of one port."""
    out = [_sum(state.given, state.dead, state.refused, state.evicted, state.damaged)[i] for i in (0, 1)]
    dropped = {"spool-full": _sum(state.refused, state.evicted), "damaged": state.damaged}
    return Spooled(
        readers=readers,
        taken=_flow(state.received),
        given=_flow(state.given),
        dropped={reason: _flow(pair) for reason, pair in dropped.items() if pair[0]},
        dead=_flow(state.dead),
        held=_flow((state.received[0] - out[0], state.received[1] - out[1])),
        disk=disk,
    )


def plus(pair: tuple[int, int], messages: int, rows: int) -> tuple[int, int]:
    return pair[0] + messages, pair[1] + rows


def _sum(*pairs: tuple[int, int]) -> tuple[int, int]:
    return sum(m for m, _ in pairs), sum(r for _, r in pairs)


def _flow(pair: tuple[int, int]) -> Flow:
    return Flow(messages=pair[0], rows=pair[1])


def ledger(relay: str, ports: Mapping[str, Spooled], repeated: Mapping[str, int]) -> Ledger:
    """A relay's books as those of a node, from those of its ports by edge."""
    dropped: dict[str, int] = {}
    for port in ports.values():
        for reason, flow in port.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + flow.rows
    dead = sum(port.dead.rows for port in ports.values())
    return Ledger(
        node=relay,
        received={edge: port.taken for edge, port in ports.items()},
        repeated={edge: count for edge, count in repeated.items() if count},
        emitted={edge: port.given for edge, port in ports.items()},
        passed=sum(port.given.rows for port in ports.values()),
        dropped=dropped,
        dead={"too-large": dead} if dead else {},
        held=sum(port.held.rows for port in ports.values()),
        spooled=dict(ports),
    )


def left(folder: Path, relay: str) -> Ledger | None:
    """The books that a relay which does not run left in its folder; None: there are none.

    :raises sqlite3.Error: a journal cannot be read.
    """
    ports: dict[str, Spooled] = {}
    for path in sorted(folder.glob(f"*/{JOURNAL}")):
        if (found := _journal(path)) is not None:
            disk = sum(file.stat().st_size for file in (path.parent / SPOOL).glob("*"))
            ports[path.parent.name] = spooled(*found, disk)
    return ledger(relay, ports, {}) if ports else None


def has_end(folder: Path) -> bool:
    """Whether a port's folder, of a relay that does not run, has the end of its stream."""
    try:
        found = _journal(folder / JOURNAL)
    except sqlite3.Error:
        return False  # the relay will say what is wrong with it
    return found is not None and found[0].end is not None


def _journal(path: Path) -> tuple[State, list[str]] | None:
    """What it says, and the readers; None: nothing."""
    if not path.exists():
        return None
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        values = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('state', 'readers')").fetchall())
    if len(values) < 2:
        return None
    return msgspec.msgpack.decode(values["state"], type=State), msgspec.msgpack.decode(
        values["readers"], type=list[str]
    )
