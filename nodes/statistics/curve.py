"""Statistics of the curve that a field draws over time: its integral and its time-weighted mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from nodes.statistics.simple import Floats, scalars
from nodes.statistics.state import Log, Slots, Table, Times
from schemas.messages import Array, Scalar

POINTS = 4096
"""Points of a group that are kept; of more, every second is left out and what that changes in the area is remembered."""
SPILL = 1 << 16


class Curve(Table):
    """Points joined by straight lines (trapezoids), in the order of event time whatever order they came in.

    ``left`` is the area that points left out have taken with them: the total stays exact for data that come in order.
    """

    columns = (("left", "<f8", 0.0),)
    left: Floats

    def __init__(self) -> None:
        self.log = Log("<i8", "<f8")
        self._limit = SPILL

    def reset(self, slots: Slots) -> None:
        super().reset(slots)
        self.log.discard(slots, len(self.left))

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        self.log.append(slots, time, values)
        if self.log.size > self._limit:
            self._thin()
            self._limit = max(SPILL, 2 * self.log.size)

    def _thin(self) -> None:
        """Leave out every second point, but the ends, of groups with too many."""
        slots, time, values = self.log.rows()
        order = np.lexsort((time, slots))
        slots, time, values = slots[order], time[order], values[order]
        n = np.bincount(slots, minlength=len(self.left))
        starts = np.cumsum(n) - n
        rank = np.arange(len(slots)) - starts[slots]
        keep = (n[slots] <= POINTS) | (rank % 2 == 0) | (rank == n[slots] - 1)
        before = _areas(slots, time, values, len(self.left))
        slots, time, values = slots[keep], time[keep], values[keep]
        self.left += before - _areas(slots, time, values, len(self.left))
        self.log.put((slots, time, values))

    def merge(self, into: Slots, other: Slots) -> None:
        self.left[into] += self.left[other]
        self.log.copy(into, other, len(self.left))

    def _measure(self, slots: Slots) -> tuple[Array, Array, Array, Array]:
        """Area, seconds from first to last point, number of points and last value of each group."""
        where, time, values = self.log.select(slots, len(self.left))
        order = np.lexsort((time, where))
        where, time, values = where[order], time[order], values[order]
        n = np.bincount(where, minlength=len(slots))
        ends = np.cumsum(n)
        area = _areas(where, time, values, len(slots)) + self.left[slots]
        seconds, last = np.zeros(len(slots)), np.full(len(slots), np.nan)
        some = np.flatnonzero(n)
        seconds[some] = (time[ends[some] - 1] - time[ends[some] - n[some]]) / 1e9
        last[some] = values[ends[some] - 1]
        return area, seconds, n, last

    def integral(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """The area under the curve: value x seconds. 0 for one point, none for none."""
        area, _, n, _ = self._measure(slots)
        return scalars(area, n > 0)

    def time_mean(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """The area by the seconds from the first point to the last; for one instant, the last value."""
        area, seconds, n, last = self._measure(slots)
        return scalars(np.where(seconds > 0, area / np.where(seconds > 0, seconds, 1.0), last), n > 0)

    def snapshot(self, slots: Slots) -> Any:
        return [super().snapshot(slots), self.log.snapshot(slots, len(self.left)), self._limit]

    def restore(self, state: Any, count: int) -> None:
        super().restore(state[0], count)
        self.log.restore(state[1])
        self._limit = int(state[2])


def _areas(slots: Array, time: Array, values: Array, count: int) -> Floats:
    """Area under the points of each slot; points are sorted by slot and time."""
    same = slots[1:] == slots[:-1]
    pieces = np.where(same, (time[1:] - time[:-1]) / 1e9 * (values[1:] / 2 + values[:-1] / 2), 0.0)
    areas: Floats = np.bincount(slots[1:], weights=pieces, minlength=count).astype(np.float64, copy=False)
    return areas
