"""Hostile bytes on a connection of the embedded broker: a clean end, others undisturbed, memory bounded."""

from __future__ import annotations

import tracemalloc

import mqtt5
from embedded_fixtures import Bench
from hypothesis import given, settings
from hypothesis import strategies as st
from mqtt5 import ConnectPacket, DisconnectPacket, PublishPacket, QoS, SubscribePacket, TopicFilter

from broker.embedded.limits import Limits

REASONS = {0x81, 0x82, 0x84, 0x90, 0x93, 0x94, 0x95, 0x99}

SOUND = [
    ConnectPacket("evil", clean_start=True).write(),
    b"\x10\x10\x00\x04MQTT\x04\x02\x00\x00\x00\x04evil",
    PublishPacket("a/b", b"x" * 20).write(),
    PublishPacket("a/b", b"x" * 20, qos=QoS(1), packet_id=1, topic_alias=1, user_properties=[("k", "v")]).write(),
    PublishPacket("a/b", b"x", qos=QoS(2), packet_id=2, message_expiry_interval=5, content_type="t").write(),
    SubscribePacket(3, [TopicFilter("#", max_qos=QoS(2)), TopicFilter("$share/g/a", max_qos=QoS(1))]).write(),
    mqtt5.UnsubscribePacket(4, ["#"]).write(),
    mqtt5.PubAckPacket(1).write(),
    mqtt5.PubRecPacket(1).write(),
    mqtt5.PubRelPacket(2).write(),
    mqtt5.PubCompPacket(1).write(),
    mqtt5.PingReqPacket().write(),
    mqtt5.AuthPacket().write(),
    DisconnectPacket().write(),
]


def mutate(packets: list[bytes], changes: list[tuple[int, int]]) -> bytes:
    data = bytearray(b"".join(packets))
    for at, byte in changes:
        if data:
            data[at % len(data)] = byte
    return bytes(data)


HOSTILE = st.binary(max_size=200) | st.builds(
    mutate,
    st.lists(st.sampled_from(SOUND), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
)


@given(HOSTILE, st.booleans(), st.integers(1, 60))
@settings(deadline=None, derandomize=True, max_examples=800)
def test_hostile_bytes(data: bytes, connected: bool, step: int) -> None:
    bench = Bench()
    victim = bench.client("victim", will=mqtt5.Will("will", payload=b"w"))
    victim.subscribe("safe", 1)
    evil = bench.client("evil") if connected else bench.raw()
    for at in range(0, len(data), step):
        evil.send(data[at : at + step])
    written = evil.conn.out
    if evil.closed and evil.conn.version == 5 and connected and written and written[-1][0] == 0xE0:
        last, _ = mqtt5.read(memoryview(written[-1]))
        assert isinstance(last, DisconnectPacket)
        assert int(last.reason_code) in REASONS
    if not evil.closed:
        assert len(b"".join(evil.conn._parts)) <= len(data)
    assert not victim.closed
    victim.publish("safe", b"still here", 1, 7)
    assert b"still here" in [p.payload for p in victim.take() if isinstance(p, PublishPacket)]
    evil.lose()
    bench.later(1)
    assert bench.core.stats.connected == 1


def test_announced_lengths_reserve_no_memory() -> None:
    bench = Bench(limits=Limits(packet_bytes=200_000_000))
    clients = [bench.client(f"c{i}") for i in range(50)]
    tracemalloc.start()
    for client in clients:
        client.send(b"\x30\xff\xff\x7f" + b"\x00\x01a")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    assert not any(client.closed for client in clients)


def test_a_flood_of_topics_is_bounded() -> None:
    """What the broker remembers of topics and properties has limits."""
    bench = Bench()
    client = bench.client()
    tracemalloc.start()
    for i in range(10_000):
        client.send(PublishPacket(f"t/{i}", b"", user_properties=[("k", str(i))]).write())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    assert not client.closed


def test_deep_filters_and_many_wildcards() -> None:
    """A client's worst filters cost no more than their number."""
    bench = Bench(limits=Limits(topic_levels=32, subscriptions=600))
    client = bench.client()
    patterns = ["/".join("+" if i >> bit & 1 else "a" for bit in range(16)) for i in range(500)]
    client.send(SubscribePacket(1, [TopicFilter(p, max_qos=QoS(0)) for p in patterns]))
    client.take()
    client.publish("/".join("a" * 16), b"x")
    assert len(client.messages()) == 1
