"""What every statistic keeps: a place for each open group (a *slot*), in arrays, so that one call serves all groups.

Updates add row by row in the order of arrival, inside numpy: an answer has the same bits however the rows were batched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from schemas.messages import Array, Scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray

Slots: TypeAlias = "NDArray[np.int64]"
Times: TypeAlias = "NDArray[np.int64]"


def pack(array: Array) -> list[Any]:
    """An array as plain msgpack types."""
    return [array.dtype.str, array.tobytes()]


def unpack(state: list[Any]) -> Array:
    """The array of :func:`pack`, writable."""
    return np.frombuffer(state[1], np.dtype(state[0])).copy()


class Accumulator(ABC):
    """The state of one ingredient over all slots. Missing values never get here.

    :cvar numeric: it takes float64 values; otherwise float64 or an object array of texts.
    """

    numeric: bool = True

    @abstractmethod
    def resize(self, capacity: int) -> None:
        """Have room for slots 0 … capacity - 1; new ones are empty."""

    @abstractmethod
    def reset(self, slots: Slots) -> None:
        """These slots are empty again."""

    @abstractmethod
    def update(self, slots: Slots, time: Times, values: Array) -> None:
        """Add value i, of event time ``time[i]``, to slot ``slots[i]``."""

    @abstractmethod
    def merge(self, into: Slots, other: Slots) -> None:
        """Add what slot ``other[i]`` has to ``into[i]``; ``other`` stays as it is, and came later in time. ``into`` has no
        slot twice."""

    @abstractmethod
    def snapshot(self, slots: Slots) -> Any:
        """The state of these slots, in this order, as plain msgpack types."""

    @abstractmethod
    def restore(self, state: Any, count: int) -> None:
        """Slots 0 … count - 1 are those of a :meth:`snapshot`."""


Result: TypeAlias = "Callable[[Slots, NDArray[np.float64]], list[Scalar]]"
"""(slots, seconds that each window lasts) → one value a slot."""


class Table(Accumulator):
    """An accumulator whose state is 1-d arrays, one element a slot: ``columns`` names them with their empty value."""

    columns: tuple[tuple[str, str, Any], ...] = ()

    def resize(self, capacity: int) -> None:
        for name, dtype, empty in self.columns:
            new = np.full(capacity, empty, dtype)
            if (old := getattr(self, name, None)) is not None:
                new[: len(old)] = old
            setattr(self, name, new)

    def reset(self, slots: Slots) -> None:
        for name, _, empty in self.columns:
            getattr(self, name)[slots] = empty

    def snapshot(self, slots: Slots) -> Any:
        picked = (getattr(self, name)[slots] for name, _, _ in self.columns)
        return [a.tolist() if a.dtype == np.object_ else pack(a) for a in picked]

    def restore(self, state: Any, count: int) -> None:
        for (name, dtype, _), saved in zip(self.columns, state, strict=True):
            if dtype == "O":
                array = np.empty(count, object)
                array[:] = saved
            else:
                array = unpack(saved)
            getattr(self, name)[:count] = array


class Log:
    """Rows (slot, values…) that are kept as they are until somebody asks; cheap to add to.

    :param dtypes: of the columns beside the slot.
    """

    def __init__(self, *dtypes: str) -> None:
        self._dtypes = ("<i8", *dtypes)
        self._chunks: list[tuple[Array, ...]] = []
        self.size = 0

    def append(self, slots: Slots, *columns: Array) -> None:
        """More rows."""
        if len(slots):
            self._chunks.append((slots, *columns))
            self.size += len(slots)

    def rows(self) -> tuple[Array, ...]:
        """All rows, in the order they came."""
        if len(self._chunks) != 1:
            parts = zip(*self._chunks, strict=True) if self._chunks else ([] for _ in self._dtypes)
            whole = tuple(
                np.concatenate(p) if p else np.zeros(0, d) for p, d in zip(map(list, parts), self._dtypes, strict=True)
            )
            self._chunks = [whole]
        return self._chunks[0]

    def keep(self, mask: Array) -> None:
        """Forget all rows but these."""
        self.put(tuple(column[mask] for column in self.rows()))

    def put(self, rows: tuple[Array, ...]) -> None:
        """These rows instead of all."""
        self._chunks = [rows]
        self.size = len(rows[0])

    def discard(self, slots: Slots, capacity: int) -> None:
        """Forget the rows of these slots."""
        if self.size:
            gone = _flags(slots, capacity)[self.rows()[0]]
            if gone.any():
                self.keep(~gone)

    def select(self, slots: Slots, capacity: int) -> tuple[Array, ...]:
        """The rows of these slots, with the slot's place in ``slots`` instead of the slot."""
        place = np.full(capacity, -1, np.int64)
        place[slots] = np.arange(len(slots))
        whole = self.rows()
        where = place[whole[0]]
        found = where >= 0
        return (where[found], *(column[found] for column in whole[1:]))

    def copy(self, into: Slots, other: Slots, capacity: int) -> None:
        """The rows of ``other[i]`` once more, for ``into[i]``."""
        if self.size:
            where, *columns = self.select(other, capacity)
            self.append(into[where], *columns)

    def snapshot(self, slots: Slots, capacity: int) -> Any:
        """The rows of these slots as plain msgpack types."""
        return [pack(column) for column in self.select(slots, capacity)]

    def restore(self, state: Any) -> None:
        """Rows of a :meth:`snapshot`."""
        self.put(tuple(unpack(column) for column in state))


def _flags(slots: Slots, capacity: int) -> NDArray[np.bool_]:
    flags = np.zeros(capacity, np.bool_)
    flags[slots] = True
    return flags
