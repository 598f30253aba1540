"""The embedded broker's core in virtual time, statement by statement of the MQTT 5 standard."""

from __future__ import annotations

from typing import Any

import pytest
from embedded_fixtures import Bench
from mqtt5 import (
    ConnAckPacket,
    ConnectPacket,
    DisconnectPacket,
    DisconnectReasonCode,
    PingReqPacket,
    PingRespPacket,
    PubAckPacket,
    PubCompPacket,
    PublishPacket,
    PubRecPacket,
    PubRecReasonCode,
    PubRelPacket,
    QoS,
    SubAckPacket,
    SubscribePacket,
    TopicFilter,
    UnsubAckPacket,
    UnsubscribePacket,
    Will,
)

from broker.embedded.limits import Limits


def code_of(packet: Any) -> int:
    return int(packet.reason_code)


# 3.1 CONNECT


def test_first_packet_must_be_connect() -> None:
    """[MQTT-3.1.0-1], and no DISCONNECT before CONNACK: [MQTT-3.14.0-1]."""
    bench = Bench()
    client = bench.raw()
    client.send(PingReqPacket())
    assert client.closed
    assert client.take() == []


def test_second_connect_is_a_protocol_error() -> None:
    """[MQTT-3.1.0-2]"""
    client = Bench().client()
    client.send(ConnectPacket("c"))
    assert client.ended_with() == 0x82


def test_connect_not_sent_in_time_closes() -> None:
    """3.1: within a reasonable time."""
    bench = Bench(limits=Limits(connect_seconds=5))
    client = bench.raw()
    bench.later(4.9)
    assert not client.closed
    bench.later(0.2)
    assert client.closed


def test_unknown_version_is_refused() -> None:
    """[MQTT-3.1.2-2]: CONNACK 0x84 and close."""
    client = Bench().raw()
    data = bytearray(ConnectPacket("c").write())
    data[8] = 6
    client.send(bytes(data))
    assert code_of(client.one(ConnAckPacket)) == 0x84
    assert client.closed


@pytest.mark.parametrize(
    ("flags", "code"),
    [(0x01, 0x81), (0x1E, 0x81), (0x08, 0x81), (0x20, 0x81)],
    ids=[
        "reserved [MQTT-3.1.2-3]",
        "will QoS 3 [MQTT-3.1.2-12]",
        "QoS without will [-11]",
        "retain without will [-13]",
    ],
)
def test_connect_flags(flags: int, code: int) -> None:
    client = Bench().raw()
    data = bytearray(ConnectPacket("c").write())
    data[9] = flags
    client.send(bytes(data))
    assert code_of(client.one(ConnAckPacket)) == code
    assert client.closed


def test_assigned_client_id() -> None:
    """[MQTT-3.1.3-6], [MQTT-3.1.3-7], [MQTT-3.2.2-16]"""
    bench = Bench()
    first, second = bench.client(""), bench.client("")
    assert first.connack.assigned_client_id
    assert first.connack.assigned_client_id != second.connack.assigned_client_id
    assert bench.client("named").connack.assigned_client_id is None


def test_client_id_too_long() -> None:
    """[MQTT-3.1.3-8]"""
    client = Bench(limits=Limits(client_id_bytes=5)).raw()
    client.send(ConnectPacket("longer"))
    assert code_of(client.one(ConnAckPacket)) == 0x85
    assert client.closed


def test_connack_says_what_the_broker_takes() -> None:
    """3.2.2.3: receive maximum, maximum packet size, topic alias maximum, lowered session expiry, server keep alive."""
    limits = Limits(inflight=7, packet_bytes=9000, topic_aliases=3, session_seconds=60, keep_alive=30)
    connack = Bench(limits=limits).client(session_expiry_interval=1000, keep_alive=0).connack
    assert (connack.receive_max, connack.max_packet_size, connack.topic_alias_max) == (7, 9000, 3)
    assert (connack.session_expiry_interval, connack.server_keep_alive) == (60, 30)


def test_extended_authentication_is_refused() -> None:
    """[MQTT-4.12.0-1]"""
    client = Bench().raw()
    client.send(ConnectPacket("c", authentication_method="SCRAM"))
    assert code_of(client.one(ConnAckPacket)) == 0x8C


def test_auth_without_method_is_a_protocol_error() -> None:
    """[MQTT-4.12.0-7]"""
    client = Bench().client()
    client.send(b"\xf0\x00")
    assert client.ended_with() == 0x82


def test_take_over() -> None:
    """[MQTT-3.1.4-3]: the older connection gets 0x8E; its will is published, the session goes on."""
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("will")
    first = bench.client("c", session_expiry_interval=100, will=Will("will", payload=b"gone"))
    first.subscribe("a", 1)
    second = bench.client("c", clean=False, session_expiry_interval=100)
    assert first.ended_with() == 0x8E
    assert second.connack.session_present
    assert watcher.payloads() == [b"gone"]
    watcher.publish("a", b"1", 1)
    assert second.payloads() == [b"1"]
    first.lose()
    assert not second.closed
    assert bench.core.stats.connected == 2


def test_clean_start_ends_the_session() -> None:
    """[MQTT-3.1.2-4], [MQTT-3.2.2-2]"""
    bench = Bench()
    client = bench.client("c", session_expiry_interval=100)
    client.subscribe("a", 1)
    client.lose()
    again = bench.client("c", clean=True)
    assert not again.connack.session_present
    bench.client("p").publish("a")
    assert again.take() == []


def test_session_is_kept_and_expires() -> None:
    """[MQTT-3.1.2-5], [MQTT-3.1.2-23], [MQTT-4.1.0-2]"""
    bench = Bench()
    publisher = bench.client("p")
    client = bench.client("c", session_expiry_interval=100)
    client.subscribe("a", 1)
    client.lose()
    publisher.publish("a", b"1", 1)
    bench.later(99)
    client = bench.client("c", clean=False, session_expiry_interval=100)
    assert client.connack.session_present
    assert client.payloads() == [b"1"]
    client.lose()
    bench.later(101)
    assert "c" not in bench.core.entrance.sessions
    client = bench.client("c", clean=False)
    assert not client.connack.session_present
    assert bench.core.router.subscriptions.count == 0


def test_session_expiry_of_an_earlier_connection_does_nothing() -> None:
    bench = Bench()
    bench.client("c", session_expiry_interval=10).lose()
    bench.later(5)
    bench.client("c", clean=False, session_expiry_interval=10).lose()
    bench.later(6)
    assert "c" in bench.core.entrance.sessions
    bench.later(5)
    assert "c" not in bench.core.entrance.sessions


def test_disconnect_changes_the_session_expiry() -> None:
    """3.14.2.2.2: it may be changed, but not from 0 to something else."""
    bench = Bench()
    client = bench.client("c", session_expiry_interval=100)
    client.leave(session_expiry_interval=0)
    assert "c" not in bench.core.entrance.sessions
    client = bench.client("c", session_expiry_interval=0)
    client.leave(session_expiry_interval=5)
    assert client.ended_with() == 0x82


def test_keep_alive() -> None:
    """[MQTT-3.1.2-22]: one and a half times the interval; PINGREQ is answered ([MQTT-3.12.4-1])."""
    bench = Bench()
    client = bench.client(keep_alive=10)
    bench.later(14)
    client.send(PingReqPacket())
    client.one(PingRespPacket)
    bench.later(14.9)
    assert not client.closed
    bench.later(0.2)
    assert client.ended_with() == 0x8D


def test_keep_alive_zero_is_for_ever() -> None:
    bench = Bench()
    client = bench.client(keep_alive=0)
    bench.later(100_000)
    assert not client.closed


def test_server_keep_alive_is_enforced() -> None:
    """[MQTT-3.2.2-21]"""
    bench = Bench(limits=Limits(keep_alive=10))
    client = bench.client(keep_alive=0)
    bench.later(16)
    assert client.ended_with() == 0x8D


# 3.1.2.5 Wills


def test_will_is_published_when_the_connection_breaks() -> None:
    """[MQTT-3.1.2-7], [MQTT-3.1.2-14], -15: QoS, retain and properties of the will."""
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("will/#", 2, as_published=True)
    will = Will(
        "will/c",
        payload=b"gone",
        qos=QoS(1),
        retain=True,
        content_type="text/plain",
        payload_format_indicator=1,
        response_topic="r",
        correlation_data=b"\x00\x01",
        user_properties=[("k", "v")],
        message_expiry_interval=60,
    )
    bench.client("c", will=will).lose()
    (message,) = watcher.messages()
    assert (message.topic, message.payload, int(message.qos), message.retain) == ("will/c", b"gone", 1, True)
    assert (message.content_type, message.payload_format_indicator) == ("text/plain", 1)
    assert (message.response_topic, message.correlation_data) == ("r", b"\x00\x01")
    assert (message.user_properties, message.message_expiry_interval) == ([("k", "v")], 60)
    (kept,) = bench.client("late").subscribe("will/c")
    assert isinstance(kept, PublishPacket)
    assert kept.payload == b"gone"


def test_no_will_after_normal_disconnect() -> None:
    """[MQTT-3.14.4-3]"""
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("will")
    bench.client("c", will=Will("will", payload=b"x")).leave()
    assert watcher.take() == []


@pytest.mark.parametrize(
    "code", [DisconnectReasonCode.DISCONNECT_WITH_WILL_MESSAGE, DisconnectReasonCode.UNSPECIFIED_ERROR]
)
def test_will_after_other_disconnects(code: DisconnectReasonCode) -> None:
    """3.14.2.1: every reason but 0x00."""
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("will")
    bench.client("c", will=Will("will", payload=b"x")).leave(reason_code=code)
    assert watcher.payloads() == [b"x"]


def test_will_delay() -> None:
    """[MQTT-3.1.3-9]: after the delay; not at all when the client is back before."""
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("will")
    options: dict[str, Any] = {
        "session_expiry_interval": 100,
        "will": Will("will", payload=b"x", will_delay_interval=10),
    }
    client = bench.client("c", **options)
    client.lose()
    bench.later(9)
    assert watcher.take() == []
    client = bench.client("c", clean=False, **options)
    bench.later(20)
    assert watcher.take() == []
    client.lose()
    bench.later(10.1)
    assert watcher.payloads() == [b"x"]
    bench.later(200)
    assert watcher.take() == []


def test_will_delay_ends_with_the_session() -> None:
    """3.1.3.2.2: the delay or the end of the session, whichever is first."""
    bench = Bench()
    watcher = bench.client("w")
    watcher.subscribe("will")
    will = Will("will", payload=b"x", will_delay_interval=50)
    bench.client("a", session_expiry_interval=5, will=will).lose()
    bench.later(5.1)
    assert watcher.payloads() == [b"x"]
    bench.client("b", session_expiry_interval=100, will=will).lose()
    bench.client("b", clean=True)
    assert watcher.payloads() == [b"x"]
    bench.later(100)
    assert watcher.take() == []


# 3.3 PUBLISH


def test_all_qos_to_all_qos() -> None:
    """[MQTT-3.8.4-8]: the lower of the published and the granted QoS."""
    for published in range(3):
        for granted in range(3):
            bench = Bench()
            subscriber, publisher = bench.client("s"), bench.client("p")
            subscriber.subscribe("a/b", granted)
            publisher.publish("a/b", b"x", published, 9)
            (message,) = subscriber.messages()
            assert int(message.qos) == min(published, granted)
            assert (message.retain, message.duplicate) == (False, False)
            if published == 1:
                assert publisher.one(PubAckPacket).packet_id == 9
            if published == 2:
                assert publisher.one(PubRecPacket).packet_id == 9
                publisher.send(PubRelPacket(9))
                assert publisher.one(PubCompPacket).packet_id == 9
            session = bench.core.entrance.sessions["s"]
            assert (session.inflight, session.bytes) == ({}, 0)


def test_properties_are_handed_on_unaltered() -> None:
    """[MQTT-3.3.2-4], -15, -16, -17, -18, -20"""
    for qos in range(3):
        bench = Bench()
        subscriber, publisher = bench.client("s"), bench.client("p")
        subscriber.subscribe("a", 2)
        properties: dict[str, Any] = {
            "payload_format_indicator": 1,
            "content_type": "application/msgpack",
            "response_topic": "answer/ü",
            "correlation_data": bytes(range(200)),
            "user_properties": [("b", "2"), ("a", "1"), ("b", "3")],
        }
        publisher.publish("a", "größe".encode(), qos, **properties)
        (message,) = subscriber.messages()
        assert message.payload == "größe".encode()
        assert {name: getattr(message, name) for name in properties} == properties


def test_runs_of_alike_messages_arrive_one_by_one() -> None:
    """The hot path hands runs on as they are: every receiver kind must see the same messages."""
    for qos in range(3):
        bench = Bench()
        plain, numbered, old = bench.client("s"), bench.client("n"), bench.raw()
        old.send(b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x00\x00\x03old", b"\x82\x08\x00\x01\x00\x03a/b" + bytes([qos]))
        assert old.written() == b"\x20\x02\x00\x00\x90\x03\x00\x01" + bytes([qos])
        plain.subscribe("a/b", qos)
        numbered.subscribe("a/+", qos, identifier=5)
        publisher = bench.client("p")
        packets = [
            PublishPacket("a/b", b"%03d" % i, qos=QoS(qos), packet_id=i + 1 if qos else None, content_type="t")
            for i in range(50)
        ]
        packets.insert(20, PublishPacket("a/b", b"longer", qos=QoS(qos), packet_id=100 if qos else None))
        data = b"".join(p.write() for p in packets)
        for at in range(0, len(data), 101):
            publisher.send(data[at : at + 101])
        want = [p.payload for p in packets]
        assert plain.payloads() == want
        found = numbered.messages()
        assert [m.payload for m in found] == want
        assert all(m.subscription_ids == [5] for m in found)
        assert {m.content_type for m in found} == {"t", None}
        head = b"a/b" if not qos else None
        if head:
            assert [part[:3] for part in old.written().split(head)[1:]] == [w[:3] for w in want]
        assert bench.core.stats.received == 51


def test_qos_2_is_delivered_once() -> None:
    """[MQTT-4.3.3-10], -12: a repeated PUBLISH is acknowledged, not delivered, until PUBREL; across connections too."""
    bench = Bench()
    subscriber = bench.client("s")
    subscriber.subscribe("a", 2)
    publisher = bench.client("p", session_expiry_interval=100)
    publisher.publish("a", b"1", 2, 5)
    publisher.lose()
    publisher = bench.client("p", clean=False, session_expiry_interval=100)
    publisher.publish("a", b"1", 2, 5, duplicate=True)
    assert publisher.one(PubRecPacket).packet_id == 5
    assert subscriber.payloads() == [b"1"]
    publisher.send(PubRelPacket(5))
    assert code_of(publisher.one(PubCompPacket)) == 0
    publisher.send(PubRelPacket(5))
    assert code_of(publisher.one(PubCompPacket)) == 0x92
    publisher.publish("a", b"2", 2, 5)
    assert subscriber.payloads() == [b"2"]


def test_unknown_pubrec_is_answered_0x92() -> None:
    """4.3.3, 3.6.2.1"""
    client = Bench().client()
    client.send(PubRecPacket(4))
    release = client.one(PubRelPacket)
    assert (release.packet_id, code_of(release)) == (4, 0x92)


def test_pubrec_with_error_ends_the_exchange() -> None:
    """[MQTT-4.3.3-4]"""
    bench = Bench()
    client = bench.client("s")
    client.subscribe("a", 2)
    bench.client("p").publish("a", b"1", 2)
    (message,) = client.messages(answer=False)
    assert message.packet_id is not None
    client.send(PubRecPacket(message.packet_id, reason_code=PubRecReasonCode.UNSPECIFIED_ERROR))
    assert client.take() == []
    assert bench.core.entrance.sessions["s"].inflight == {}


@pytest.mark.parametrize(("first", "answer"), [(1, PubRecPacket), (2, PubAckPacket)])
def test_wrong_kind_of_acknowledgement(first: int, answer: type[Any]) -> None:
    """4.13: PUBREC for QoS 1, PUBACK for QoS 2."""
    bench = Bench()
    client = bench.client("s")
    client.subscribe("a", 2)
    bench.client("p").publish("a", b"1", first)
    (message,) = client.messages(answer=False)
    client.send(answer(message.packet_id))
    assert client.ended_with() == 0x82


def test_no_matching_subscribers() -> None:
    """3.4.2.1, 3.5.2.1: reason 0x10."""
    client = Bench().client()
    client.publish("a", b"", 1)
    assert code_of(client.one(PubAckPacket)) == 0x10
    client.publish("a", b"", 2, 2)
    assert code_of(client.one(PubRecPacket)) == 0x10


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x36\x06\x00\x01a\x00\x01\x00", 0x81),  # QoS 3 [MQTT-3.3.1-4]
        (b"\x38\x04\x00\x01a\x00", 0x81),  # DUP at QoS 0 [MQTT-3.3.1-2]
        (b"\x30\x04\x00\x01#\x00", 0x90),  # wildcard [MQTT-3.3.2-2]
        (b"\x30\x04\x00\x01+\x00", 0x90),
        (b"\x30\x03\x00\x00\x00", 0x82),  # no topic and no alias
        (b"\x32\x06\x00\x01a\x00\x00\x00", 0x82),  # packet identifier 0 [MQTT-2.2.1-3]
        (b"\x30\x04\x00\x01\xff\x00", 0x81),  # not UTF-8 [MQTT-1.5.4-1]
        (b"\x30\x04\x00\x01\x00\x00", 0x81),  # U+0000 [MQTT-1.5.4-2]
        (b"\x30\x06\x00\x03\xed\xa0\x80\x00", 0x81),  # a surrogate
        (b"\x30\x06\x00\x01a\x02\x0b\x01", 0x82),  # subscription identifier [MQTT-3.3.4-6]
        (b"\x30\x07\x00\x01a\x03\x23\x00\x00", 0x94),  # alias 0 [MQTT-3.3.2-8]
        (b"\x30\x07\x00\x01a\x03\x23\x7f\xff", 0x94),  # alias above the maximum [MQTT-3.3.2-9]
        (b"\x30\x06\x00\x00\x03\x23\x00\x05", 0x82),  # alias never set
        (b"\x30\x06\x00\x01a\x02\x01\x02", 0x82),  # payload format 2
        (b"\x30\x08\x00\x01a\x04\x01\x01\x01\x01", 0x82),  # a property twice
        (b"\x30\x05\x00\x01a\x01\x11", 0x81),  # a property of CONNECT
        (b"\x30\x08\x00\x01a\x04\x08\x00\x01#", 0x90),  # response topic with wildcard [MQTT-3.3.2-14]
        (b"\x30\x07\x00\x01a\x02\x01\x01\xff", 0x99),  # payload is not the text it says it is
        (b"\x30\x02\x00\x09", 0x81),  # topic past the end
        (b"\x30\x03\x00\x01a", 0x81),  # no properties
        (b"\x30\x05\x00\x01a\x05\x01", 0x81),  # properties past the end
        (b"\x30\x80\x80\x80\x80\x01", 0x81),  # remaining length of five bytes
        (b"\x30\x80\x00", 0x81),  # not in its shortest form [MQTT-1.5.5-1]
    ],
)
def test_bad_publish_ends_the_connection(data: bytes, code: int) -> None:
    bench = Bench()
    other, client = bench.client("o"), bench.client()
    other.subscribe("#")
    client.send(data)
    assert client.ended_with() == code
    assert other.take() == []


def test_payload_format_is_answered_at_qos_1() -> None:
    """3.3.2.3.2: 0x99 in PUBACK and PUBREC."""
    client = Bench().client()
    client.publish("a", b"\xff", 1, payload_format_indicator=1)
    assert code_of(client.one(PubAckPacket)) == 0x99
    client.publish("a", b"\xff", 2, payload_format_indicator=1)
    assert code_of(client.one(PubRecPacket)) == 0x99
    client.send(PubRelPacket(1))
    assert code_of(client.one(PubCompPacket)) == 0x92


def test_topic_aliases() -> None:
    """3.3.2.3.4: set, used, set anew; they end with the connection, and belong to one client only."""
    bench = Bench()
    subscriber = bench.client("s")
    subscriber.subscribe("#", 1)
    one, two = bench.client("p"), bench.client("q")
    one.publish("a", b"1", topic_alias=3)
    two.publish("z", b"2", topic_alias=3)
    alias = b"\x30\x07\x00\x00\x03\x23\x00\x03"
    one.send(alias + b"3", alias + b"4")
    one.publish("b", b"5", topic_alias=3)
    one.send(alias + b"6")
    one.send(b"\x32\x09\x00\x00\x00\x07\x03\x23\x00\x037")
    messages = subscriber.messages()
    found = [(m.topic, m.payload) for m in messages]
    assert found == [("a", b"1"), ("z", b"2"), ("a", b"3"), ("a", b"4"), ("b", b"5"), ("b", b"6"), ("b", b"7")]
    assert {m.topic_alias for m in messages} == {None}
    one.lose()
    one = bench.client("p")
    one.send(alias + b"8")
    assert one.ended_with() == 0x82


def test_message_expiry_is_decremented() -> None:
    """[MQTT-3.3.2-5], [MQTT-3.3.2-6]"""
    bench = Bench()
    publisher = bench.client("p")
    client = bench.client("s", session_expiry_interval=1000)
    client.subscribe("a", 1)
    client.lose()
    publisher.publish("a", b"short", 1, message_expiry_interval=10)
    publisher.publish("a", b"long", 1, message_expiry_interval=100)
    publisher.publish("a", b"kept", 1, retain=True, message_expiry_interval=50)
    bench.later(30)
    client = bench.client("s", clean=False, session_expiry_interval=1000)
    messages = client.messages()
    assert [(m.payload, m.message_expiry_interval) for m in messages] == [(b"long", 70), (b"kept", 20)]
    assert bench.core.stats.expired == 1
    (kept,) = bench.client("x").subscribe("a")
    assert isinstance(kept, PublishPacket)
    assert kept.message_expiry_interval == 20
    bench.later(21)
    assert bench.client("y").subscribe("a") == []


def test_order_is_kept() -> None:
    """[MQTT-4.6.0-5], -6: of one topic and QoS, through queue and window."""
    bench = Bench()
    publisher = bench.client("p")
    client = bench.client("s", session_expiry_interval=1000, receive_max=3)
    client.subscribe("a", 1)
    for i in range(20):
        publisher.publish("a", b"%d" % i, 1, i + 1)
    client.lose()
    for i in range(20, 30):
        publisher.publish("a", b"%d" % i, 1, i + 1)
    client = bench.client("s", clean=False, session_expiry_interval=1000, receive_max=3)
    assert [int(p) for p in client.payloads()] == list(range(30))


def test_resent_after_reconnect() -> None:
    """[MQTT-4.4.0-1], [MQTT-4.6.0-1], [MQTT-3.3.1-1]: same packet identifiers, DUP, in order, PUBREL where that is due."""
    bench = Bench()
    publisher = bench.client("p")
    client = bench.client("s", session_expiry_interval=1000)
    client.subscribe("a", 2)
    for i in range(3):
        publisher.publish("a", b"%d" % i, 2, i + 1)
    first = client.messages(answer=False)
    assert first[0].packet_id is not None
    client.send(PubRecPacket(first[0].packet_id))
    client.one(PubRelPacket)
    client.lose()
    client = bench.client("s", clean=False, session_expiry_interval=1000)
    packets = client.take()
    assert isinstance(packets[0], PubRelPacket)
    assert packets[0].packet_id == first[0].packet_id
    again = [p for p in packets if isinstance(p, PublishPacket)]
    assert [(p.packet_id, p.payload, p.duplicate) for p in again] == [(p.packet_id, p.payload, True) for p in first[1:]]
    # A message is not sent again on a connection that stays: [MQTT-4.4.0-1].
    bench.later(1000)
    assert client.take() == []


def test_receive_maximum_of_the_client() -> None:
    """[MQTT-3.3.4-9]: no more unacknowledged than it said; QoS 0 goes on. QoS 2 counts until PUBCOMP (4.9)."""
    bench = Bench()
    publisher = bench.client("p")
    client = bench.client("s", receive_max=2)
    client.subscribe("a", 2)
    for i in range(4):
        publisher.publish("a", b"%d" % i, 2, i + 1)
    first = client.messages(answer=False)
    assert [m.payload for m in first] == [b"0", b"1"]
    publisher.publish("a", b"plain", 0)
    assert client.payloads(answer=False) == [b"plain"]
    assert first[0].packet_id is not None
    client.send(PubRecPacket(first[0].packet_id))
    client.one(PubRelPacket)
    client.send(PubCompPacket(first[0].packet_id))
    assert client.payloads(answer=False) == [b"2"]


def test_maximum_packet_size_of_the_client() -> None:
    """[MQTT-3.1.2-24], [MQTT-3.1.2-25]: too large ones are left out, as if delivered; the others are not touched."""
    for qos in range(3):
        bench = Bench()
        publisher = bench.client("p")
        client = bench.client("s", max_packet_size=50)
        client.subscribe("a", qos)
        publisher.publish("a", b"x" * 100, qos, 1)
        publisher.publish("a", b"fits", qos, 2)
        assert client.payloads() == [b"fits"]
        assert bench.core.stats.dropped == 1
        assert bench.core.entrance.sessions["s"].bytes == 0


# 3.3.1.3 Retained messages


def test_retained() -> None:
    """[MQTT-3.3.1-5], -6, -7, -8, -9, -12: replaced, cleared, RETAIN 1 to new and 0 to standing subscriptions."""
    bench = Bench()
    publisher, standing = bench.client("p"), bench.client("s")
    standing.subscribe("a/#")
    publisher.publish("a/b", b"old", retain=True)
    publisher.publish("a/b", b"new", 1, retain=True)
    publisher.publish("a/b", b"not kept")
    assert [(m.payload, m.retain) for m in standing.messages()] == [
        (b"old", False),
        (b"new", False),
        (b"not kept", False),
    ]
    (kept,) = bench.client("x").subscribe("+/b", 1)
    assert isinstance(kept, PublishPacket)
    assert (kept.payload, kept.retain, int(kept.qos)) == (b"new", True, 1)
    publisher.publish("a/b", b"", retain=True)
    assert [m.payload for m in standing.messages()] == [b""]
    assert bench.client("y").subscribe("a/b") == []
    assert (len(bench.core.router.retained), bench.core.router.retained.bytes) == (0, 0)


def test_retain_as_published() -> None:
    """[MQTT-3.3.1-12], [MQTT-3.3.1-13]"""
    bench = Bench()
    client = bench.client("s")
    client.subscribe("a", as_published=True)
    publisher = bench.client("p")
    publisher.publish("a", b"1", retain=True)
    publisher.publish("a", b"2")
    assert [m.retain for m in client.messages()] == [True, False]


def test_retain_handling() -> None:
    """[MQTT-3.3.1-9], -10, -11"""
    bench = Bench()
    bench.client("p").publish("a", b"k", retain=True)
    client = bench.client("s")
    assert client.subscribe("a", handling=2) == []
    assert client.subscribe("a", handling=1) == []
    assert len(client.subscribe("a", handling=0)) == 1
    fresh = bench.client("t")
    assert len(fresh.subscribe("a", handling=1)) == 1
    assert fresh.subscribe("a", handling=1) == []


def test_a_retained_message_is_not_overtaken() -> None:
    """A live QoS 0 message after SUBSCRIBE comes after the retained ones, even while these wait for room."""
    bench = Bench(limits=Limits(out_bytes=100))
    publisher = bench.client("p")
    for i in range(20):
        publisher.publish(f"a/{i}", b"old" * 10, retain=True)
    client = bench.client("s")
    client.send(SubscribePacket(1, [TopicFilter("a/#", max_qos=QoS(0))]))
    publisher.publish("a/19", b"new")
    payloads = [p.payload for p in client.take() if isinstance(p, PublishPacket)]
    assert payloads == [b"old" * 10] * 20 + [b"new"]


# 3.8 SUBSCRIBE, 3.10 UNSUBSCRIBE


def test_suback_answers_each_filter() -> None:
    """[MQTT-3.8.4-1], -2, -5, -6: one code each, in order; bad filters 0x8F."""
    client = Bench(limits=Limits(topic_levels=4)).client()
    filters = [
        b"a",
        b"a/#/b",
        b"a+",
        b"#",
        b"+/+",
        b"$share/g",
        b"$share//a",
        b"$share/g+/a",
        b"$share/g/a",
        b"",
        b"a/b/c/d/e",
    ]
    body = b"\x00\x05\x00" + b"".join(len(f).to_bytes(2, "big") + f + b"\x01" for f in filters)
    client.send(b"\x82" + bytes([len(body)]) + body)
    answer = client.one(SubAckPacket)
    codes = [int(code) for code in answer.reason_codes]
    assert answer.packet_id == 5
    assert codes == [1, 0x8F, 0x8F, 1, 1, 0x8F, 0x8F, 0x8F, 1, 0x8F, 0x8F]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x03\x00\x01\x00", 0x82),  # no filter [MQTT-3.8.3-2]
        (b"\xa2\x03\x00\x01\x00", 0x82),  # no filter [MQTT-3.10.3-2]
        (b"\x80\x07\x00\x01\x00\x00\x01a\x00", 0x81),  # reserved flags [MQTT-3.8.1-1]
        (b"\xa0\x06\x00\x01\x00\x00\x01a", 0x81),  # reserved flags [MQTT-3.10.1-1]
        (b"\x60\x02\x00\x01", 0x81),  # reserved flags [MQTT-3.6.1-1]
        (b"\x82\x07\x00\x00\x00\x00\x01a\x00", 0x82),  # packet identifier 0
        (b"\x82\x07\x00\x01\x00\x00\x01a\x03", 0x81),  # QoS 3
        (b"\x82\x07\x00\x01\x00\x00\x01a\x40", 0x81),  # reserved option [MQTT-3.8.3-5]
        (b"\x82\x07\x00\x01\x00\x00\x01a\x30", 0x82),  # retain handling 3
        (b"\x82\x09\x00\x01\x02\x0b\x00\x00\x01a\x00", 0x82),  # subscription identifier 0
        (b"\x82\x10\x00\x01\x00\x00\x0a$share/g/a\x04", 0x82),  # no local, shared [MQTT-3.8.3-4]
        (b"\x82\x06\x00\x01\x00\x00\x01a", 0x81),  # no options
        (b"\x20\x03\x00\x00\x00", 0x82),  # CONNACK from a client
        (b"\x00\x00", 0x81),  # packet type 0
        (b"\xc0\x01\x00", 0x81),  # PINGREQ with a body
        (b"\xe0\x01\x01", 0x81),  # an unknown reason
        (b"\xe0\x08\x00\x06\x1f\x00\x03\xffaa", 0x81),  # not UTF-8
        (b"\x40\x02\x00\x00", 0x82),  # PUBACK of 0
    ],
)
def test_bad_packets_end_the_connection(data: bytes, code: int) -> None:
    client = Bench().client()
    client.send(data)
    assert client.ended_with() == code


def test_one_copy_of_overlapping_subscriptions() -> None:
    """3.3.4: one copy, at the highest QoS, with all identifiers ([MQTT-3.3.4-2] to -5)."""
    bench = Bench()
    client = bench.client("s")
    client.subscribe("a/#", 1, identifier=1)
    client.subscribe("a/+", 2, identifier=200)
    client.subscribe("a/b", 0)
    bench.client("p").publish("a/b", b"x", 2)
    (message,) = client.messages()
    assert int(message.qos) == 2
    assert sorted(message.subscription_ids) == [1, 200]


def test_a_subscription_replaces_one_with_the_same_filter() -> None:
    """[MQTT-3.8.4-3]"""
    bench = Bench()
    client = bench.client("s")
    client.subscribe("a", 0, identifier=1)
    client.subscribe("a", 1, identifier=2)
    bench.client("p").publish("a", b"x", 2)
    (message,) = client.messages()
    assert (int(message.qos), message.subscription_ids) == (1, [2])
    assert bench.core.router.subscriptions.count == 1


def test_no_local() -> None:
    """[MQTT-3.8.3-3]"""
    for qos in range(2):
        bench = Bench()
        client, other = bench.client("s"), bench.client("o")
        client.subscribe("a", qos, no_local=True)
        client.publish("a", b"own", qos)
        if qos:
            assert code_of(client.one(PubAckPacket)) == 0x10
        assert client.take() == []
        other.publish("a", b"other", qos)
        assert client.payloads() == [b"other"]
        client.subscribe("#", qos, identifier=9)
        client.publish("a", b"own", 0)
        (message,) = client.messages()
        assert message.subscription_ids == [9]


def test_wildcards_do_not_match_dollar_topics() -> None:
    """[MQTT-4.7.2-1]"""
    bench = Bench()
    client = bench.client("s")
    for pattern in ("#", "+/b", "+/#"):
        client.subscribe(pattern)
    publisher = bench.client("p")
    publisher.publish("$own/b", b"x", retain=True)
    assert client.take() == []
    client.subscribe("$own/+")
    assert bench.client("t").subscribe("#") == []
    publisher.publish("$own/b", b"y")
    assert client.payloads()[-1] == b"y"


def test_unsubscribe() -> None:
    """[MQTT-3.10.4-1], -4, -5, -6: a code for each filter; nothing new, but what is in flight is completed."""
    bench = Bench()
    client, publisher = bench.client("s"), bench.client("p")
    client.subscribe("a", 1)
    client.subscribe("$share/g/b", 1)
    publisher.publish("a", b"1", 1)
    client.send(UnsubscribePacket(6, ["a", "nothing", "$share/g/b"]))
    packets = client.take()
    answer = packets[-1]
    assert isinstance(answer, UnsubAckPacket)
    assert [int(code) for code in answer.reason_codes] == [0, 0x11, 0]
    publisher.publish("a", b"2", 1)
    publisher.publish("b", b"2", 1)
    assert client.take() == []
    assert len(bench.core.entrance.sessions["s"].inflight) == 1


def test_subscription_limit() -> None:
    """3.9.3: 0x97; a filter that is there already may be replaced."""
    client = Bench(limits=Limits(subscriptions=2)).client()
    client.send(SubscribePacket(1, [TopicFilter(f, max_qos=QoS(0)) for f in ("a", "b", "c", "a")]))
    assert [int(code) for code in client.one(SubAckPacket).reason_codes] == [0, 0, 0x97, 0]


# 4.8.2 Shared subscriptions


def test_shared_subscription_goes_to_one_in_turn() -> None:
    """[MQTT-4.8.2-3], -4: each to one member, at its own QoS; a plain subscription and another group get it as well."""
    bench = Bench()
    members = [bench.client(f"m{i}") for i in range(3)]
    for i, member in enumerate(members):
        member.subscribe("$share/g/a/+", i)
    plain, other = bench.client("x"), bench.client("y")
    plain.subscribe("a/b")
    other.subscribe("$share/h/a/b")
    publisher = bench.client("p")
    for i in range(30):
        publisher.publish("a/b", b"%d" % i, 2, i + 1)
    shares = [member.messages() for member in members]
    assert [len(share) for share in shares] == [10, 10, 10]
    assert [{int(m.qos) for m in share} for share in shares] == [{0}, {1}, {2}]
    assert (len(plain.messages()), len(other.messages())) == (30, 30)


def test_shared_subscription_prefers_who_is_there() -> None:
    bench = Bench()
    here, away = bench.client("here"), bench.client("away", session_expiry_interval=100)
    here.subscribe("$share/g/a", 1)
    away.subscribe("$share/g/a", 1)
    away.lose()
    publisher = bench.client("p")
    for i in range(4):
        publisher.publish("a", b"%d" % i, 1, i + 1)
    assert len(here.messages()) == 4
    here.leave()
    publisher.publish("a", b"kept", 1, 9)
    away = bench.client("away", clean=False)
    assert away.payloads() == [b"kept"]


def test_shared_messages_of_a_lost_member_go_to_another() -> None:
    """4.8.2: QoS 1 unacknowledged and everything unsent; QoS 2 in flight must not ([MQTT-4.8.2-5])."""
    bench = Bench()
    lost = bench.client("lost", receive_max=2)
    lost.subscribe("$share/g/a", 2)
    publisher = bench.client("p")
    publisher.publish("a", b"two", 2, 1)
    publisher.publish("a", b"one", 1, 2)
    publisher.publish("a", b"queued", 1, 3)
    assert lost.payloads(answer=False) == [b"two", b"one"]
    heir = bench.client("heir")
    heir.subscribe("$share/g/a", 2)
    lost.lose()
    assert heir.payloads() == [b"one", b"queued"]


def test_retained_messages_are_not_for_shared_subscriptions() -> None:
    """3.8.3.1, 3.8.4"""
    bench = Bench()
    bench.client("p").publish("a", b"k", retain=True)
    assert bench.client("s").subscribe("$share/g/a") == []


# The broker's own


def test_sys_topics() -> None:
    bench = Bench()
    client = bench.client("s")
    assert list(bench.core.router.retained.matching("$SYS/#", bench.now)) == []
    first = client.subscribe("$SYS/broker/clients/#")
    found = {p.topic: p.payload for p in first if isinstance(p, PublishPacket)}
    assert found["$SYS/broker/clients/connected"] == b"1"
    bench.client("t")
    bench.later(10.1)
    assert {m.topic: m.payload for m in client.messages()}["$SYS/broker/clients/connected"] == b"2"
    client.send(UnsubscribePacket(1, ["$SYS/broker/clients/#"]))
    client.take()
    timers = len(bench.core.timers._heap)
    bench.later(30)
    assert len(bench.core.timers._heap) < timers
    client.publish("$SYS/broker/clients/connected", b"lie", 1)
    assert code_of(client.one(PubAckPacket)) == 0x87


def test_shutting_down() -> None:
    """0x8B to everybody, and no wills: a planned end is not the clients' fault."""
    bench = Bench()
    client, watcher = bench.client("c", will=Will("will", payload=b"x")), bench.client("w")
    watcher.subscribe("will")
    bench.core.shut_down(bench.now)
    assert client.ended_with() == 0x8B
    assert watcher.ended_with() == 0x8B


def test_reason_strings_only_where_wanted() -> None:
    """[MQTT-3.1.2-29]: with request problem information 0 there are none but in CONNACK and DISCONNECT."""
    client = Bench().client(request_problem_info=False)
    client.publish("a", b"\xff", 1, payload_format_indicator=1)
    assert client.one(PubAckPacket).reason_str is None


def test_disconnect_from_client_closes() -> None:
    """[MQTT-3.14.4-1], -2"""
    client = Bench().client()
    client.send(DisconnectPacket())
    assert client.closed
    assert client.take() == []
    client.send(PingReqPacket())
    assert client.take() == []


def test_will_with_wildcards_is_refused() -> None:
    client = Bench().raw()
    client.send(ConnectPacket("c", will=Will("a/b", payload=b"q")).write().replace(b"a/b", b"a/+"))
    assert code_of(client.one(ConnAckPacket)) == 0x90


def test_connections_and_sessions_are_limited() -> None:
    """3.2.2.2: 0x89 and 0x97. A known client may always come back."""
    bench = Bench(limits=Limits(connections=2, sessions=3))
    bench.client("a", session_expiry_interval=10)
    bench.client("b")
    third = bench.raw()
    third.send(ConnectPacket("c"))
    assert code_of(third.one(ConnAckPacket)) == 0x89
    bench.client("a", clean=False, session_expiry_interval=10).lose()
    bench.client("c", session_expiry_interval=10).lose()
    fourth = bench.raw()
    fourth.send(ConnectPacket("d"))
    assert code_of(fourth.one(ConnAckPacket)) == 0x97
