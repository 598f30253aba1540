"""A figure: what was measured, in which unit, several times, and what it is held against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One line of the table.

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
        if self.limit is None:
            return None
        return self.median <= self.limit if self.at_most else self.median >= self.limit

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median": self.median, "holds": self.holds}


def table(figures: list[Figure]) -> list[str]:
    """Lines for people: name, median, spread, limit."""
    rows = [("figure", "median", "min … max", "limit", "")]
    for f in figures:
        limit = "" if f.limit is None else f"{'≤' if f.at_most else '≥'} {f.limit:g} {f.unit}"
        verdict = "" if f.holds is None else "holds" if f.holds else "DOES NOT HOLD"
        spread = f"{min(f.values):.3g} … {max(f.values):.3g}"
        rows.append((f.name, f"{f.median:.3g} {f.unit}", spread, limit, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
