"""Pace of replays: on time on average, never bursting for long, cancellable at any moment; and event times to go with it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema

from schemas.units import Rate

CATCH_UP = 1.0
"""Seconds of lateness that are made up for by going faster; what is later than that is let go, so that a consumer that
was away is not hit by everything at once."""

Pace: TypeAlias = Literal["recorded", "max"] | Rate
"""How fast a recording is played: as ``recorded``, as fast as the consumers take it (``max``), or at a rate."""


def instant(value: Any) -> int:
    """An ISO 8601 time, or a YAML timestamp, as ns since the epoch; without a zone it is UTC.

    :raises ValueError: not a time.
    """
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"expected a time such as 2024-05-01T06:00:00Z, got {value!r}") from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if not isinstance(value, datetime):
        raise ValueError(f"expected a time such as 2024-05-01T06:00:00Z, got {value!r}")
    return nanoseconds(value if value.tzinfo else value.replace(tzinfo=UTC))


def nanoseconds(moment: datetime) -> int:
    """A time with a zone as ns since the epoch, exact to its microsecond."""
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86400 + delta.seconds) * 10**9 + delta.microseconds * 1000


Instant = Annotated[int, BeforeValidator(instant), WithJsonSchema({"type": "string", "format": "date-time"})]
"""A moment, ns since the epoch, written in ISO 8601."""


class Pacer:
    """Waits until things are due, seen from the first of them.

    Due times are absolute, so that the waits' inaccuracies do not add up.
    """

    def __init__(self, catch_up: float = CATCH_UP) -> None:
        self._catch_up = catch_up
        self._origin: float | None = None

    async def until(self, due: float) -> None:
        """Return when ``due`` seconds (on the replay's own clock) have come. At once if they are past."""
        now = time.monotonic()
        if self._origin is None:
            self._origin = now - due
        late = now - self._origin - due
        if late >= 0:
            if late > self._catch_up:
                self._origin += late - self._catch_up
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(-late)


class EventTimes:
    """Event times of things that have none in their data: ``start`` + number × ``interval``, or the clock.

    :param start: ns since the epoch; None: the clock at the moment of reading.
    :param interval: ns between two things; None: one period of ``rate``.
    """

    def __init__(self, start: int | None, interval: int | None, rate: float | str | None) -> None:
        self._start = start
        if interval is None and isinstance(rate, (int, float)):
            interval = round(1e9 / rate)
        self._interval = interval

    def at(self, number: int) -> int:
        """Event time of thing ``number``, counted from 0."""
        if self._start is None:
            return time.time_ns()
        return self._start + number * (self._interval or 0)


def times_problem(start: int | None, interval: int | None, rate: float | str | None) -> str | None:
    """What is wrong with a config's ``start``, ``interval`` and ``rate`` taken together, or None."""
    if start is not None and interval is None and not isinstance(rate, (int, float)):
        return "event times from 'start' need an 'interval' (or a 'rate') between one and the next"
    if interval is not None and start is None:
        return "'interval' counts from 'start', which is not given"
    return None
