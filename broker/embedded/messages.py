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


class Message:
    """One application message.

    :param topic: topic name; ``name`` is the same as UTF-8 with its length in front.
    :param body: what follows topic and packet identifier in the PUBLISH that it came with: the property block (MQTT 5), then
        the payload from ``start`` on. It is what most subscribers get, so it is kept in one piece.
    :param version: of MQTT that ``body`` is in.
    :param qos: as published.
    :param retain: the RETAIN flag as published.
    :param received: broker time of arrival, seconds.
    """

    __slots__ = (
        "_form",
        "_how",
        "_version",
        "body",
        "name",
        "properties",
        "qos",
        "received",
        "retain",
        "size",
        "start",
        "topic",
        "version",
    )

    def __init__(
        self,
        topic: str,
        name: bytes,
        body: bytes,
        start: int,
        version: int,
        qos: int,
        retain: bool,
        properties: Properties,
        received: float,
    ) -> None:
        self.topic = topic
        self.name = name
        self.body = body
        self.start = start
        self.version = version
        self.qos = qos
        self.retain = retain
        self.properties = properties
        self.received = received
        self.size = len(body) + len(name) + OVERHEAD
        self._how: Manner | None = None
        """What ``_form`` and ``_version`` are for; they are not there before."""

    _form: tuple[bytes, bytes]
    _version: int

    @property
    def payload(self) -> bytes:
        """The payload."""
        return self.body[self.start :] if self.start else self.body

    @property
    def empty(self) -> bool:
        """Whether the payload is empty."""
        return len(self.body) == self.start

    @property
    def expires(self) -> float | None:
        """Broker time after which it is not delivered any more."""
        expiry = self.properties.expiry
        return None if expiry is None else self.received + expiry

    def form(self, how: Manner, version: int, now: float) -> tuple[bytes, bytes]:
        """What stands before and after the packet identifier (QoS 0 has none) in this message's PUBLISH.

        The last form is kept, so that a fan-out to many alike encodes once.
        """
        if how is self._how and version == self._version:
            return self._form
        properties = self.properties
        expiry = properties.expiry
        if version == self.version and expiry is None and not how.extra and not properties.alias:
            after = self.body
        elif version != 5:
            after = self.payload
        else:
            block = properties.raw
            if expiry is not None:
                # [MQTT-3.3.2-6]: what is left of the interval after the time spent here.
                block += b"\x02" + max(expiry - int(now - self.received), 0).to_bytes(4, "big")
            block += how.extra
            after = encode_varint(len(block)) + block + self.payload
        qos = how.qos
        length = len(self.name) + len(after) + (2 if qos else 0)
        first = 0x30 | qos << 1 | how.retain
        head = bytes((first, length)) if length < 0x80 else bytes((first,)) + encode_varint(length)
        self._form = form = head + self.name, after
        # The interval that is left changes with time, so a form with it is not kept.
        self._how, self._version = (how, version) if expiry is None else (None, version)
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
        return Message(topic, name, b"\0" + payload, 1, 5, qos, retain, properties, now)
    # A body without a property block is one of 3.1.1; MQTT 5 subscribers get it with the properties in front.
    return Message(topic, name, payload, 0, 4, qos, retain, properties, now)


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
