"""A node of your own. The topology names this file and the function, and gives it its options."""

import numpy as np

from schemas.messages import Array, Readings


def comfort(readings: Readings, warm: float) -> Readings:
    """Adds how warm it feels, by a rule of thumb (damp air feels warmer above 20 °C), and whether that is too warm.

    A message has many rows: each column is one array, and there is no loop over rows.
    """
    temperature = numbers(readings, "temperature")
    humidity = numbers(readings, "humidity")
    feels = temperature + 0.05 * (humidity - 50) * np.maximum(temperature - 20, 0) / 10
    columns = {**readings.columns, "feels": feels, "too_warm": feels > warm}
    return Readings(n=readings.n, columns=columns, time=readings.time, source=readings.source)


def numbers(readings: Readings, name: str) -> Array:
    """A column of numbers; what is missing in it is NaN."""
    column = readings.columns[name]
    if isinstance(column, list):
        raise TypeError(f"{name} is a column of texts")
    return column
