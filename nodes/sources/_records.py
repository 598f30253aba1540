"""Records of a CSV file with the byte where each ends, so that reading can go on exactly there after a restart."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from typing import BinaryIO

MAX_LINE = 2**20
"""Longest line that is looked at; of a longer one the beginning goes to the dead letters."""
MAX_LINES = 100
"""Most lines of one record (line breaks inside quotes); more means that a quote was never closed."""


@dataclass(slots=True)
class Block:
    """Some records in a row.

    :param rows: cells of each record.
    :param lines: number of each record's first line in the file, from 1.
    :param ends: byte offset after each record.
    :param raw: bytes of each record.
    :param bad: index of a record that is none → why; its row is empty.
    """

    rows: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


class RecordReader:
    """Reads records from a binary file that stands at ``offset``; blank lines are no records."""

    def __init__(self, file: BinaryIO, *, delimiter: str, encoding: str, offset: int = 0, line: int = 1) -> None:
        self._file = file
        self._delimiter = delimiter
        self._encoding = encoding
        self._pending: list[bytes] = []
        self.offset = offset
        self.line = line

    def read(self, count: int) -> Block:
        """The next records, at most ``count``; empty at the end of the file. Blocks on the disk."""
        block = Block()
        while not block:
            lines = self._pending[:count]
            if len(lines) < count:
                lines += islice(iter(partial(self._file.readline, MAX_LINE), b""), count - len(lines))
            self._pending[:count] = []
            if not lines:
                break
            if not self._plain(lines, block):
                self._pending[:0] = lines
                self._careful(count, block)
        return block

    def _plain(self, lines: list[bytes], block: Block) -> bool:
        """One record a line, no quotes: all at once. False, and nothing done, where that does not hold."""
        data = b"".join(lines)
        if b'"' in data or data.count(b"\n") < len(lines) - 1 or len(lines[-1]) >= MAX_LINE:
            return False
        try:
            rows = list(csv.reader(data.decode(self._encoding).split("\n"), delimiter=self._delimiter))
        except (csv.Error, UnicodeDecodeError):
            return False
        rows = rows[: len(lines)]  # after a last line break one empty row more
        if len(rows) < len(lines):
            return False
        ends = list(accumulate(map(len, lines), initial=self.offset))
        numbers = range(self.line, self.line + len(lines))
        if all(rows):
            block.rows, block.lines, block.ends, block.raw = rows, list(numbers), ends[1:], lines
        else:
            keep = [i for i, row in enumerate(rows) if row]
            block.rows = [rows[i] for i in keep]
            block.lines = [numbers[i] for i in keep]
            block.ends = [ends[i + 1] for i in keep]
            block.raw = [lines[i] for i in keep]
        self.offset = ends[-1]
        self.line += len(lines)
        return True

    def _careful(self, count: int, block: Block) -> None:
        """Record by record: quotes, line breaks in them, undecodable and endless lines."""
        while len(block) < count and (first := self._next()):
            taken = [first]
            why = ""
            row: list[str] = []
            length = len(first)
            if length >= MAX_LINE and not first.endswith(b"\n"):
                why = f"longer than {MAX_LINE} bytes"
                taken = [first[:1024]]
                while rest := self._next():
                    length += len(rest)
                    if rest.endswith(b"\n"):
                        break
            else:
                try:
                    row = next(csv.reader(self._texts(taken), delimiter=self._delimiter), [])
                except (csv.Error, UnicodeDecodeError) as error:
                    why = str(error)
                if len(taken) > 1 and (why or sum(t.count(b'"') for t in taken) % 2):
                    self._pending[:0] = taken[1:]  # the quote belongs to its own line; what follows may be sound
                    taken, row, why = [first], [], why or "a quote is not closed"
                length = sum(map(len, taken))
            self.offset += length
            if row or why:
                if why:
                    block.bad[len(block)] = why
                block.rows.append(row)
                block.lines.append(self.line)
                block.ends.append(self.offset)
                block.raw.append(b"".join(taken))
            self.line += len(taken)

    def _next(self) -> bytes:
        return self._pending.pop(0) if self._pending else self._file.readline(MAX_LINE)

    def _texts(self, taken: list[bytes]) -> Iterator[str]:
        """Lines for one record; the reader takes as many as it needs, and ``taken`` knows them."""
        yield taken[0].decode(self._encoding)
        while len(taken) < MAX_LINES and (line := self._next()):
            taken.append(line)
            yield line.decode(self._encoding)
