"""How fast a blob goes: the time of a round trip, how many chunks may be under way, and when one counts as lost."""

from __future__ import annotations

MS = 1_000_000
MOST_WINDOW = 8
"""Chunks under way at most."""
FIRST_WINDOW = 2
FIRST_TIMEOUT = 3_000 * MS
"""Of what was sent, as long as no round trip was seen."""
FIRST_ASK = 500 * MS
"""Of what was asked for, likewise: a question is small, and who is asked knows what is under way."""
LEAST_TIMEOUT = 200 * MS
MOST_TIMEOUT = 60_000 * MS
QUEUEING = 250 * MS
"""A round trip below this does not count as one that waits in a queue, however much longer than the shortest one it is."""
_AGE = 64  # round trips after which the shortest one seen is forgotten in favour of later ones


class Steady:
    """A clock made of times that are given: it never goes back. What jumps back goes on from where it was."""

    __slots__ = ("_ahead", "_now")

    def __init__(self, now: int) -> None:
        self._now = now
        self._ahead = 0

    def __call__(self, now: int) -> int:
        """The time here."""
        now += self._ahead
        if now < self._now:
            self._ahead += self._now - now
            now = self._now
        self._now = now
        return now

    def outside(self, at: int) -> int:
        """A time of this clock as those give it who have the other."""
        return at - self._ahead


class Pace:
    """Of one way to one peer; may serve several blobs, one after the other. Times in ns. ``first``: the timeout at first.

    The round trip is estimated as in RFC 6298. The window grows by one chunk for each that arrives, falls by half for a loss
    and to one chunk for a time in which nothing came back; while round trips take twice as long as the shortest one, the
    link is full and more of them would only wait in its queue (and keep-alive's pings behind them), so then it does not grow,
    and shrinks where they take three times as long.
    """

    def __init__(self, window: int = MOST_WINDOW, *, first: int = FIRST_TIMEOUT) -> None:
        self.most = max(1, min(window, MOST_WINDOW))
        self.window = min(FIRST_WINDOW, self.most)
        self._first = first
        self.rtt = 0
        """Mean; 0: not known."""
        self._spread = 0
        self._shortest = [0, 0]  # of this and of the previous age
        self._seen = 0
        self._backoff = 0

    @property
    def usual(self) -> int:
        """After how long what was sent counts as lost, were the far end there."""
        if not self.rtt:
            return self._first
        return max(LEAST_TIMEOUT, min(self.rtt + 4 * self._spread, MOST_TIMEOUT))

    @property
    def timeout(self) -> int:
        """After how long without an answer it is sent again: longer each time that this did not help."""
        return min(self.usual << self._backoff, MOST_TIMEOUT)

    def measured(self, took: int) -> None:
        """A round trip of something that was sent once."""
        took = max(1, took)
        if not self.rtt:
            self.rtt, self._spread = took, took // 2
        else:
            self._spread += (abs(self.rtt - took) - self._spread) // 4
            self.rtt += (took - self.rtt) // 8
        self._backoff = 0
        now, before = self._shortest
        if self._seen % _AGE == 0:
            now, before = took, now
        self._shortest = [min(now, took), before]
        self._seen += 1

    def arrived(self, count: int) -> None:
        """So many got there, none of them lost."""
        shortest = min(filter(None, self._shortest), default=0)
        if self.rtt > QUEUEING and self.rtt > 2 * shortest:
            if self.rtt > 3 * shortest:
                self.window = max(1, self.window - 1)
            return
        self.window = min(self.most, self.window + count)

    def lost(self) -> None:
        """One was lost though others got there. Called once a round trip."""
        self.window = max(1, self.window // 2)

    def silent(self) -> None:
        """Nothing came back."""
        self.window = 1
        if self.timeout < MOST_TIMEOUT:
            self._backoff += 1

    def heard(self) -> None:
        """The far end is there (again)."""
        self._backoff = 0
