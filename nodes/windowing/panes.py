"""Tumbling and sliding windows over event time.

Time is cut into panes as long as the greatest common divisor of a window's size and step; a row goes to one pane, a
window's answer is merged from its panes. Krishnamurthy, Wu and Franklin, *On-the-fly sharing for streamed aggregation*
(SIGMOD 2006), section 3. A tumbling window is one pane.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.statistics.state import Slots, Times, pack, unpack
from nodes.windowing.base import Added, Due, Window, Windows, bounds, nothing
from nodes.windowing.groups import Groups
from nodes.windowing.keys import Kids

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Panes(Windows):
    """Windows [i · every, i · every + size) for every whole i.

    ``self._panes`` is pane number → slot by key number, -1 where the key has none.
    """

    def __init__(self, groups: Groups, lateness: int, size: int, every: int) -> None:
        super().__init__(groups, lateness)
        self.size = size
        self.every = every
        self.pane = gcd(size, every)
        self.step = every // self.pane
        self.parts = size // self.pane
        self._panes: dict[int, NDArray[np.int64]] = {}

    def _ended(self, mark: int, after: int = 0) -> int:
        """Number of the last window that a watermark has ended (``after`` ns ago)."""
        return (mark - after - self.size) // self.every

    def _first(self, pane: int) -> int:
        """The first window with this pane."""
        return (pane - self.parts) // self.step + 1

    def split(self, kid: Kids, time: Times, marks: Times) -> int:
        top = int(marks[-1])
        same = self._ended(top) == self._ended(self.mark)
        if same and (not self.lateness or self._ended(top, self.lateness) == self._ended(self.mark, self.lateness)):
            return len(time)
        high = time // self.every
        low = (time - self.size) // self.every
        changed = np.zeros(len(time), np.bool_)
        for after in {0, self.lateness}:
            now = np.clip((marks - after - self.size) // self.every, low, high)
            changed |= now != np.clip(self._ended(self.mark, after), low, high)
        return int(changed.argmax()) if changed.any() else len(time)

    def add(self, kid: Kids, time: Times) -> Added:
        pane = time // self.pane
        least, most = bounds(pane)
        ended = self._ended(self.mark)
        late: NDArray[np.bool_] | None = None
        again: set[Window] = set()
        if self._first(least) <= ended:
            late = pane // self.step <= self._ended(self.mark, self.lateness)
            again = self._touched(kid[~late], pane[~late], ended)
        if least == most:
            slots = self._slots(least, kid) if late is None or not late.all() else np.full(len(kid), -1)
        else:
            slots = np.full(len(kid), -1)
            taken = pane if late is None else pane[~late]
            for number in sorted(set(taken.tolist())):
                at = np.flatnonzero(pane == number)
                slots[at] = self._slots(number, kid[at])
        return Added(slots, late if late is not None and late.any() else None, again)

    def _touched(self, kid: Kids, pane: Times, ended: int) -> set[Window]:
        """Ended windows still kept that rows of these keys and panes go into."""
        least = self._ended(self.mark, self.lateness) + 1
        out: set[Window] = set()
        for k, p in set(zip(kid.tolist(), pane.tolist(), strict=True)):
            for window in range(max(self._first(p), least), min(p // self.step, ended) + 1):
                out.add((window * self.every, k))
        return out

    def _slots(self, pane: int, kid: Kids) -> Slots:
        table = self._panes.get(pane)
        if table is None or len(table) < len(self.keys):
            grown = np.full(max(len(self.keys), 16, 0 if table is None else 2 * len(table)), -1)
            if table is not None:
                grown[: len(table)] = table
            table = self._panes[pane] = grown
        slots = table[kid]
        absent = slots < 0
        if absent.any():
            new = np.array(list(dict.fromkeys(kid[absent].tolist())), np.int64)
            table[new] = self._open(new)
            slots = table[kid]
        return slots

    def _collect(self, windows: Iterable[int], only: dict[int, list[int]] | None = None) -> Due:
        """These windows, all keys or of each ``only`` these."""
        made: list[tuple[int, Kids, Slots]] = []
        for window in windows:
            if self.parts == 1:
                table = self._panes.get(window)
                if table is None:
                    continue
                kids = np.flatnonzero(table >= 0)
                if only is not None:
                    kids = np.intersect1d(kids, only[window])
                made.append((window, kids, table[kids]))
            else:
                made.append((window, *self._merged(window, None if only is None else only[window])))
        if not made:
            return nothing()
        start = np.concatenate([np.full(len(kids), window * self.every) for window, kids, _ in made])
        kid = np.concatenate([kids for _, kids, _ in made])
        slots = np.concatenate([s for _, _, s in made])
        return Due(start, start + self.size, start, kid, slots, self.parts > 1)

    def _merged(self, window: int, only: list[int] | None) -> tuple[Kids, Slots]:
        """Temporary groups with all panes of a window."""
        into = np.full(len(self.keys), -1)
        for pane in range(window * self.step, window * self.step + self.parts):
            table = self._panes.get(pane)
            if table is None:
                continue
            kids = np.flatnonzero(table >= 0)
            if only is not None:
                kids = np.intersect1d(kids, only)
            new = kids[into[kids] < 0]
            into[new] = self.groups.open(new)
            self.groups.merge(into[kids], table[kids])
        found = np.flatnonzero(into >= 0)
        return found, into[found]

    def _with_rows(self, above: int, upto: int | None) -> list[int]:
        """Numbers of windows that have panes, above one and up to another, in order."""
        out: set[int] = set()
        for pane in self._panes:
            high = pane // self.step
            out.update(range(max(self._first(pane), above + 1), (high if upto is None else min(high, upto)) + 1))
        return sorted(out)

    def due(self, mark: int) -> Due:
        before, now = self._ended(self.mark), self._ended(mark)
        self.mark = mark
        if now == before:
            return nothing()
        return self._collect(self._with_rows(before, now))

    def unended(self, horizon: int) -> Due:
        return self._collect(self._with_rows(self._ended(self.mark), self._ended(horizon)))

    def find(self, windows: Iterable[Window]) -> Due:
        only: dict[int, list[int]] = {}
        for start, kid in windows:
            only.setdefault(start // self.every, []).append(kid)
        return self._collect(sorted(only), only)

    def purge(self) -> None:
        gone = self._ended(self.mark, self.lateness)
        if old := [pane for pane in self._panes if pane // self.step <= gone]:
            tables = [self._panes.pop(pane) for pane in old]
            self.groups.close(np.concatenate([t[t >= 0] for t in tables]))
        if self.answered and old:
            self.answered = {w: a for w, a in self.answered.items() if w[0] // self.every > gone}

    def next_end(self, after: int) -> int | None:
        above = max(self._ended(self.mark), self._ended(after))
        ends = [
            max(self._first(pane), above + 1) * self.every + self.size
            for pane in self._panes
            if pane // self.step > above
        ]
        return min(ends, default=None)

    def live(self) -> Slots:
        tables = [self._panes[pane] for pane in sorted(self._panes)]
        return np.concatenate([t[t >= 0] for t in tables]) if tables else np.zeros(0, np.int64)

    def snapshot(self) -> Any:
        # slots are numbered in the order of live(): the keys of each pane say it all
        return [self.mark, [[p, pack(np.flatnonzero(self._panes[p] >= 0))] for p in sorted(self._panes)]]

    def restore(self, state: Any, renumber: NDArray[np.int64]) -> None:
        self.mark, panes = state
        next_slot = 0
        for pane, packed in panes:
            kids = renumber[unpack(packed)]
            table = np.full(max(len(self.keys), 16), -1)
            table[kids] = np.arange(next_slot, next_slot + len(kids))
            next_slot += len(kids)
            self._panes[pane] = table
