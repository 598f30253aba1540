"""Lines on the standard output: for people, or JSON for another program."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from nodes.operator import Context, Flow, Sink
from nodes.options import Options
from nodes.sinks import _json
from schemas.errors import RunError
from schemas.messages import Message


class Config(Options):
    """Options of the ``stdout`` sink."""

    format: Literal["text", "json"] = Field("text", description="text: a line for people; json: a JSON object a line")
    each: _json.Each = Field("row", description="what one line is: a row, or a whole message")

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {}


def build(config: Config, context: Context) -> Sink:
    """A :class:`StdoutSink`."""
    return StdoutSink(config)


class StdoutSink(Sink):
    """Writes in a thread: a reader that stands still stops this sink and nothing else."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, "stdout-sink")

    async def write(self, messages: Sequence[Message]) -> None:
        """:raises RunError: nobody reads any more."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write, messages)

    async def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _write(self, messages: Sequence[Message]) -> None:
        whole = self._config.each == "message"
        objects = [
            _json.plain(m, inline=0 if self._config.format == "text" else _json.INLINE) for m in messages if whole
        ]
        if not whole:
            objects = _json.records(messages)
        if self._config.format == "json":
            data = b"".join(_json.encode(o) + b"\n" for o in objects)
        else:
            data = "".join(_text(o) + "\n" for o in objects).encode("utf-8", "replace")
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except (BrokenPipeError, ValueError) as error:
            raise RunError("nobody reads the standard output any more") from error


def _text(thing: dict[str, Any]) -> str:
    """``06:00:00.000 line-3 temperature=21.5 label=ok``."""
    moment = thing["time"][11:23]
    body = thing.get("body")
    fields = {k: v for k, v in thing.items() if k not in _json.RESERVED} if body is None else {thing["type"]: body}
    return " ".join([moment, _clean(thing["source"]), *(f"{_clean(k)}={_value(v)}" for k, v in fields.items())])


def _value(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, dict):
        return "{" + " ".join(f"{_clean(str(k))}={_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list) and len(value) > 8:
        return f"[{' '.join(map(_value, value[:8]))} … {len(value)}]"
    return f"[{' '.join(map(_value, value))}]" if isinstance(value, list) else str(value).lower()


def _clean(text: str) -> str:
    """Without control characters: what a device calls itself must not steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
