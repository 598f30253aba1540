"""Windows of a number of rows of a key, in the order that the rows come."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.statistics.state import Slots, Times, pack, unpack
from nodes.windowing.base import Added, Due, Window, Windows, nothing
from nodes.windowing.groups import Groups
from nodes.windowing.keys import Kids

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Counts(Windows):
    """Window i of a key has its rows i · every … i · every + size - 1. Nothing is ever late; time has no part in it.

    ``self._panes`` is (key number, number of the pane among the key's) → slot.
    """

    spans = True
    in_order = True
    _over = False

    def __init__(self, groups: Groups, size: int, every: int) -> None:
        super().__init__(groups, 0)
        self.size = size
        self.every = every
        self.pane = gcd(size, every)
        self.step = every // self.pane
        self.parts = size // self.pane
        self._panes: dict[tuple[int, int], int] = {}
        self._seen = np.full(64, -1, np.int64)
        self._complete: list[Window] = []

    def add(self, kid: Kids, time: Times) -> Added:
        while len(self._seen) < len(self.keys):
            self._seen = np.concatenate([self._seen, np.full(len(self._seen), -1)])
        new = np.array(list(dict.fromkeys(kid[self._seen[kid] < 0].tolist())), np.int64)
        self._seen[new] = 0
        self.keys.hold(new)
        order = np.argsort(kid, kind="stable")
        sorted_kid = kid[order]
        starts = np.flatnonzero(np.r_[True, sorted_kid[1:] != sorted_kid[:-1]])
        rank = np.empty(len(kid), np.int64)
        lengths = np.diff(np.r_[starts, len(kid)])
        rank[order] = np.arange(len(kid)) - np.repeat(starts, lengths)
        number = self._seen[kid] + rank
        self._seen[sorted_kid[starts]] += lengths
        pane = number // self.pane
        pairs, where = np.unique(np.stack([kid, pane]), axis=1, return_inverse=True)
        slots = np.array([self._slot(k, p) for k, p in pairs.T.tolist()], np.int64)
        over = number + 1 - self.size
        full = np.flatnonzero((over >= 0) & (over % self.every == 0))
        self._complete = list(zip((over[full] // self.every).tolist(), kid[full].tolist(), strict=True))
        return Added(slots[where.reshape(-1)])

    def _slot(self, kid: int, pane: int) -> int:
        slot = self._panes.get((kid, pane))
        if slot is None:
            slot = int(self._open(np.array([kid]))[0])
            if slot >= 0:
                self._panes[kid, pane] = slot
        return slot

    def due(self, mark: int) -> Due:
        self.mark = mark
        return self._collect(self._complete)

    def finish(self) -> Due:
        self._over = True
        return self.unended(0)

    def _collect(self, windows: list[Window]) -> Due:
        columns = [
            [self._panes.get((kid, number * self.step + part), -1) for number, kid in windows]
            for part in range(self.parts)
        ]
        table = np.array(columns, np.int64).reshape(self.parts, len(windows))
        some = np.flatnonzero((table >= 0).any(axis=0))
        if not len(some):
            return nothing()
        numbers = np.array([windows[i][0] for i in some.tolist()], np.int64)
        kid = np.array([windows[i][1] for i in some.tolist()], np.int64)
        table = table[:, some]
        slots = table[0]
        if self.parts > 1:
            slots = self.groups.open(kid)
            for part in table:
                there = part >= 0
                self.groups.merge(slots[there], part[there])
        since, until = self.groups.since[slots], self.groups.until[slots]
        return Due(since, until + 1, numbers, kid, slots, self.parts > 1)

    def unended(self, horizon: int) -> Due:
        windows: set[Window] = set()
        for kid, pane in self._panes:
            done = (int(self._seen[kid]) - self.size) // self.every
            first = max((pane - self.parts) // self.step + 1, done + 1, 0)
            windows.update((number, kid) for number in range(first, pane // self.step + 1))
        return self._collect(sorted(windows))

    def find(self, windows: Iterable[Window]) -> Due:
        return self._collect(sorted(windows))

    def purge(self) -> None:
        if self._over:
            self.groups.close(self.live())
            self._panes.clear()
            self.answered.clear()
            self._over = False
        gone: list[int] = []
        for number, kid in self._complete:
            self.answered.pop((number, kid), None)
            panes = range(number * self.step, (number + 1) * self.step)
            gone += [self._panes.pop((kid, pane)) for pane in panes if (kid, pane) in self._panes]
        self._complete = []
        self.groups.close(np.array(gone, np.int64))

    def next_end(self, after: int) -> int | None:
        return None

    def live(self) -> Slots:
        return np.array([self._panes[pair] for pair in sorted(self._panes)], np.int64)

    def snapshot(self) -> Any:
        known = np.flatnonzero(self._seen >= 0)
        return [self.mark, [list(pair) for pair in sorted(self._panes)], pack(known), pack(self._seen[known])]

    def restore(self, state: Any, renumber: NDArray[np.int64]) -> None:
        self.mark, pairs, known, seen = state
        self._panes = {(int(renumber[kid]), pane): slot for slot, (kid, pane) in enumerate(pairs)}
        kids = renumber[unpack(known)]
        self._seen = np.full(max(64, len(self.keys)), -1, np.int64)
        self._seen[kids] = unpack(seen)
        self.keys.hold(kids)
