"""Times in foreign data: texts and numbers to ns since the epoch, a column at a time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING

import numpy as np

from nodes.sources._pace import nanoseconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""Units of epoch numbers, in ns."""

_SIZES = ((1e11, "s"), (1e14, "ms"), (1e17, "us"), (float("inf"), "ns"))
"""Epoch numbers below a limit are of its unit."""
_NUMBER = re.compile(r"\s*[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?\s*")
_PLAIN = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?Z?")
_FRACTION = re.compile(r"[.,]([0-9]{7,})")
_LIMIT = 2**63 - 1


def guess(sample: Sequence[str]) -> str:
    """Format of a column of times: ``iso``, or the unit of epoch numbers by their size (years 1973 to 5138).

    The larger part of the sample decides; the others are faults of their rows.
    """
    numbers = sorted(abs(float(c)) for c in sample if _NUMBER.fullmatch(c))
    if 2 * len(numbers) <= len([c for c in sample if c.strip()]):
        return "iso"
    largest = numbers[len(numbers) // 2]
    return next(unit for limit, unit in _SIZES if largest < limit)


def unit_of(numbers: NDArray[np.float64] | NDArray[np.int64]) -> str | None:
    """The unit that :func:`guess` finds for each of these; None: not the same for all, or one is not finite."""
    if not numbers.size:
        return None
    sizes = np.abs(numbers.astype(np.float64))
    least, most = float(sizes.min()), float(sizes.max())
    units = {next((unit for limit, unit in _SIZES if size < limit), None) for size in (least, most)}
    return units.pop() if len(units) == 1 else None


def all_plain(cells: Sequence[str]) -> bool:
    """Whether all are ISO 8601 in the form that :func:`from_texts` reads at once."""
    return all(map(_PLAIN.fullmatch, cells))


def from_numbers(values: NDArray[np.float64] | NDArray[np.int64], unit: str) -> NDArray[np.int64]:
    """Epoch numbers as ns.

    :raises ValueError: one is not finite or beyond the years 1677 to 2262.
    """
    factor = UNITS[unit]
    if values.size and not np.all(np.abs(values.astype(np.float64)) < _LIMIT / factor):
        raise ValueError("a time is missing or beyond the years 1677 to 2262")
    if values.dtype.kind in "iu":
        return values.astype(np.int64) * factor
    whole = np.floor(values)
    return whole.astype(np.int64) * factor + np.rint((values - whole) * factor).astype(np.int64)


def from_text(cell: str, form: str, zone: tzinfo | None) -> int:
    """One time as ns. See :func:`from_texts`."""
    cell = cell.strip()
    if form in UNITS:
        if not _NUMBER.fullmatch(cell):
            raise ValueError(f"{cell!r} is not a number of {form} since 1970")
        exact = cell.lstrip("+-").isdigit()
        return int(from_numbers(np.array([int(cell) if exact else float(cell)]), form)[0])
    extra = 0
    if form == "iso":
        if found := _FRACTION.search(cell):  # datetime keeps six digits; the three after them count too
            extra = int(found[1][6:9].ljust(3, "0"))
        moment = datetime.fromisoformat(cell)
    else:
        moment = datetime.strptime(cell, form)  # noqa: DTZ007 - the zone is added below
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone or UTC)
    ns = nanoseconds(moment) + extra
    if abs(ns) > _LIMIT:
        raise ValueError(f"{cell!r} is beyond the years 1677 to 2262")
    return ns


def from_texts(cells: Sequence[str], form: str, zone: tzinfo | None = None) -> NDArray[np.int64]:
    """A column of times as int64 ns since the epoch.

    :param form: ``iso`` (ISO 8601), ``s``, ``ms``, ``us``, ``ns`` since the epoch, or a ``strptime`` format.
    :param zone: of times that name none; None: UTC.
    :raises ValueError: one of them is no such time.
    """
    if form in UNITS:
        if not any("_" in c for c in cells):
            try:
                return from_numbers(np.array([int(c) for c in cells], np.int64), form)
            except (ValueError, OverflowError):
                return from_numbers(np.fromiter(map(float, cells), np.float64, len(cells)), form)
    elif form == "iso" and zone is None and all_plain(cells):
        texts = [c.removesuffix("Z") for c in cells]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seconds = np.array(texts, "datetime64[s]").astype(np.int64)
            if seconds.size and int(np.abs(seconds).max()) < _LIMIT // 10**9:
                return np.array(texts, "datetime64[ns]").astype(np.int64)
    return np.fromiter((from_text(c, form, zone) for c in cells), np.int64, len(cells))
