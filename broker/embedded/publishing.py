"""What one client publishes: the broker's hot path.

Packets are looked at where they lie. Of QoS 0 packets that follow each other and are alike up to the payload (same
length, topic and properties: what a sensor sends) only the first is examined; the run is handed on as the bytes that
came in. That costs a comparison per message instead of decoding and encoding it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from broker.embedded.codec5 import (
    MALFORMED,
    PROTOCOL_ERROR,
    TOPIC_ALIAS_INVALID,
    TOPIC_NAME_INVALID,
    FaultError,
    packet_id,
    take_text,
)
from broker.embedded.messages import NO_PROPERTIES, Message, Properties, parse_properties
from broker.embedded.router import QUOTA_EXCEEDED, SUCCESS, Run
from broker.embedded.topics import is_name

if TYPE_CHECKING:
    from broker.embedded.connection import Connection
    from broker.embedded.sessions import Session

NOT_AUTHORIZED, PAYLOAD_FORMAT_INVALID = 0x87, 0x99
RECEIVE_MAXIMUM_EXCEEDED = 0x93
_MAX_TOPICS = 4096
_MAX_BLOCKS = 1024


class _Held(NamedTuple):
    """An acknowledgement that waits for a slow subscriber, or behind one that does ([MQTT-4.6.0-2], -3)."""

    answer: bytes
    slow: Session | None
    size: int
    counts: bool
    """Whether the publication counts against the receive maximum until this is sent (QoS 1; QoS 2 is counted elsewhere)."""


class Publisher:
    """The incoming PUBLISH packets of one connection, and their acknowledgements."""

    __slots__ = ("_aliases", "_blocks", "_conn", "_held", "_held_bytes", "_topics", "unreleased")

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._aliases: dict[int, bytes] = {}
        self._topics: dict[bytes, tuple[str, int]] = {}
        self._blocks: dict[bytes, Properties] = {}
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self.unreleased = 0
        """QoS 2 publications of this connection that PUBREL has not ended."""

    def take(self, data: bytes, begin: int, start: int, stop: int, session: Session, now: float) -> int:
        """Take the PUBLISH at ``data[begin:stop]``, whose variable header starts at ``start``, and a run of alike ones.

        :returns: the position after what was taken.
        :raises FaultError: with the reason code for DISCONNECT.
        """
        conn = self._conn
        first = data[begin]
        qos = first >> 1 & 3
        if qos == 3 or (first & 8 and not qos):  # [MQTT-3.3.1-4], -2
            raise FaultError(MALFORMED, "PUBLISH with QoS 3, or with DUP at QoS 0")
        body = start + 2
        if body > stop or (body := body + (data[start] << 8 | data[start + 1])) > stop:
            raise FaultError(MALFORMED, "the topic runs past the end of its packet")
        name = data[start:body]
        number = 0
        if qos:
            number = packet_id(data, body, stop)
            body += 2
        properties, payload = NO_PROPERTIES, body
        if conn.version != 5:
            pass
        elif body < stop and not data[body] and body - start > 2:
            payload += 1  # the usual case, spared a call: no properties
        else:
            properties, payload = self._properties(data, body, stop)
            if properties.alias or name == b"\0\0":
                name = self._alias(name, properties.alias)
        known = self._topics.get(name)
        topic, code = known if known is not None else self._topic(name)
        if properties.text and not code and not _is_text(data[payload:stop]):
            code = PAYLOAD_FORMAT_INVALID
        retain = bool(first & 1)
        core = conn.core
        size, head, more = stop - begin, payload - body, not (code or properties.alias or properties.text)
        if qos:
            # Those that follow and differ in packet identifier and payload only need no further look at the rest.
            before, block, gap = data[begin : body - 2], data[body:payload], body - begin
            last = len(data) - size
            while True:
                message = Message(topic, name, data[body:stop], head, conn.version, qos, retain, properties, now)
                self._acknowledge(message, number, code, session, now)
                if (
                    not more
                    or stop > last
                    or not data.startswith(before, stop)
                    or not data.startswith(block, stop + gap)
                    or conn.paused
                ):
                    return stop
                body = stop + gap
                if not (number := data[body - 2] << 8 | data[body - 1]):
                    return stop
                stop += size
        if code:
            core.stats.received += 1
            self._refuse_plain(code, topic)
        elif retain or not more:
            core.stats.received += 1
            message = Message(topic, name, data[body:stop], head, conn.version, 0, retain, properties, now)
            if core.router.publish(message, session, now)[0] >= 0x80:
                core.stats.dropped += 1
        else:
            alike, last = data[begin:payload], len(data) - size
            while stop <= last and data.startswith(alike, stop):
                stop += size
            run = Run(topic, name, properties, data[begin:stop], size, body - begin, payload - begin, conn.version)
            core.stats.received += run.count
            core.router.fan_out(run, session, now)
        return stop

    def _acknowledge(self, message: Message, number: int, code: int, session: Session, now: float) -> None:
        conn = self._conn
        core = conn.core
        core.stats.received += 1
        slow: Session | None = None
        if message.qos == 2 and number in session.received:  # sent again: it was delivered then (4.3.3)
            code = SUCCESS
        else:
            if (self._held or self.unreleased) and conn.version == 5 and self._outstanding() >= core.limits.inflight:
                raise FaultError(RECEIVE_MAXIMUM_EXCEEDED, "more publications unacknowledged than the receive maximum")
            if not code:
                code, slow = core.router.publish(message, session, now)
            if message.qos == 2 and code < 0x80:
                session.received.add(number)
                self.unreleased += 1
                if session.stored:
                    core.store.received(session.client_id, number)
            if code >= 0x80:
                core.stats.refused += 1
                if conn.version != 5 and code == QUOTA_EXCEEDED:
                    core.stats.dropped += 1
                if conn.version != 5 and message.qos == 2:
                    # There is no error in a 3.1.1 PUBREC: the exchange goes on, and PUBREL must find its identifier.
                    session.received.add(number)
        kind = b"\x40" if message.qos == 1 else b"\x50"
        if code and conn.version == 5:
            answer = kind + b"\x03" + number.to_bytes(2, "big") + bytes((code,))
        else:
            answer = kind + b"\x02" + number.to_bytes(2, "big")
        if slow is None and not self._held:
            conn.send(answer)
            return
        if slow is not None:
            slow.holding.add(conn)
            if not slow.slow:
                slow.slow = True
                slow.progress = now
                core.watch(slow, now)
        self._held.append(_Held(answer, slow, message.size, message.qos == 1))
        self._held_bytes += message.size
        if self._held_bytes > core.limits.held_bytes or len(self._held) >= core.limits.inflight:
            conn.pause()

    def settle(self) -> None:
        """Send the acknowledgements that wait for nobody any more. Called when a session is slow no longer."""
        held = self._held
        while held:
            answer, slow, size, _ = held[0]
            if slow is not None and slow.slow:
                if not self._conn.closing:
                    slow.holding.add(self._conn)
                break
            held.popleft()
            self._held_bytes -= size
            self._conn.send(answer)
        limits = self._conn.core.limits
        if self._held_bytes <= limits.held_bytes // 2 and len(held) < max(limits.inflight // 2, 1):
            self._conn.go_on()

    @property
    def waits(self) -> bool:
        """Whether acknowledgements are held back."""
        return bool(self._held)

    def close(self) -> None:
        """The connection ended: nobody is to be answered."""
        for entry in self._held:
            if entry.slow is not None:
                entry.slow.holding.discard(self._conn)
        self._held.clear()

    def _outstanding(self) -> int:
        return self.unreleased + sum(entry.counts for entry in self._held)

    def _properties(self, data: bytes, at: int, stop: int) -> tuple[Properties, int]:
        if at >= stop:
            raise FaultError(MALFORMED, "PUBLISH without properties")
        length = data[at]
        if not length:
            return NO_PROPERTIES, at + 1
        if length > 127:
            return parse_properties(data, at, stop)
        end = at + 1 + length
        block = data[at:end]
        known = self._blocks.get(block)
        if known is None or end > stop:
            known, end = parse_properties(data, at, stop)
            if len(self._blocks) >= _MAX_BLOCKS:
                self._blocks.clear()
            self._blocks[block] = known
        return known, end

    def _alias(self, name: bytes, alias: int) -> bytes:
        """The topic that an alias stands for, or is set to (3.3.2.3.4)."""
        if not alias:
            raise FaultError(PROTOCOL_ERROR, "PUBLISH without a topic")
        if alias > self._conn.core.limits.topic_aliases:
            raise FaultError(TOPIC_ALIAS_INVALID, "a topic alias above the maximum")
        if name != b"\0\0":
            self._aliases[alias] = name
            return name
        known = self._aliases.get(alias)
        if known is None:  # 3.3.4: a zero length topic name and no mapping
            raise FaultError(PROTOCOL_ERROR, "a topic alias that was not set")
        return known

    def _topic(self, name: bytes) -> tuple[str, int]:
        """The topic, and the reason code if this client may not publish to it. Remembered for the connection."""
        topic, _ = take_text(name, 0, len(name))
        if "+" in topic or "#" in topic or not topic:  # [MQTT-3.3.2-2]
            raise FaultError(TOPIC_NAME_INVALID, "a topic name with wildcards, or an empty one")
        conn = self._conn
        if not is_name(topic, conn.core.limits.topic_levels):
            code = TOPIC_NAME_INVALID
        else:
            code = SUCCESS if conn.may("publish", topic) else NOT_AUTHORIZED
        if len(self._topics) >= _MAX_TOPICS:
            self._topics.clear()
        self._topics[name] = topic, code
        return topic, code

    def _refuse_plain(self, code: int, topic: str) -> None:
        """QoS 0 has no answer: a denied one is counted, a faulty one ends the connection."""
        self._conn.core.stats.refused += 1
        if code != NOT_AUTHORIZED:
            raise FaultError(code, f"publication to {topic[:100]!r} cannot be taken")


def _is_text(payload: bytes) -> bool:
    try:
        str(payload, "utf-8")
    except UnicodeDecodeError:
        return False
    return True
