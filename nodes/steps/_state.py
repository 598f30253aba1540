"""State of a step by source or key: bounded, with undo for a call that fails, and ready to be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

LIMIT = 100_000
"""Most keys remembered; beyond it the one that changed longest ago is forgotten."""

_ABSENT: Any = object()


class Memory(Generic[K, V]):
    """A bounded map whose values are never changed in place.

    :param limit: most keys.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._now: dict[K, V] = {}
        self._before: dict[K, Any] = {}

    def get(self, key: K) -> V | None:
        """The value, or None."""
        return self._now.get(key)

    def set(self, key: K, value: V) -> None:
        """Remember."""
        old = self._now.pop(key, _ABSENT)
        self._before.setdefault(key, old)
        self._now[key] = value
        if len(self._now) > self.limit:
            self.forget(next(iter(self._now)))

    def forget(self, key: K) -> None:
        """Remember no more."""
        old = self._now.pop(key, _ABSENT)
        self._before.setdefault(key, old)

    def items(self) -> Iterator[tuple[K, V]]:
        """Keys and values, that which changed longest ago first."""
        return iter(self._now.items())

    def __len__(self) -> int:
        return len(self._now)

    def begin(self) -> None:
        """From here on changes can be undone."""
        self._before.clear()

    def rollback(self) -> None:
        """Undo what changed since :meth:`begin`."""
        for key, old in self._before.items():
            self._now.pop(key, None)
            if old is not _ABSENT:
                self._now[key] = old
        self._before.clear()

    def snapshot(self, value: Callable[[V], Any] = lambda v: v, key: Callable[[K], Any] = lambda k: k) -> Any:
        """Plain pairs; ``value`` and ``key`` turn theirs into msgpack types."""
        return [[key(k), value(v)] for k, v in self._now.items()]

    def restore(
        self, state: Any, value: Callable[[Any], V] = lambda v: v, key: Callable[[Any], K] = lambda k: k
    ) -> None:
        """From a :meth:`snapshot`."""
        self._now = {key(k): value(v) for k, v in state}
        self._before.clear()
