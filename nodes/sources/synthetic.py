"""Readings or frames made up by rule: the same for the same options, with anomalies where they are asked for.

For trying out a topology and for load tests. Noise comes from a counter-based generator (Philox) in blocks of fixed
length, so that any row can be made without those before it, whatever the batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nodes.operator import Chunk, Context, Draft, Flow, Source
from nodes.options import Options
from nodes.sources._pace import Instant, Pacer
from schemas.errors import ConfigError, Problem
from schemas.messages import Column, Frame, Readings
from schemas.units import Duration, Rate

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1024
"""Rows whose noise is drawn together."""
MESSAGES_AHEAD = 256
ROWS_AHEAD = 65536
"""Most messages, and rows, that are made in one go where nothing sets a pace."""


class Signal(BaseModel):
    """One field: ``offset`` + a shape + noise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["sine", "ramp", "walk", "constant", "noise"] = Field(description="shape of the signal over time")
    offset: float = Field(0.0, description="added to every value")
    amplitude: float = Field(
        1.0, description="of a sine; height of a ramp; step (standard deviation) of a walk or of noise"
    )
    period: Duration = Field(60 * 10**9, gt=0, description="of a sine or ramp")
    noise: float = Field(0.0, ge=0, description="standard deviation of what is added to each value")


class Anomalies(BaseModel):
    """Faults put in on purpose; rows that have one say so in the field ``anomaly``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(ge=2, description="rows from the beginning of one to the beginning of the next")
    length: int = Field(1, ge=1, description="rows that each lasts")
    kind: Literal["spike", "drift", "stuck", "missing"] = Field("spike", description="what happens")
    magnitude: float = Field(10.0, description="height of a spike, or of the end of a drift")
    fields: list[str] | None = Field(None, description="fields that have them; all if left out")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length >= self.every:
            raise ValueError(f"'length' {self.length} leaves no sound row of 'every' {self.every}")
        return self


class Pictures(BaseModel):
    """Frames of a bright square that moves over a grey ramp; its place is in the attributes x and y."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(64, ge=8, le=8192, description="pixels")
    height: int = Field(48, ge=8, le=8192, description="pixels")
    square: int = Field(12, ge=1, description="side of the square, pixels; at most the smaller side of the frame")
    colour: bool = Field(True, description="RGB; otherwise grey")


class Config(Options):
    """Options of the ``synthetic`` source."""

    signals: dict[str, Signal] = Field(
        {"value": Signal.model_validate({"kind": "sine"})}, description="fields and their shapes"
    )
    frames: Pictures | None = Field(None, description="make frames instead of readings")
    anomalies: Anomalies | None = Field(None, description="faults in the readings")
    device: str | None = Field(None, description="what they speak of; the node's name if left out")
    devices: int = Field(
        1, ge=1, le=100_000, description="how many devices; of several each has its number at its name's end"
    )
    interval: Duration | None = Field(None, gt=0, description="event time between rows; one period of 'rate', or 1s")
    rate: Rate | None = Field(None, description="rows per second of each device; as fast as they are taken if left out")
    count: int | None = Field(None, ge=1, description="rows of each device; endless if left out")
    batch: int | None = Field(None, ge=1, le=100_000, description="rows a message; 1 if there is a rate, or else 1024")
    start: Instant | None = Field(
        None, description="event time of the first row; the clock at the first start if left out"
    )
    seed: int = Field(0, ge=0, description="of the noise")

    def check(self, context: Context) -> None:
        del context
        if self.anomalies is not None and self.frames is not None:
            raise ConfigError(Problem(("anomalies",), "frames have no anomalies"))
        if self.frames is not None and "signals" in self.model_fields_set:
            raise ConfigError(Problem(("signals",), "either 'signals' or 'frames'"))
        if not self.signals:
            raise ConfigError(Problem(("signals",), "expected at least one field"))
        if self.anomalies is not None:
            if "anomaly" in self.signals:
                raise ConfigError(
                    Problem(("signals", "anomaly"), "the name 'anomaly' is taken by 'anomalies'", on_key=True)
                )
            for i, name in enumerate(self.anomalies.fields or ()):
                if name not in self.signals:
                    raise ConfigError(Problem(("anomalies", "fields", i), f"no signal is named {name!r}"))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        if self.frames is not None:
            return {"out": Flow("frame/1")}
        return {"out": Flow("readings/1", frozenset(self.signals) | ({"anomaly"} if self.anomalies else frozenset()))}

    def accepts(self) -> frozenset[str]:
        return frozenset()


def build(config: Config, context: Context) -> Source:
    """A :class:`SyntheticSource`."""
    return SyntheticSource(config, context)


class SyntheticSource(Source):
    """Makes rows ``[first, last)`` of every device in one go; a message holds ``batch`` rows of one device."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        name = config.device or context.node
        width = len(str(config.devices - 1))
        self._devices = [name] if config.devices == 1 else [f"{name}-{i:0{width}}" for i in range(config.devices)]
        self._numbered = list(enumerate(self._devices))
        self._step = config.interval or (round(1e9 / config.rate) if config.rate else 10**9)

    async def open(self, position: Any) -> str:
        config = self._config
        rule = config.model_dump_json(exclude={"rate", "count", "batch"}) + "".join(self._devices[:1])
        fits = position is not None and position["rule"] == _short(rule)
        self._rule = _short(rule)
        self._row = int(position["row"]) if fits else 0
        self._start = int(position["start"]) if fits else (config.start if config.start is not None else time.time_ns())
        self._walked: dict[int, tuple[int, float]] = {}
        return _short(f"{rule}{self._start}")

    async def chunks(self) -> AsyncIterator[Chunk]:
        config = self._config
        batch = config.batch or (1 if config.rate or config.frames else 1024)
        pacer, began = Pacer(), self._row
        end = config.count
        ahead = batch if config.rate is not None else batch * self._ahead(batch)
        while end is None or self._row < end:
            first = self._row
            last = first + ahead if end is None else min(first + ahead, end)
            if config.rate is not None:
                await pacer.until((last - 1 - began) / config.rate)
            else:
                await asyncio.sleep(0)
            drafts: list[Draft] = []
            if config.frames is not None:
                for row in range(first, last):
                    drafts += [self._frame(config.frames, number, device, row) for number, device in self._numbered]
            else:
                made = [self._table(number, first, last) for number, _ in self._numbered]
                for begin in range(first, last, batch):
                    rows = slice(begin - first, min(begin + batch, last) - first)
                    drafts += [
                        self._readings(number, device, begin, rows, *made[number]) for number, device in self._numbered
                    ]
            self._row = last
            yield Chunk(drafts, {"rule": self._rule, "start": self._start, "row": last})

    def _ahead(self, batch: int) -> int:
        """Batches of every device that are made in one go where nothing sets a pace: a call costs more than its rows."""
        messages = MESSAGES_AHEAD // len(self._devices)
        return max(
            1,
            messages if self._config.frames is not None else min(messages, ROWS_AHEAD // (batch * len(self._devices))),
        )

    def _table(self, number: int, first: int, last: int) -> tuple[NDArray[np.int64], dict[str, Column]]:
        """Times and columns of rows [first, last) of one device."""
        config = self._config
        rows = np.arange(first, last)
        elapsed = rows * self._step
        columns: dict[str, Column] = {}
        for place, (name, signal) in enumerate(config.signals.items()):
            lane = (number << 16) | place
            values = self._shape(signal, elapsed, lane, first, last)
            if signal.noise:
                values = values + signal.noise * self._noise(lane | 1 << 48, first, last)
            columns[name] = values
        if config.anomalies is not None:
            columns["anomaly"] = self._spoil(config.anomalies, columns, rows, number)
        return self._start + elapsed, columns

    def _readings(
        self, number: int, device: str, first: int, rows: slice, times: NDArray[np.int64], columns: dict[str, Column]
    ) -> Draft:
        """One message: these rows of a device's table, the first of which is row ``first`` of the stream."""
        own = times[rows]
        body = Readings(
            n=len(own),
            columns={name: column[rows] for name, column in columns.items()},
            time=None if len(own) == 1 else own,
        )
        return Draft(device, int(own[0]), body, f"{first}:{number}" if len(self._devices) > 1 else str(first))

    def _shape(
        self, signal: Signal, elapsed: NDArray[np.int64], lane: int, first: int, last: int
    ) -> NDArray[np.float64]:
        phase = (elapsed % signal.period) / signal.period
        match signal.kind:
            case "sine":
                return signal.offset + signal.amplitude * np.sin(2 * np.pi * phase)
            case "ramp":
                return signal.offset + signal.amplitude * phase
            case "walk":
                return signal.offset + signal.amplitude * self._walk(lane, first, last)
            case "noise":
                return signal.offset + signal.amplitude * self._noise(lane, first, last)
            case "constant":
                return np.full(last - first, signal.offset)

    def _noise(self, lane: int, first: int, last: int) -> NDArray[np.float64]:
        """Standard normal numbers of rows [first, last) of one lane (a field of a device)."""
        blocks = range(first // BLOCK, (last - 1) // BLOCK + 1)
        drawn = [_block(self._config.seed, lane, block) for block in blocks]
        values = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
        begin = first - blocks.start * BLOCK
        return values[begin : begin + last - first]

    def _walk(self, lane: int, first: int, last: int) -> NDArray[np.float64]:
        """Sum of the steps so far. Where it stood is kept by whole blocks, so that sums add in one order only."""
        block, total = self._walked.get(lane, (0, 0.0))
        if block > first // BLOCK:
            block, total = 0, 0.0
        for passed in range(block, first // BLOCK):
            total += float(np.sum(_block(self._config.seed, lane, passed)))
        parts = []
        self._walked[lane] = (first // BLOCK, total)
        for current in range(first // BLOCK, (last - 1) // BLOCK + 1):
            steps = _block(self._config.seed, lane, current)
            parts.append(total + np.cumsum(steps))
            total += float(np.sum(steps))
        begin = first % BLOCK
        return np.concatenate(parts)[begin : begin + last - first]

    def _spoil(
        self, anomalies: Anomalies, columns: dict[str, Column], rows: NDArray[np.int64], number: int
    ) -> NDArray[np.bool_]:
        """Put the faults in; each device has its own moments, never in the first rows."""
        offset = (number * 7919 + anomalies.every - 1) % anomalies.every
        since = (rows - offset) % anomalies.every
        hit: NDArray[np.bool_] = (since < anomalies.length) & (rows >= offset)
        for name in anomalies.fields or list(self._config.signals):
            values = np.array(columns[name], np.float64)
            match anomalies.kind:
                case "spike":
                    values[hit] += anomalies.magnitude
                case "drift":
                    values[hit] += anomalies.magnitude * (since[hit] + 1) / anomalies.length
                case "stuck":
                    values[hit] = self._config.signals[name].offset
                case "missing":
                    values[hit] = np.nan
            columns[name] = values
        return hit

    def _frame(self, picture: Pictures, number: int, device: str, row: int) -> Draft:
        height, width = picture.height, picture.width
        side = min(picture.square, height, width)
        x = (row + number * 13) % (width - side + 1)
        y = (row // 3 + number * 7) % (height - side + 1)
        image = np.broadcast_to(np.linspace(0, 127, width).astype(np.uint8), (height, width)).copy()
        image[y : y + side, x : x + side] = 255
        layout = "HW"
        if picture.colour:
            image = np.repeat(image[:, :, None], 3, axis=2)
            layout = "HWC"
        attributes: dict[str, Any] = {"x": x, "y": y, "side": side, "index": row}
        body = Frame(data=image, layout=layout, rate=1e9 / self._step, attributes=attributes)
        key = f"{row}:{number}" if len(self._devices) > 1 else str(row)
        return Draft(device, self._start + row * self._step, body, key)


@lru_cache(maxsize=256)
def _block(seed: int, lane: int, block: int) -> NDArray[np.float64]:
    """The normal numbers of one block of one lane."""
    key = np.array([seed & (2**64 - 1), lane], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block])).standard_normal(BLOCK)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
