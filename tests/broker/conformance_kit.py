"""Clients of few words for the conformance cases: packets out, packets in, on a real socket."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from contextlib import suppress
from typing import Any, Self, TypeVar

import mqtt5
from mqtt5 import (
    ConnAckPacket,
    ConnectPacket,
    DisconnectPacket,
    PingReqPacket,
    PingRespPacket,
    PubAckPacket,
    PubCompPacket,
    PublishPacket,
    PubRecPacket,
    PubRelPacket,
    QoS,
    RetainHandling,
    SubAckPacket,
    SubscribePacket,
    TopicFilter,
    UnsubAckPacket,
    UnsubscribePacket,
)

from broker.embedded.server import EmbeddedBroker

P = TypeVar("P", bound=mqtt5.Packet)
_numbers = itertools.count(1)
ENDED = (ConnectionResetError, BrokenPipeError)


def fresh(prefix: str = "t") -> str:
    """A name that no other case uses: the brokers are shared."""
    return f"{prefix}{next(_numbers)}"


class Served:
    """An embedded broker in a thread of its own.

    :param options: of :class:`EmbeddedBroker`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with EmbeddedBroker(**self._options) as self.broker:
            self.port = self.broker.port
            self._ready.set()
            await self._stop.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()


class Line:
    """A socket with frames on it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""

    def put(self, data: bytes) -> None:
        with suppress(*ENDED):
            self.socket.sendall(data)

    def frame(self) -> bytes | None:
        """The next whole packet; None at the end."""
        while True:
            data = self._data
            size = shift = 0
            for at in range(1, min(len(data), 5)):
                size |= (data[at] & 127) << shift
                shift += 7
                if data[at] < 128:
                    if len(data) >= at + 1 + size:
                        self._data = data[at + 1 + size :]
                        return data[: at + 1 + size]
                    break
            try:
                more = self.socket.recv(65_536)
            except ENDED:
                more = b""
            if not more:
                return None
            self._data += more

    def drop(self) -> None:
        """The network connection ends without a DISCONNECT."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


class Peer(Line):
    """A client of MQTT 5. ``options`` are those of ``mqtt5.ConnectPacket``; without CONNECT where ``connect`` is False."""

    connack: ConnAckPacket

    def __init__(
        self, port: int, client_id: str | None = None, *, connect: bool = True, accepted: bool = True, **options: Any
    ) -> None:
        super().__init__(port)
        self._ahead: list[mqtt5.Packet] = []
        if connect:
            name = fresh("c") if client_id is None else client_id
            self.send(ConnectPacket(name, clean_start=options.pop("clean_start", True), **options))
            self.connack = self.expect(ConnAckPacket)
            assert (int(self.connack.reason_code) == 0) is accepted, self.connack

    def send(self, *packets: mqtt5.Packet | bytes) -> None:
        """All in one piece."""
        self.put(b"".join(p if isinstance(p, bytes) else p.write() for p in packets))

    def read(self) -> mqtt5.Packet | None:
        """The next packet; None at the end."""
        if self._ahead:
            return self._ahead.pop(0)
        frame = self.frame()
        return None if frame is None else mqtt5.read(memoryview(frame))[0]

    def expect(self, kind: type[P]) -> P:
        """The next packet, which must be of this kind."""
        packet = self.read()
        assert isinstance(packet, kind), packet
        return packet

    def quiet(self) -> None:
        """Nothing more has come: the answer to a PINGREQ is next."""
        self.send(PingReqPacket())
        self.expect(PingRespPacket)

    def subscribe(self, *patterns: str, qos: int = 0, identifier: int | None = None, **options: Any) -> list[int]:
        """The reason codes of SUBACK."""
        handling = RetainHandling(options.pop("handling", 0))
        options.setdefault("retain_as_published", False)  # mqtt5 sets it where it is not given
        filters = [TopicFilter(p, max_qos=QoS(qos), retain_handling=handling, **options) for p in patterns]
        self.send(SubscribePacket(9, filters, subscription_id=identifier))
        answer = self.expect(SubAckPacket)
        assert answer.packet_id == 9
        return [int(code) for code in answer.reason_codes]

    def unsubscribe(self, *patterns: str) -> list[int]:
        self.send(UnsubscribePacket(10, list(patterns)))
        answer = self.expect(UnsubAckPacket)
        assert answer.packet_id == 10
        return [int(code) for code in answer.reason_codes]

    def publish(self, topic: str, payload: bytes = b"x", qos: int = 0, packet_id: int = 1, **options: Any) -> int:
        """Publish and go through the whole exchange; the reason code of PUBACK or PUBREC, 0 at QoS 0."""
        options.update({"packet_id": packet_id} if qos else {})
        self.send(PublishPacket(topic, payload, qos=QoS(qos), **options))
        if not qos:
            # When this is answered, the publication has been dealt with.
            self.quiet()
            return 0
        if qos == 1:
            answer = self.expect(PubAckPacket)
            assert answer.packet_id == packet_id
            return int(answer.reason_code)
        received = self.expect(PubRecPacket)
        assert received.packet_id == packet_id
        if int(received.reason_code) < 0x80:
            self.send(PubRelPacket(packet_id))
            assert self.expect(PubCompPacket).packet_id == packet_id
        return int(received.reason_code)

    def receive(self, *, answer: bool = True) -> PublishPacket:
        """The next message, with the whole exchange of its QoS if it is to be answered."""
        packet = self.expect(PublishPacket)
        if answer and int(packet.qos) == 1:
            self.send(PubAckPacket(packet.packet_id or 0))
        elif answer and int(packet.qos) == 2:
            self.send(PubRecPacket(packet.packet_id or 0))
            ahead: list[mqtt5.Packet] = []
            while isinstance(between := self.read(), PublishPacket):
                ahead.append(between)
            self._ahead = ahead + self._ahead
            assert isinstance(between, PubRelPacket)
            assert between.packet_id == packet.packet_id
            self.send(PubCompPacket(packet.packet_id or 0))
        return packet

    def payloads(self, count: int) -> list[bytes]:
        """Payloads of the next ``count`` messages, and that there are no more."""
        found = [self.receive().payload for _ in range(count)]
        self.quiet()
        return found

    def leave(self, **options: Any) -> None:
        """DISCONNECT, and wait for the end."""
        self.send(DisconnectPacket(**options))
        assert self.read() is None
        self.socket.close()

    def ended(self, *codes: int) -> None:
        """The broker ends the connection; a DISCONNECT before that has one of these reason codes."""
        packet = self.read()
        if packet is not None:
            assert isinstance(packet, DisconnectPacket), packet
            assert int(packet.reason_code) in codes, packet
            assert self.read() is None
        self.socket.close()


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def frame3(first: int, *parts: bytes) -> bytes:
    """A packet with a remaining length of one byte."""
    body = b"".join(parts)
    assert len(body) < 128
    return bytes((first, len(body))) + body


def subscribe5(pattern: str, options: int = 0) -> bytes:
    """A SUBSCRIBE with packet identifier 9 for a filter that the codec would not write."""
    body = b"\x00\x09\x00" + _text(pattern) + bytes((options,))
    return bytes((0x82, len(body))) + body


class Old(Line):
    """A client of MQTT 3.1.1, by bytes.

    :param will: topic, payload, QoS, retain.
    """

    def __init__(
        self,
        port: int,
        client_id: str | None = None,
        *,
        clean: bool = True,
        will: tuple[str, bytes, int, bool] | None = None,
        keep_alive: int = 0,
        code: int = 0,
    ) -> None:
        super().__init__(port)
        flags, extra = 2 * clean, b""
        if will is not None:
            topic, payload, qos, retain = will
            flags |= 4 | qos << 3 | retain << 5
            extra = _text(topic) + len(payload).to_bytes(2, "big") + payload
        name = fresh("o") if client_id is None else client_id
        self.put(frame3(0x10, _text("MQTT"), bytes((4, flags)), keep_alive.to_bytes(2, "big"), _text(name), extra))
        answer = self.frame()
        assert answer is not None
        assert (answer[:2], answer[3]) == (b"\x20\x02", code)
        self.present = bool(answer[2])

    def subscribe(self, *filters: tuple[str, int]) -> bytes:
        """The return codes of SUBACK."""
        self.put(frame3(0x82, b"\x00\x09", *(_text(p) + bytes((qos,)) for p, qos in filters)))
        answer = self.frame()
        assert answer is not None
        assert answer[:4] == bytes((0x90, 2 + len(filters), 0, 9))
        return answer[4:]

    def publish(self, topic: str, payload: bytes = b"x", qos: int = 0, *, retain: bool = False) -> None:
        number = b"\x00\x05" if qos else b""
        self.put(frame3(0x30 | qos << 1 | retain, _text(topic), number, payload))
        if qos == 1:
            assert self.frame() == b"\x40\x02\x00\x05"
        elif qos == 2:
            assert self.frame() == b"\x50\x02\x00\x05"
            self.put(b"\x62\x02\x00\x05")
            assert self.frame() == b"\x70\x02\x00\x05"
        else:
            self.quiet()

    def receive(self, *, answer: bool = True) -> tuple[str, bytes, int, bool, bool]:
        """Topic, payload, QoS, RETAIN and DUP of the next message."""
        frame = self.frame()
        assert frame is not None
        assert frame[0] >> 4 == 3, frame
        qos, retain, duplicate = frame[0] >> 1 & 3, bool(frame[0] & 1), bool(frame[0] & 8)
        end = 4 + (frame[2] << 8 | frame[3])
        number, payload = (frame[end : end + 2], frame[end + 2 :]) if qos else (b"", frame[end:])
        if answer and qos == 1:
            self.put(b"\x40\x02" + number)
        elif answer and qos == 2:
            self.put(b"\x50\x02" + number)
            assert self.frame() == b"\x62\x02" + number
            self.put(b"\x70\x02" + number)
        return frame[4:end].decode(), payload, qos, retain, duplicate

    def quiet(self) -> None:
        self.put(b"\xc0\x00")
        assert self.frame() == b"\xd0\x00"

    def leave(self) -> None:
        self.put(b"\xe0\x00")
        assert self.frame() is None
        self.socket.close()

    def ended(self) -> None:
        assert self.frame() is None
        self.socket.close()
