"""What the probes of a run have seen, read while it runs and after it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Key = tuple[str, int]
"""A message's identity and, of an aggregate, its revision."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message as a probe knows it.

    :param deliveries: how often it was handed to the sink.
    """

    source: str
    rows: int
    digest: bytes
    deliveries: int


class Probes:
    """The records of all probes.

    :param folder: where each has a file of its name.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._files = {name: folder / f"{name}.sqlite" for name in names}
        self._open: dict[str, sqlite3.Connection] = {}

    @property
    def names(self) -> list[str]:
        """The probes' nodes."""
        return list(self._files)

    def first_after(self, moment: int, names: Iterable[str]) -> int | None:
        """When the first message came to one of these probes after ``moment``, ns of the monotonic clock; None: none."""
        found = [self._one(name, "SELECT min(first) FROM arrivals WHERE first > ?", (moment,)) for name in names]
        return min((moment for moment in found if moment is not None), default=None)

    def longest_gap(self, since: int, names: Iterable[str]) -> int | None:
        """Longest time without a message to any of these probes, from ``since`` until the last one came, ns; None: none came."""
        query = "SELECT first FROM arrivals WHERE first > ? ORDER BY first"
        moments = sorted({moment for name in names for (moment,) in self._all(name, query, (since,))})
        return max((b - a for a, b in pairwise([since, *moments])), default=None)

    def last(self) -> int:
        """When the last message came to any probe, ns of the monotonic clock; 0: none yet."""
        return max((self._one(name, "SELECT max(first) FROM arrivals") or 0 for name in self._files), default=0)

    def arrivals(self, name: str) -> dict[Key, Arrival]:
        """Everything that a probe has."""
        if not self._files[name].exists():
            return {}
        with closing(self._connect(name)) as db:
            found = db.execute("SELECT id, revision, source, rows, digest, deliveries FROM arrivals").fetchall()
        return {(ident, revision): Arrival(*others) for ident, revision, *others in found}

    def close(self) -> None:
        """Close the files."""
        for db in self._open.values():
            db.close()
        self._open.clear()

    def _one(self, name: str, query: str, values: tuple[int, ...] = ()) -> int | None:
        found = self._all(name, query, values)
        return found[0][0] if found else None

    def _all(self, name: str, query: str, values: tuple[int, ...]) -> list[Any]:
        try:
            if name not in self._open:
                if not self._files[name].exists():
                    return []
                self._open[name] = self._connect(name)
            return self._open[name].execute(query, values).fetchall()
        except sqlite3.OperationalError:  # no table yet, or locked while it is opened again
            return []

    def _connect(self, name: str) -> sqlite3.Connection:
        return sqlite3.connect(f"{self._files[name].resolve().as_uri()}?mode=ro", uri=True, timeout=1)
