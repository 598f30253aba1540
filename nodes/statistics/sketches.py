"""Statistics that need the values themselves: exact while there are few, a sketch of stated error beyond.

An answer depends on which values a group has, never on their order or batching, up to the bounds named here.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.statistics.simple import Floats
from nodes.statistics.state import Accumulator, Log, Slots, Table, Times
from schemas.messages import Array, Scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXACT = 1024
"""Values of a group up to which quantiles, ``distinct`` and ``mode`` are exact."""
SPILL = 1 << 16
"""Rows in a log at which it is gone through for groups that have too many."""
TOTAL = 1 << 20
"""Most values kept by one quantile statistic over all groups; beyond, all groups are sketched."""
ERROR = 0.005
"""Relative error of a sketched quantile."""

_GAMMA = (1 + ERROR) / (1 - ERROR)
_LOG = log(_GAMMA)
_MIDDLE = 100_000
_FAR = 2 * _MIDDLE
_BUCKETS = 4096


def buckets(values: Floats) -> NDArray[np.int64]:
    """Bucket of each value; buckets have the order of their values."""
    size = np.abs(values)
    index = np.ceil(np.log(np.where((size > 1e-300) & np.isfinite(size), size, 1.0)) / _LOG) + _MIDDLE
    index = np.where(np.isinf(size), float(_FAR), np.where(size > 1e-300, index, 0.0))
    return np.asarray(np.copysign(index, values)).astype(np.int64)


def bucket_value(bucket: int) -> float:
    """A value within :data:`ERROR` of all values of the bucket."""
    if bucket == 0:
        return 0.0
    if abs(bucket) == _FAR:
        return float(np.copysign(np.inf, bucket))
    size = 2.0 / (_GAMMA + 1) * float(np.exp((abs(bucket) - _MIDDLE) * _LOG))
    return size if bucket > 0 else -size


class Values(Table):
    """Quantiles: exact up to :data:`EXACT` values of a group (linear between the neighbours, as numpy), then a DDSketch.

    Masson, Rim and Lee, *DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees* (VLDB 2019),
    section 2: buckets that grow by γ = (1 + α) / (1 - α). At most 4,096 buckets a group: beyond, values nearest zero
    are taken for zero.
    """

    columns = (("n", "<i8", 0),)
    n: NDArray[np.int64]

    def __init__(self) -> None:
        self.log = Log("<f8")
        self.sketch: dict[int, dict[int, int]] = {}

    def reset(self, slots: Slots) -> None:
        super().reset(slots)
        self.log.discard(slots, len(self.n))
        for slot in slots.tolist() if self.sketch else ():
            self.sketch.pop(slot, None)

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        np.add.at(self.n, slots, 1)
        self.log.append(slots, values)
        if self.log.size > SPILL:
            self._spill()

    def _spill(self) -> None:
        slots = self.log.rows()[0]
        big = self.n[slots] > EXACT
        if len(slots) - int(big.sum()) > TOTAL:
            big[:] = True
        if big.any():
            self._into_sketches(big)

    def _into_sketches(self, mask: Array) -> None:
        slots, values = self.log.rows()
        self._count(slots[mask], buckets(values[mask]))
        self.log.keep(~mask)

    def _count(self, slots: Array, bucket: Array) -> None:
        pairs, counts = np.unique(np.stack([slots, bucket]), axis=1, return_counts=True)
        for slot, b, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            sketch = self.sketch.setdefault(slot, {})
            sketch[b] = sketch.get(b, 0) + count
        for slot in np.unique(pairs[0]).tolist():
            _collapse(self.sketch[slot])

    def merge(self, into: Slots, other: Slots) -> None:
        self.n[into] += self.n[other]
        self.log.copy(into, other, len(self.n))
        if self.sketch:
            for a, b in zip(into.tolist(), other.tolist(), strict=True):
                if theirs := self.sketch.get(b):
                    ours = self.sketch.setdefault(a, {})
                    for bucket, count in theirs.items():
                        ours[bucket] = ours.get(bucket, 0) + count
                    _collapse(ours)

    def quantiles(self, slots: Slots, q: float) -> list[Scalar]:
        """The value below which a share ``q`` of the values lies."""
        n = self.n[slots]
        rough = n > EXACT
        if self.sketch:
            rough |= np.array([slot in self.sketch for slot in slots.tolist()], np.bool_)
        if rough.any():
            wanted = np.zeros(len(self.n), np.bool_)
            wanted[slots[rough]] = True
            mask = wanted[self.log.rows()[0]]
            if mask.any():
                self._into_sketches(mask)
        where, values = self.log.select(slots, len(self.n))
        values = values[np.lexsort((values, where))]
        exact = np.where(rough, 0, n)
        start = np.cumsum(exact) - exact
        out: list[Scalar] = [None] * len(slots)
        some = np.flatnonzero(exact > 0)
        if len(some):
            at = q * (exact[some] - 1)
            below = np.floor(at).astype(np.int64)
            low = values[start[some] + below]
            high = values[start[some] + np.minimum(below + 1, exact[some] - 1)]
            part = at - below
            found = np.where((low == high) | (part == 0), low, low + (high - low) * part)
            for i, value in zip(some.tolist(), found.tolist(), strict=True):
                out[i] = None if value != value else value
        for i in np.flatnonzero(rough).tolist():
            out[i] = _rank(self.sketch[int(slots[i])], q)
        return out

    def snapshot(self, slots: Slots) -> Any:
        sketches = [list(self.sketch.get(slot, {}).items()) for slot in slots.tolist()] if self.sketch else []
        return [super().snapshot(slots), self.log.snapshot(slots, len(self.n)), sketches]

    def restore(self, state: Any, count: int) -> None:
        super().restore(state[0], count)
        self.log.restore(state[1])
        self.sketch = {slot: {int(b): int(c) for b, c in items} for slot, items in enumerate(state[2]) if items}


def _collapse(sketch: dict[int, int]) -> None:
    if len(sketch) > _BUCKETS:
        for bucket in sorted(sketch, key=abs)[: len(sketch) - _BUCKETS + 1]:
            sketch[0] = sketch.pop(bucket) + sketch.get(0, 0)


def _rank(sketch: dict[int, int], q: float) -> float:
    rank = q * (sum(sketch.values()) - 1)
    seen = 0
    for bucket in sorted(sketch):
        seen += sketch[bucket]
        if seen > rank:
            return bucket_value(bucket)
    raise AssertionError("a rank beyond all values")


@lru_cache(maxsize=4096)
def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hashes(values: Array) -> NDArray[np.uint64]:
    """64 well-mixed bits of each value (numbers: the finaliser of splitmix64; texts: BLAKE2b)."""
    if values.dtype == np.object_:
        return np.array([_hash(str(v)) for v in values.tolist()], np.uint64)
    x = (values.astype(np.float64) + 0.0).view(np.uint64)  # + 0.0: minus zero is zero
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class Distinct(Accumulator):
    """How many different values: exact up to :data:`EXACT`, then estimated from the k-th least hash (standard error
    1/√(k - 2), here 3.1 %): Bar-Yossef et al., *Counting distinct elements in a data stream* (RANDOM 2002)."""

    numeric = False

    def __init__(self) -> None:
        self.log = Log("<u8")
        self.capacity = 0
        self._limit = SPILL

    def resize(self, capacity: int) -> None:
        self.capacity = capacity

    def reset(self, slots: Slots) -> None:
        self.log.discard(slots, self.capacity)

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        self.log.append(slots, hashes(values))
        if self.log.size > self._limit:
            self.log.put(_least(*self.log.rows()))
            self._limit = max(SPILL, 2 * self.log.size)

    def merge(self, into: Slots, other: Slots) -> None:
        self.log.copy(into, other, self.capacity)

    def distinct(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """How many."""
        where, found = _least(*self.log.select(slots, self.capacity))
        n = np.bincount(where, minlength=len(slots))
        last = np.cumsum(n) - 2  # of EXACT + 1 kept hashes, in order, the one before the last is the k-th
        out: list[Scalar] = []
        for count, at in zip(n.tolist(), last.tolist(), strict=True):
            out.append(count if count <= EXACT else round((EXACT - 1) / (int(found[at]) / 2.0**64)))
        return out

    def snapshot(self, slots: Slots) -> Any:
        return self.log.snapshot(slots, self.capacity)

    def restore(self, state: Any, count: int) -> None:
        self.log.restore(state)


def _least(slots: Array, found: Array) -> tuple[Array, Array]:
    """Each slot's least EXACT + 1 different hashes, sorted by slot and hash."""
    order = np.lexsort((found, slots))
    slots, found = slots[order], found[order]
    if len(slots) > 1:
        new = np.r_[True, (slots[1:] != slots[:-1]) | (found[1:] != found[:-1])]
        slots, found = slots[new], found[new]
        starts = np.flatnonzero(np.r_[True, slots[1:] != slots[:-1]])
        rank = np.arange(len(slots)) - np.repeat(starts, np.diff(np.r_[starts, len(slots)]))
        slots, found = slots[rank <= EXACT], found[rank <= EXACT]
    return slots, found


class Mode(Accumulator):
    """The most frequent value, the least of equals. Exact up to twice :data:`EXACT` different values of a group; beyond,
    the rarest are forgotten."""

    numeric = False

    def __init__(self) -> None:
        self.counts: dict[int, dict[Any, int]] = {}

    def resize(self, capacity: int) -> None:
        pass

    def reset(self, slots: Slots) -> None:
        for slot in slots.tolist():
            self.counts.pop(slot, None)

    def update(self, slots: Slots, time: Times, values: Array) -> None:
        if values.dtype == np.object_:
            names = values.tolist()
            places = {name: i for i, name in enumerate(dict.fromkeys(names))}
            codes = np.fromiter(map(places.__getitem__, names), np.int64, len(names))
            different: list[Any] = list(places)
        else:
            unique, codes = np.unique(values + 0.0, return_inverse=True)
            different = unique.tolist()
        pairs, counts = np.unique(slots * len(different) + codes, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            slot, code = divmod(pair, len(different))
            self._add(slot, different[code], count)

    def _add(self, slot: int, value: Any, count: int) -> None:
        table = self.counts.setdefault(slot, {})
        table[value] = table.get(value, 0) + count
        if len(table) > 2 * EXACT:
            self.counts[slot] = dict(sorted(table.items(), key=_rarest, reverse=True)[:EXACT])

    def merge(self, into: Slots, other: Slots) -> None:
        for a, b in zip(into.tolist(), other.tolist(), strict=True):
            for value, count in self.counts.get(b, {}).items():
                self._add(a, value, count)

    def mode(self, slots: Slots, _seconds: Floats) -> list[Scalar]:
        """That value."""
        out: list[Scalar] = []
        for slot in slots.tolist():
            table = self.counts.get(slot)
            if not table:
                out.append(None)
                continue
            most = max(table.values())
            ties = [v for v, c in table.items() if c == most]
            out.append(min(ties, key=lambda v: (isinstance(v, str), v)))
        return out

    def snapshot(self, slots: Slots) -> Any:
        return [[list(item) for item in self.counts.get(slot, {}).items()] for slot in slots.tolist()]

    def restore(self, state: Any, count: int) -> None:
        self.counts = {slot: {v: int(c) for v, c in items} for slot, items in enumerate(state) if items}


def _rarest(item: tuple[Any, int]) -> tuple[int, str]:
    return item[1], str(item[0])
