"""A virtual link between the two halves of a blob's exchange: loses, repeats, delays and reorders, in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random

MS = 1_000_000
SECOND = 1000 * MS
BEGIN = 1_700_000_000 * SECOND
"""ns; when every virtual link begins."""


class Link:
    """One way or many: what is sent is handed to its receiver at a later time.

    :param loss: share of messages that vanish; ``repeat``: that come twice; ``spread``: ms that one may be late.
    :param rate: bytes per second that go through, one after the other; 0: no limit.
    :ivar out: messages that were handed to the link; ``lost``: those of them that vanished.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        loss: float = 0.0,
        repeat: float = 0.0,
        delay: float = 1.0,
        spread: float = 0.0,
        rate: float = 0.0,
    ) -> None:
        self.now = BEGIN
        self.draw = Random(seed)
        self.loss = loss
        self.repeat = repeat
        self.delay = delay
        self.spread = spread
        self.rate = rate
        self.down = False
        self.out = 0
        self.lost = 0
        self._free = 0
        self._numbers = 0
        self._under_way: list[tuple[int, int, Callable[[bytes, int], object], bytes]] = []

    def send(self, to: Callable[[bytes, int], object], payload: bytes) -> bool:
        """False: it was lost."""
        self.out += 1
        if self.down or self.draw.random() < self.loss:
            self.lost += 1
            return False
        for _ in range(2 if self.draw.random() < self.repeat else 1):
            at = self.now + int((self.delay + self.draw.random() * self.spread) * MS)
            if self.rate:
                self._free = max(self._free, self.now) + int(len(payload) / self.rate * SECOND)
                at = max(at, self._free)
            self._numbers += 1
            heapq.heappush(self._under_way, (at, self._numbers, to, payload))
        return True

    def clear(self) -> None:
        """What is under way vanishes."""
        self.lost += len(self._under_way)
        self._under_way.clear()

    def next(self) -> int | None:
        """When something arrives."""
        return self._under_way[0][0] if self._under_way else None

    def deliver(self) -> None:
        """Hand over what is due."""
        while self._under_way and self._under_way[0][0] <= self.now:
            _, _, to, payload = heapq.heappop(self._under_way)
            to(payload, self.now)
