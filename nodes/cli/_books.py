"""Books as tables for people: what the end of ``penstock run`` and ``penstock ledger`` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from schemas.messages import Ledger


def books_table(
    books: Mapping[str, Ledger | None], *, before: tuple[str, Mapping[str, str]], after: tuple[str, Mapping[str, str]]
) -> list[str]:
    """A line for each node: what it did with its rows, and how long that took.

    :param before: heading and cells by node of a column behind the node's name; ``after``: of the last column.
    """
    rows: list[tuple[str, ...]] = [
        (
            "node",
            before[0],
            "in",
            "out",
            "filtered",
            "dropped",
            "dead",
            "held",
            "wait p50/p99",
            "process p50/p99",
            after[0],
        )
    ]
    for name, book in books.items():
        cells = ["-"] * 8 if book is None else _cells(book)
        rows.append((name, before[1].get(name, ""), *cells, after[1].get(name, "")))
    return table(rows)


def spools_table(books: Mapping[str, Ledger | None]) -> list[str]:
    """A line for each edge that a relay keeps, in messages: in = out + dropped + dead + in flight; none: no lines."""
    rows = [
        (
            f"{edge} → {reader}",
            name,
            *(str(n or "") for n in (port.taken.messages, port.given.messages)),
            ", ".join(f"{flow.messages} {reason}" for reason, flow in port.dropped.items()),
            *(str(n or "") for n in (port.dead.messages, port.held.messages)),
            size(port.disk),
        )
        for name, book in books.items()
        if book is not None
        for edge, port in (book.spooled or {}).items()
        for reader in port.readers
    ]
    heading = ("kept edge", "by", "in", "out", "dropped", "dead", "in flight", "on disk")
    return ["", *table([heading, *rows])] if rows else []


def size(count: int) -> str:
    """Bytes for people: ``0 B``, ``512 B``, ``1.2 MB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _cells(book: Ledger) -> list[str]:
    return [
        str(sum(flow.rows for flow in book.received.values())) if book.received else "",
        str(sum(flow.rows for flow in book.emitted.values())) if book.emitted else "",
        *(str(n or "") for n in (book.filtered, sum(book.dropped.values()), sum(book.dead.values()), book.held)),
        *(_span(book.latency.get(stage)) for stage in ("wait", "process")),
    ]


def reasons(books: Mapping[str, Ledger | None]) -> list[str]:
    """Why rows were dropped or dead-lettered, a line each."""
    return [
        f"{name}: {count} rows {what}: {reason}"
        for name, book in books.items()
        if book is not None
        for what, counts in (("dropped", book.dropped), ("dead", book.dead))
        for reason, count in counts.items()
    ]


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned lines, the first a heading; columns that are empty below it are left out. Numbers go right."""
    shown = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in shown]
    words = {i for i in shown if i == 0 or _words(row[i] for row in rows[1:])}
    out = []
    for row in rows:
        cells = [row[i].ljust(w) if i in words else row[i].rjust(w) for i, w in zip(shown, widths, strict=True)]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * width for width in widths))
    return out


def _words(cells: Iterable[str]) -> bool:
    """Whether a column holds words, which go left."""
    return any(cell[:1].isalpha() for cell in cells)


def span(ns: int) -> str:
    """A duration for people: ``850 µs``, ``12.3 ms``, ``4.1 s``."""
    for unit, size in (("s", 10**9), ("ms", 10**6)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns / 1000:.0f} µs"


def _span(percentiles: dict[str, int] | None) -> str:
    return f"{span(percentiles['p50'])} / {span(percentiles['p99'])}" if percentiles else ""
