"""Framing and strict checks before a packet goes to the ``mqtt5`` codec.

``mqtt5`` is fast, but it is a codec for peers that behave: bytes that are not UTF-8 make it panic (a
``BaseException``), and it takes packet id 0, reserved subscription bits or a payload format of 7 as they come. So every
packet of a client is walked here first, in Python, and only then read by ``mqtt5``. PUBLISH is not read by ``mqtt5`` at
all: a broker forwards its properties as the bytes they are (see ``messages.py``).

One more trap: the enumerations of ``mqtt5`` are not the ``IntEnum`` that its stubs say. They do not compare by ``<``, are
not hashable, and are always true: ``int()`` them first.

Section numbers are those of the OASIS standard *MQTT Version 5.0*.
"""

from __future__ import annotations

from typing import NamedTuple

import mqtt5

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 1, 2, 3, 4, 5, 6, 7
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = 8, 9, 10, 11, 12, 13, 14, 15

MALFORMED = 0x81
PROTOCOL_ERROR = 0x82
TOPIC_NAME_INVALID = 0x90
TOPIC_ALIAS_INVALID = 0x94
PACKET_TOO_LARGE = 0x95
UNSUPPORTED_VERSION = 0x84

_U8, _U16, _U32, _VARINT, _TEXT, _BYTES, _PAIR = range(7)

# 2.2.2.2: identifier -> type of its value.
_KINDS = {
    **dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), _U8),
    **dict.fromkeys((0x13, 0x21, 0x22, 0x23), _U16),
    **dict.fromkeys((0x02, 0x11, 0x18, 0x27), _U32),
    0x0B: _VARINT,
    **dict.fromkeys((0x03, 0x08, 0x12, 0x15, 0x1A, 0x1C, 0x1F), _TEXT),
    **dict.fromkeys((0x09, 0x16), _BYTES),
    0x26: _PAIR,
}
_BOOLEANS = frozenset({0x01, 0x17, 0x19})
_ACK = frozenset({0x1F, 0x26})
ALLOWED = {
    CONNECT: frozenset({0x11, 0x15, 0x16, 0x17, 0x19, 0x21, 0x22, 0x26, 0x27}),
    PUBLISH: frozenset({0x01, 0x02, 0x03, 0x08, 0x09, 0x0B, 0x23, 0x26}),
    PUBACK: _ACK,
    PUBREC: _ACK,
    PUBREL: _ACK,
    PUBCOMP: _ACK,
    SUBSCRIBE: frozenset({0x0B, 0x26}),
    UNSUBSCRIBE: frozenset({0x26}),
    DISCONNECT: frozenset({0x11, 0x1F, 0x26}),
    AUTH: frozenset({0x15, 0x16, 0x1F, 0x26}),
}
_WILL = frozenset({0x01, 0x02, 0x03, 0x08, 0x09, 0x18, 0x26})
# 2.1.3: the low four bits of the first byte.
_FLAGS = {PUBREL: 2, SUBSCRIBE: 2, UNSUBSCRIBE: 2}


class FaultError(Exception):
    """A client broke the protocol; its connection ends with this reason code.

    :param code: MQTT 5 reason code.
    """

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Property(NamedTuple):
    """One property as it stands in the packet: ``data[begin:stop]``, its value from ``value`` on."""

    identifier: int
    begin: int
    value: int
    stop: int


def varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """A variable byte integer (1.5.5) and the position after it.

    :raises FaultError: longer than four bytes, cut off by ``stop``, or not in its shortest form.
    """
    result = shift = 0
    for position in range(at, min(stop, at + 4)):
        byte = data[position]
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and position > at:  # [MQTT-1.5.5-1]
                raise FaultError(MALFORMED, "a variable byte integer is not in its shortest form")
            return result, position + 1
        shift += 7
    raise FaultError(MALFORMED, "a variable byte integer is cut off or too long")


def encode_varint(number: int) -> bytes:
    """``number`` (below 2**28) as a variable byte integer."""
    if number < 0x80:
        return bytes((number,))
    result = bytearray()
    while number >= 0x80:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    result.append(number)
    return bytes(result)


def take_bytes(data: bytes, at: int, stop: int) -> int:
    """The position after binary data (1.5.6) that starts at ``at``."""
    if at + 2 > stop or (end := at + 2 + (data[at] << 8 | data[at + 1])) > stop:
        raise FaultError(MALFORMED, "a field runs past the end of its packet")
    return end


def take_text(data: bytes, at: int, stop: int) -> tuple[str, int]:
    """A UTF-8 string (1.5.4) and the position after it."""
    end = take_bytes(data, at, stop)
    try:
        text = str(data[at + 2 : end], "utf-8")
    except UnicodeDecodeError:  # [MQTT-1.5.4-1]
        raise FaultError(MALFORMED, "a string is not UTF-8") from None
    if "\0" in text:  # [MQTT-1.5.4-2]
        raise FaultError(MALFORMED, "a string has the character U+0000")
    return text, end


def properties(data: bytes, at: int, stop: int, allowed: frozenset[int]) -> tuple[list[Property], int]:
    """Walk a property block that starts at ``at`` (its length comes first) and check every value in it.

    :returns: the properties in their order, and the position after the block.
    """
    length, at = varint(data, at, stop)
    if (end := at + length) > stop:
        raise FaultError(MALFORMED, "the properties run past the end of their packet")
    found: list[Property] = []
    seen = 0
    while at < end:
        begin, identifier = at, data[at]
        if identifier not in allowed:
            raise FaultError(MALFORMED, f"property 0x{identifier:02X} does not belong in this packet")
        if identifier != 0x26:
            if seen >> identifier & 1:
                raise FaultError(PROTOCOL_ERROR, f"property 0x{identifier:02X} comes twice")
            seen |= 1 << identifier
        at += 1
        kind = _KINDS[identifier]
        if kind == _PAIR:
            stop_value = take_text(data, take_text(data, at, end)[1], end)[1]
        elif kind == _TEXT:
            stop_value = take_text(data, at, end)[1]
        elif kind == _BYTES:
            stop_value = take_bytes(data, at, end)
        elif kind == _VARINT:
            stop_value = varint(data, at, end)[1]
        else:
            stop_value = at + (1, 2, 4)[kind]
            if stop_value > end:
                raise FaultError(MALFORMED, "a property is cut off")
        _check_value(identifier, data, at, stop_value)
        found.append(Property(identifier, begin, at, stop_value))
        at = stop_value
    return found, end


def _check_value(identifier: int, data: bytes, at: int, stop: int) -> None:
    if identifier in _BOOLEANS:
        if data[at] > 1:
            raise FaultError(PROTOCOL_ERROR, f"property 0x{identifier:02X} is neither 0 nor 1")
    elif identifier == 0x23:
        if not (data[at] or data[at + 1]):  # [MQTT-3.3.2-8]
            raise FaultError(TOPIC_ALIAS_INVALID, "topic alias 0")
    elif identifier in {0x21, 0x27, 0x0B} and not any(data[at:stop]):
        raise FaultError(PROTOCOL_ERROR, f"property 0x{identifier:02X} is 0")


def packet_id(data: bytes, at: int, stop: int) -> int:
    """The packet identifier at ``at``; never 0 ([MQTT-2.2.1-3])."""
    if at + 2 > stop:
        raise FaultError(MALFORMED, "the packet identifier is cut off")
    if not (number := data[at] << 8 | data[at + 1]):
        raise FaultError(PROTOCOL_ERROR, "packet identifier 0")
    return number


def _check_connect(data: bytes, at: int, stop: int) -> None:
    name, at = take_text(data, at, stop)
    if at + 4 > stop:
        raise FaultError(MALFORMED, "CONNECT is cut off")
    level, flags = data[at], data[at + 1]
    if name != "MQTT" or level != 5:
        raise FaultError(UNSUPPORTED_VERSION, "not a version of MQTT that is spoken here")
    will, will_qos, will_retain = flags >> 2 & 1, flags >> 3 & 3, flags >> 5 & 1
    if flags & 1 or will_qos == 3 or (not will and (will_qos or will_retain)):  # [MQTT-3.1.2-3], -11, -13
        raise FaultError(MALFORMED, "the connect flags contradict each other")
    at = properties(data, at + 4, stop, ALLOWED[CONNECT])[1]
    at = take_text(data, at, stop)[1]
    if will:
        at = properties(data, at, stop, _WILL)[1]
        at = take_bytes(data, take_text(data, at, stop)[1], stop)
    if flags & 0x80:
        at = take_text(data, at, stop)[1]
    if flags & 0x40:
        at = take_bytes(data, at, stop)
    if at != stop:
        raise FaultError(MALFORMED, "CONNECT has more bytes than its fields")


def _check_filters(data: bytes, at: int, stop: int, *, options: bool) -> None:
    if at == stop:
        raise FaultError(PROTOCOL_ERROR, "no topic filter")  # [MQTT-3.8.3-2], [MQTT-3.10.3-2]
    while at < stop:
        at = take_text(data, at, stop)[1]
        if options:
            if at == stop:
                raise FaultError(MALFORMED, "the subscription options are cut off")
            option = data[at]
            if option & 0xC0 or option & 3 == 3:  # [MQTT-3.8.3-5]
                raise FaultError(MALFORMED, "reserved bits in the subscription options")
            if option & 0x30 == 0x30:
                raise FaultError(PROTOCOL_ERROR, "retain handling 3")
            at += 1


def check(frame: bytes, at: int) -> None:
    """Check one whole packet of an MQTT 5 client, other than PUBLISH. ``at``: where its variable header starts.

    :raises FaultError: with the reason code for DISCONNECT (CONNACK, where it is a CONNECT).
    """
    kind, stop = frame[0] >> 4, len(frame)
    if frame[0] & 15 != _FLAGS.get(kind, 0):  # [MQTT-2.1.3-1]
        raise FaultError(MALFORMED, "reserved flags in the fixed header")
    if kind == CONNECT:
        _check_connect(frame, at, stop)
    elif kind in {SUBSCRIBE, UNSUBSCRIBE}:
        packet_id(frame, at, stop)
        at = properties(frame, at + 2, stop, ALLOWED[kind])[1]
        _check_filters(frame, at, stop, options=kind == SUBSCRIBE)
    elif kind in ALLOWED:
        if PUBACK <= kind <= PUBCOMP:
            packet_id(frame, at, stop)
            at += 2
        if stop - at > 1 and properties(frame, at + 1, stop, ALLOWED[kind])[1] != stop:
            raise FaultError(MALFORMED, "bytes after the properties")
    elif kind == PINGREQ:
        if at != stop:
            raise FaultError(MALFORMED, "PINGREQ has a body")
    else:
        raise FaultError(PROTOCOL_ERROR if kind else MALFORMED, "a packet that no client sends")


def read(frame: bytes, at: int) -> mqtt5.Packet:
    """Read one whole packet other than PUBLISH. ``at``: where its variable header starts.

    :raises FaultError: it breaks the protocol.
    """
    check(frame, at)
    if frame == b"\xf0\x00":  # 3.15.2.1: both may be left out; mqtt5 does not know it
        return mqtt5.AuthPacket()
    try:
        return mqtt5.read(memoryview(frame))[0]
    except (ValueError, IndexError, OverflowError) as error:
        raise FaultError(MALFORMED, str(error)) from None


def write(packet: mqtt5.Packet) -> bytes:
    """The bytes of a packet of the broker."""
    return packet.write()
