"""Session windows: rows of a key less than a gap apart belong together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.statistics.state import Slots, Times
from nodes.windowing.base import HORIZON, Added, Due, Window, Windows, nothing
from nodes.windowing.groups import Groups
from nodes.windowing.keys import Kids

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class Span:
    """One session: its first and last event time and its group.

    :param number: its start when it was first answered; its name from then on, though it may grow.
    :param ended: the watermark has passed its end.
    """

    start: int
    last: int
    slot: int
    number: int | None = None
    ended: bool = False

    @property
    def name(self) -> int:
        """What names it among the sessions of its key."""
        return self.start if self.number is None else self.number


class Sessions(Windows):
    """A session is [first row, last row + gap). Sessions that a row brings together become one."""

    def __init__(self, groups: Groups, lateness: int, gap: int) -> None:
        super().__init__(groups, lateness)
        self.gap = gap
        self._spans: dict[int, list[Span]] = {}
        self._next = HORIZON
        self._purge_at = HORIZON
        self._latest = np.full(64, -HORIZON, np.int64)
        self._moved: dict[int, int] = {}

    def split(self, kid: Kids, time: Times, marks: Times) -> int:
        behind = (time < marks) & (marks > self.mark)
        if not behind.any():
            return len(time)
        self._room()
        order = np.argsort(kid, kind="stable")
        k, t = kid[order], time[order]
        before = np.empty_like(t)
        first = np.r_[True, k[1:] != k[:-1]]
        before[1:] = t[:-1]
        before[first] = self._latest[k[first]]
        previous = np.empty_like(t)
        previous[order] = before
        end = previous + self.gap
        risky = behind & ((time < previous) | ((end > time) & (end <= marks)))
        # a key with rows out of order: what the newest of them was is not known here
        risky |= behind & np.isin(kid, k[t < before])
        for after in {0, self.lateness}:
            own = time + self.gap + after
            risky |= (own <= marks) & (own > self.mark)
        return max(int(risky.argmax()), 1) if risky.any() else len(time)

    def _room(self) -> None:
        while len(self._latest) < len(self.keys):
            self._latest = np.concatenate([self._latest, np.full(len(self._latest), -HORIZON)])

    def add(self, kid: Kids, time: Times) -> Added:
        self._room()
        order = np.lexsort((time, kid))
        k, t = kid[order], time[order]
        bounds = np.flatnonzero(np.r_[True, (k[1:] != k[:-1]) | (t[1:] - t[:-1] >= self.gap), True])
        slots = np.full(len(kid), -1)
        late = np.zeros(len(kid), np.bool_)
        again: set[Window] = set()
        firsts, lasts = t[bounds[:-1]].tolist(), t[bounds[1:] - 1].tolist()
        for i, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            key = int(k[a])
            if firsts[i] + self.gap > self.mark:
                slots[order[a:b]] = self._place(key, firsts[i], lasts[i], again)
                continue
            for row in np.sort(order[a:b]).tolist():  # some may be late: one by one, as they came
                moment = int(time[row])
                if moment + self.gap + self.lateness <= self.mark and not self._inside(key, moment):
                    late[row] = True
                else:
                    slots[row] = self._place(key, moment, moment, again)
        if self._moved:
            slots = np.array([self._final(s) for s in slots.tolist()], np.int64)
            self.groups.close(np.array(list(self._moved), np.int64))
            self._moved = {}
        np.maximum.at(self._latest, kid[slots >= 0], time[slots >= 0])
        return Added(slots, late if late.any() else None, again)

    def _final(self, slot: int) -> int:
        while slot in self._moved:
            slot = self._moved[slot]
        return slot

    def _overlapping(self, kid: int, first: int, last: int) -> list[Span]:
        spans = self._spans.get(kid, ())
        return [s for s in spans if first < s.last + self.gap and s.start < last + self.gap]

    def _inside(self, kid: int, moment: int) -> bool:
        """Whether a session holds this moment. A late row may not open one or pull its start back: sessions of one key
        would come to have one start, and so one name."""
        return any(s.start <= moment < s.last + self.gap for s in self._spans.get(kid, ()))

    def _place(self, kid: int, first: int, last: int, again: set[Window]) -> int:
        """The slot for a run of rows, which may open, stretch or join sessions; -1 without room."""
        touched = self._overlapping(kid, first, last)
        if not touched:
            slot = int(self._open(np.array([kid]))[0])
            if slot < 0:
                return -1
            span = Span(first, last, slot)
            self._spans.setdefault(kid, []).append(span)
            self._spans[kid].sort(key=lambda s: s.start)
        else:
            span = touched[0]
            for other in touched[1:]:
                self._join(kid, span, other, again)
            span.start, span.last = min(span.start, first), max(span.last, last)
        end = span.last + self.gap
        again.discard((span.name, kid))
        span.ended = end <= self.mark
        if span.ended:
            if span.number is None:
                span.number = span.start
            again.add((span.name, kid))
            self._purge_at = min(self._purge_at, end + self.lateness)
        else:
            self._next = min(self._next, end)
        return span.slot

    def _join(self, kid: int, span: Span, other: Span, again: set[Window]) -> None:
        self.groups.merge(np.array([span.slot]), np.array([other.slot]))
        self._moved[other.slot] = span.slot
        self._spans[kid].remove(other)
        span.last = max(span.last, other.last)
        again.discard((other.name, kid))
        if other.number is not None:
            base = self.answered.pop((other.number, kid), None)
            if span.number is None:
                span.number = other.number
                if base is not None:
                    self.answered[span.number, kid] = base

    def _due(self, found: list[tuple[int, int, Span]]) -> Due:
        if not found:
            return nothing()
        for _, _, span in found:
            if span.number is None:
                span.number = span.start
        start, end, number, kid, slots = (
            np.array(column, np.int64)
            for column in zip(*((s.start, e, s.name, k, s.slot) for e, k, s in found), strict=True)
        )
        return Due(start, end, number, kid, slots)

    def due(self, mark: int) -> Due:
        self.mark = mark
        if mark < self._next:
            return nothing()
        found = []
        self._next = HORIZON
        for kid, spans in self._spans.items():
            for span in spans:
                if span.ended:
                    continue
                end = span.last + self.gap
                if end <= mark:
                    span.ended = True
                    self._purge_at = min(self._purge_at, end + self.lateness)
                    found.append((end, kid, span))
                else:
                    self._next = min(self._next, end)
        return self._due(found)

    def unended(self, horizon: int) -> Due:
        return self._due(
            [
                (span.last + self.gap, kid, span)
                for kid, spans in self._spans.items()
                for span in spans
                if not span.ended and span.last + self.gap <= horizon
            ]
        )

    def find(self, windows: Iterable[Window]) -> Due:
        wanted = set(windows)
        kids = {kid for _, kid in wanted}
        return self._due(
            [
                (span.last + self.gap, kid, span)
                for kid in sorted(kids)
                for span in self._spans.get(kid, ())
                if (span.name, kid) in wanted
            ]
        )

    def purge(self) -> None:
        if self.mark < self._purge_at:
            return
        gone: list[int] = []
        self._purge_at = HORIZON
        for kid in list(self._spans):
            spans = self._spans[kid]
            old = []
            for span in spans:
                until = span.last + self.gap + self.lateness
                if span.ended and until <= self.mark:
                    old.append(span)
                elif span.ended:
                    self._purge_at = min(self._purge_at, until)
            if not old:
                continue
            for span in old:
                gone.append(span.slot)
                self.answered.pop((span.name, kid), None)
            left = [s for s in spans if s not in old]
            if left:
                self._spans[kid] = left
            else:
                del self._spans[kid]
                self._latest[kid] = -HORIZON
        self.groups.close(np.array(gone, np.int64))

    def next_end(self, after: int) -> int | None:
        ends = (s.last + self.gap for spans in self._spans.values() for s in spans if not s.ended)
        return min((e for e in ends if e > after), default=None)

    def live(self) -> Slots:
        return np.array([s.slot for kid in sorted(self._spans) for s in self._spans[kid]], np.int64)

    def snapshot(self) -> Any:
        return [
            self.mark,
            [[kid, s.start, s.last, s.number, s.ended] for kid in sorted(self._spans) for s in self._spans[kid]],
        ]

    def restore(self, state: Any, renumber: NDArray[np.int64]) -> None:
        self.mark, spans = state
        self._room()
        for slot, (kid, start, last, number, ended) in enumerate(spans):
            now = int(renumber[kid])
            self._spans.setdefault(now, []).append(Span(start, last, slot, number, ended))
            self._latest[now] = max(int(self._latest[now]), last)
            if ended:
                self._purge_at = min(self._purge_at, last + self.gap + self.lateness)
            else:
                self._next = min(self._next, last + self.gap)
