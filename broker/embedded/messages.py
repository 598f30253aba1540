"""Messages as the broker keeps them, and PUBLISH on the wire in both versions.

A broker hands properties on unaltered ([MQTT-3.3.2-4], -15, -16, -17), so they stay the bytes they came as; only the
message expiry interval, subscription identifiers and topic aliases are taken out and put in.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import mqtt5

from broker.embedded.codec5 import (
    ALLOWED,
    MALFORMED,
    PROTOCOL_ERROR,
    PUBLISH,
    TOPIC_NAME_INVALID,
    FaultError,
    encode_varint,
    properties,
    take_text,
)

OVERHEAD: Final = 256
"""Bytes that a queued message costs beside topic and payload, for the limits in bytes."""


UNLIMITED: Final = 1 << 28
"""Longer than any packet."""
_MAX_BLOCKS: Final = 64
"""Property blocks kept with one kind: one for each set of subscription identifiers."""


class Properties(NamedTuple):
    """The property block of a PUBLISH.

    :param raw: what is handed on, without a length in front.
    :param expiry: message expiry interval, seconds.
    :param alias: topic alias, 0 for none.
    :param text: the payload is declared to be UTF-8 (payload format indicator 1).
    """

    raw: bytes = b""
    expiry: int | None = None
    alias: int = 0
    text: bool = False


NO_PROPERTIES: Final = Properties()


def parse_properties(data: bytes, at: int, stop: int) -> tuple[Properties, int]:
    """The property block at ``at`` of a PUBLISH, checked, and the position of the payload after it.

    :raises FaultError: with the reason code for DISCONNECT.
    """
    if data[at : at + 1] == b"\0":
        return NO_PROPERTIES, at + 1
    found, end = properties(data, at, stop, ALLOWED[PUBLISH])
    kept: list[bytes] = []
    expiry, alias, text = None, 0, False
    for identifier, begin, value, after in found:
        if identifier == 0x23:
            alias = int.from_bytes(data[value:after], "big")
            continue
        if identifier == 0x02:
            expiry = int.from_bytes(data[value:after], "big")
            continue
        if identifier == 0x0B:  # [MQTT-3.3.4-6]
            raise FaultError(PROTOCOL_ERROR, "a client's PUBLISH has a subscription identifier")
        if identifier == 0x01:
            text = data[value] == 1
        elif identifier == 0x08:
            response, _ = take_text(data, value, after)
            if "+" in response or "#" in response:  # [MQTT-3.3.2-14]
                raise FaultError(TOPIC_NAME_INVALID, "a response topic with wildcards")
        kept.append(data[begin:after])
    return Properties(b"".join(kept), expiry, alias, text), end


class Manner:
    """How one subscriber gets messages: QoS, RETAIN flag, subscription identifiers. Shared by all who get them so."""

    __slots__ = ("extra", "group", "identifiers", "qos", "retain")

    def __init__(self, qos: int, retain: bool, identifiers: tuple[int, ...], group: object = None) -> None:
        self.qos = qos
        self.retain = retain
        self.identifiers = identifiers
        self.extra = b"".join(b"\x0b" + encode_varint(number) for number in identifiers)
        self.group = group


@lru_cache(maxsize=4096)
def manner(qos: int, retain: bool, identifiers: tuple[int, ...]) -> Manner:
    """The one :class:`Manner` of these values."""
    return Manner(qos, retain, identifiers)


_LENGTHS: Final = tuple(encode_varint(length) for length in range(2048))
_FIRST: Final = {first: tuple(bytes((first,)) + length for length in _LENGTHS) for first in (0x30, 0x32)}


def head(first: int, length: int) -> bytes:
    """The fixed header of a packet: its first byte, and the length of what follows."""
    if length < 2048 and (known := _FIRST.get(first)) is not None:
        return known[length]
    return bytes((first,)) + encode_varint(length)


class Kind:
    """What messages of one topic and with the same properties have in common, made once for all of them.

    :param topic: topic name; ``name`` is the same as UTF-8 with its length in front.
    :param properties: what ``block`` says.
    :param version: of MQTT that they came in.
    :param block: the property block as it stands in them, its length in front; empty in 3.1.1.
    """

    __slots__ = ("_blocks", "block", "name", "properties", "topic", "version")

    def __init__(self, topic: str, name: bytes, properties: Properties, version: int, block: bytes) -> None:
        self.topic = topic
        self.name = name
        self.properties = properties
        self.version = version
        self.block = block
        self._blocks: dict[bytes, bytes] = {}

    def same(self, version: int, extra: bytes) -> bool:
        """Whether such a subscriber is sent ``block`` as it is."""
        return version == self.version and not extra and not self.properties.alias

    def written(self, version: int, extra: bytes, spent: int = 0) -> bytes:
        """The property block for a subscriber, its length in front.

        :param extra: its subscription identifiers.
        :param spent: seconds that a message has waited here.
        """
        if version != 5:
            return b""
        if not spent and (known := self._blocks.get(extra)) is not None:
            return known
        block = self.properties.raw
        if (expiry := self.properties.expiry) is not None:
            # [MQTT-3.3.2-6]: what is left of the interval after the time spent here.
            block += b"\x02" + max(expiry - spent, 0).to_bytes(4, "big")
        block += extra
        block = encode_varint(len(block)) + block
        if not spent:
            if len(self._blocks) >= _MAX_BLOCKS:
                self._blocks.clear()
            self._blocks[extra] = block
        return block


class Message:
    """One application message.

    :param kind: its topic and properties.
    :param body: what follows topic and packet identifier in the PUBLISH that it came with: the property block (MQTT 5), then
        the payload. It is what most subscribers get, so it is kept in one piece.
    :param qos: as published.
    :param retain: the RETAIN flag as published.
    :param received: broker time of arrival, seconds.
    """

    __slots__ = ("_form", "_how", "_version", "body", "kind", "qos", "received", "retain", "size")

    def __init__(self, kind: Kind, body: bytes, qos: int, retain: bool, received: float) -> None:
        self.kind = kind
        self.body = body
        self.qos = qos
        self.retain = retain
        self.received = received
        self.size = len(body) + len(kind.name) + OVERHEAD
        self._how: Manner | None = None
        """What ``_form`` and ``_version`` are for; they are not there before."""

    _form: tuple[bytes, bytes]
    _version: int

    @property
    def topic(self) -> str:
        """The topic name."""
        return self.kind.topic

    @property
    def properties(self) -> Properties:
        """The properties."""
        return self.kind.properties

    @property
    def payload(self) -> bytes:
        """The payload."""
        return self.body[len(self.kind.block) :]

    @property
    def empty(self) -> bool:
        """Whether the payload is empty."""
        return len(self.body) == len(self.kind.block)

    @property
    def expires(self) -> float | None:
        """Broker time after which it is not delivered any more."""
        expiry = self.kind.properties.expiry
        return None if expiry is None else self.received + expiry

    def form(self, how: Manner, version: int, now: float) -> tuple[bytes, bytes]:
        """What stands before and after the packet identifier (QoS 0 has none) in this message's PUBLISH.

        The last form is kept, so that a fan-out to many alike encodes once.
        """
        if how is self._how and version == self._version:
            return self._form
        kind = self.kind
        expires = kind.properties.expiry is not None
        if kind.same(version, how.extra) and not expires:
            after = self.body
        else:
            after = kind.written(version, how.extra, int(now - self.received) if expires else 0) + self.payload
        qos = how.qos
        length = len(kind.name) + len(after) + (2 if qos else 0)
        first = 0x30 | qos << 1 | how.retain
        self._form = form = head(first, length) + kind.name, after
        # The interval that is left changes with time, so a form with it is not kept.
        self._how, self._version = (None, version) if expires else (how, version)
        return form


def make(
    topic: str,
    payload: bytes,
    now: float,
    *,
    qos: int = 0,
    retain: bool = False,
    properties: Properties = NO_PROPERTIES,
) -> Message:
    """A message of the broker's own, or a will."""
    encoded = topic.encode()
    name = len(encoded).to_bytes(2, "big") + encoded
    if not properties.raw and properties.expiry is None:
        return Message(Kind(topic, name, properties, 5, b"\0"), b"\0" + payload, qos, retain, now)
    # A body without a property block is one of 3.1.1; MQTT 5 subscribers get it with the properties in front.
    return Message(Kind(topic, name, properties, 4, b""), payload, qos, retain, now)


def will_properties(will: mqtt5.Will) -> Properties:
    """The properties of a will as a block that is handed on."""
    packet = mqtt5.PublishPacket(
        "w",
        b"",
        payload_format_indicator=will.payload_format_indicator,
        message_expiry_interval=will.message_expiry_interval,
        content_type=will.content_type,
        response_topic=will.response_topic,
        correlation_data=will.correlation_data,
        user_properties=will.user_properties,
    ).write()
    at = 2
    while packet[at - 1] > 0x7F:
        at += 1
    found, end = parse_properties(packet, at + 3, len(packet))
    if end != len(packet):
        raise FaultError(MALFORMED, "the will's properties")
    return found
