"""What is measured: a figure against a limit, or ours against peers in one run; each several times."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, TypeVar

OURS = "penstock"
ROUNDS = 5
"""How often each contestant is measured; ``--rounds`` sets it."""

ONLY = ""
"""Rows with this in their names are measured, where a workload can leave out others; ``--only`` sets it."""

T = TypeVar("T")


def wanted(*names: str) -> bool:
    """Whether one of these rows is to be measured."""
    return not ONLY or any(ONLY in name for name in names)


@dataclass(frozen=True)
class Figure:
    """One line of the table: a value, and the limit it is held against.

    :param values: one a run.
    :param limit: what it should stay under (``at_most``) or reach; None: nothing is promised.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    limit: float | None = None
    at_most: bool = True

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def holds(self) -> bool | None:
        """Whether the limit is held by the median; None without a limit."""
        return _holds(self.median, self.limit, self.at_most)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median": self.median, "holds": self.holds}

    def lines(self) -> list[tuple[str, ...]]:
        """Rows of the table: what, value, spread, ratio, bar, verdict."""
        spread = f"{min(self.values):.3g} … {max(self.values):.3g}"
        bar = "" if self.limit is None else f"{'≤' if self.at_most else '≥'} {self.limit:g} {self.unit}"
        return [(self.name, f"{_short(self.median)} {self.unit}", spread, "", bar, _verdict(self.holds))]


@dataclass(frozen=True)
class Comparison:
    """A workload, done by us and by others in turns (:func:`in_turns`).

    :param seen: who → one value a round; ``penstock`` among them.
    :param bars: who → what ours divided by theirs is to reach, or not to exceed (``at_most``).
    """

    name: str
    unit: str
    seen: Mapping[str, tuple[float, ...]]
    bars: Mapping[str, float] = field(default_factory=dict)
    at_most: bool = False

    def ratio(self, who: str) -> float:
        """Ours divided by theirs, median by median."""
        theirs = median(self.seen[who])
        return median(self.seen[OURS]) / theirs if theirs else float("inf")

    def holds(self, who: str) -> bool | None:
        """Whether the bar against them is held; None without one."""
        return _holds(self.ratio(who), self.bars.get(who), self.at_most)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        others = [who for who in self.seen if who != OURS]
        return {
            **asdict(self),
            "median": {who: median(values) for who, values in self.seen.items()},
            "ratio": {who: self.ratio(who) for who in others},
            "holds": {who: self.holds(who) for who in others if who in self.bars},
        }

    def lines(self) -> list[tuple[str, ...]]:
        """Rows of the table: ours, then a row for each of the others."""
        out: list[tuple[str, ...]] = []
        for who, values in self.seen.items():
            spread = f"{_short(min(values))} … {_short(max(values))}"
            first = (self.name if who == OURS else f"  {who}", f"{_short(median(values))} {self.unit}", spread)
            if who == OURS:
                out.append((*first, "", "", ""))
            else:
                bar = f"{'≤' if self.at_most else '≥'} {self.bars[who]:.3g} ×" if who in self.bars else ""
                out.append((*first, f"{self.ratio(who):.2f} ×", bar, _verdict(self.holds(who))))
        return out


def in_turns(contestants: Mapping[str, Callable[[], T]], rounds: int | None = None) -> dict[str, list[T]]:
    """Runs each of them once a round, A B C A B C: what slows the machine for a while slows all of them.

    Says on stderr how far it is. :data:`ROUNDS` rounds, unless they are given.
    """
    seen: dict[str, list[T]] = {who: [] for who in contestants}
    rounds = rounds or ROUNDS
    for number in range(rounds):
        for who, run in contestants.items():
            print(f"  round {number + 1} of {rounds}: {who}", file=sys.stderr, flush=True)
            seen[who].append(run())
    return seen


def table(figures: list[Figure | Comparison]) -> list[str]:
    """Lines for people."""
    rows: list[tuple[str, ...]] = [("figure", "median", "min … max", "ours / theirs", "bar", "")]
    for each in figures:
        rows += each.lines()
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _holds(value: float, limit: float | None, at_most: bool) -> bool | None:
    if limit is None:
        return None
    return value <= limit if at_most else value >= limit


def _verdict(holds: bool | None) -> str:
    return "" if holds is None else "holds" if holds else "DOES NOT HOLD"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
