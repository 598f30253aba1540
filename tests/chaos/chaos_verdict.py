"""What must be in the sinks, computed from the readings themselves, and what is wrong with what is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nodes.supervisor import Outcome

START = 1_700_000_000
DEVICES = 4
WINDOW = 60
Row = tuple[str, int, int]
"""Device, event time in ns, value."""
Mean = tuple[str, int, int, int, float, float, float]
"""Device, start of the window in ns, revision, rows, sum, least, greatest."""


def readings(count: int) -> Iterable[Row]:
    """All readings: each device has one a second, and every value is there once."""
    return ((f"d{i % DEVICES}", (START + i // DEVICES) * 10**9, i) for i in range(count))


def write(path: Path, count: int) -> None:
    """The readings as the source's file."""
    with path.open("w") as file:
        file.write("time,device,value\n")
        file.writelines(f"{time // 10**9},{device},{value}\n" for device, time, value in readings(count))


def kept(count: int) -> list[Row]:
    """What the filter lets through."""
    return [row for row in readings(count) if row[2] % 3]


def windows(rows: Iterable[Row]) -> list[Mean]:
    """What the aggregates of these rows are."""
    size = WINDOW * 10**9
    groups: dict[tuple[str, int], list[int]] = {}
    for device, time, value in rows:
        groups.setdefault((device, time // size * size), []).append(value)
    return [(d, t, 0, len(v), float(sum(v)), float(min(v)), float(max(v))) for (d, t), v in groups.items()]


def differences(what: str, expected: Iterable[tuple[object, ...]], found: Iterable[tuple[object, ...]]) -> list[str]:
    """How two collections differ, one line for each way; empty when they hold the same, each as often."""
    want, have = Counter(expected), Counter(found)
    lost = want - have
    unknown = [row for row in have if row not in want]
    repeated = [row for row, times in have.items() if times > want[row] > 0]
    faults = []
    for name, rows in (("missing", list(lost)), ("repeated", repeated), ("that nobody sent", unknown)):
        if rows:
            faults.append(f"{len(rows)} {what} {name}, e.g. {min(rows, key=repr)}")
    return faults


def books(outcome: Outcome, count: int, through: int, answers: int) -> list[str]:
    """What the ledger says that it must not say.

    :param count: readings of the source.
    :param through: of these, what the filter lets through.
    :param answers: aggregates.
    """
    faults = [f"ledger: {finding}" for finding in outcome.findings]
    if not outcome.complete:
        faults.append("the run did not complete")
    for name, book in outcome.ledgers.items():
        if book.dropped or book.dead or book.held:
            faults.append(f"ledger: {name} dropped {book.dropped}, dead {book.dead}, held {book.held}")
    expected = {
        "warm": (through, count - through),
        "means": (through, 0),
        "store": (through, 0),
        "report": (answers, 0),
    }
    for name, figures in expected.items():
        entry = outcome.ledgers.get(name)
        said = (entry.passed, entry.filtered) if entry is not None else None
        if said != figures:
            faults.append(f"ledger: {name} passed and filtered {said}, not {figures}")
    return faults
