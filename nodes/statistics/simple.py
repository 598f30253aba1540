"""Statistics whose state is a few numbers a group."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nodes.statistics.state import Accumulator, Slots, Table, Times, pack, unpack
from schemas.messages import Array, Scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float64]"


def scalars(values: Array, there: Array) -> list[Scalar]:
    """Values as Python numbers, None where there is none (or it is no number)."""
    good = there & ~np.isnan(values)
    return [v if g else None for v, g in zip(values.tolist(), good.tolist(), strict=True)]


class Moments(Table):
    """Number, sum and, where ``squares`` is asked for, sum of squares: count, sum, mean, variance.

    Sums are of differences from the group's first value, which keeps the cancellation of the textbook formula away: the
    shifted algorithm of Chan, Golub and LeVeque, *Algorithms for computing the sample variance* (The American
    Statistician 37, 1983), whose error with a shift taken from the data grows with the number of rows only. Parts are
    merged by moving one to the other's shift, as in their pairwise formula.
    """

    n: NDArray[np.int64]
    shift: Floats
    s: Floats
    q: Floats

    def __init__(self, squares: bool) -> None:
        self.squares = squares
        self.columns = (("n", "<i8", 0), ("shift", "<f8", 0.0), ("s", "<f8", 0.0))
        if squares:
            self.columns += (("q", "<f8", 0.0),)

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        fresh = self.n[slots] == 0
        if fresh.any():
            at = np.flatnonzero(fresh)[::-1]  # backwards: of several values for a slot the first is written last
            first = values[at]
            self.shift[slots[at]] = np.where(np.isfinite(first), first, 0.0)
        off = values - self.shift[slots]
        np.add.at(self.s, slots, off)
        if self.squares:
            np.add.at(self.q, slots, off * off)
        np.add.at(self.n, slots, 1)

    def merge(self, into: Slots, other: Slots) -> None:
        n, m = self.n[into], self.n[other]
        shift = np.where(n > 0, self.shift[into], self.shift[other])
        off = np.where(m > 0, self.shift[other] - shift, 0.0)
        s = self.s[other]
        if self.squares:
            self.q[into] += self.q[other] + 2 * off * s + m * off * off
        self.s[into] += s + m * off
        self.shift[into] = shift
        self.n[into] = n + m

    def count(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """Values that are there."""
        return list(self.n[slots].tolist())

    def sum(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """Their sum."""
        n = self.n[slots]
        return scalars(n * self.shift[slots] + self.s[slots], n > 0)

    def mean(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """Their mean."""
        n = self.n[slots]
        return scalars(self.shift[slots] + self.s[slots] / np.maximum(n, 1), n > 0)

    def _variance(self, slots: Slots) -> tuple[Floats, Array]:
        n = self.n[slots]
        s = self.s[slots]
        rest = np.maximum(self.q[slots] - s * s / np.maximum(n, 1), 0.0)
        return rest / np.maximum(n - 1, 1), n > 1

    def variance(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """Their sample variance (divided by n - 1)."""
        return scalars(*self._variance(slots))

    def stddev(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """Its square root."""
        variance, there = self._variance(slots)
        return scalars(np.sqrt(variance), there)


class Extremes(Table):
    """The least and the greatest value."""

    columns = (("low", "<f8", inf), ("high", "<f8", -inf))
    low: Floats
    high: Floats

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        np.minimum.at(self.low, slots, values)
        np.maximum.at(self.high, slots, values)

    def merge(self, into: Slots, other: Slots) -> None:
        self.low[into] = np.minimum(self.low[into], self.low[other])
        self.high[into] = np.maximum(self.high[into], self.high[other])

    def _there(self, slots: Slots) -> Array:
        return np.asarray(self.low[slots] <= self.high[slots])

    def min(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """The least."""
        return scalars(self.low[slots], self._there(slots))

    def max(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """The greatest."""
        return scalars(self.high[slots], self._there(slots))

    def range(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """Their difference."""
        return scalars(self.high[slots] - self.low[slots], self._there(slots))


class Count(Table):
    """Values that are there, or that are true where they are truth values."""

    numeric = False
    columns = (("n", "<i8", 0),)
    n: NDArray[np.int64]

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        if values.dtype == np.bool_:
            slots = slots[values]
        np.add.at(self.n, slots, 1)

    def merge(self, into: Slots, other: Slots) -> None:
        self.n[into] += self.n[other]

    def count(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """How many."""
        return list(self.n[slots].tolist())

    def share(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """How many a second."""
        there = np.ones(len(slots), np.bool_)
        return scalars(np.where(_seconds > 0, self.n[slots] / np.where(_seconds > 0, _seconds, 1.0), np.nan), there)


_FIRST, _LAST = -(2**63), 2**63 - 1
"""The least and the greatest time, ns: that of a slot which has had none."""


class Ends(Table):
    """The first and the last value by event time. Of equal times the first to arrive is first, the last to arrive last."""

    numeric = False
    columns = (
        ("since", "<i8", _LAST),
        ("first", "O", None),
        ("until", "<i8", _FIRST),
        ("last", "O", None),
    )
    since: NDArray[np.int64]
    until: NDArray[np.int64]
    first: Array
    last: Array

    def __init__(self) -> None:
        self._scratch: Array | None = None

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        if len(time) > 1 and bool((time[1:] < time[:-1]).any()):
            order = np.argsort(time, kind="stable")
            slots, time, values = slots[order], time[order], values[order]
        at = np.arange(len(slots))
        if (place := self._scratch) is None or len(place) < len(self.since):
            place = self._scratch = np.zeros(len(self.since), np.int64)
        place[slots] = at
        newest = np.flatnonzero(place[slots] == at)
        newest = newest[time[newest] >= self.until[slots[newest]]]
        self.until[slots[newest]] = time[newest]
        self.last[slots[newest]] = values[newest]
        place[slots[::-1]] = at[::-1]
        oldest = np.flatnonzero(place[slots] == at)
        oldest = oldest[time[oldest] < self.since[slots[oldest]]]
        self.since[slots[oldest]] = time[oldest]
        self.first[slots[oldest]] = values[oldest]

    def merge(self, into: Slots, other: Slots) -> None:
        # only where the other has any: its empty times would win nothing, but equal empty ones must not copy None
        older = self.since[other] < self.since[into]
        self.since[into[older]] = self.since[other[older]]
        self.first[into[older]] = self.first[other[older]]
        newer = (self.until[other] >= self.until[into]) & (self.until[other] > _FIRST)
        self.until[into[newer]] = self.until[other[newer]]
        self.last[into[newer]] = self.last[other[newer]]

    def at_first(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """The first value."""
        return list(self.first[slots].tolist())

    def at_last(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """The last value."""
        return list(self.last[slots].tolist())

    def delta(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """The last minus the first."""
        pairs = zip(self.first[slots].tolist(), self.last[slots].tolist(), strict=True)
        return [None if a is None else b - a for a, b in pairs]

    def slope(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """That difference by the seconds between them; none where these are 0."""
        seconds = [
            (until - since) / 1e9 if until > since else 0.0
            for since, until in zip(self.since[slots].tolist(), self.until[slots].tolist(), strict=True)
        ]
        deltas: list[Any] = self.delta(slots, _seconds)
        return [d / s if d is not None and s > 0 else None for d, s in zip(deltas, seconds, strict=True)]


class NumberEnds(Ends):
    """As :class:`Ends`, of numbers."""

    numeric = True


class Histogram(Accumulator):
    """How many values lie below the first edge, between each two, and from the last on.

    :param edges: rising.
    """

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = np.array(edges)
        self.bins = len(edges) + 1
        self.n = np.zeros(0, np.int64)

    def resize(self, capacity: int) -> None:
        new = np.zeros(capacity * self.bins, np.int64)
        new[: len(self.n)] = self.n
        self.n = new

    def reset(self, slots: Slots) -> None:
        self.n.reshape(-1, self.bins)[slots] = 0

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        np.add.at(self.n, slots * self.bins + np.searchsorted(self.edges, values, side="right"), 1)

    def merge(self, into: Slots, other: Slots) -> None:
        table = self.n.reshape(-1, self.bins)
        table[into] += table[other]

    def snapshot(self, slots: Slots) -> Any:
        return pack(self.n.reshape(-1, self.bins)[slots].reshape(-1))

    def restore(self, state: Any, count: int) -> None:
        self.n[: count * self.bins] = unpack(state)

    def bin(self, i: int, slots: Slots) -> list[Scalar]:
        """How many are in bin ``i``."""
        return list(self.n.reshape(-1, self.bins)[slots, i].tolist())
