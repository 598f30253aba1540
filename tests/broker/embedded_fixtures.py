"""Clients of the sans-I/O broker in virtual time."""

from __future__ import annotations

from typing import Any, TypeVar

import mqtt5
from mqtt5 import (
    ConnAckPacket,
    ConnectPacket,
    DisconnectPacket,
    Packet,
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
)

from broker.embedded.connection import Connection
from broker.embedded.core import Core

P = TypeVar("P")


class Bench:
    """A broker whose time is :attr:`now`."""

    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.core = Core(now=self.now, **options)

    def client(self, client_id: str = "c", **options: Any) -> Client:
        """A connected MQTT 5 client. ``clean`` is ``clean_start``."""
        client = self.raw()
        clean = options.pop("clean", True)
        client.send(ConnectPacket(client_id, clean_start=clean, **options))
        answer, *client.early = client.take()
        assert isinstance(answer, ConnAckPacket), answer
        client.connack = answer
        assert int(client.connack.reason_code) == 0, client.connack
        return client

    def raw(self, **options: Any) -> Client:
        """A connection that has sent nothing yet."""
        return Client(self, self.core.accept(self.now, **options))

    def later(self, seconds: float) -> None:
        """Let time pass; every timer runs at its own time."""
        end = self.now + seconds
        while (due := self.core.timers.next) is not None and due <= end:
            self.now = max(self.now, due)
            self.core.tick(self.now)
        self.now = end


class Client:
    """One connection, MQTT 5 unless told otherwise."""

    connack: ConnAckPacket

    def __init__(self, bench: Bench, conn: Connection) -> None:
        self.bench = bench
        self.conn = conn
        self.early: list[Packet] = []
        """What came right behind CONNACK."""

    @property
    def closed(self) -> bool:
        return self.conn.closing

    def send(self, *packets: Packet | bytes) -> None:
        """All packets in one piece, as a socket may give them."""
        self.conn.receive(b"".join(p if isinstance(p, bytes) else p.write() for p in packets), self.bench.now)

    def written(self) -> bytes:
        """What the broker has written since the last call."""
        data = b""
        while self.conn.out:
            data += b"".join(self.conn.out)
            self.conn.wrote(self.bench.now)
        core = self.bench.core
        self.conn.dirty = False
        if self.conn in core.dirty:
            core.dirty.remove(self.conn)
        resumed, core.resumed = core.resumed, []
        for conn in resumed:
            conn.proceed(self.bench.now)
        return data

    def take(self) -> list[Packet]:
        """The packets that the broker has written since the last call."""
        data = memoryview(self.written())
        packets, self.early = self.early, []
        while data:
            packet, size = mqtt5.read(data)
            packets.append(packet)
            data = data[size:]
        return packets

    def one(self, kind: type[P]) -> P:
        """The one packet that the broker has written since the last call."""
        packets = self.take()
        assert len(packets) == 1, packets
        assert isinstance(packets[0], kind), packets
        return packets[0]

    def subscribe(
        self,
        pattern: str,
        qos: int = 0,
        *,
        identifier: int | None = None,
        no_local: bool = False,
        as_published: bool = False,
        handling: int = 0,
    ) -> list[Packet]:
        """Subscribe; the granted QoS must be the one asked for.

        :returns: what came after SUBACK.
        """
        chosen = TopicFilter(
            pattern,
            max_qos=QoS(qos),
            no_local=no_local,
            retain_as_published=as_published,
            retain_handling=RetainHandling(handling),
        )
        self.send(SubscribePacket(77, [chosen], subscription_id=identifier))
        packets = self.take()
        answer = packets[0]
        assert isinstance(answer, SubAckPacket), packets
        assert [int(code) for code in answer.reason_codes] == [qos]
        return packets[1:]

    def publish(self, topic: str, payload: bytes = b"m", qos: int = 0, number: int = 1, **options: Any) -> None:
        """Send one PUBLISH."""
        self.send(PublishPacket(topic, payload, qos=QoS(qos), packet_id=number if qos else None, **options))

    def messages(self, *, answer: bool = True) -> list[PublishPacket]:
        """The publications received since the last call, acknowledged if ``answer``."""
        found: list[PublishPacket] = []
        while packets := self.take():
            for packet in packets:
                if isinstance(packet, PublishPacket):
                    found.append(packet)
                    if not answer or packet.packet_id is None:
                        continue
                    if int(packet.qos) == 1:
                        self.send(PubAckPacket(packet.packet_id))
                    else:
                        self.send(PubRecPacket(packet.packet_id))
                elif isinstance(packet, PubRelPacket):
                    self.send(PubCompPacket(packet.packet_id))
                else:
                    raise AssertionError(packet)
            if not answer:
                break
        return found

    def payloads(self, *, answer: bool = True) -> list[bytes]:
        """Payloads of :meth:`messages`."""
        return [m.payload for m in self.messages(answer=answer)]

    def lose(self) -> None:
        """The network connection breaks."""
        self.conn.close(self.bench.now)

    def leave(self, **options: Any) -> None:
        """A clean end."""
        self.send(DisconnectPacket(**options))

    def ended_with(self) -> int:
        """The reason code of the DISCONNECT that is the last packet written; the connection must be closed."""
        packets = self.take()
        assert self.closed
        assert packets, "closed without DISCONNECT"
        last = packets[-1]
        assert isinstance(last, DisconnectPacket), packets
        return int(last.reason_code)
