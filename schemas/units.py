"""Quantities as people write them: ``5ms``, ``10s``, ``2 MB``, ``30/s``; and the pydantic types that take them."""

from __future__ import annotations

import re
from math import inf
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

_DURATIONS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "min": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}
_SIZES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_RATES = {"s": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([^\s0-9]+)\s*")
_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*/\s*([a-z]+)\s*")


def _scaled(value: Any, units: dict[str, int], what: str, example: str) -> int:
    if isinstance(value, str) and (m := _QUANTITY.fullmatch(value)) and m[2] in units:
        scaled = float(m[1]) * units[m[2]]
        if scaled >= 2**63:
            raise ValueError(f"expected {what} that fits 64 bits, got {value!r}")
        return round(scaled)
    raise ValueError(f"expected {what} with a unit ({', '.join(units)}), e.g. {example}, got {value!r}")


def duration(value: Any) -> int:
    """``"5ms"`` → ns. A bare number is refused, except 0: the reader should see the unit.

    :raises ValueError: not a duration.
    """
    return 0 if value == 0 and not isinstance(value, bool) else _scaled(value, _DURATIONS, "a duration", "10s")


def size(value: Any) -> int:
    """``"5MB"`` → bytes; a bare whole number is bytes.

    :raises ValueError: not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return _scaled(value, _SIZES, "a size", "20MB")


def rate(value: Any) -> float:
    """``"30/s"`` → per second; a bare number is per second.

    :raises ValueError: not a rate.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < inf:
        return float(value)
    if isinstance(value, str) and (m := _RATE.fullmatch(value)) and m[2] in _RATES and float(m[1]) > 0:
        return float(m[1]) / _RATES[m[2]]
    raise ValueError(f"expected a rate per {', '.join(_RATES)}, e.g. 30/s, got {value!r}")


Duration = Annotated[int, BeforeValidator(duration), WithJsonSchema({"type": "string", "examples": ["5ms", "10s"]})]
"""A duration in ns, written with its unit."""
Size = Annotated[int, BeforeValidator(size), WithJsonSchema({"type": ["string", "integer"], "examples": ["20MB"]})]
"""A size in bytes."""
Rate = Annotated[float, BeforeValidator(rate), WithJsonSchema({"type": ["string", "number"], "examples": ["30/s"]})]
"""A rate per second."""
