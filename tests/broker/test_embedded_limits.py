"""Slow, full and greedy: what the embedded broker does at its limits. Nothing with QoS > 0 is lost in silence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from embedded_fixtures import Bench, Client
from mqtt5 import ConnAckPacket, PingReqPacket, PubAckPacket, PublishPacket, PubRecPacket, PubRelPacket, QoS

from broker.embedded.limits import Limits


def codes(client: Client) -> list[tuple[int, int]]:
    """(packet identifier, reason code) of the acknowledgements received."""
    found: list[tuple[int, int]] = []
    for packet in client.take():
        assert isinstance(packet, PubAckPacket | PubRecPacket), packet
        found.append((packet.packet_id, int(packet.reason_code)))
    return found


def test_a_slow_subscriber_holds_its_publisher_and_loses_nothing() -> None:
    """The queue fills, PUBACKs wait, and come in their order when it is down to half ([MQTT-4.6.0-2])."""
    bench = Bench(limits=Limits(queue_messages=10))
    slow, fast, publisher = bench.client("slow", receive_max=1), bench.client("fast"), bench.client("p")
    slow.subscribe("a", 1)
    fast.subscribe("#", 1)
    for i in range(1, 21):
        publisher.publish("a", b"%d" % i, 1, i)
    assert codes(publisher) == [(i, 0) for i in range(1, 10)]
    assert len(fast.messages()) == 20
    publisher.publish("b", b"other", 1, 21)
    assert codes(publisher) == [], "acknowledgements keep their order"
    got: list[bytes] = []
    acknowledged: list[int] = []
    while True:
        messages = slow.messages(answer=False)
        if not messages:
            break
        (message,) = messages
        got.append(message.payload)
        assert message.packet_id is not None
        slow.send(PubAckPacket(message.packet_id))
        acknowledged += [number for number, _ in codes(publisher)]
        if acknowledged:
            assert len(bench.core.entrance.sessions["slow"].queue) <= 6
    assert [int(p) for p in got] == list(range(1, 21))
    assert acknowledged == list(range(10, 22))
    assert bench.core.entrance.sessions["slow"].bytes == 0


def test_two_that_publish_to_each_other_do_not_block() -> None:
    """Both queues are full; reading goes on, so both get their acknowledgements through."""
    bench = Bench(limits=Limits(queue_messages=4, inflight=50))
    one, two = bench.client("1", receive_max=1), bench.client("2", receive_max=1)
    one.subscribe("to/1", 1)
    two.subscribe("to/2", 1)
    for i in range(1, 41):
        one.publish("to/2", b"%d" % i, 1, i)
        two.publish("to/1", b"%d" % i, 1, i)
    got: dict[str, list[int]] = {"1": [], "2": []}
    acknowledged = {"1": 0, "2": 0}
    for _ in range(200):
        for name, client in (("1", one), ("2", two)):
            for packet in client.take():
                if isinstance(packet, PublishPacket):
                    got[name].append(int(packet.payload))
                    assert packet.packet_id is not None
                    client.send(PubAckPacket(packet.packet_id))
                else:
                    acknowledged[name] += 1
    assert got == {"1": list(range(1, 41)), "2": list(range(1, 41))}
    assert acknowledged == {"1": 40, "2": 40}


def test_a_stalled_subscriber_is_disconnected() -> None:
    bench = Bench(limits=Limits(queue_messages=5, stall_seconds=20))
    stalled = bench.client("s", receive_max=1, session_expiry_interval=100)
    stalled.subscribe("a", 1)
    publisher = bench.client("p")
    for i in range(1, 9):
        publisher.publish("a", b"%d" % i, 1, i)
    assert codes(publisher) == [(i, 0) for i in range(1, 5)]
    bench.later(19)
    assert not stalled.closed
    bench.later(1.1)
    assert stalled.ended_with() == 0x97
    assert codes(publisher) == [(i, 0) for i in range(5, 9)], "they were taken before"
    publisher.publish("a", b"9", 1, 9)
    assert codes(publisher) == [(9, 0x97)]
    back = bench.client("s", clean=False, receive_max=100)
    assert [int(p) for p in back.payloads()] == list(range(1, 9))


def test_progress_is_not_a_stall() -> None:
    bench = Bench(limits=Limits(queue_messages=4, stall_seconds=20))
    slow, publisher = bench.client("s", receive_max=1), bench.client("p")
    slow.subscribe("a", 1)
    for i in range(1, 30):
        publisher.publish("a", b"%d" % i, 1, i)
    for _ in range(20):
        bench.later(15)
        (message,) = slow.messages(answer=False)
        assert message.packet_id is not None
        slow.send(PubAckPacket(message.packet_id))
    assert not slow.closed


@pytest.mark.parametrize("qos", [1, 2])
def test_a_full_session_that_is_away_refuses(qos: int) -> None:
    """0x97 in PUBACK and PUBREC; everybody else gets the message; after it is back all is well."""
    bench = Bench(limits=Limits(queue_messages=3))
    away, other, publisher = bench.client("s", session_expiry_interval=100), bench.client("o"), bench.client("p")
    away.subscribe("a", 2)
    other.subscribe("a", 2)
    away.lose()
    for i in range(1, 6):
        publisher.publish("a", b"%d" % i, qos, i)
    assert codes(publisher) == [(1, 0), (2, 0), (3, 0), (4, 0x97), (5, 0x97)]
    assert len(other.messages()) == 5
    assert bench.core.stats.refused == 2
    publisher.publish("a", b"plain", 0)
    assert other.payloads() == [b"plain"]
    back = bench.client("s", clean=False, session_expiry_interval=100)
    assert back.payloads() == [b"1", b"2", b"3"]
    publisher.publish("a", b"6", qos, 6)
    assert codes(publisher) == [(6, 0)]
    assert back.payloads() == [b"6"]


def test_the_queue_is_bounded_in_bytes() -> None:
    bench = Bench(limits=Limits(queue_bytes=10_000))
    away, publisher = bench.client("s", session_expiry_interval=100), bench.client("p")
    away.subscribe("a", 1)
    away.lose()
    for i in range(1, 6):
        publisher.publish("a", b"x" * 3000, 1, i)
    assert codes(publisher) == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0x97)]
    assert bench.core.entrance.sessions["s"].bytes < 14_000


def test_a_full_session_and_an_old_publisher(caplog: pytest.LogCaptureFixture) -> None:
    """A 3.1.1 PUBACK has no reason: the loss is counted and logged once."""
    bench = Bench(limits=Limits(queue_messages=1))
    away = bench.client("s", session_expiry_interval=100)
    away.subscribe("a", 1)
    away.lose()
    old = bench.raw()
    old.send(b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x00\x00\x03old")
    old.written()
    with caplog.at_level(logging.WARNING):
        for i in range(1, 4):
            old.send(b"\x32\x06\x00\x01a\x00%cx" % i)
    assert old.written() == b"\x40\x02\x00\x01\x40\x02\x00\x02\x40\x02\x00\x03"
    assert bench.core.stats.dropped == 2
    assert len(caplog.records) == 1


def test_an_old_publisher_without_a_window_is_read_no_more() -> None:
    """3.1.1 knows no receive maximum: past ``inflight`` the broker stops reading, and goes on when there is room."""
    bench = Bench(limits=Limits(queue_messages=5, inflight=10))
    slow = bench.client("slow", receive_max=1)
    slow.subscribe("a", 1)
    old = bench.raw()
    old.send(b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x00\x00\x03old")
    old.written()
    packets = [b"\x32\x08\x00\x01a\x00%c%03d" % (i, i) for i in range(1, 101)]
    old.send(b"".join(packets))
    assert old.conn.paused
    assert len(bench.core.entrance.sessions["slow"].queue) < 16
    got: list[int] = []
    answers = b""
    for _ in range(200):
        got += [int(p) for p in slow.payloads()]
        answers += old.written()
        assert len(bench.core.entrance.sessions["slow"].queue) < 16
    assert got == list(range(1, 101))
    assert answers == b"".join(b"\x40\x02\x00%c" % i for i in range(1, 101))
    assert not old.conn.paused


def test_receive_maximum_of_the_broker() -> None:
    """[MQTT-3.3.4-7], 4.9: more unacknowledged QoS > 0 than announced is 0x93; QoS 2 counts until PUBREL."""
    bench = Bench(limits=Limits(inflight=3))
    client = bench.client()
    for i in range(1, 4):
        client.publish("a", b"", 2, i)
    client.send(PubRelPacket(1))
    client.publish("a", b"", 2, 4)
    client.publish("a", b"", 2, 5)
    assert client.ended_with() == 0x93


def test_packet_too_large() -> None:
    """[MQTT-3.2.2-15]: 0x95 as soon as the length is known, without waiting for the rest."""
    bench = Bench(limits=Limits(packet_bytes=1000, connect_bytes=200))
    client = bench.client()
    client.send(b"\x30\xff\x7f\x00\x01a")
    assert client.ended_with() == 0x95
    early = bench.raw()
    early.send(b"\x10\xff\x01")
    assert int(early.one(ConnAckPacket).reason_code) == 0x95


def test_too_many_levels() -> None:
    """0x90: in PUBACK, or as DISCONNECT where there is no answer."""
    client = Bench(limits=Limits(topic_levels=3)).client()
    client.publish("a/b/c/d", b"", 1)
    assert codes(client) == [(1, 0x90)]
    client.publish("a/b/c/d", b"", 0)
    assert client.ended_with() == 0x90


def test_retained_messages_are_bounded() -> None:
    bench = Bench(limits=Limits(retained_messages=2, retained_bytes=2000))
    client = bench.client()
    for number, (topic, payload) in enumerate(
        [("a", b"1"), ("b", b"2"), ("c", b"3"), ("a", b"x" * 3000), ("a", b"4")], 1
    ):
        client.publish(topic, payload, 1, number, retain=True)
    assert codes(client) == [(1, 0x10), (2, 0x10), (3, 0x97), (4, 0x97), (5, 0x10)]
    kept = bench.client("s").subscribe("#")
    assert sorted(p.payload for p in kept if isinstance(p, PublishPacket)) == [b"2", b"4"]


def test_plain_messages_for_a_slow_reader_are_dropped_and_counted() -> None:
    """QoS 0 to a connection that is not written: at most ``out_bytes`` wait, other readers get all."""
    bench = Bench(limits=Limits(out_bytes=1000))
    slow, fast, publisher = bench.client("slow"), bench.client("fast"), bench.client("p")
    slow.subscribe("a")
    fast.subscribe("a")
    packet = PublishPacket("a", b"x" * 95).write()
    for _ in range(10):
        publisher.send(packet * 4)
        assert len(fast.messages()) == 4
    assert slow.conn.pending <= 1000
    got = len(slow.messages())
    assert got == 1000 // len(packet)
    assert bench.core.stats.dropped == 40 - got


def test_a_client_that_asks_and_does_not_read_is_read_no_more() -> None:
    bench = Bench(limits=Limits(out_bytes=1000))
    client = bench.client(keep_alive=10)
    client.send(PingReqPacket().write() * 5000)
    assert client.conn.paused
    assert client.conn.pending < 3000
    assert len(client.written()) >= 2000
    total = 0
    while data := client.written():
        total += len(data)
    assert not client.conn.paused


def test_held_publishers_are_let_go_when_the_slow_one_leaves() -> None:
    for leave in ("lose", "leave"):
        bench = Bench(limits=Limits(queue_messages=2))
        slow, publisher = bench.client("s", receive_max=1), bench.client("p")
        slow.subscribe("a", 1)
        for i in range(1, 6):
            publisher.publish("a", b"%d" % i, 1, i)
        assert codes(publisher) == [(1, 0)]
        getattr(slow, leave)()
        assert codes(publisher) == [(i, 0) for i in range(2, 6)]
        assert publisher.conn.session is not None
        publisher.lose()


def test_a_publisher_that_leaves_is_forgotten_by_the_slow_session() -> None:
    bench = Bench(limits=Limits(queue_messages=2))
    slow, publisher = bench.client("s", receive_max=1), bench.client("p")
    slow.subscribe("a", 1)
    for i in range(1, 6):
        publisher.publish("a", b"%d" % i, 1, i)
    publisher.lose()
    session = bench.core.entrance.sessions["s"]
    assert session.holding == set()
    assert len(slow.payloads()) == 5
    assert not session.slow


def test_qos_2_under_back_pressure_is_delivered_once() -> None:
    bench = Bench(limits=Limits(queue_messages=3))
    slow, publisher = bench.client("s", receive_max=1), bench.client("p", session_expiry_interval=100)
    slow.subscribe("a", 2)
    for i in range(1, 7):
        publisher.publish("a", b"%d" % i, 2, i)
    assert codes(publisher) == [(1, 0), (2, 0)]
    publisher.lose()
    publisher = bench.client("p", clean=False, session_expiry_interval=100)
    for i in range(1, 7):
        publisher.publish("a", b"%d" % i, 2, i, duplicate=True)
    assert [int(p) for p in slow.payloads()] == list(range(1, 7))


def test_large_messages_arrive_in_pieces() -> None:
    options: dict[str, Any] = {"qos": QoS(1), "packet_id": 1}
    bench = Bench()
    subscriber, publisher = bench.client("s"), bench.client("p")
    subscriber.subscribe("a", 1)
    payload = bytes(range(256)) * 20_000
    data = PublishPacket("a", payload, **options).write()
    for at in range(0, len(data), 65_536):
        publisher.send(data[at : at + 65_536])
    assert subscriber.payloads() == [payload]
    for byte in PublishPacket("a", b"bytewise", **options).write():
        publisher.send(bytes([byte]))
    assert subscriber.payloads() == [b"bytewise"]
