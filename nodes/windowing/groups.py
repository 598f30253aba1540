"""The open groups of an operator: one slot for each, in the arrays of every accumulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.statistics import Plan, Series
from nodes.statistics.state import Slots, Times, pack, unpack
from nodes.windowing.keys import Keys, Kids

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FIRST, _LAST = -(2**63), 2**63 - 1
"""The least and the greatest time, ns: that of a group which has had none."""


class Groups:
    """Slots and what they hold.

    :param limit: most groups at once.
    :param spans: keep the first and last event time of each group as well.
    """

    def __init__(self, plan: Plan, keys: Keys, limit: int, spans: bool) -> None:
        self.plan = plan
        self.keys = keys
        self.limit = limit
        self.spans = spans
        self.used = 0
        self.count = np.zeros(0, np.int64)
        self.key = np.zeros(0, np.int64)
        self.since = np.zeros(0, np.int64)
        self.until = np.zeros(0, np.int64)
        self._free = np.zeros(0, np.int64)
        self._grow(64)

    @property
    def capacity(self) -> int:
        """Slots that there are."""
        return len(self.count)

    def _grow(self, capacity: int) -> None:
        old = self.capacity
        for name, empty in (("count", 0), ("key", 0), ("since", _LAST), ("until", _FIRST)):
            array = np.full(capacity, empty, np.int64)
            array[:old] = getattr(self, name)
            setattr(self, name, array)
        for _, accumulator in self.plan.accumulators:
            accumulator.resize(capacity)
        # the lowest slot is at the end: it is taken first
        self._free = np.concatenate([np.arange(capacity - 1, old - 1, -1), self._free])

    def room(self) -> int:
        """Groups that may still be opened."""
        return max(self.limit - self.used, 0)

    def open(self, kids: Kids) -> Slots:
        """Empty slots for groups of these keys. The caller has looked at :meth:`room`; answers in the making may pass it."""
        need = len(kids)
        while len(self._free) < need:
            self._grow(2 * self.capacity)
        slots = self._free[len(self._free) - need :][::-1].copy()
        self._free = self._free[: len(self._free) - need]
        self.key[slots] = kids
        self.used += need
        self.keys.hold(kids)
        return slots

    def close(self, slots: Slots) -> None:
        """These groups are done with."""
        if not len(slots):
            return
        self.keys.release(self.key[slots])
        self.count[slots] = 0
        self.since[slots] = _LAST
        self.until[slots] = _FIRST
        for _, accumulator in self.plan.accumulators:
            accumulator.reset(slots)
        self._free = np.concatenate([self._free, slots[::-1]])
        self.used -= len(slots)

    def update(self, slots: Slots, time: Times, series: Sequence[Series], index: NDArray[np.int64] | None) -> None:
        """Add rows ``index`` (None: all) of the evaluated batch; ``slots`` and ``time`` are those of these rows."""
        np.add.at(self.count, slots, 1)
        if self.spans:
            np.minimum.at(self.since, slots, time)
            np.maximum.at(self.until, slots, time)
        picked = [s.pick(slots, time, index) for s in series]
        with np.errstate(all="ignore"):  # infinities are values like others
            for at, accumulator in self.plan.accumulators:
                if at < 0:
                    accumulator.update(slots, time, slots)
                else:
                    accumulator.update(*picked[at])

    def merge(self, into: Slots, other: Slots) -> None:
        """Add group ``other[i]`` to ``into[i]``; ``other`` stays and came later in time."""
        self.count[into] += self.count[other]
        self.since[into] = np.minimum(self.since[into], self.since[other])
        self.until[into] = np.maximum(self.until[into], self.until[other])
        with np.errstate(all="ignore"):
            for _, accumulator in self.plan.accumulators:
                accumulator.merge(into, other)

    def snapshot(self, slots: Slots) -> Any:
        """These groups, in this order, as plain msgpack types; they are slots 0, 1, … after :meth:`restore`."""
        return [
            len(slots),
            pack(self.count[slots]),
            pack(self.key[slots]),
            pack(self.since[slots]),
            pack(self.until[slots]),
            [a.snapshot(slots) for _, a in self.plan.accumulators],
        ]

    def restore(self, state: Any, renumber: NDArray[np.int64]) -> Slots:
        """Continue; only for new groups.

        :param renumber: key number in the snapshot → now.
        """
        n, count, key, since, until, parts = state
        slots = self.open(renumber[unpack(key)])
        self.count[:n], self.since[:n], self.until[:n] = unpack(count), unpack(since), unpack(until)
        for (_, accumulator), part in zip(self.plan.accumulators, parts, strict=True):
            accumulator.restore(part, n)
        return slots
