"""The streams of a producer's replicas made one again, in the order of their times.

Each replica keeps the order of its own sources, but they are not equally fast. An operator that closes windows by event
time would take the rows of the slower ones for late. So before it, a message waits until every other stream has come as far:
by a later message, by its end, or by a :class:`~schemas.messages.Progress`, which producers send to replicas that have nothing
else to do, and which those pass on. A stream has come as far as the greatest time seen in it, so a message that was late in its
own stream is no later here.

A stream whose replica is away is not waited for (see :mod:`nodes.lanes`; one with its state on its disk is).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

FLOOR = -(2**62)
"""Before every time."""


class Side(Generic[T]):
    """One stream. ``newest``: greatest time seen; ``over``: nothing more is waited for; ``away``: not for now."""

    __slots__ = ("away", "newest", "over", "waiting")

    def __init__(self, newest: int) -> None:
        self.newest = newest
        self.over = False
        self.away = False
        self.waiting: deque[tuple[int, T]] = deque()


class Merge(Generic[T]):
    """Streams by number.

    :param newest: times that the streams had come to when this was last committed.
    """

    def __init__(self, newest: Sequence[int]) -> None:
        self.sides: list[Side[T]] = [Side(time) for time in newest]

    def put(self, number: int, time: int, item: T) -> int:
        """Add an item; gives the time that its stream has come to with it."""
        side = self.sides[number]
        side.newest = max(side.newest, time)
        side.waiting.append((side.newest, item))
        return side.newest

    def free(self) -> list[T]:
        """Items that wait for no other stream any more, in order; they are taken out."""
        out: list[T] = []
        while True:
            heads = [(side.waiting[0][0], i) for i, side in enumerate(self.sides) if side.waiting]
            if not heads:
                return out
            time, i = min(heads)
            # a stream that waits has its own head; the others have come as far as they said
            limit = min((head for head, j in heads if j != i), default=None)
            for side in self.sides:
                if not side.waiting and not side.over and not side.away:
                    limit = side.newest if limit is None else min(limit, side.newest)
            if limit is not None and time > limit:
                return out
            waiting = self.sides[i].waiting
            while waiting and (limit is None or waiting[0][0] <= limit):
                out.append(waiting.popleft()[1])
