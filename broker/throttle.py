"""A limit on how fast something goes: the token bucket of the textbooks, in plain numbers and without a clock of its own."""

from __future__ import annotations


class Throttle:
    """At most ``rate`` units (messages, bytes) per second on average, and ``burst`` at once after a pause.

    What is larger than ``burst`` goes when the bucket is full, and the debt is waited for afterwards.

    :param rate: units per second, above 0.
    :param burst: units; by default those of a tenth of a second, at least 1.
    """

    def __init__(self, rate: float, burst: float | None = None) -> None:
        if not 0 < rate < float("inf"):
            raise ValueError(f"a rate of {rate}")
        self.rate = rate
        self.burst = max(1.0, rate / 10) if burst is None else burst
        self._tokens = self.burst
        self._at: float | None = None

    def wait(self, units: float, now: float) -> float:
        """Seconds until ``units`` may go; 0: now. Changes nothing but the time.

        :param now: seconds of a clock that does not jump; one that goes back is taken as standing still.
        """
        if self._at is None or now < self._at:
            self._at = now
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
        self._at = now
        lacking = min(units, self.burst) - self._tokens
        return lacking / self.rate if lacking > 1e-9 * self.burst else 0.0

    def spend(self, units: float) -> None:
        """``units`` went."""
        self._tokens -= units
