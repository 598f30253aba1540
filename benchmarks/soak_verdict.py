"""Does something grow? A line through the second half of a run, for each series, and what is beyond its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import fmean, median

FLOORS = {
    "rss": (2_000_000, 0.03),
    "files": (2_000_000, 0.05),
    "fds": (1.5, 0.0),
    "threads": (0.9, 0.0),
    "p50": (0.002, 0.2),
    "p99": (0.02, 0.3),
}
"""Growth over the second half that is none, whatever the noise: so much, or that share of the mean, whichever is more. Bytes,
counts, seconds."""
SURE = 4.0
"""Standard errors that a slope must be above zero. One in some thousand flat series is that steep by chance."""
LEAST = 4
"""Windows of the second half that it takes to say anything."""


@dataclass(frozen=True)
class Trend:
    """One series over the second half of a run.

    :param growth: of the line, from the first window to the last.
    :param an_hour: the same, carried on.
    :param sureness: slope over its standard error.
    """

    mean: float
    growth: float
    an_hour: float
    sureness: float

    def grows(self, metric: str) -> bool:
        """Whether that is more than noise, and more than nothing to speak of."""
        least, share = FLOORS[metric]
        return self.sureness > SURE and self.growth > max(least, share * self.mean)


def windows(samples: Sequence[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """Medians of (time, value) samples over windows of so many seconds; the last is left out unless it is full."""
    found: dict[int, list[float]] = {}
    for time, value in samples:
        found.setdefault(int(time // seconds), []).append(value)
    last = samples[-1][0] if samples else 0.0
    return [((i + 0.5) * seconds, median(v)) for i, v in sorted(found.items()) if (i + 1) * seconds <= last + 1.0]


def trend(points: Sequence[tuple[float, float]]) -> Trend | None:
    """Least squares through the second half of ``points`` (seconds, value); None where there are too few."""
    half = points[len(points) // 2 :]
    if len(half) < LEAST:
        return None
    times, values = [t for t, _ in half], [v for _, v in half]
    middle, mean = fmean(times), fmean(values)
    spread = sum((t - middle) ** 2 for t in times)
    slope = sum((t - middle) * (v - mean) for t, v in half) / spread
    left = sum((v - mean - slope * (t - middle)) ** 2 for t, v in half)
    error = sqrt(left / (len(half) - 2) / spread)
    sureness = slope / error if error > 0 else (inf if slope > 0 else 0.0)
    return Trend(mean, slope * (times[-1] - times[0]), slope * 3600, sureness)


def growing(series: Mapping[tuple[str, str], Sequence[tuple[float, float]]]) -> list[str]:
    """One line for each series that grows; ``series``: (process, metric) → windows."""
    found = []
    for (process, metric), points in series.items():
        it = trend(points)
        if it is not None and it.grows(metric):
            found.append(
                f"{process}: {metric} grows by {say(metric, it.growth)} over the second half, {say(metric, it.an_hour)} an hour"
                f" (mean {say(metric, it.mean)}, {it.sureness:.0f} standard errors)"
            )
    return found


def say(metric: str, value: float) -> str:
    """A value with its unit."""
    if metric in {"rss", "files"}:
        return f"{value / 1e6:.2f} MB"
    return f"{value * 1e3:.2f} ms" if metric in {"p50", "p99"} else f"{value:.1f}"
