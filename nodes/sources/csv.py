"""Readings from a CSV file, as fast as possible, at a rate, or at the speed they were recorded.

Resumes at the byte where it stood, also in a file that grew since. Rows that are none go to the dead letters.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import Field

from nodes.operator import Chunk, Context, Draft, Flow, Source
from nodes.options import Options
from nodes.sources import _files, _times
from nodes.sources._cells import CellType
from nodes.sources._csv_table import Layout, Parsed, Table, inspect
from nodes.sources._pace import EventTimes, Instant, Pace, Pacer, times_problem
from nodes.sources._records import RecordReader
from schemas.errors import ConfigError, Problem
from schemas.messages import Array, Readings
from schemas.rows import take
from schemas.units import Duration


class Config(Options):
    """Options of the ``csv`` source."""

    path: str = Field(description="the file")
    device: str | None = Field(None, description="what the readings speak of; the node's name if left out")
    device_column: str | None = Field(None, description="column that names the device of each row")
    split: bool = Field(False, description="one message for each device of a batch")
    time: str | None = Field(None, description="column of the event time")
    time_format: str | None = Field(
        None, description="iso, s, ms, us, ns (since 1970) or a strptime format; found on a sample if left out"
    )
    timezone: str | None = Field(None, description="zone of times that name none, e.g. Europe/Berlin; UTC if left out")
    start: Instant | Literal["now"] | None = Field(
        None, description="event time of the first row; recorded times are moved by as much"
    )
    interval: Duration | None = Field(None, description="event time between two rows of a file without times")
    columns: list[str] | None = Field(None, description="names of the columns of a file without a header")
    skip: int = Field(0, ge=0, description="lines before the header")
    fields: list[str] | None = Field(None, description="columns to send; all but time and device if left out")
    types: dict[str, CellType] = Field({}, description="types of columns: float, int, bool, text; others are found out")
    missing: list[str] = Field(["", "NA", "N/A", "null", "None", "-"], description="texts that stand for no value")
    delimiter: str = Field(",", min_length=1, max_length=1, description="character between two cells")
    decimal: Literal[".", ","] = Field(".", description="decimal sign of numbers")
    encoding: Literal["utf-8", "latin-1", "cp1252"] = Field("utf-8", description="encoding of the file")
    rate: Pace = Field("max", description="recorded, max, or rows per second")
    speed: float = Field(1.0, gt=0, description="factor on the recorded speed")
    max_gap: Duration | None = Field(None, description="longest wait between two rows at recorded speed")
    batch: int | None = Field(
        None, ge=1, le=100_000, description="rows a message; 1024 if left out, or what comes in 50 ms at a paced rate"
    )
    loop: bool = Field(False, description="begin again at the end, event times going on")

    def check(self, context: Context) -> None:
        layout = self.layout(context)
        known = layout.names
        problems = []
        for key, name in (("time", self.time), ("device_column", self.device_column)):
            if name is not None and name not in known:
                problems.append(Problem((key,), layout.unknown(name)))
        problems += [
            Problem(("fields", i), layout.unknown(n)) for i, n in enumerate(self.fields or []) if n not in known
        ]
        problems += [Problem(("types", n), layout.unknown(n), on_key=True) for n in self.types if n not in known]
        if self.rate == "recorded" and self.time is None:
            problems.append(Problem(("rate",), "recorded speed needs the 'time' column"))
        start = None if self.start == "now" else self.start
        if self.time is not None and self.interval is not None:
            problems.append(Problem(("interval",), "the file has times of its own ('time')"))
        elif self.time is None and (why := times_problem(start, self.interval, self.rate)):
            problems.append(Problem(("interval" if self.interval is not None else "start",), why))
        if self.timezone is not None:
            try:
                self.zone()
            except (ValueError, OSError, KeyError):
                problems.append(Problem(("timezone",), f"unknown time zone {self.timezone!r}"))
        form = self.time_format
        if form is not None and form != "iso" and form not in _times.UNITS and "%" not in form:
            problems.append(
                Problem(("time_format",), f"expected iso, s, ms, us, ns or a strptime format, got {form!r}")
            )
        if problems:
            raise ConfigError(*problems)

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs
        return {"out": Flow("readings/1", frozenset(self.selected(self.layout(context).names)))}

    def accepts(self) -> frozenset[str]:
        return frozenset()

    def layout(self, context: Context) -> Layout:
        """Header and first rows of the file.

        :raises ConfigError: it is not there, or has no usable header.
        """
        path = context.path(self.path)
        _files.must_exist(path, "path")
        return inspect(path, self.columns, self.skip, self.delimiter, self.encoding)

    def selected(self, names: Sequence[str]) -> list[str]:
        """The columns that are sent."""
        if self.fields is not None:
            return self.fields
        return [n for n in names if n not in (self.time, self.device_column)]

    def zone(self) -> Any:
        """The zone of times without one, or None."""
        from zoneinfo import ZoneInfo

        return None if self.timezone in (None, "UTC") else ZoneInfo(self.timezone or "")


def build(config: Config, context: Context) -> Source:
    """A :class:`CsvSource`."""
    return CsvSource(config, context)


class CsvSource(Source):
    """Reads blocks of rows in a thread, converts whole columns, and sends them in batches."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self._path: Path = context.path(config.path)
        self._device = config.device or context.node
        self._file: BinaryIO | None = None

    async def open(self, position: Any) -> str:
        return await asyncio.to_thread(self._open, position)

    def _open(self, position: Any) -> str:
        config, path = self._config, self._path
        if not path.is_file():
            raise _files.missing(path)
        size = path.stat().st_size
        stream = _files.digest(path)
        if position is not None:
            grown = size > position["size"] and _files.digest(path, position["size"]) == position["digest"]
            if stream != position["digest"] and not grown:
                position = None  # another file stands there now
        layout = config.layout(self._context)
        self._table = Table(config, layout)
        self._size, self._digest = size, stream
        self._stream = stream if position is None else str(position["stream"])
        self._begin = (layout.offset, layout.line)
        self._step = usual_step(self._table, layout)
        self._row, self._shift = 0, 0
        self._first: int | None = None
        self._last: int | None = None
        self._previous: int | None = None
        offset, line = self._begin
        if position is not None:
            offset, line, self._row = position["offset"], position["line"], position["row"]
            self._shift, self._first, self._last = position["shift"], position["first"], position["last"]
        self._file = path.open("rb")
        self._file.seek(offset)
        self._reader = self._records(offset, line)
        return self._stream

    def _records(self, offset: int, line: int) -> RecordReader:
        assert self._file is not None  # noqa: S101 - open() came first
        config = self._config
        return RecordReader(self._file, delimiter=config.delimiter, encoding=config.encoding, offset=offset, line=line)

    def _batch(self) -> int:
        """Rows a message. Depends on the config and the file only, so that ids mean the same rows after a restart."""
        config = self._config
        if config.batch is not None:
            return config.batch
        if config.rate == "max":
            return 1024
        rate = config.rate if isinstance(config.rate, float) else 1e9 * config.speed / max(self._step, 1)
        return min(max(int(rate / 20), 1), 1024)

    async def chunks(self) -> AsyncIterator[Chunk]:
        config, batch = self._config, self._batch()
        block_size = batch * max(1, 1024 // batch)
        pacer = Pacer()
        start = None if config.start == "now" else config.start
        events = EventTimes(start, config.interval, config.rate)
        elapsed = 0.0
        while True:
            part = await asyncio.to_thread(self._read, block_size)
            if part is None:
                if not config.loop or self._row == 0:
                    return
                self._again()
                continue
            table, block = part
            pending: list[Draft] = []
            base = self._row
            for low in range(0, block, batch):
                high = min(low + batch, block)
                index = np.flatnonzero((table.record >= low) & (table.record < high))
                times = None if table.time is None else self._moved(table.time[index])
                drafts = self._drafts(table, index, times, base + low, events)
                self._row = base + high
                if config.rate == "max":
                    pending += drafts
                    continue
                if times is None or config.rate != "recorded":
                    elapsed += (high - low) / float(config.rate if isinstance(config.rate, float) else 1.0)
                elif len(times):
                    elapsed += self._gap(times)
                await pacer.until(elapsed)
                dead = [letter for i, letter in table.dead.items() if low <= i < high]
                yield Chunk(drafts, self._position(table.ends[high - 1], table.lines[high - 1]), dead)
            if config.rate == "max":
                await asyncio.sleep(0)
                yield Chunk(pending, self._position(table.ends[-1], table.lines[-1]), list(table.dead.values()))

    def _read(self, count: int) -> tuple[Parsed, int] | None:
        block = self._reader.read(count)
        if not len(block):
            return None
        return self._table.parse(block, self._path.name), len(block)

    def _again(self) -> None:
        """Begin the file again, event times going on where they stood."""
        assert self._file is not None  # noqa: S101 - open() came first
        if self._first is not None and self._last is not None:
            self._shift += self._last - self._first + self._step
            self._first = self._last = None
        self._file.seek(self._begin[0])
        self._reader = self._records(*self._begin)

    def _moved(self, times: Array) -> Array:
        """Recorded times as they are sent; remembers the first and last for ``start`` and ``loop``."""
        if not len(times):
            return times
        if self._first is None:
            if self._config.start is not None and self._row == 0:
                start = time.time_ns() if self._config.start == "now" else self._config.start
                self._shift = start - int(times[0])
            self._first = int(times[0])
        self._previous = self._last
        self._last = max(int(times.max()), self._last if self._last is not None else int(times[0]))
        return times + self._shift if self._shift else times

    def _gap(self, times: Array) -> float:
        """Seconds to wait before rows with these times are due, after those before them."""
        before = times[0] if self._previous is None else self._previous + self._shift
        gaps = np.diff(times, prepend=before).clip(0, self._config.max_gap)
        return float(gaps.sum()) / 1e9 / self._config.speed

    def _drafts(self, table: Parsed, index: Array, times: Array | None, row: int, events: EventTimes) -> list[Draft]:
        """One batch as messages: one, or one for each device."""
        if not len(index):
            return []
        devices = None if table.device is None else [d or self._device for d in take(table.device, index)]
        whole = len(index) == table.n
        columns = table.columns if whole else {name: take(c, index) for name, c in table.columns.items()}
        if times is None:
            moment = events.at(row)
            if len(index) > 1 and self._config.start not in (None, "now"):
                times = moment + (table.record[index] - table.record[index[0]]) * (events.at(row + 1) - moment)
        else:
            moment = int(times[0])
        if not self._config.split or devices is None:
            one = devices is not None and len(set(devices)) == 1
            source = devices[0] if one and devices is not None else self._device
            body = Readings(n=len(index), columns=columns, time=times, source=None if one else devices)
            return [Draft(source, moment, body, str(row))]
        names, which = np.unique(np.array(devices, object).astype(str), return_inverse=True)
        drafts = []
        for i, name in enumerate(names.tolist()):
            pick = np.flatnonzero(which == i)
            own = None if times is None else times[pick]
            body = Readings(n=len(pick), columns={k: take(c, pick) for k, c in columns.items()}, time=own)
            drafts.append(Draft(name, moment if own is None else int(own[0]), body, f"{row}:{name}"))
        return drafts

    def _position(self, offset: int, line: int) -> dict[str, Any]:
        return {
            "stream": self._stream,
            "digest": self._digest,
            "size": self._size,
            "offset": offset,
            "line": line,
            "row": self._row,
            "shift": self._shift,
            "first": self._first,
            "last": self._last,
        }

    async def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def usual_step(table: Table, layout: Layout) -> int:
    """Usual time between two rows of the sample, ns; 1 s where it has no times."""
    times = table.parse(layout.sample, "").time if len(layout.sample) else None
    if times is None or len(times) < 2:
        return 10**9
    steps = np.diff(times)
    steps = steps[steps > 0]
    return int(np.median(steps)) if len(steps) else 10**9
