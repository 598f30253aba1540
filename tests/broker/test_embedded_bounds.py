"""Each bound of the embedded broker ends in a refusal that the client can read; and rights, case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conformance_kit import Peer, Served, fresh
from embedded_fixtures import Bench, Client
from mqtt5 import (
    ConnAckPacket,
    ConnectPacket,
    PubAckPacket,
    PublishPacket,
    PubRecPacket,
    QoS,
    SubAckPacket,
    SubscribePacket,
    TopicFilter,
    Will,
)

from broker.embedded.__main__ import read_rules
from broker.embedded.access import Rule, Rules
from broker.embedded.limits import Limits
from schemas.errors import ConfigError

KEPT: dict[str, Any] = {"clean": False, "session_expiry_interval": 1000}


def refusal(bench: Bench, packet: ConnectPacket | bytes) -> int:
    """The reason code of CONNACK; the connection must be closed."""
    raw = bench.raw()
    raw.send(packet)
    answer = raw.one(ConnAckPacket)
    assert raw.closed
    return int(answer.reason_code)


def code(client: Client) -> int:
    answer = client.take()[-1]
    assert isinstance(answer, PubAckPacket | PubRecPacket)
    return int(answer.reason_code)


def suback(client: Client, *patterns: str) -> list[int]:
    client.send(SubscribePacket(1, [TopicFilter(p, max_qos=QoS(0)) for p in patterns]))
    return [int(c) for c in client.one(SubAckPacket).reason_codes]


# Bounds


def test_connections() -> None:
    bench = Bench(limits=Limits(connections=2))
    first = bench.client("a")
    bench.client("b")
    assert refusal(bench, ConnectPacket("c")) == 0x89
    old = bench.raw()
    old.send(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01o")
    assert old.written() == b"\x20\x02\x00\x03"
    bench.client("a")  # who takes its own place is no more than there were
    assert first.closed


def test_sessions() -> None:
    bench = Bench(limits=Limits(sessions=1))
    bench.client("a", **KEPT).lose()
    assert refusal(bench, ConnectPacket("b")) == 0x97
    bench.client("a", **KEPT)


@pytest.mark.parametrize(
    ("limits", "packet", "wanted"),
    [
        (Limits(client_id_bytes=4), ConnectPacket("ééé"), 0x85),
        (Limits(connect_bytes=50), ConnectPacket("c" * 60), 0x95),
        (Limits(topic_levels=2), ConnectPacket("c", will=Will("a/b/c")), 0x90),
    ],
)
def test_what_a_connect_may_have(limits: Limits, packet: ConnectPacket, wanted: int) -> None:
    assert refusal(Bench(limits=limits), packet) == wanted


def test_packet_size() -> None:
    bench = Bench(limits=Limits(packet_bytes=100))
    client = bench.client()
    assert client.connack.max_packet_size == 100
    client.send(PublishPacket("a", b"x" * 94))
    assert not client.closed
    client.send(PublishPacket("a", b"x" * 97))
    assert client.ended_with() == 0x95


def test_topic_depth() -> None:
    client = Bench(limits=Limits(topic_levels=3)).client()
    assert suback(client, "a/b/c", "a/b/c/d", "$share/g/a/b/c", "$share/g/a/b/c/d", "+/+/#") == [0, 0x8F, 0, 0x8F, 0]
    client.publish("a/b/c", b"", 1, 1)
    assert code(client) == 0
    client.publish("a/b/c/d", b"", 2, 2)
    assert code(client) == 0x90
    client.publish("a/b/c/d", b"", 0)
    assert client.ended_with() == 0x90


def test_subscriptions() -> None:
    client = Bench(limits=Limits(subscriptions=2)).client()
    assert suback(client, "a", "b", "c", "a") == [0, 0, 0x97, 0]


def test_topic_aliases() -> None:
    client = Bench(limits=Limits(topic_aliases=2)).client()
    assert client.connack.topic_alias_max == 2
    client.publish("a", b"", 0, topic_alias=3)
    assert client.ended_with() == 0x94


def test_all_queues_together() -> None:
    """0x97 for sessions that are away, though each has room; who keeps up is served; room comes back with what is taken."""
    bench = Bench(limits=Limits(all_queue_bytes=20_000, queue_bytes=15_000))
    away = [bench.client(name, **KEPT) for name in ("a", "b")]
    for client in away:
        client.subscribe(f"to/{client.conn.session.client_id if client.conn.session else ''}", 1)
        client.lose()
    live, publisher = bench.client("live"), bench.client("p")
    live.subscribe("#", 1)
    answers: dict[str, list[int]] = {"a": [], "b": []}
    for i in range(1, 13):
        for name, got in answers.items():
            publisher.publish(f"to/{name}", b"x" * 700, 1, i)
            got.append(code(publisher))
            assert len(live.messages()) == 1
    assert bench.core.stats.queued < 22_000
    for name, got in answers.items():
        session = bench.core.entrance.sessions[name]
        assert session.bytes < 15_000, "its own bound was not reached"
        assert sorted(got) == got, "refused once full"
        assert got.count(0) == len(session.queue) > 5
        assert got.count(0x97) >= 1
    back = bench.client("a", **KEPT)
    assert len(back.payloads()) == answers["a"].count(0)
    publisher.publish("to/b", b"x", 1, 50)
    assert code(publisher) == 0
    assert live.payloads() == [b"x"]
    bench.client("b", clean=True)
    bench.client("a", clean=True)
    assert bench.core.stats.queued == 0


def test_all_queues_together_and_a_slow_reader() -> None:
    """One that is there and does not keep up holds its publisher, until its own queue is empty; nothing is lost."""
    bench = Bench(limits=Limits(all_queue_bytes=3000))
    slow, publisher = bench.client("s", receive_max=1), bench.client("p")
    slow.subscribe("t", 1)
    for i in range(1, 31):
        publisher.publish("t", b"%d" % i, 1, i)
    held = 30 - len(publisher.take())
    assert held > 10
    assert [int(p) for p in slow.payloads()] == list(range(1, 31))
    assert len(publisher.take()) == held
    assert bench.core.stats.queued == 0


def test_a_slow_subscriber_is_left_alone_on_a_socket() -> None:
    """It reads nothing at all: another topic's traffic goes on at its pace, and so does QoS 0 on the same topic."""
    with Served(limits=Limits(queue_messages=50, out_bytes=20_000, stall_seconds=60)) as served:
        slow, brisk = Peer(served.port, receive_max=5), Peer(served.port)
        held, free = Peer(served.port), Peer(served.port)
        slow.subscribe("shared", qos=1)
        brisk.subscribe("#", qos=1)
        for i in range(1, 101):
            held.send(PublishPacket("shared", b"x" * 1000, qos=QoS(1), packet_id=i))
        assert [brisk.receive().topic for _ in range(100)] == ["shared"] * 100
        for i in range(1, 300):
            assert free.publish("other", b"%d" % i, 1) == 0
            assert brisk.receive().payload == b"%d" % i
            free.send(PublishPacket("shared", b"plain"))
            assert brisk.receive().payload == b"plain"
        for peer in (slow, brisk, held, free):
            peer.drop()


# Rights


RULES = [
    Rule("*", ["open/#"], ["open/#"]),
    Rule("ann", ["own/%u/#", "cmd/+/set"], ["own/%u/#", "+/status", "by/%c"]),
    Rule("reader", [], ["#"]),
]


@pytest.mark.parametrize(
    ("user", "action", "topic", "allowed"),
    [
        (None, "publish", "open/x", True),
        (None, "publish", "own/None/x", False),
        (None, "subscribe", "open/+/x", True),
        (None, "subscribe", "#", False),
        (None, "subscribe", "+/x", False),
        ("ann", "publish", "own/ann/a/b", True),
        ("ann", "publish", "own/bob/a", False),
        ("ann", "publish", "cmd/7/set", True),
        ("ann", "publish", "cmd/7/8/set", False),
        ("ann", "subscribe", "own/ann/#", True),
        ("ann", "subscribe", "own/+/#", False),
        ("ann", "subscribe", "+/status", True),
        ("ann", "subscribe", "pump/status", True),
        ("ann", "subscribe", "+/+", False),
        ("ann", "subscribe", "by/c1", True),
        ("ann", "subscribe", "by/c2", False),
        ("reader", "subscribe", "a/+/#", True),
        ("reader", "publish", "a", False),
        ("reader", "subscribe", "$SYS/#", False),
        ("+", "publish", "own/+/x", False),
        ("a/b", "publish", "own/a/b/x", False),
        ("bob", "publish", "own/ann/x", False),
    ],
)
def test_rules(user: str | None, action: Any, topic: str, allowed: bool) -> None:
    assert Rules(RULES)("c1", user, action, topic) is allowed


def test_rights_at_every_door() -> None:
    """Publications at each QoS, wills, filters, shared filters, retained messages; what is denied reaches nobody."""
    rules = Rules([Rule("w", ["ok/#"], ["ok/#"]), Rule("all", ["#"], ["#"])])
    bench = Bench(authorize=rules)
    watcher = bench.client("watcher", username="all")
    watcher.subscribe("#", 2)
    client = bench.client("c", username="w")
    client.publish("no", b"0", 0, retain=True)
    client.publish("no", b"1", 1, 1)
    assert code(client) == 0x87
    client.publish("no", b"2", 2, 2)
    assert code(client) == 0x87
    client.publish("no", b"3", 1, 3, topic_alias=1)
    assert code(client) == 0x87
    client.publish("", b"4", 1, 4, topic_alias=1)
    assert code(client) == 0x87
    assert not client.closed
    assert suback(client, "ok/+", "no", "#", "$share/g/no", "$share/g/ok/x") == [0, 0x87, 0x87, 0x87, 0]
    client.publish("ok/x", b"5", 1, 5)
    assert watcher.payloads() == [b"5"]
    late = bench.client("late", username="all")
    assert late.subscribe("no") == []
    assert refusal(bench, ConnectPacket("v", username="w", will=Will("no"))) == 0x87
    assert bench.core.stats.refused >= 5


def test_nobody_publishes_sys_topics_and_client_ids_are_not_taken() -> None:
    bench = Bench()
    client = bench.client("c", username="ann")
    client.publish("$SYS/broker/version", b"fake", 1)
    assert code(client) == 0x87
    assert refusal(bench, ConnectPacket("c", username="bob")) == 0x87
    assert not client.closed


def test_rights_on_a_socket() -> None:
    with Served(users={}, anonymous=True, acl=RULES) as served, Peer(served.port) as peer:
        assert peer.subscribe("open/#", "own/#", qos=1) == [1, 0x87]
        with Peer(served.port) as publisher:
            assert publisher.publish("open/x", b"1", 1) == 0x00
        assert peer.receive().payload == b"1"
        assert peer.publish(fresh(), b"2", 1) == 0x87
        with Peer(served.port, username="ann", password=b"x", accepted=False) as stranger:
            assert int(stranger.connack.reason_code) == 0x86


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"user": "x"}, "expected a list of rules"),
        ([{"publish": []}], 'expected a map with a "user"'),
        ([{"user": "x", "publsh": []}], "unknown key 'publsh'; did you mean 'publish'?"),
        ([{"user": "x", "publish": "a"}], "expected lists of topic filters"),
    ],
)
def test_a_rules_file_that_is_wrong(tmp_path: Path, rules: Any, message: str) -> None:
    path = tmp_path / "acl.json"
    path.write_text(json.dumps(rules))
    with pytest.raises(ConfigError) as caught:
        read_rules(path)
    assert message in str(caught.value)
