"""What one client, one session and the broker as a whole may use."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the embedded broker. Each one ends in a refusal that the client can read, never in silence.

    :param connections: clients at once; one more gets CONNACK 0x89 (3.1.1: code 3).
    :param connect_seconds: time from the TCP connection to a whole CONNECT packet.
    :param connect_bytes: largest packet of a client that is not yet let in.
    :param packet_bytes: largest packet taken from a client (announced in CONNACK; 0x95 past it).
    :param client_id_bytes: longest client id (CONNACK 0x85).
    :param topic_levels: most levels of a topic or filter (0x90, in SUBACK 0x8F).
    :param subscriptions: filters of one session (SUBACK 0x97).
    :param inflight: publications with QoS > 0 that one client may have unacknowledged (receive maximum; 0x93 past it).
    :param outgoing_inflight: the same towards a client, whatever more it would take.
    :param topic_aliases: topic aliases that a client may set (0x94 past it), and that the broker sets towards a client.
    :param queue_messages: messages with QoS > 0 kept for one session, in flight or waiting; see ``sessions.py``.
    :param queue_bytes: the same in bytes.
    :param all_queue_bytes: the same for all sessions together: past it, a session that is away takes no more, and one that
        does not keep up holds its publishers up.
    :param out_bytes: bytes written for a client that it has not taken; past it QoS 0 is dropped and counted.
    :param held_bytes: bytes of one publisher whose acknowledgement waits for a slow subscriber; past it, or past
        ``inflight`` messages, the broker reads no more from that publisher.
    :param stall_seconds: a connected subscriber that holds publishers up and acknowledges nothing for so long is
        disconnected with 0x97.
    :param sessions: sessions kept, connected or not (CONNACK 0x97).
    :param session_seconds: longest session expiry interval (a longer wish is lowered, and CONNACK says so).
    :param retained_messages: retained messages in all (PUBACK 0x97).
    :param retained_bytes: the same in bytes.
    :param keep_alive: seconds; MQTT 5 clients that ask for none or a longer one are told to use this. None: as they ask.
    """

    connections: int = 1024
    connect_seconds: float = 10.0
    connect_bytes: int = 128 * KIB
    packet_bytes: int = 16 * MIB
    client_id_bytes: int = 256
    topic_levels: int = 32
    subscriptions: int = 1024
    inflight: int = 1024
    outgoing_inflight: int = 4096
    topic_aliases: int = 64
    queue_messages: int = 10_000
    queue_bytes: int = 64 * MIB
    all_queue_bytes: int = 256 * MIB
    out_bytes: int = 8 * MIB
    held_bytes: int = 8 * MIB
    stall_seconds: float = 20.0
    sessions: int = 10_000
    session_seconds: int = 7 * 86_400
    retained_messages: int = 100_000
    retained_bytes: int = 256 * MIB
    keep_alive: int | None = None
