"""MQTT 3.1.1, by turning its packets into those of MQTT 5 and back.

The two versions differ little on the wire: version 5 puts property blocks and reason codes in. So what a 3.1.1 client
sends is given empty property blocks and read by the MQTT 5 codec, checks and all; what goes out loses them again. The
rest of the broker sees the packet classes of ``mqtt5`` only.

Section numbers are those of the OASIS standard *MQTT Version 3.1.1*.
"""

from __future__ import annotations

import mqtt5

from broker.embedded import codec5
from broker.embedded.codec5 import MALFORMED, PROTOCOL_ERROR, FaultError, encode_varint, take_text

NEVER = 0xFFFFFFFF
"""Session expiry interval of a 3.1.1 session that is kept (CleanSession 0): as long as the broker allows."""

# CONNACK return codes (3.2.2.3) for the reason codes of MQTT 5; all others are "server unavailable".
_RETURN_CODES = {
    0x00: 0,
    0x84: 1,
    0x85: 2,
    0x86: 4,
    0x87: 5,
}


def _framed(first: int, *parts: bytes) -> tuple[bytes, int]:
    body = b"".join(parts)
    head = bytes((first,)) + encode_varint(len(body))
    return head + body, len(head)


def _connect(frame: bytes, at: int) -> tuple[bytes, int]:
    stop = len(frame)
    name, after = take_text(frame, at, stop)
    if after + 4 > stop or name != "MQTT" or frame[after] != 4:
        raise FaultError(MALFORMED, "not a CONNECT of MQTT 3.1.1")
    flags = frame[after + 1]
    if flags & 0x40 and not flags & 0x80:  # [MQTT-3.1.2-22]
        raise FaultError(PROTOCOL_ERROR, "a password without a user name")
    rest = take_text(frame, after + 4, stop)[1]
    properties = b"\0" if flags & 2 else b"\x05\x11" + NEVER.to_bytes(4, "big")
    head = frame[at:after] + b"\x05" + frame[after + 1 : after + 4] + properties
    will = b"\0" if flags & 4 else b""
    return _framed(frame[0], head, frame[after + 4 : rest], will, frame[rest:])


def read(frame: bytes, at: int) -> mqtt5.Packet:
    """Read one whole packet of a 3.1.1 client, other than PUBLISH. ``at``: where its variable header starts.

    :raises FaultError: it breaks the protocol; a 3.1.1 client learns that by the closed connection only.
    """
    kind = frame[0] >> 4
    if kind == codec5.CONNECT:
        return codec5.read(*_connect(frame, at))
    if kind in {codec5.SUBSCRIBE, codec5.UNSUBSCRIBE}:
        if len(frame) < at + 2:
            raise FaultError(MALFORMED, "the packet identifier is cut off")
        longer, start = _framed(frame[0], frame[at : at + 2], b"\0", frame[at + 2 :])
        packet = codec5.read(longer, start)
        if isinstance(packet, mqtt5.SubscribePacket) and any(
            f.no_local or f.retain_as_published or int(f.retain_handling) for f in packet.topic_filters
        ):
            raise FaultError(MALFORMED, "reserved bits beside the requested QoS")  # [MQTT-3-8.3-4]
        return packet
    if kind == codec5.AUTH:
        raise FaultError(MALFORMED, "there is no AUTH in MQTT 3.1.1")
    if len(frame) - at != (2 if codec5.PUBACK <= kind <= codec5.PUBCOMP else 0):
        raise FaultError(MALFORMED, "the packet has the wrong length")
    return codec5.read(frame, at)


def write(packet: mqtt5.Packet) -> bytes:
    """The 3.1.1 form of a packet of the broker; empty where that version has none (DISCONNECT, AUTH).

    PUBLISH is written by ``messages.py``.
    """
    match packet:
        case mqtt5.ConnAckPacket():
            code = _RETURN_CODES.get(int(packet.reason_code), 3)
            return bytes((0x20, 2, packet.session_present and not code, code))
        case mqtt5.SubAckPacket():
            codes = bytes(min(128, int(code)) for code in packet.reason_codes)
            return _framed(0x90, packet.packet_id.to_bytes(2, "big"), codes)[0]
        case mqtt5.UnsubAckPacket():
            return b"\xb0\x02" + packet.packet_id.to_bytes(2, "big")
        case mqtt5.PubAckPacket():
            return b"\x40\x02" + packet.packet_id.to_bytes(2, "big")
        case mqtt5.PubRecPacket():
            return b"\x50\x02" + packet.packet_id.to_bytes(2, "big")
        case mqtt5.PubRelPacket():
            return b"\x62\x02" + packet.packet_id.to_bytes(2, "big")
        case mqtt5.PubCompPacket():
            return b"\x70\x02" + packet.packet_id.to_bytes(2, "big")
        case mqtt5.PingRespPacket():
            return b"\xd0\x00"
        case _:
            return b""
