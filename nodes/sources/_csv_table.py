"""Header, types and columns of a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nodes.sources import _times
from nodes.sources._cells import Cells, infer
from nodes.sources._records import Block, RecordReader
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.messages import Array, Column

if TYPE_CHECKING:
    from nodes.sources.csv import Config

SAMPLE = 1000
"""Rows on which types and the format of times are found."""


@dataclass(slots=True)
class Layout:
    """What the beginning of a file tells.

    :param offset: byte where the first row begins; ``line`` its line number.
    """

    names: list[str]
    sample: Block
    offset: int
    line: int

    def unknown(self, name: str) -> str:
        """What to say of a column that is not there."""
        return f"the file has no column {name!r}{did_you_mean(name, self.names)}"


def inspect(path: Path, columns: list[str] | None, skip: int, delimiter: str, encoding: str) -> Layout:
    """Read the header and a sample.

    :raises ConfigError: unreadable, empty, or a header that names a column twice.
    """
    try:
        with path.open("rb") as file:
            offset = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(offset)
            for _ in range(skip):
                offset += len(file.readline())
            reader = RecordReader(file, delimiter=delimiter, encoding=encoding, offset=offset, line=skip + 1)
            if columns is None:
                head = reader.read(1)
                if not len(head):
                    raise ConfigError(Problem(("path",), f"{path.name} is empty"))
                if head.bad:
                    raise ConfigError(
                        Problem(("path",), f"{path.name}, line {head.lines[0]}: no header: {head.bad[0]}")
                    )
                columns = [name.strip() or f"column{i + 1}" for i, name in enumerate(head.rows[0])]
            begin = (reader.offset, reader.line)
            sample = reader.read(SAMPLE)
    except OSError as error:
        raise ConfigError(Problem(("path",), f"cannot read {path}: {error.strerror}")) from None
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise ConfigError(
            Problem(("path",), f"two columns are named {min(twice)!r}; name them with 'columns' and 'skip'")
        )
    return Layout(columns, sample, *begin)


@dataclass(slots=True)
class Parsed:
    """Columns of the good rows of a block.

    :param record: int64 [n], index in the block of each row.
    :param ends: byte offset after each record of the block, bad ones too; ``lines``: line number after it.
    :param dead: the bad ones by their index, as a chunk takes them.
    """

    n: int
    columns: dict[str, Column]
    time: Array | None
    device: list[str | None] | None
    record: Array
    ends: list[int]
    lines: list[int]
    dead: dict[int, tuple[bytes, str, str, str]]


class Table:
    """Converts blocks of one file; types are fixed when it is made."""

    def __init__(self, config: Config, layout: Layout) -> None:
        self._width = len(layout.names)
        missing = frozenset(config.missing)
        where = {name: i for i, name in enumerate(layout.names)}
        good = [row for row in layout.sample.rows if len(row) == self._width]
        self._cells: dict[str, tuple[int, Cells]] = {}
        for name in config.selected(layout.names):
            at = where[name]
            kind = config.types.get(name) or infer([row[at] for row in good], missing, config.decimal)
            self._cells[name] = (at, Cells(kind, missing, config.decimal))
        self._time = None if config.time is None else where[config.time]
        self._device = None if config.device_column is None else where[config.device_column]
        self._zone = config.zone()
        self._form = config.time_format or (
            "iso" if self._time is None else _times.guess([r[self._time] for r in good])
        )

    def parse(self, block: Block, name: str) -> Parsed:
        """Columns of a block; ``name`` of the file is for the dead letters' position."""
        bad = dict(block.bad)
        if set(map(len, block.rows)) != {self._width}:
            for i, row in enumerate(block.rows):
                if len(row) != self._width:
                    bad.setdefault(i, f"{len(row)} cells where the header has {self._width}")
        found = self._convert(block.rows, bad)
        if found is None:
            self._faults(block.rows, bad)
            found = self._convert(block.rows, bad) or ({}, None, None)
        columns, time, device = found
        record = (
            np.arange(len(block)) if not bad else np.array([i for i in range(len(block)) if i not in bad], np.int64)
        )
        dead = {i: (block.raw[i], "bad-row", why, f"{name}:{block.lines[i]}") for i, why in sorted(bad.items())}
        lines = [n + max(raw.count(b"\n"), 1) for n, raw in zip(block.lines, block.raw, strict=True)]
        return Parsed(len(record), columns, time, device, record, block.ends, lines, dead)

    def _convert(
        self, rows: Sequence[Sequence[str]], bad: dict[int, str]
    ) -> tuple[dict[str, Column], Array | None, list[str | None] | None] | None:
        """All columns, or None if some cell is not of its column's type."""
        if bad:
            rows = [row for i, row in enumerate(rows) if i not in bad]
        if not rows:
            return {}, None, None
        across = list(zip(*rows, strict=True))
        try:
            time = None if self._time is None else _times.from_texts(across[self._time], self._form, self._zone)
            columns = {name: cells.column(across[at]) for name, (at, cells) in self._cells.items()}
        except (ValueError, OverflowError, Warning):
            return None
        device = None if self._device is None else [c.strip() or None for c in across[self._device]]
        return columns, time, device

    def _faults(self, rows: Sequence[Sequence[str]], bad: dict[int, str]) -> None:
        """Find the rows with a fault, one by one."""
        for i, row in enumerate(rows):
            if i in bad:
                continue
            for name, (at, cells) in self._cells.items():
                if why := cells.fault(row[at]):
                    bad[i] = f"column {name!r}: {why}"
            if self._time is not None:
                try:
                    _times.from_text(row[self._time], self._form, self._zone)
                except (ValueError, OverflowError) as error:
                    bad[i] = f"time: {error}"
