"""How far event time has come: what decides that a window is complete and that a row is late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nodes.statistics.state import Times
from nodes.windowing.base import FLOOR, HORIZON


class Watermark:
    """The least over the in-edges of the newest event time that each has brought, less ``delay``. It never goes back.

    :param delay: how far rows of one edge may be out of order, ns.
    :param idle: an edge silent for so long, ns by the clock, holds it back no more; None: only its end does.
    :param edges: in-edges as far as they are known; until each has brought a row nothing is late and no window ends.
    """

    def __init__(self, delay: int, idle: int | None, edges: Iterable[str]) -> None:
        self.delay = delay
        self.idle = idle
        self.mark = FLOOR
        self.newest = FLOOR
        self._edges: dict[str, int] = dict.fromkeys(edges, FLOOR)
        self._heard: dict[str, int] = {}

    def _others(self, edge: str, now: int) -> int:
        """The least of the other edges."""
        if len(self._edges) == 1 and edge in self._edges:
            return HORIZON
        least = HORIZON
        for name, newest in self._edges.items():
            silent = self.idle is not None and now - self._heard.setdefault(name, now) >= self.idle
            if name != edge and not silent:
                least = min(least, newest)
        return least

    def before(self, edge: str, time: Times, now: int) -> tuple[Times, int]:
        """The watermark as each of these rows comes, and that after the last (not yet taken: see :meth:`advance`)."""
        own = self._edges.get(edge, FLOOR)
        others = self._others(edge, now)
        newest = np.maximum.accumulate(np.concatenate([[own], time]))
        marks = np.maximum(np.minimum(newest, others) - self.delay, self.mark)
        return marks[:-1], int(marks[-1])

    def after(self, edge: str, newest: int, now: int) -> int:
        """The watermark after rows of which the newest is ``newest``."""
        own = max(self._edges.get(edge, FLOOR), newest)
        return max(min(own, self._others(edge, now)) - self.delay, self.mark)

    def advance(self, edge: str, newest: int, mark: int, now: int) -> None:
        """The edge has brought rows up to ``newest``; the watermark is ``mark``."""
        self._edges[edge] = max(self._edges.get(edge, FLOOR), newest)
        self._heard[edge] = now
        self.newest = max(self.newest, newest)
        self.mark = max(self.mark, mark)

    def end(self, edge: str) -> int:
        """The edge brings nothing more. Returns the watermark without it; with no edge left it stays."""
        self._edges.pop(edge, None)
        if self._edges:
            self.mark = max(self.mark, min(self._edges.values()) - self.delay)
        return self.mark

    def snapshot(self) -> Any:
        """State as plain msgpack types."""
        return [self.mark, self.newest, self._edges]

    def restore(self, state: Any) -> None:
        """Continue. Edges of this run that the snapshot does not know hold the watermark as new ones do."""
        self.mark, self.newest, edges = state
        self._edges.update(edges)
