"""Many publications in one read, which the broker hands on together: to each subscriber as if they had come one by one."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import mqtt5
import pytest
from embedded_fixtures import Bench, Client
from mqtt5 import PubAckPacket, PublishPacket, QoS

from broker.embedded.codec5 import encode_varint
from broker.embedded.limits import Limits


class Seen(NamedTuple):
    topic: str
    payload: bytes
    qos: int
    content_type: str | None = None
    properties: tuple[tuple[str, str], ...] = ()
    expiry: int | None = None
    identifiers: tuple[int, ...] = ()


def connect3(bench: Bench, name: str) -> Client:
    """A client that speaks 3.1.1."""
    client = bench.raw()
    encoded = name.encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x00" + len(encoded).to_bytes(2, "big") + encoded
    client.send(b"\x10" + encode_varint(len(body)) + body)
    assert client.written() == b"\x20\x02\x00\x00"
    return client


def publish3(topic: str, payload: bytes, qos: int, number: int) -> bytes:
    encoded = topic.encode()
    body = len(encoded).to_bytes(2, "big") + encoded + (number.to_bytes(2, "big") if qos else b"") + payload
    return bytes((0x30 | qos << 1,)) + encode_varint(len(body)) + body


def seen3(client: Client) -> list[Seen]:
    """What a 3.1.1 client was sent; acknowledged."""
    found: list[Seen] = []
    while data := client.written():
        acks, at = b"", 0
        while at < len(data):
            start, size, shift = at + 1, 0, 0
            while True:
                size |= (data[start] & 127) << shift
                shift, start = shift + 7, start + 1
                if data[start - 1] < 128:
                    break
            stop, qos = start + size, data[at] >> 1 & 3
            assert data[at] >> 4 == 3
            body = start + 2 + int.from_bytes(data[start : start + 2], "big")
            topic = data[start + 2 : body].decode()
            if qos:
                acks += b"\x40\x02" + data[body : body + 2]
                body += 2
            found.append(Seen(topic, data[body:stop], qos))
            at = stop
        client.send(acks)
    return found


def seen5(client: Client) -> list[Seen]:
    """What an MQTT 5 client was sent; acknowledged, and its topic aliases looked up."""
    found: list[Seen] = []
    aliases: dict[int, str] = {}
    for m in client.messages():
        if m.topic_alias is not None and m.topic:
            aliases[m.topic_alias] = m.topic
        topic = m.topic or aliases[m.topic_alias or 0]
        pairs = tuple((k, v) for k, v in m.user_properties or ())
        identifiers = tuple(sorted(m.subscription_ids or ()))
        found.append(
            Seen(topic, m.payload or b"", int(m.qos), m.content_type, pairs, m.message_expiry_interval, identifiers)
        )
    return found


def stream(rng: random.Random, version: int, count: int) -> list[tuple[bytes, Seen]]:
    """Packets of a publisher, and what each of them says."""
    topics = [f"plant/{i}/temperature" for i in range(4)] + ["a", "plant/2"]
    aliases: dict[int, str] = {}
    out: list[tuple[bytes, Seen]] = []
    while len(out) < count:
        qos = rng.choice((0, 0, 0, 1, 1))
        topic = rng.choice(topics)
        kinds = ["plain", "plain", "typed", "traced", "expiring", "alias"] if version == 5 else ["plain"]
        kind, alias = rng.choice(kinds), rng.randrange(1, 4)
        for _ in range(rng.choice((1, 1, 2, 7))):
            payload = bytes(rng.randrange(256) for _ in range(rng.choice((1, 5, 5, 5, 130, 5000))))
            number = len(out) + 1
            if version != 5:
                out.append((publish3(topic, payload, qos, number), Seen(topic, payload, qos)))
                continue
            content_type = "text/x" if kind == "typed" else None
            properties = [("at", str(rng.randrange(1000)))] if kind == "traced" else []
            expiry = 100 if kind == "expiring" else None
            name = topic
            if kind == "alias" and aliases.get(alias) == topic:
                name = ""
            elif kind == "alias":
                aliases[alias] = topic
            packet = PublishPacket(
                name,
                payload,
                qos=QoS(qos),
                packet_id=number if qos else None,
                content_type=content_type,
                user_properties=properties,
                message_expiry_interval=expiry,
                topic_alias=alias if kind == "alias" else None,
            )
            out.append((packet.write(), Seen(topic, payload, qos, content_type, tuple(properties), expiry)))
    return out


@pytest.mark.parametrize("seed", range(40))
def test_every_subscriber_gets_everything_in_order_and_in_its_way(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench()
    version = rng.choice((4, 5))
    plain, marked, short, exact = (bench.client(n, **o) for n, o in SUBSCRIBERS)
    plain.subscribe("#", 1)
    marked.subscribe("plant/#", 1, identifier=300)
    marked.subscribe("+/+/temperature", 0, identifier=7)
    short.subscribe("#", rng.choice((0, 1)), identifier=9)
    exact.subscribe("plant/1/temperature", 1)
    exact.subscribe("plant/2", 0)
    old = connect3(bench, "old")
    old.send(b"\x82\x06\x00\x01\x00\x01#\x01")
    assert old.written() == b"\x90\x03\x00\x01\x01"
    publisher = bench.client("p") if version == 5 else connect3(bench, "p")
    sent = stream(rng, version, 120)
    data = b"".join(packet for packet, _ in sent)
    cuts = [0, *sorted(rng.randrange(len(data)) for _ in range(rng.choice((0, 3, 40)))), len(data)]
    granted = next(iter(bench.core.entrance.sessions["short"].subscriptions.values())).qos
    for begin, end in pairwise(cuts):
        if begin != end:
            publisher.conn.receive(data[begin:end], bench.now)
    said = [what for _, what in sent]
    assert seen5(plain) == said
    wanted_of_marked = [
        w._replace(identifiers=(7, 300) if w.topic.endswith("temperature") else (300,))
        for w in said
        if w.topic.startswith("plant/")
    ]
    # Its window is small: QoS 0 may overtake what waits for it ([MQTT-4.6.0-6] is of one topic and QoS).
    assert sorted(seen5(marked), key=lambda w: w.qos) == sorted(wanted_of_marked, key=lambda w: w.qos)
    assert seen5(short) == [w._replace(qos=min(w.qos, granted), identifiers=(9,)) for w in said]
    assert seen5(exact) == [
        w._replace(qos=w.qos if w.topic != "plant/2" else 0)
        for w in said
        if w.topic in {"plant/1/temperature", "plant/2"}
    ]
    assert seen3(old) == [Seen(w.topic, w.payload, w.qos) for w in said]
    wanted = [number for number, what in enumerate(said, 1) if what.qos]
    assert acknowledged(publisher.written()) == wanted
    stats = bench.core.stats
    assert stats.received == len(sent)
    assert (stats.dropped, stats.queued) == (0, 0)


SUBSCRIBERS: tuple[tuple[str, dict[str, int]], ...] = (
    ("plain", {}),
    ("marked", {"receive_max": 30}),
    ("short", {"topic_alias_max": 3}),
    ("exact", {"max_packet_size": 8000}),
)


def acknowledged(data: bytes) -> list[int]:
    assert len(data) % 4 == 0
    assert all(data[at : at + 2] == b"\x40\x02" for at in range(0, len(data), 4))
    return [int.from_bytes(data[at + 2 : at + 4], "big") for at in range(0, len(data), 4)]


def test_a_slow_reader_gets_whole_packets_of_qos_0_and_the_rest_is_counted() -> None:
    bench = Bench(limits=Limits(out_bytes=1000))
    slow = bench.client("s")
    slow.subscribe("#")
    publisher = bench.client("p")
    packets = [PublishPacket("a/b", bytes(50 + i % 3)).write() for i in range(100)]
    publisher.send(*packets)
    written = slow.written()
    assert 900 < len(written) <= 1000
    assert b"".join(packets).startswith(written)
    stats = bench.core.stats
    assert (stats.received, stats.sent, stats.dropped) == (100, len(slow_packets(written)), 100 - stats.sent)


def slow_packets(data: bytes) -> list[mqtt5.Packet]:
    found: list[mqtt5.Packet] = []
    view = memoryview(data)
    while view:
        packet, size = mqtt5.read(view)
        found.append(packet)
        view = view[size:]
    return found


def test_subscriptions_and_rights_are_those_of_the_moment() -> None:
    def authorize(client_id: str, user: str | None, action: str, topic: str) -> bool:
        return client_id != "p" or topic != "secret"

    bench = Bench(authorize=authorize)
    publisher, early, late = bench.client("p"), bench.client("early"), bench.client("late")
    early.subscribe("#", 1)
    burst = [PublishPacket(topic, b"1").write() for topic in ("a", "secret", "a", "a", "secret", "b")]
    publisher.send(*burst)
    late.subscribe("a", 1)
    publisher.send(*burst)
    early.send(b"\xa2\x06\x00\x05\x00\x00\x01#")
    publisher.send(*burst)
    assert [m.topic for m in early.take() if isinstance(m, PublishPacket)] == ["a", "a", "a", "b"] * 2
    assert [m.topic for m in late.messages()] == ["a"] * 6
    assert bench.core.stats.refused == 6


@pytest.mark.parametrize("qos", [0, 1])
def test_what_came_before_a_fault_is_delivered(qos: int) -> None:
    bench = Bench()
    subscriber, publisher = bench.client("s"), bench.client("p")
    subscriber.subscribe("#", 1)
    good = [PublishPacket("a", bytes((65 + i,)), qos=QoS(qos), packet_id=i + 1 if qos else None) for i in range(5)]
    fault = b"\x32\x06\x00\x01a\x00\x00\x00" if qos else b"\x30\x05\x00\x09aaa"
    publisher.send(*good, *good, fault, *good)
    assert publisher.closed
    assert subscriber.payloads() == [b"A", b"B", b"C", b"D", b"E"] * 2


def test_a_publisher_is_held_up_in_the_midst_of_a_run() -> None:
    """MQTT 3.1.1 has no receive maximum: past the limit the broker reads no further, and goes on where it stopped."""
    bench = Bench(limits=Limits(queue_messages=10, inflight=20))
    slow, publisher = bench.client("s", receive_max=5), connect3(bench, "p")
    slow.subscribe("#", 1)
    publisher.send(*(publish3("t", b"%d" % i, 1, i + 1) for i in range(100)))
    assert publisher.conn.paused
    got: list[bytes] = []
    answers: list[int] = []
    while len(got) < 100:
        for packet in slow.take():
            assert isinstance(packet, PublishPacket)
            got.append(packet.payload or b"")
            slow.send(PubAckPacket(packet.packet_id or 0))
        answers += acknowledged(publisher.written())
    assert got == [b"%d" % i for i in range(100)]
    answers += acknowledged(publisher.written())
    assert answers == list(range(1, 101))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("qos", [0, 1])
def test_large_packets_come_in_any_pieces(seed: int, qos: int) -> None:
    rng = random.Random(seed)
    bench = Bench()
    subscriber, publisher = bench.client("s"), bench.client("p")
    subscriber.subscribe("#", 1)
    payloads = [rng.randbytes(rng.choice((3, 65_536, 70_000, 200_000, 300_000))) for _ in range(12)]
    data = b"".join(
        PublishPacket("a", payload, qos=QoS(qos), packet_id=i + 1 if qos else None).write()
        for i, payload in enumerate(payloads)
    )
    cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.choice((1, 12, 60))))})
    for begin, end in pairwise(cuts):
        publisher.conn.receive(data[begin:end], bench.now)
    assert subscriber.payloads() == payloads
    assert acknowledged(publisher.written()) == (list(range(1, 13)) if qos else [])
