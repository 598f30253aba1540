"""Messages to topics of any broker: msgpack as on the wire, or JSON for systems that speak no msgpack.

A write returns when the broker has acknowledged every publication.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from broker.bus import Bus, Publication
from nodes.operator import Context, Flow, Sink
from nodes.options import Options
from nodes.sinks import _json
from schemas import codec
from schemas.errors import (
    BusError,
    ClosedError,
    ConfigError,
    ConnectError,
    DeniedError,
    PacketTooLargeError,
    Problem,
    PublishFailedError,
    RejectedError,
    SinkAwayError,
    did_you_mean,
)
from schemas.messages import Message

PIECE = 16
"""Messages made to publications before others get their turn of the event loop."""
_TOPICS = 4096
"""Topics that are remembered."""
PLACES = ("source", "node", "topology", "type")
_PLACE = re.compile(r"\{([^{}]*)\}")
_UNFIT = re.compile(r"[+#/\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Config(Options):
    """Options of the ``mqtt`` sink."""

    topic: str = Field(description="topic; {source}, {node}, {topology} and {type} are filled in")
    broker: str | None = Field(
        None, description="name of a broker of the topology, or its URL; the host's own if left out"
    )
    format: Literal["json", "msgpack"] = Field("json", description="json, or msgpack as Penstock's own messages")
    each: _json.Each = Field("message", description="what one JSON publication is: a message, or a row of it")
    retain: bool = Field(False, description="the broker keeps the last one of each topic for later subscribers")
    qos: Literal[0, 1] = Field(1, description="1: a write waits for the broker's acknowledgement; 0: it does not")
    expiry: int | None = Field(None, ge=1, description="seconds after which the broker may forget it undelivered")

    def check(self, context: Context) -> None:
        for found in _PLACE.finditer(self.topic):
            if found[1] not in PLACES:
                text = f"unknown place {found[0]}{did_you_mean(found[1], PLACES)}"
                raise ConfigError(Problem(("topic",), text, offset=found.start()))
        rest = _PLACE.sub("x", self.topic)
        if not rest or _UNFIT.search(rest.replace("/", "")) or "{" in rest or "}" in rest or len(rest) > 1024:
            raise ConfigError(Problem(("topic",), "expected a topic without wildcards, e.g. plant/{source}"))
        if self.topic.startswith("$"):
            raise ConfigError(Problem(("topic",), "topics that begin with $ are the broker's own"))
        if self.format == "msgpack" and self.each == "row":
            raise ConfigError(Problem(("each",), "msgpack sends whole messages"))
        if self.broker is not None and "://" not in self.broker and self.broker not in context.brokers:
            hint = did_you_mean(self.broker, context.brokers)
            raise ConfigError(Problem(("broker",), f"unknown broker {self.broker!r}{hint}"))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {}


def build(config: Config, context: Context) -> Sink:
    """An :class:`MqttSink`."""
    return MqttSink(config, context)


class MqttSink(Sink):
    """One client of its own."""

    max_batch = 512
    prompt = True

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self._bus: Bus | None = None
        self._topics: dict[tuple[str, str], str] = {}

    async def open(self) -> None:
        """:raises ConnectError: the broker refuses us for good.
        :raises SinkAwayError: it cannot be reached.
        """
        bus = self._context.bus(self._config.broker, "sink")
        try:
            await bus.open()
        except ConnectError as error:
            await bus.close()
            if error.permanent:
                raise
            raise SinkAwayError(str(error)) from error
        self._bus = bus

    async def write(self, messages: Sequence[Message]) -> None:
        if self._bus is None:
            await asyncio.sleep(0)  # to connect takes a task of one's own, see Sink.prompt
            await self.open()
        assert self._bus is not None  # noqa: S101 - open() sets it
        publications: list[Publication] = []
        of: list[int] = []
        rejected: list[tuple[int, str]] = []
        for start in range(0, len(messages), PIECE):
            if start:  # two hundred windows that end at once are not to hold up a reading that is under way
                await asyncio.sleep(0)
            some, places, bad = self._publications(messages[start : start + PIECE])
            publications += some
            of += [start + place for place in places]
            rejected += [(start + place, why) for place, why in bad]
        if publications:
            try:
                receipt = await self._bus.publish(publications)
                await receipt
            except PublishFailedError as error:
                failed = {of[i]: str(why) for i, why in error.failures if _is_final(why)}
                if not all(_is_final(why) for _, why in error.failures):
                    raise SinkAwayError(str(error)) from error
                rejected += failed.items()
            except ClosedError:
                self._bus = None
                raise SinkAwayError("the connection was closed") from None
            except (DeniedError, PacketTooLargeError) as error:
                if len(messages) == 1:
                    raise RejectedError([(0, str(error))]) from error
                raise SinkAwayError(str(error)) from error
            except BusError as error:
                raise SinkAwayError(str(error)) from error
        if rejected:
            raise RejectedError(sorted(rejected))

    def _publications(self, messages: Sequence[Message]) -> tuple[list[Publication], list[int], list[tuple[int, str]]]:
        """What is to be sent, the message that each belongs to, and what cannot be written."""
        config = self._config
        out: list[Publication] = []
        of: list[int] = []
        rejected: list[tuple[int, str]] = []
        content = codec.CONTENT_TYPE if config.format == "msgpack" else "application/json"
        for i, message in enumerate(messages):
            try:
                if config.format == "msgpack":
                    payloads = [codec.encode(message)]
                else:
                    payloads = [line for _, line in _json.lines([message], config.each)]
            except (TypeError, ValueError, OverflowError) as error:
                rejected.append((i, f"cannot be written as {config.format}: {error}"))
                continue
            key = message.source, message.type
            topic = self._topics.get(key)
            if topic is None:
                if len(self._topics) >= _TOPICS:
                    self._topics.clear()
                topic = self._topics[key] = self._topic(message)
            trace = () if message.trace is None else (("traceparent", message.trace),)
            for payload in payloads:
                out.append(Publication(topic, payload, config.qos, config.retain, config.expiry, trace, content))
                of.append(i)
        return out, of, rejected

    def _topic(self, message: Message) -> str:
        """The topic of a message; what may not stand in one level becomes ``-``."""
        values = {
            "source": message.source,
            "node": self._context.node,
            "topology": self._context.topology,
            "type": message.type.partition("/")[0],
        }
        return _PLACE.sub(lambda found: _UNFIT.sub("-", values[found[1]])[:256] or "-", self._config.topic)

    async def close(self) -> None:
        if self._bus is not None:
            await self._bus.close()
            self._bus = None


def _is_final(error: BusError) -> bool:
    """Whether sending it again cannot help."""
    return isinstance(error, (DeniedError, PacketTooLargeError))
