"""What sources of stored frames (``images``, ``arrays``) share: options of time and pace, and the loop that sends."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import Field

from nodes.operator import Chunk, Context, Draft, Flow, Source
from nodes.options import Options
from nodes.sources._pace import EventTimes, Instant, Pacer, times_problem
from schemas.errors import ConfigError, Problem
from schemas.messages import Frame
from schemas.units import Duration, Rate

AHEAD = 256
"""Most frames that are read in one go where nothing sets a pace,"""
AHEAD_FOR = 0.003
"""and seconds after which no more are: a thread of its own pays for some work only, and a frame is not to wait long."""


class StoredFrames(Options):
    """Options of sources of stored frames."""

    device: str | None = Field(None, description="what the frames speak of; the node's name if left out")
    rate: Rate | None = Field(None, description="frames per second; as fast as the consumers take them if left out")
    start: Instant | None = Field(None, description="event time of the first frame; the clock at reading if left out")
    interval: Duration | None = Field(
        None, description="event time between two frames; one period of 'rate' if left out"
    )
    count: int | None = Field(None, ge=1, description="most frames of one pass; all if left out")
    loop: bool = Field(False, description="begin again at the end")

    def check(self, context: Context) -> None:
        del context
        if why := times_problem(self.start, self.interval, self.rate):
            raise ConfigError(Problem(("interval" if self.start is None else "start",), why))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {"out": Flow("frame/1")}

    def accepts(self) -> frozenset[str]:
        return frozenset()


class StoredFramesSource(Source):
    """Sends the frames that :meth:`load` finds and :meth:`read` reads, from where it stood."""

    def __init__(self, options: StoredFrames, context: Context) -> None:
        self._options = options
        self._device = options.device or context.node

    @abstractmethod
    def load(self) -> tuple[str, int]:
        """Find the frames: name of the stream, and how many there are. In a thread."""

    @abstractmethod
    def read(self, index: int) -> tuple[Frame, int | None] | tuple[bytes, str, str, str]:
        """Frame ``index`` and its own time, if it has one; or a dead letter. In a thread."""

    def _read_all(self, numbers: range) -> list[tuple[Frame, int | None] | tuple[bytes, str, str, str]]:
        """The first of these frames, at least one: as many as there is time for."""
        until = time.monotonic() + AHEAD_FOR
        answers = []
        for i in numbers:
            answers.append(self.read(i % self._total))
            if time.monotonic() >= until:
                break
        return answers

    async def open(self, position: Any) -> str:
        self._stream, total = await asyncio.to_thread(self.load)
        self._total = min(total, self._options.count or total)
        fits = position is not None and position["stream"] == self._stream
        self._number = int(position["number"]) if fits else 0
        return self._stream

    async def chunks(self) -> AsyncIterator[Chunk]:
        options, total = self._options, self._total
        events = EventTimes(options.start, options.interval, options.rate)
        pacer = Pacer()
        began = self._number
        while total and (options.loop or self._number < total):
            ahead = 1 if options.rate is not None else AHEAD
            last = self._number + ahead if options.loop else min(self._number + ahead, total)
            numbers = range(self._number, last)
            answers = await asyncio.to_thread(self._read_all, numbers)
            drafts, dead = [], []
            last = numbers.start + len(answers)
            for number, answer in zip(numbers, answers, strict=False):  # there may have been time for fewer
                if len(answer) == 2:
                    frame, own = answer
                    moment = events.at(number) if own is None else own
                    drafts.append(Draft(self._device, moment, frame, str(number)))
                else:
                    dead.append(answer)
            if options.rate is not None:
                await pacer.until((self._number - began) / options.rate)
                if options.start is None:  # the clock when it is sent, not when it was read ahead
                    drafts = [Draft(d.source, events.at(0), d.body, d.key) for d in drafts]
            else:
                await asyncio.sleep(0)
            self._number = last
            yield Chunk(drafts, {"stream": self._stream, "number": last}, dead)
