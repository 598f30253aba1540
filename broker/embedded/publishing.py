"""What one client publishes: the broker's hot path.

Packets are looked at where they lie. The first of a topic with the same properties is examined in full (:meth:`Publisher.take`);
what was found is remembered for the connection, so that those after it cost a look-up each (:meth:`Publisher.stream`). Those
that go the same way are handed on together: QoS 0 as the bytes that came in, where nothing in them has to change.
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
from broker.embedded.messages import NO_PROPERTIES, Kind, Message, parse_properties
from broker.embedded.router import QUOTA_EXCEEDED, SUCCESS
from broker.embedded.runs import Piece, Run
from broker.embedded.topics import Route, is_name

if TYPE_CHECKING:
    from broker.embedded.connection import Connection
    from broker.embedded.sessions import Session

NOT_AUTHORIZED, PAYLOAD_FORMAT_INVALID = 0x87, 0x99
RECEIVE_MAXIMUM_EXCEEDED = 0x93
_MAX_TOPICS = 4096
_MAX_HEADS = 16_384
_MAX_KEY = 256
_MAX_STREAMED = 4096
"""Longer packets are taken one by one: what looking at them costs does not count."""
_LEAST = 5
"""A PUBLISH that may be streamed has at least so many bytes."""


class _Held(NamedTuple):
    """An acknowledgement that waits for a slow subscriber, or behind one that does ([MQTT-4.6.0-2], -3)."""

    answer: bytes
    slow: Session | None
    size: int
    counts: bool
    """Whether the publication counts against the receive maximum until this is sent (QoS 1; QoS 2 is counted elsewhere)."""


class Publisher:
    """The incoming PUBLISH packets of one connection, and their acknowledgements."""

    __slots__ = (
        "_aliases",
        "_changes",
        "_conn",
        "_heads",
        "_held",
        "_held_bytes",
        "_largest",
        "_topics",
        "unreleased",
    )

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._aliases: dict[int, bytes] = {}
        self._topics: dict[bytes, tuple[str, int]] = {}
        self._heads: dict[bytes, tuple[Kind, Route]] = {}
        """Topic and properties, as they stand in a packet: what they mean and where such messages go."""
        self._changes = 0
        """The state of the subscriptions that ``_heads`` is of."""
        self._largest = min(_MAX_STREAMED, conn.core.limits.packet_bytes - 3)
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self.unreleased = 0
        """QoS 2 publications of this connection that PUBREL has not ended."""

    def stream(self, data: bytes, at: int, session: Session, now: float) -> int:
        """Take the PUBLISH packets from ``at`` on that are like earlier ones: topic and properties known, not retained, QoS 0 or
        1, no repeats, not large.

        :returns: the position after what was taken; the next packet, if there is one, is for :meth:`take`.
        """
        changes = self._conn.core.router.subscriptions.changes
        if changes != self._changes:  # where they go may have changed
            self._changes = changes
            self._heads.clear()
        last = len(data) - _LEAST
        while at <= last and not self._conn.paused:
            begin = at
            if data[at] == 0x30:
                at = self._stream_plain(data, at, session, now)
            elif data[at] == 0x32 and not self._held and not self.unreleased:
                at = self._stream_acknowledged(data, at, session, now)
            if at == begin:
                break
        return at

    def _stream_plain(self, data: bytes, at: int, session: Session, now: float) -> int:
        """:meth:`stream` for QoS 0."""
        conn, heads, largest = self._conn, self._heads, self._largest
        five, end, last = conn.version == 5, len(data), len(data) - _LEAST
        begin = at
        route: Route | None = None
        last_known: tuple[Kind, Route] | None = None
        last_size = 0
        pieces: list[Piece] = []
        while at <= last and data[at] == 0x30:
            size, start = data[at + 1], at + 2
            if size > 0x7F:
                if not 0 < data[start] < 0x80:
                    break
                size, start = size + (data[start] << 7) - 0x80, start + 1
            stop = start + size
            body = start + 2 + (data[start] << 8 | data[start + 1])
            if stop > end or body >= stop or size > largest:
                break
            if not five:
                payload, known = body, heads.get(data[start:body])
            elif not data[body]:
                payload, known = body + 1, heads.get(data[start:body])
            else:
                payload = body + 1 + data[body]
                known = heads.get(data[start:payload])
            if known is None or payload > stop:
                break
            kind, way = known
            if way is not route:
                if route is not None:
                    self._hand_on(Run(data[begin:at], begin, pieces, route, conn.version), session, now)
                    begin, pieces = at, []
                route = way
            pieces.append((kind, payload, stop))
            if known is last_known and size == last_size:  # what a sensor sends: only the payload differs
                alike, size = data[at:payload], stop - at
                gap = payload - at
                while stop <= end - size and data.startswith(alike, stop):
                    pieces.append((kind, stop + gap, stop + size))
                    stop += size
                last_known = None
            else:
                last_known, last_size = known, size
            at = stop
        if route is not None:
            self._hand_on(Run(data[begin:at], begin, pieces, route, conn.version), session, now)
        return at

    def _hand_on(self, run: Run, session: Session, now: float) -> None:
        core = self._conn.core
        core.stats.received += run.count
        core.router.fan_out(run, session, now)

    def _stream_acknowledged(self, data: bytes, at: int, session: Session, now: float) -> int:
        """:meth:`stream` for QoS 1. Nobody holds this client up."""
        conn, heads, largest = self._conn, self._heads, self._largest
        five, end, last = conn.version == 5, len(data), len(data) - _LEAST
        route: Route | None = None
        messages: list[Message] = []
        numbers: list[bytes] = []
        stops: list[int] = []
        while at <= last and data[at] == 0x32:
            size, start = data[at + 1], at + 2
            if size > 0x7F:
                if not 0 < data[start] < 0x80:
                    break
                size, start = size + (data[start] << 7) - 0x80, start + 1
            stop = start + size
            middle = start + 2 + (data[start] << 8 | data[start + 1])
            body = middle + 2
            if stop > end or body >= stop or size > largest:
                break
            if not five or not data[body]:
                known = heads.get(data[start:middle])
            elif (after := body + 1 + data[body]) > stop:
                break
            else:
                known = heads.get(data[start:middle] + data[body:after])
            number = data[middle:body]
            if known is None or number == b"\0\0":
                break
            kind, way = known
            if way is not route:
                if route is not None:
                    at = self._answer(route, messages, numbers, stops, session, now)
                    messages, numbers, stops = [], [], []
                    if self._held:
                        return at
                route = way
            messages.append(Message(kind, data[body:stop], 1, False, now))
            numbers.append(number)
            stops.append(stop)
            at = stop
        return at if route is None else self._answer(route, messages, numbers, stops, session, now)

    def _answer(
        self,
        route: Route,
        messages: list[Message],
        numbers: list[bytes],
        stops: list[int],
        session: Session,
        now: float,
    ) -> int:
        """Deliver messages of QoS 1 that go one way, and acknowledge them.

        :param stops: where each of them ends.
        :returns: where the last of those taken ends: once the connection is paused no more are.
        """
        conn = self._conn
        if conn.core.router.fan_in(route, messages, session, now):
            conn.core.stats.received += len(messages)
            conn.send(b"\x40\x02" + b"\x40\x02".join(numbers))
            return stops[-1]
        for message, number, stop in zip(messages, numbers, stops, strict=True):
            self._acknowledge(message, int.from_bytes(number, "big"), SUCCESS, session, now)
            if conn.paused:
                return stop
        return stops[-1]

    def take(self, data: bytes, begin: int, start: int, stop: int, session: Session, now: float) -> int:
        """Take the PUBLISH at ``data[begin:stop]``, whose variable header starts at ``start``.

        :returns: ``stop``.
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
        key = name = data[start:body]
        number = 0
        if qos:
            number = packet_id(data, body, stop)
            body += 2
        properties, payload = NO_PROPERTIES, body
        if conn.version == 5:
            properties, payload = parse_properties(data, body, stop)
            if properties.alias or name == b"\0\0":
                name = self._alias(name, properties.alias)
            if payload > body + 1:
                key += data[body:payload]
        topic, code = self._topic(name)
        kind = Kind(topic, name, properties, conn.version, data[body:payload])
        if properties.text and not code and not _is_text(data[payload:stop]):
            code = PAYLOAD_FORMAT_INVALID
        retain = bool(first & 1)
        core = conn.core
        route = core.router.subscriptions.route(topic)
        # What sets an alias does something, and text is looked at each time.
        if not code and not properties.text and (not properties.alias or key.startswith(b"\0\0")):
            self._remember(key, kind, route)
        if qos:
            self._acknowledge(Message(kind, data[body:stop], qos, retain, now), number, code, session, now)
        elif code:
            core.stats.received += 1
            self._refuse_plain(code, topic)
        elif retain:
            core.stats.received += 1
            if core.router.publish(Message(kind, data[body:stop], 0, True, now), session, now)[0] >= 0x80:
                core.stats.dropped += 1
        else:
            self._hand_on(Run(data[begin:stop], begin, [(kind, payload, stop)], route, conn.version), session, now)
        return stop

    def _remember(self, key: bytes, kind: Kind, route: Route) -> None:
        if len(key) > _MAX_KEY:
            return
        if len(self._heads) >= _MAX_HEADS:
            self._heads.clear()
        self._heads[key] = kind, route

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

    def _alias(self, name: bytes, alias: int) -> bytes:
        """The topic that an alias stands for, or is set to (3.3.2.3.4)."""
        if not alias:
            raise FaultError(PROTOCOL_ERROR, "PUBLISH without a topic")
        if alias > self._conn.core.limits.topic_aliases:
            raise FaultError(TOPIC_ALIAS_INVALID, "a topic alias above the maximum")
        if name != b"\0\0":
            if self._aliases.get(alias, name) != name:
                self._heads.clear()  # some may stand for what the alias was
            self._aliases[alias] = name
            return name
        known = self._aliases.get(alias)
        if known is None:  # 3.3.4: a zero length topic name and no mapping
            raise FaultError(PROTOCOL_ERROR, "a topic alias that was not set")
        return known

    def _topic(self, name: bytes) -> tuple[str, int]:
        """The topic, and the reason code if this client may not publish to it. Remembered for the connection."""
        if (known := self._topics.get(name)) is not None:
            return known
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
