"""Cells of text to columns: types found on a sample, then fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

from schemas.messages import Column

CellType: TypeAlias = Literal["float", "int", "bool", "text"]

_BOOLS = {"true": True, "false": False}
_WRITTEN_BOOLS = {**_BOOLS, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}


def number(cell: str) -> float:
    """:raises ValueError: not a number (digits grouped by ``_`` are none either)."""
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


def _whole(cell: str) -> int:
    value = int(cell) if "_" not in cell else None
    if value is None or not -(2**63) <= value < 2**63:
        raise ValueError(cell)
    return value


def _bool(cell: str) -> bool:
    try:
        return _WRITTEN_BOOLS[cell.strip().lower()]
    except KeyError:
        raise ValueError(cell) from None


_CONVERT: dict[str, Callable[[str], float | int | bool]] = {"float": number, "int": _whole, "bool": _bool}
_SAID = {"float": "a number", "int": "a whole number", "bool": "a truth value"}


class Cells:
    """Turns the cells of one column into its values.

    :param kind: its type; of ``float`` a missing cell is NaN, of ``text`` None, of the others it is an error.
    :param missing: texts that mean that there is no value.
    :param decimal: the decimal sign.
    """

    def __init__(self, kind: CellType, missing: frozenset[str], decimal: str = ".") -> None:
        self.kind = kind
        self._missing = missing
        self._comma = decimal == "," and kind == "float"

    def column(self, cells: Sequence[str]) -> Column:
        """All values.

        :raises ValueError: at least one cell is none; :meth:`fault` tells of each.
        """
        missing = self._missing
        if self.kind == "text":
            return [None if c in missing else c for c in cells]
        if self._comma:
            cells = [c.replace(",", ".") for c in cells]
        if self.kind == "float":
            if "_" not in "".join(cells):
                try:
                    return np.fromiter(map(float, cells), np.float64, len(cells))
                except ValueError:
                    pass
            values = (np.nan if c.strip() in missing else number(c) for c in cells)
            return np.fromiter(values, np.float64, len(cells))
        if self.kind == "int":
            return np.fromiter(map(_whole, cells), np.int64, len(cells))
        return np.fromiter(map(_bool, cells), np.bool_, len(cells))

    def fault(self, cell: str) -> str | None:
        """What is wrong with a cell, or None."""
        try:
            self.column([cell])
        except ValueError:
            return f"{cell[:40]!r} is not {_SAID[self.kind]}"
        return None


def infer(sample: Sequence[str], missing: frozenset[str], decimal: str = ".") -> CellType:
    """Type of a column by some of its cells: ``float``, ``bool`` or ``text``.

    Whole numbers are ``float`` too: the next row may have a fraction, or nothing. ``int`` is for who says so.
    """
    present = [c.strip() for c in sample if c.strip() not in missing]
    if not present:
        return "float" if sample else "text"
    if len(present) == len(sample) and all(c.lower() in _BOOLS for c in present):
        return "bool"
    cells = Cells("float", missing, decimal)
    # a fault or two in a sample are faults of those rows and do not make the column a text
    return "float" if sum(cells.fault(c) is not None for c in present) <= len(present) // 20 else "text"
