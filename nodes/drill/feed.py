"""Plays the devices of an MQTT source: publishes what its options say that they publish, and counts it."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import Any

import msgspec

from broker.bus import Bus, Publication
from nodes.sources._mapping import steps_of
from nodes.sources.mqtt import Config

_PER_SECOND = 20.0
_BAD = (b"\xff\xfe\x00", b'{"value": ', b"\x91" * 2000, b"")


class Feed:
    """Publishes at QoS 1 until cancelled; each message has a number of its own in every field.

    :param config: options of the source.
    :ivar sent: messages that the broker has acknowledged: from then on they are not to be lost.
    :ivar bad: payloads that are none of the source's format.
    """

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self.sent = 0
        self.bad = 0
        self._config = config
        self._factor = 1.0
        self._bus: Bus | None = None
        self._topics = [_filled(text) for text in config.topics]

    def hurry(self, factor: float) -> None:
        """So many times the usual rate, from now on."""
        self._factor = factor

    async def run(self, bus: Bus) -> None:
        """Publish for ever."""
        self._bus = bus
        loop = asyncio.get_running_loop()
        due = loop.time()
        for number in count():
            topic = self._topics[number % len(self._topics)]
            receipt = await bus.publish([Publication(topic, self.payload(number), qos=1)])
            receipt.add_done_callback(self._acknowledged)
            due = max(due + 1 / (_PER_SECOND * self._factor), loop.time() - 1.0)
            await asyncio.sleep(max(0.0, due - loop.time()))

    def _acknowledged(self, receipt: asyncio.Future[None]) -> None:
        if not receipt.cancelled() and receipt.exception() is None:
            self.sent += 1

    async def send_bad(self) -> int:
        """Publish what the source cannot read; how many will be dead letters."""
        if self._bus is None:
            return 0
        bad = _BAD if self._config.format in {"json", "msgpack"} else (b"\xff\xfe", b"\xc3")
        await (await self._bus.publish([Publication(self._topics[0], payload, qos=1) for payload in bad]))
        self.bad += len(bad)
        return len(bad)

    def payload(self, number: int) -> bytes:
        """One message of the devices."""
        config = self._config
        if config.format in {"number", "text"}:
            return str(number).encode()
        record: Any = {}
        for path in [*(config.fields or {"": f"$.{config.field}"}).values(), config.device or "", config.time or ""]:
            if path.startswith("$"):
                record = _put(record, steps_of(path), self._value(path, number))
        if config.rows is not None:
            record = _put({}, steps_of(config.rows), [record])
        encode = msgspec.json.encode if config.format == "json" else msgspec.msgpack.encode
        return encode(record)

    def _value(self, path: str, number: int) -> Any:
        if path == self._config.time:
            now = time.time_ns()
            unit = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}.get(self._config.time_unit or "ms")
            if unit is None:
                return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now / 1e9))
            return now // unit
        if path == self._config.device:
            return "drill"
        field = next((name for name, own in (self._config.fields or {}).items() if own == path), "")
        match self._config.types.get(field):
            case "text":
                return str(number)
            case "bool":
                return number % 2 == 0
            case _:
                return number


def _filled(text: str) -> str:
    """A topic that a filter matches."""
    return "/".join("drill" if level in {"+", "#"} else level for level in text.split("/"))


def _put(record: Any, steps: list[str | int], value: Any) -> Any:
    """``record`` with a value at a path; maps and lists on the way are made."""
    if not steps:
        return value
    first, rest = steps[0], steps[1:]
    if isinstance(first, int):
        items = list(record) if isinstance(record, list) else []
        at = first if first >= 0 else max(0, len(items) + first)
        items += [0] * (at + 1 - len(items))
        items[at] = _put(items[at], rest, value)
        return items
    out = dict(record) if isinstance(record, dict) else {}
    out[first] = _put(out.get(first), rest, value)
    return out
