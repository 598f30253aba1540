"""One client's connection: its packets in their order, without any I/O."""

from __future__ import annotations

import logging
from enum import Enum
from struct import Struct
from typing import TYPE_CHECKING, Literal

import mqtt5

from broker.embedded import codec3, codec5
from broker.embedded.codec5 import (
    CONNECT,
    MALFORMED,
    PACKET_TOO_LARGE,
    PROTOCOL_ERROR,
    PUBLISH,
    FaultError,
)
from broker.embedded.messages import UNLIMITED
from broker.embedded.publishing import Publisher

if TYPE_CHECKING:
    from broker.embedded.core import Core
    from broker.embedded.messages import Message
    from broker.embedded.runs import Run
    from broker.embedded.sessions import Session

log = logging.getLogger(__name__)

_CONTROL_FACTOR = 2
_LARGE = 1 << 16
_ACKS = Struct(">HH")
_MAX_ALIASED_BLOCK = 125
"""Longest property block, with its length, that an alias is added to: the length stays one byte."""
_MAX_ALIASED = 4096
_MIN_ALIASED_NAME = 8
"""With its length; an alias costs three bytes, and a shorter topic is hardly worth one."""
_ALIAS_ROOM = 10


class State(Enum):
    """How far a connection has come."""

    NEW = "new"
    CHECKING = "checking"
    OPEN = "open"
    CLOSED = "closed"


class Connection:
    """What the broker knows of one connection.

    The server gives it bytes (:meth:`receive`), writes what is in ``out``, and closes it when ``closing`` is set.

    :param core: the broker.
    :param identity: user name that the transport vouches for (client certificate), or None.
    :param peer: where it comes from, for the log.
    """

    def __init__(self, core: Core, now: float, *, identity: str | None = None, peer: str = "") -> None:
        self.core = core
        self.identity = identity
        self.peer = peer
        self.owner: object = None
        """The server's own for this connection."""
        self.state = State.NEW
        self.version = 5
        self.session: Session | None = None
        self.publisher = Publisher(self)
        self.out: list[bytes] = []
        """Bytes to be written, in order."""
        self.pending = 0
        """How many they are."""
        self.dirty = False
        self.gated = False
        """``out`` has something that must not be written before the present changes are committed."""
        self.sealed = 0
        """How many of ``out`` the commit under way lets go."""
        self.free = 0
        """How many of ``out`` may be written: what they speak of is committed."""
        self.closing = False
        """Write ``out``, then close."""
        self.paused = False
        """Read no more for now."""
        self.connect: mqtt5.ConnectPacket | None = None
        """The CONNECT whose password is being checked."""
        self.will: Message | None = None
        self.will_delay = 0
        self.keep_alive = 0.0
        self.last_heard = now
        self.receive_max = 65_535
        self.packet_max = UNLIMITED
        self.alias_max = 0
        """Topic aliases that the client takes."""
        self._aliases: dict[bytes, bytes] = {}
        self.expiry_fixed = False
        self.problems = True
        self._parts: list[bytes | memoryview] = []
        self._gathered = 0
        self._needed = 0
        core.timers.at(now + core.limits.connect_seconds, self._expect_connect)

    # What goes out

    def send(self, data: bytes) -> None:
        """Have ``data`` written, after what the broker knows now is committed."""
        self.gated = True
        self.out.append(data)
        self.pending += len(data)
        if not self.dirty:
            self.dirty = True
            self.core.dirty.append(self)

    def send_now(self, data: bytes) -> None:
        """Have ``data`` written, which speaks of nothing that must be committed."""
        self.out.append(data)
        self.pending += len(data)
        if not self.dirty:
            self.dirty = True
            self.core.dirty.append(self)

    def shorten(self, name: bytes, block: bytes, length: int) -> tuple[bytes, bytes]:
        """Topic and property block of a PUBLISH with QoS > 0, with a topic alias in place of the topic (3.3.2.3.4).

        What is returned must be sent: it may be what sets the alias. QoS 0 messages have none, since they may be dropped.

        :param name: the topic, its length in front; ``block`` the properties, likewise.
        :param length: of the payload.
        """
        if len(block) > _MAX_ALIASED_BLOCK or length > _MAX_ALIASED:
            return name, block
        alias = self._aliases.get(name)
        if alias is not None:
            return b"\0\0", bytes((len(block) + 2,)) + alias + block[1:]
        if (
            len(self._aliases) >= self.alias_max
            or len(name) <= _MIN_ALIASED_NAME
            or len(name) + len(block) + length + _ALIAS_ROOM > self.packet_max
        ):
            return name, block
        alias = self._aliases[name] = b"\x23" + (len(self._aliases) + 1).to_bytes(2, "big")
        return name, bytes((len(block) + 2,)) + alias + block[1:]

    def send_run(self, run: Run, extra: bytes) -> None:
        """Have QoS 0 messages written, as far as the client takes them; ``extra`` are its subscription identifiers."""
        data = run.form(self.version, extra)
        if len(data) <= self.packet_max and self.pending + len(data) <= self.core.limits.out_bytes:
            self.core.stats.sent += run.count
            self.send_now(data)
        else:
            for packet in run.packets(self.version, extra):
                self.send_plain(packet)

    def send_plain(self, packet: bytes) -> None:
        """Have a QoS 0 PUBLISH written, if the client takes it; else it is dropped."""
        full = self.pending and self.pending + len(packet) > self.core.limits.out_bytes
        if full or len(packet) > self.packet_max:  # [MQTT-3.1.2-24]
            self.core.stats.dropped += 1
            return
        self.core.stats.sent += 1
        self.send_now(packet)

    def write(self, packet: mqtt5.Packet) -> None:
        """Have a packet written, in the client's version. One above its maximum packet size is left out."""
        data = codec5.write(packet) if self.version == 5 else codec3.write(packet)
        if data and len(data) <= self.packet_max:
            self.send(data)

    def wrote(self, now: float, count: int | None = None) -> None:
        """The server has given the first ``count`` of ``out`` (None: all) to the transport: there is room again."""
        if count is None or count >= len(self.out):
            self.out = []
            self.pending = self.sealed = 0
            self.gated = False
        else:
            self.pending -= sum(map(len, self.out[:count]))
            self.sealed = max(self.sealed - count, 0)
            del self.out[:count]
        self.free = 0
        session = self.session
        if session is not None and (session.queue or session.resend):
            session.pump(now)
        if self.paused:
            self.publisher.settle()

    def pause(self) -> None:
        """Read no more from the client."""
        self.paused = True

    def go_on(self) -> None:
        """Read again."""
        if self.paused:
            self.paused = False
            self.core.resumed.append(self)

    # What comes in

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes of the client, whole packets or not."""
        self.last_heard = now
        parts = self._parts
        if parts:
            parts.append(data)
            self._gathered += len(data)
            if self._gathered < self._needed or self.paused:
                return
            over = self._gathered - self._needed
            if self._needed >= _LARGE and 0 < over < len(data):
                # A large packet by itself is handed on as it is; behind it there would be a second copy of it.
                parts[-1] = memoryview(data)[:-over]
                large = b"".join(parts)
                parts.clear()
                self._feed(large, now)
                data = data[-over:]
                if parts:
                    parts.append(data)
                    self._gathered += over
                    return
            else:
                data = b"".join(parts)
                parts.clear()
        if self.state is not State.CLOSED:
            self._feed(data, now)

    def _feed(self, data: bytes, now: float) -> None:
        try:
            rest, needed = self._take(data, now)
        except FaultError as fault:
            self.fail(fault.code, str(fault), now)
            return
        if rest < len(data) and self.state is not State.CLOSED:
            self._parts.append(data[rest:] if rest else data)
            self._gathered = len(data) - rest
            self._needed = needed

    def proceed(self, now: float) -> None:
        """Take up what was left when reading was paused."""
        if self._parts:
            self._needed = 0
            self.receive(b"", now)
        self.last_heard = now

    @property
    def _let_in(self) -> Session | None:
        return self.session if self.state is State.OPEN else None

    def _take(self, data: bytes, now: float) -> tuple[int, int]:
        """Take all whole packets.

        :returns: the position of what is left, and the bytes that its packet needs.
        """
        limits = self.core.limits
        at, end = 0, len(data)
        session = self._let_in
        largest = limits.connect_bytes if session is None else limits.packet_bytes
        while end - at >= 2 and not self.paused:
            first = data[at]
            if (first == 0x30 or first == 0x32) and session is not None:
                begin, at = at, self.publisher.stream(data, at, session, now)
                if at != begin:
                    continue
            start, size = at + 2, data[at + 1]
            if size > 0x7F:
                start, size = _long_length(data, at + 1)
                if not start:
                    return at, end - at + 1
            stop = start + size
            if stop - at > largest:
                raise FaultError(PACKET_TOO_LARGE, f"a packet of {stop - at} bytes")
            if stop > end:
                return at, stop - at
            if session is not None:
                if first >> 4 == PUBLISH:
                    at = self.publisher.take(data, at, start, stop, session, now)
                    continue
                if first == 0x40 and size == 2:
                    at = self._pubacks(data, at, session, now)
                    continue
                self._packet(data[at:stop], start - at, session, now)
            elif self.state is State.NEW:
                self._first(data[at:stop], start - at, now)
                if (session := self._let_in) is not None:
                    largest = limits.packet_bytes
            at = stop
            if self.closing:
                return end, 0
        return at, 0

    def _pubacks(self, data: bytes, at: int, session: Session, now: float) -> int:
        """Take all PUBACKs of four bytes that stand in a row from ``at`` on.

        :returns: the position after them.
        """
        numbers: list[int] = []
        for head, number in _ACKS.iter_unpack(data[at : at + (len(data) - at & ~3)]):
            if head != 0x4002:
                break
            numbers.append(number)
        self._acknowledged(numbers, session, now)
        return at + 4 * len(numbers)

    def _acknowledged(self, numbers: list[int], session: Session, now: float) -> None:
        inflight = session.inflight
        for number in numbers:
            delivery = inflight.get(number)
            if delivery is None or delivery[1].qos != 1:
                if not number:
                    raise FaultError(PROTOCOL_ERROR, "packet identifier 0")
                if number in inflight:
                    raise FaultError(PROTOCOL_ERROR, "PUBACK for a message of QoS 2")
        session.acknowledged(numbers, now)

    def _first(self, frame: bytes, start: int, now: float) -> None:
        if frame[0] >> 4 != CONNECT:  # [MQTT-3.1.0-1]
            self.close(now)
            return
        name_stop = start + 2 + (frame[start] << 8 | frame[start + 1]) if len(frame) >= start + 2 else 0
        if frame[start + 2 : name_stop] == b"MQTT" and frame[name_stop : name_stop + 1] == b"\x04":
            self.version = 4
            packet = codec3.read(frame, start)
        else:
            packet = codec5.read(frame, start)
        assert isinstance(packet, mqtt5.ConnectPacket)  # noqa: S101 - the type was in the first byte
        self.core.entrance.connect(self, packet, now)

    def _packet(self, frame: bytes, start: int, session: Session, now: float) -> None:
        if frame[0] >> 4 == CONNECT:  # [MQTT-3.1.0-2]
            raise FaultError(PROTOCOL_ERROR, "a second CONNECT")
        packet = codec5.read(frame, start) if self.version == 5 else codec3.read(frame, start)
        match packet:
            case mqtt5.PingReqPacket():
                self.send_now(b"\xd0\x00")
            case mqtt5.PubAckPacket():
                self._acknowledged([packet.packet_id], session, now)
            case mqtt5.PubRecPacket():
                self._pubrec(packet, session, now)
            case mqtt5.PubRelPacket():
                self._pubrel(packet.packet_id, session)
            case mqtt5.PubCompPacket():
                session.completed(packet.packet_id, now)
            case mqtt5.SubscribePacket():
                self.core.desk.subscribe(self, session, packet, now)
            case mqtt5.UnsubscribePacket():
                self.core.desk.unsubscribe(self, session, packet)
            case mqtt5.DisconnectPacket():
                self._disconnect(packet, session, now)
            case _:  # AUTH without an authentication method in CONNECT ([MQTT-4.12.0-7])
                raise FaultError(PROTOCOL_ERROR, "a packet that was not asked for")
        if self.pending > self.core.limits.out_bytes * _CONTROL_FACTOR:
            self.pause()  # it asks and does not read the answers

    def _pubrec(self, packet: mqtt5.PubRecPacket, session: Session, now: float) -> None:
        number = packet.packet_id
        qos = session.expects(number)
        if qos == 1:
            raise FaultError(PROTOCOL_ERROR, "PUBREC for a message of QoS 1")
        if int(packet.reason_code) >= 0x80:
            session.acknowledged((number,), now)
            return
        known = session.taken(number, now)
        release = number.to_bytes(2, "big")
        if known or self.version != 5:
            self.send(b"\x62\x02" + release)
        else:
            self.send(b"\x62\x03" + release + b"\x92")

    def _pubrel(self, number: int, session: Session) -> None:
        known = number in session.received
        if known:
            session.received.discard(number)
            self.publisher.unreleased = max(self.publisher.unreleased - 1, 0)
            if session.stored:
                self.core.store.forgotten(session.client_id, number)
        if known or self.version != 5:
            self.send(b"\x70\x02" + number.to_bytes(2, "big"))
        else:
            self.send(b"\x70\x03" + number.to_bytes(2, "big") + b"\x92")

    def _disconnect(self, packet: mqtt5.DisconnectPacket, session: Session, now: float) -> None:
        seconds = packet.session_expiry_interval
        if seconds is not None:
            if self.expiry_fixed and seconds:  # 3.14.2.2.2
                raise FaultError(PROTOCOL_ERROR, "a session expiry interval after one of 0 in CONNECT")
            session.seconds = min(seconds, self.core.limits.session_seconds)
        if int(packet.reason_code) == 0:  # [MQTT-3.14.4-3]
            self.will = None
        self.close(now)

    def may(self, action: Literal["publish", "subscribe"], topic: str) -> bool:
        """Whether the client has the right to."""
        session = self.session
        assert session is not None  # noqa: S101 - only a client that is let in asks
        return self.core.allows(session.client_id, session.user, action, topic)

    # How it ends

    def fail(self, code: int, why: str, now: float) -> None:
        """End the connection for what the client did."""
        log.info("client %r %s: %s (0x%02X)", self.session.client_id if self.session else "", self.peer, why, code)
        if self.state is State.OPEN:
            self.disconnect(code, why, now)
            return
        if self.version == 5:
            if code in {0x81, 0x82, 0x84, 0x95}:  # those that CONNACK has
                self.write(mqtt5.ConnAckPacket(reason_code=mqtt5.ConnAckReasonCode(code), reason_str=why))
        elif code == 0x84:
            self.write(mqtt5.ConnAckPacket(reason_code=mqtt5.ConnAckReasonCode.UNSUPPORTED_PROTOCOL_VERSION))
        self.close(now)

    def disconnect(self, code: int, why: str, now: float) -> None:
        """End the connection from our side: DISCONNECT with the reason (MQTT 5), then close."""
        if self.state is State.OPEN:
            self.write(mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode(code), reason_str=why or None))
        self.close(now)

    def close(self, now: float) -> None:
        """The connection ends: by us, by the client, or because the transport did. Idempotent."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self.closing = True
        self._parts.clear()
        self.publisher.close()
        if not self.dirty:
            self.dirty = True
            self.core.dirty.append(self)
        self.core.entrance.leave(self, now)

    def _expect_connect(self, now: float) -> None:
        if self.state is State.NEW:
            self.close(now)

    def watch(self, now: float) -> None:
        """Start the keep-alive check ([MQTT-3.1.2-22]: one and a half times the interval)."""
        if self.keep_alive:
            self.core.timers.at(now + self.keep_alive * 1.5, self._check_alive)

    def _check_alive(self, now: float) -> None:
        if self.state is not State.OPEN:
            return
        if self.paused and self.publisher.waits:
            self.last_heard = now  # it is we who do not listen
        due = self.last_heard + self.keep_alive * 1.5
        if now >= due:
            self.disconnect(0x8D, "nothing heard within the keep alive", now)
        else:
            self.core.timers.at(due, self._check_alive)


def _long_length(data: bytes, at: int) -> tuple[int, int]:
    """A remaining length of more than one byte (2.1.4).

    :returns: the position after it and its value; the position 0 where some of it is not there yet.
    """
    size = shift = 0
    for position in range(at, min(len(data), at + 4)):
        byte = data[position]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if not byte:  # [MQTT-1.5.5-1]
                raise FaultError(MALFORMED, "the remaining length is not in its shortest form")
            return position + 1, size
    if shift == 28:
        raise FaultError(MALFORMED, "the remaining length has more than four bytes")
    return 0, 0
