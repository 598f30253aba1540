"""How long a client waits before it tries to connect again."""

from __future__ import annotations

from random import uniform

QUICK = 1.0
"""Seconds between two attempts, at most, while the broker has not been away for long."""
SHARE = 30
"""Later: at most this part of the time that it has been away, so that coming back costs little of what was lost already."""
STEADY = 5.0
"""Seconds that a connection must have lasted for the pauses to begin anew."""


class Backoff:
    """Pauses that double, but only up to what the absence itself justifies. Times are seconds of one clock.

    A connection that was lost before it was steady does not begin them anew (somebody with our name may be there, and two
    would throw each other out as fast as they can), but neither may a row of short connections end in a pause of half a
    minute: what counts for the bound is how long there has been no connection at all.

    :param least: the first pause.
    :param most: no pause is longer.
    :param now: when the first attempt is made.
    """

    def __init__(self, least: float, most: float, now: float) -> None:
        self._least = least
        self._most = most
        self._next = least
        self._away = now

    def lost(self, lasted: float, now: float) -> float:
        """A connection is gone that had lasted so long; seconds until the next attempt.

        Between none and a whole pause: a broker that restarts gets its clients one after the other.
        """
        self._away = now
        if lasted >= STEADY:
            self._next = self._least
        return self._pause(now) * uniform(0.0, 1.0)  # noqa: S311 # jitter, not a secret

    def failed(self, now: float) -> float:
        """An attempt came to nothing; seconds until the next one."""
        return self._pause(now) * uniform(0.5, 1.0)  # noqa: S311 # likewise

    def _pause(self, now: float) -> float:
        pause = min(self._next, self._most, max(QUICK, (now - self._away) / SHARE))
        self._next = min(2 * self._next, self._most)
        return pause
