"""Rows appended to a CSV file; a field that is new begins a new part with a new header.

Columns: ``id``, ``row``, ``source``, ``time`` (ISO 8601), then the fields in the order they came. A line break inside a
text is written as ``\\n``, so that one row is one line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from nodes.operator import Context, Sink
from nodes.sinks import _json
from nodes.sinks._lines import FileOptions, LinesSink, identity, revised
from schemas.errors import RejectedError, RunError
from schemas.messages import Aggregate, Message
from schemas.rows import ROW_TYPES, Rows, rows

KEYS = ("id", "row", "source", "time")


class Config(FileOptions):
    """Options of the ``csv`` sink."""

    delimiter: str = Field(",", min_length=1, max_length=1, description="character between two cells")

    def accepts(self) -> frozenset[str]:
        return ROW_TYPES


def build(config: Config, context: Context) -> Sink:
    """A :class:`CsvSink`."""
    return CsvSink(config, context)


class CsvSink(LinesSink):
    """The header of a file that is there is kept as long as it has all fields."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self._delimiter = config.delimiter
        self._header: list[str] = []
        self._revision: int | None = None

    def ident(self, line: bytes) -> str | None:
        try:
            row = next(csv.reader([line.decode("utf-8", "replace")], delimiter=self._delimiter), [""])
        except csv.Error:
            return None
        if row[0] == "id":
            self._begins(row)
            return None
        at = self._revision
        return revised(row[0], int(row[at]) if at is not None and at < len(row) and row[at].isdecimal() else 0)

    def begun(self) -> None:
        self._header = []
        if self._file.empty:
            return
        with self._file.path.open(encoding="utf-8", errors="replace") as file:
            header = next(csv.reader(file, delimiter=self._delimiter), [])
        if tuple(header[: len(KEYS)]) != KEYS:
            raise RunError(f"{self._file.path} is there and is no file of ours: its header begins with {header[:4]}")
        self._header = header
        self._begins(header)

    def _begins(self, header: list[str]) -> None:
        """Where lines below this header have an aggregate's revision."""
        aggregates = {"revision", "key", "count", "start", "end"} <= set(header)
        self._revision = header.index("revision") if aggregates else None

    def put(self, messages: Sequence[Message]) -> None:
        able = [m for m in messages if m.type in ROW_TYPES]
        if able:
            self._put(able)
        if len(able) < len(messages):
            raise RejectedError(
                [(i, f"{m.type} has no rows") for i, m in enumerate(messages) if m.type not in ROW_TYPES]
            )

    def _put(self, messages: Sequence[Message]) -> None:
        table = rows(messages)
        if not table.n:
            return
        columns = _json.values(table)
        bodies = [m.body for m in messages]
        if any(isinstance(b, Aggregate) for b in bodies):
            revisions = [b.revision if isinstance(b, Aggregate) else 0 for b in bodies]
            columns["revision"] = [revisions[i] for i in table.message.tolist()]
        header = self._header or list(KEYS)
        if lacking := [name for name in map(_flat, columns) if name not in header]:
            if not self._file.empty:
                self._file.rotate()
            header = [*header, *lacking]
        self._header = header
        self.append(self._lines(messages, table, columns), self._line([self._header]))

    def _lines(
        self, messages: Sequence[Message], table: Rows, columns: dict[str, list[Any]]
    ) -> list[tuple[str, bytes]]:
        ids = [messages[i].id for i in table.message.tolist()]
        cells: dict[str, list[Any]] = {
            "id": ids,
            "row": _json.row_numbers(table).tolist(),
            "source": table.source,
            "time": _json.iso_all(table.time),
            **{_flat(name): [_cell(v) for v in column] for name, column in columns.items()},
        }
        nothing = [""] * table.n
        across = zip(*(cells.get(name, nothing) for name in self._header), strict=True)
        text = self._line(across)
        own = [identity(messages[i]) for i in table.message.tolist()]
        return list(zip(own, text.splitlines(keepends=True), strict=True))

    def _line(self, table: Any) -> bytes:
        out = io.StringIO()
        csv.writer(out, delimiter=self._delimiter, lineterminator="\n").writerows(table)
        return out.getvalue().encode("utf-8", "replace")


def _flat(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n") if "\n" in text or "\r" in text else text


def _cell(value: Any) -> Any:
    """A value as a cell: nothing for what is missing, ``true`` and ``false``, floats in their shortest exact form."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _flat(value) if isinstance(value, str) else value
