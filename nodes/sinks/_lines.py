"""What the ``jsonl`` and ``csv`` sinks share: options, the writing thread, repeats."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import Field

from nodes.operator import Context, Flow, Sink
from nodes.options import Options
from nodes.sinks._append import AppendFile, Recent
from schemas.errors import ConfigError, Problem, RejectedError
from schemas.messages import Aggregate, Message
from schemas.units import Duration, Size


class FileOptions(Options):
    """Options of sinks that append to a file."""

    path: str = Field(description="the file; made if it is not there, appended to if it is")
    sync: bool = Field(
        True, description="each write survives a power cut; otherwise it survives a crash of the process"
    )
    rotate_size: Size | None = Field(None, description="size after which a new part begins; never if left out")
    rotate_every: Duration | None = Field(None, description="time after which a new part begins; never if left out")
    keep: int | None = Field(None, ge=1, description="most full parts that stay, the oldest go; all if left out")

    def check(self, context: Context) -> None:
        path = context.path(self.path)
        if path.is_dir():
            raise ConfigError(Problem(("path",), f"a folder, not a file: {path}"))
        for key in ("rotate_size", "rotate_every"):
            if getattr(self, key) == 0:
                raise ConfigError(Problem((key,), "expected more than 0"))
        if self.keep is not None and self.rotate_size is None and self.rotate_every is None:
            raise ConfigError(Problem(("keep",), "there are no parts without 'rotate_size' or 'rotate_every'"))

    def whole(self) -> str | None:
        return "each would write the file"

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {}


def identity(message: Message) -> str:
    """What a line belongs to: the message's id, and the revision of an aggregate that was revised."""
    body = message.body
    return revised(message.id, body.revision if isinstance(body, Aggregate) else 0)


def revised(ident: str, revision: int) -> str:
    """Id of a message in this revision."""
    return f"{ident}#{revision}" if revision else ident


class LinesSink(Sink):
    """Appends lines in one thread. A message that was written before is recognised among the newest."""

    def __init__(self, options: FileOptions, context: Context) -> None:
        self._file = AppendFile(
            context.path(options.path),
            sync=options.sync,
            max_size=options.rotate_size,
            max_age=options.rotate_every,
            keep=options.keep,
        )
        self._recent = Recent()
        self._thread = ThreadPoolExecutor(1, "lines-sink")

    @abstractmethod
    def ident(self, line: bytes) -> str | None:
        """The :func:`identity` of the message that a line of the file belongs to; None: it is no line of ours."""

    @abstractmethod
    def put(self, messages: Sequence[Message]) -> None:
        """Write messages by :meth:`append`."""

    def begun(self) -> None:
        """The file was opened; its lines come next, by :meth:`ident`."""

    async def open(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def write(self, messages: Sequence[Message]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, messages)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._file.close)
        self._thread.shutdown(wait=False)

    def _open(self) -> None:
        lines = self._file.open()
        self._recent = Recent()
        self.begun()
        for line in lines:
            if (ident := self.ident(line)) is not None:
                self._recent.add(ident)

    def _write(self, messages: Sequence[Message]) -> None:
        if not self._file.usable:
            self._open()
        if self._file.due():
            self._file.rotate()
        first: dict[str, int] = {}
        for i, message in enumerate(messages):
            first.setdefault(identity(message), i)
        index = list(first.values())
        try:
            self.put([messages[i] for i in index])
        except RejectedError as error:
            raise RejectedError([(index[i], why) for i, why in error.rejected]) from None

    def append(self, lines: Sequence[tuple[str, bytes]], head: bytes = b"") -> None:
        """Append what is not there yet of lines (:func:`identity`, line); ``head`` first if the file is empty."""
        fresh = self._recent.new(lines)
        out = [line for _, line in fresh]
        if out and self._file.empty and head:
            out.insert(0, head)
        self._file.append(out)
        for ident, _ in fresh:
            self._recent.add(ident)
