"""JSON lines appended to a file: one a message, or one a row."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from pydantic import Field

from nodes.operator import Context, Sink
from nodes.sinks import _json
from nodes.sinks._lines import FileOptions, LinesSink, identity, revised
from schemas.errors import RejectedError
from schemas.messages import Message


class Config(FileOptions):
    """Options of the ``jsonl`` sink."""

    each: _json.Each = Field("message", description="what one line is: a message, or a row of it")


def build(config: Config, context: Context) -> Sink:
    """A :class:`JsonlSink`."""
    return JsonlSink(config, context)


class _Revised(msgspec.Struct, frozen=True):
    revision: int = 0


class _Line(msgspec.Struct, frozen=True):
    id: str
    type: str = ""
    body: _Revised = _Revised()
    revision: int = 0


_decoder = msgspec.json.Decoder(_Line)


class JsonlSink(LinesSink):
    """See :mod:`nodes.sinks._json` for what a line looks like."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self._each = config.each

    def ident(self, line: bytes) -> str | None:
        try:
            found = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return revised(found.id, found.body.revision or found.revision) if found.type == "aggregate/1" else found.id

    def put(self, messages: Sequence[Message]) -> None:
        try:
            lines = self._lines(messages)
        except (TypeError, ValueError, OverflowError):
            self._one_by_one(messages)
        else:
            self.append(lines)

    def _lines(self, messages: Sequence[Message]) -> list[tuple[str, bytes]]:
        made = _json.lines(messages, self._each)
        return [(identity(messages[i]), line + b"\n") for i, line in made]

    def _one_by_one(self, messages: Sequence[Message]) -> None:
        """At least one cannot be said in JSON: leave that out."""
        lines: list[tuple[str, bytes]] = []
        rejected = []
        for i, message in enumerate(messages):
            try:
                lines += self._lines([message])
            except (TypeError, ValueError, OverflowError) as error:
                rejected.append((i, f"no JSON: {error}"))
        self.append(lines)
        if rejected:
            raise RejectedError(rejected)
