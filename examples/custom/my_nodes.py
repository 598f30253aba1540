"""Two nodes of one's own: a function, and an operator that remembers. Neither knows of MQTT, msgpack or processes."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from nodes.operator import Emit, Operator
from schemas.messages import Event, Message, Readings


def dew_point(readings: Readings) -> Readings:
    """Adds the dew point in °C, by the Magnus formula with the constants of Sonntag (1990).

    A function gets a whole batch: columns, not rows. What its annotations say is what ``penstock check`` goes by.
    """
    temp, humidity = np.asarray(readings.columns["temp"]), np.asarray(readings.columns["humidity"])
    gamma = np.log(humidity / 100) + 17.62 * temp / (243.12 + temp)
    dew = 243.12 * gamma / (17.62 - gamma)
    return Readings(n=readings.n, columns={**readings.columns, "dew": dew}, time=readings.time, source=readings.source)


class Trend(Operator):
    """Says when a field rose by more than ``limit`` within its last ``rows`` rows of a source, once per rise.

    :param field: the field that is watched.
    """

    absorbs = True  # many rows make one event, or none

    def __init__(self, field: str, rows: int = 10, limit: float = 1.0) -> None:
        self._field = field
        self._rows = rows
        self._limit = limit
        self._last: dict[str, deque[float]] = {}
        self._rising: set[str] = set()

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        """One event where a rise begins."""
        for message in messages:
            body = message.body
            if not isinstance(body, Readings) or self._field not in body.columns:
                emit.reject(message, "missing-field", f"expected readings with {self._field!r}")
                continue
            sources = body.source or [message.source] * body.n
            times = [message.time] * body.n if body.time is None else body.time.tolist()
            values = np.asarray(body.columns[self._field], float).tolist()
            for row, (source, time, value) in enumerate(zip(sources, times, values, strict=True)):
                if rise := self._rise(source, value):
                    event = Event(
                        name="rising", severity="warning", values={"device": source, self._field: value, "by": rise}
                    )
                    emit.send(message.derive(event, part=row, time=time))
            emit.absorb(body.n)

    def _rise(self, source: str, value: float) -> float:
        """How far the value is above the least of the last rows, where a rise begins here; else 0."""
        last = self._last.setdefault(source, deque(maxlen=self._rows))
        last.append(value)
        rise = value - min(last)
        if rise <= self._limit:
            if rise <= self._limit / 2:  # not already when it wavers about the limit
                self._rising.discard(source)
            return 0.0
        begins = source not in self._rising
        self._rising.add(source)
        return rise if begins else 0.0

    def snapshot(self) -> Any:
        """Kept by the runtime, so that a restart continues in the middle of a rise."""
        return {"last": {source: list(values) for source, values in self._last.items()}, "rising": sorted(self._rising)}

    def restore(self, state: Any) -> None:
        """Continue from a snapshot."""
        self._last = {source: deque(values, maxlen=self._rows) for source, values in state["last"].items()}
        self._rising = set(state["rising"])
