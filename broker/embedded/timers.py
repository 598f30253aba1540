"""Things to be done at a time, in the broker's time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import TypeAlias

Action: TypeAlias = Callable[[float], None]
"""Called with the present time."""


class Timers:
    """A heap of actions. There is no cancelling: an action looks whether it is still wanted."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action]] = []
        self._number = count()

    def at(self, when: float, action: Action) -> None:
        """Have ``action`` called by the first :meth:`run` that is not before ``when``."""
        heappush(self._heap, (when, next(self._number), action))

    @property
    def next(self) -> float | None:
        """When :meth:`run` is next needed."""
        return self._heap[0][0] if self._heap else None

    def run(self, now: float) -> None:
        """Do what is due."""
        while self._heap and self._heap[0][0] <= now:
            heappop(self._heap)[2](now)
