"""Rows of text as columns: the first to the left, the others to the right."""

from __future__ import annotations

from collections.abc import Iterator


def table(rows: list[list[str]]) -> Iterator[str]:
    """The lines; all rows have as many cells as the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
