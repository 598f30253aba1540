"""MQTT 5, statement by statement, on a real socket. Numbers in brackets are those of the conformance statements of the
OASIS standard *MQTT Version 5.0*.

The same cases run on mosquitto, where it is installed: that proves the cases. Where mosquitto 2.0 does otherwise, though
the standard leaves no choice, or where it has the choice, the case says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from bus_site import Mosquitto
from conformance_kit import Peer, Served, fresh, subscribe5
from conftest import NEEDS_MOSQUITTO
from mqtt5 import (
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
    SubscribePacket,
    TopicFilter,
    Will,
)

from broker.embedded.limits import Limits

EACH_QOS = pytest.mark.parametrize("qos", [0, 1, 2])

NOT_ON_MOSQUITTO = {
    "test_keep_alive": "looks for silent clients some seconds late",
    "test_receive_maximum_of_the_server": "answers PUBREC 0x97 instead of ending the connection",
    "test_a_client_sends_no_subscription_identifier": "lets it pass",
    "test_no_local_on_a_shared_subscription": "lets it pass",
    "test_response_topic_with_a_wildcard": "lets it pass",
    "test_will_at_the_end_of_the_session": "forgets the will",
    "test_no_retained_messages_for_shared_subscriptions": "sends them",
    "test_wrong_shared_filters": "grants some of them",
}


@pytest.fixture(scope="module")
def embedded() -> Iterator[int]:
    with Served(limits=Limits(inflight=20, topic_aliases=10, stall_seconds=60)) as served:
        yield served.port


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=[pytest.mark.connected, NEEDS_MOSQUITTO])])
def port(request: pytest.FixtureRequest) -> int:
    """Of each broker in turn."""
    if request.param == "embedded":
        return int(request.getfixturevalue("embedded"))
    if (reason := NOT_ON_MOSQUITTO.get(request.node.originalname)) is not None:
        pytest.skip(f"mosquitto 2.0 {reason}")
    broker: Mosquitto = request.getfixturevalue("shared_mosquitto")
    return broker.port


# 1.5, 2: the form of packets


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x30\x80\x80\x80\x80\x01", id="2.1.4 a remaining length of five bytes"),
        pytest.param(b"\x30\x06\x00\x02\xc3\x28\x00x", id="[MQTT-1.5.4-1] a topic that is not UTF-8"),
        pytest.param(b"\x30\x07\x00\x03\xed\xa0\x80\x00x", id="[MQTT-1.5.4-1] a surrogate"),
        pytest.param(b"\x30\x05\x00\x01\x00\x00x", id="[MQTT-1.5.4-2] U+0000 in a topic"),
        pytest.param(b"\x36\x07\x00\x01a\x00\x01\x00x", id="[MQTT-3.3.1-4] QoS 3"),
        pytest.param(b"\x32\x07\x00\x01a\x00\x00\x00x", id="[MQTT-2.2.1-3] packet identifier 0"),
        pytest.param(b"\x30\x05\x00\x01#\x00x", id="[MQTT-3.3.2-2] a topic with a wildcard"),
        pytest.param(b"\x80\x07\x00\x01\x00\x00\x01a\x00", id="[MQTT-3.8.1-1] SUBSCRIBE flags"),
        pytest.param(b"\x82\x03\x00\x01\x00", id="[MQTT-3.8.3-2] SUBSCRIBE without a filter"),
        pytest.param(b"\x82\x07\x00\x01\x00\x00\x01a\x03", id="3.8.3.1 QoS 3 asked for"),
        pytest.param(b"\x82\x07\x00\x01\x00\x00\x01a\x30", id="3.8.3.1 retain handling 3"),
        pytest.param(b"\x82\x07\x00\x01\x00\x00\x01a\x40", id="[MQTT-3.8.3-5] reserved option bits"),
        pytest.param(b"\x82\x07\x00\x00\x00\x00\x01a\x00", id="[MQTT-2.2.1-3] SUBSCRIBE identifier 0"),
        pytest.param(b"\xa0\x06\x00\x01\x00\x00\x01a", id="[MQTT-3.10.1-1] UNSUBSCRIBE flags"),
        pytest.param(b"\xa2\x03\x00\x01\x00", id="[MQTT-3.10.3-2] UNSUBSCRIBE without a filter"),
        pytest.param(b"\x60\x02\x00\x01", id="[MQTT-3.6.1-1] PUBREL flags"),
        pytest.param(b"\xf0\x00", id="4.12 AUTH without a method"),
        pytest.param(b"\x30\x07\x00\x01a\x03\x23\x00\x00", id="[MQTT-3.3.2-8] topic alias 0"),
        pytest.param(b"\x30\x09\x00\x01a\x04\x01\x00\x01\x00x", id="2.2.2.2 a property twice"),
        pytest.param(b"\x30\x08\x00\x01a\x02\x24\x01xx", id="2.2.2.2 a property of another packet"),
        pytest.param(b"\x00\x00", id="2.1.2 packet type 0"),
    ],
)
def test_malformed_packets_end_the_connection(port: int, data: bytes) -> None:
    """4.13.1: DISCONNECT with a reason code of 0x80 or more, or none, then the end of the connection."""
    with Peer(port) as peer:
        peer.send(data)
        peer.ended(0x81, 0x82, 0x90, 0x94, 0x95)


def test_packets_in_pieces_and_together(port: int) -> None:
    """2.1: a byte stream; where it is cut says nothing."""
    with Peer(port) as peer:
        topic = fresh()
        peer.subscribe(topic)
        for byte in PublishPacket(topic, b"bytewise").write():
            peer.send(bytes([byte]))
        assert peer.receive().payload == b"bytewise"
        peer.send(*[PublishPacket(topic, b"%d" % i) for i in range(50)], PingReqPacket())
        assert [peer.receive().payload for _ in range(50)] == [b"%d" % i for i in range(50)]
        peer.expect(PingRespPacket)


# 3.1 CONNECT, 3.2 CONNACK


def test_the_first_packet_is_connect(port: int) -> None:
    """[MQTT-3.1.0-1]."""
    with Peer(port, connect=False) as peer:
        peer.send(PingReqPacket())
        peer.ended(0x82)


def test_a_second_connect_is_a_protocol_error(port: int) -> None:
    """[MQTT-3.1.0-2]."""
    with Peer(port) as peer:
        peer.send(ConnectPacket(fresh()))
        peer.ended(0x82)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(0x03, id="[MQTT-3.1.2-3] reserved"),
        pytest.param(0x1E, id="[MQTT-3.1.2-12] will QoS 3"),
        pytest.param(0x0A, id="[MQTT-3.1.2-11] will QoS without will"),
        pytest.param(0x22, id="[MQTT-3.1.2-13] will retain without will"),
    ],
)
def test_connect_flags(port: int, flags: int) -> None:
    with Peer(port, connect=False) as peer:
        will = b"\x00\x00\x01w\x00\x01w" if flags & 4 else b""
        body = b"\x00\x04MQTT\x05" + bytes((flags,)) + b"\x00\x00\x00\x00\x01f" + will
        peer.send(bytes((0x10, len(body))) + body)
        packet = peer.read()
        assert packet is None or int(getattr(packet, "reason_code", 0)) >= 0x80
        assert packet is None or peer.read() is None


def test_unknown_protocol_version(port: int) -> None:
    """[MQTT-3.1.2-2]: CONNACK 0x84 may be sent; the connection ends."""
    with Peer(port, connect=False) as peer:
        peer.send(b"\x10\x0e\x00\x04MQTT\x07\x02\x00\x00\x00\x00\x01v")
        frame = peer.frame()
        assert frame is None or frame[3] in {0x84, 0x01}
        assert frame is None or peer.frame() is None


def test_zero_length_client_id(port: int) -> None:
    """[MQTT-3.1.3-6], [MQTT-3.2.2-16]: it is given one, unlike all others, and told so."""
    with Peer(port, "") as one, Peer(port, "") as two:
        assert one.connack.assigned_client_id
        assert two.connack.assigned_client_id
        assert one.connack.assigned_client_id != two.connack.assigned_client_id
    with Peer(port, fresh()) as named:
        assert named.connack.assigned_client_id is None


def test_an_assigned_client_id_can_be_used_again(port: int) -> None:
    """3.2.2.3.7."""
    with Peer(port, "", session_expiry_interval=100) as one:
        name = one.connack.assigned_client_id
        one.drop()
    with Peer(port, name, clean_start=False) as back:
        assert back.connack.session_present


def test_take_over(port: int) -> None:
    """[MQTT-3.1.4-3]: the older connection ends with 0x8E."""
    name = fresh()
    with Peer(port, name) as old, Peer(port, name) as new:
        old.ended(0x8E)
        new.quiet()


def test_session_present(port: int) -> None:
    """[MQTT-3.1.2-4] to -6, [MQTT-3.2.2-2], -3."""
    name = fresh()
    with Peer(port, name, session_expiry_interval=100, clean_start=False) as peer:
        assert not peer.connack.session_present
        peer.leave()
    with Peer(port, name, session_expiry_interval=100, clean_start=False) as peer:
        assert peer.connack.session_present
        peer.leave()
    with Peer(port, name, session_expiry_interval=100, clean_start=True) as peer:
        assert not peer.connack.session_present
        peer.leave()


def test_session_expiry_zero_ends_with_the_connection(port: int) -> None:
    """3.1.2.11.2: absent or 0."""
    name = fresh()
    with Peer(port, name, clean_start=False) as peer:
        peer.leave()
    with Peer(port, name, clean_start=False) as peer:
        assert not peer.connack.session_present


def test_session_expires(port: int) -> None:
    """[MQTT-4.1.0-2]: after the interval the session is gone; before, it is there."""
    name, other = fresh(), fresh()
    with Peer(port, name, session_expiry_interval=1) as peer:
        peer.leave()
    with Peer(port, other, session_expiry_interval=60) as peer:
        peer.leave()
    time.sleep(2.6)  # mosquitto looks every second
    with Peer(port, name, clean_start=False) as peer, Peer(port, other, clean_start=False) as kept:
        assert not peer.connack.session_present
        assert kept.connack.session_present


def test_disconnect_changes_the_session_expiry(port: int) -> None:
    """3.14.2.2.2: to longer, to 0."""
    name = fresh()
    with Peer(port, name, session_expiry_interval=1) as peer:
        peer.leave(session_expiry_interval=100)
    with Peer(port, name, clean_start=False, session_expiry_interval=100) as peer:
        assert peer.connack.session_present
        peer.leave(session_expiry_interval=0)
    with Peer(port, name, clean_start=False) as peer:
        assert not peer.connack.session_present


def test_disconnect_cannot_make_a_session_of_none(port: int) -> None:
    """3.14.2.2.2: not 0 after 0 in CONNECT is a protocol error."""
    with Peer(port) as peer:
        peer.send(DisconnectPacket(session_expiry_interval=5))
        peer.ended(0x82)


def test_keep_alive(port: int) -> None:
    """[MQTT-3.1.2-22]: within one and a half times the interval of silence; PINGREQ is a sign of life ([MQTT-3.12.4-1])."""
    with Peer(port, keep_alive=2) as silent, Peer(port, keep_alive=2) as lively:
        begin = time.monotonic()
        while time.monotonic() - begin < 2.5:
            lively.quiet()
            time.sleep(0.3)
        silent.ended(0x8D)
        assert 2.4 < time.monotonic() - begin < 6.5
        lively.quiet()


# 3.3 PUBLISH


@pytest.mark.parametrize("granted", [0, 1, 2])
@EACH_QOS
def test_delivered_at_the_lower_qos(port: int, qos: int, granted: int) -> None:
    """[MQTT-3.8.4-8]: the lower of what was published and what was granted; every exchange to its end."""
    topic = fresh()
    with Peer(port) as subscriber, Peer(port) as publisher:
        assert subscriber.subscribe(topic, qos=granted) == [granted]
        assert publisher.publish(topic, b"payload", qos) == 0
        message = subscriber.receive()
        assert (message.topic, message.payload) == (topic, b"payload")
        assert (int(message.qos), message.retain, message.duplicate) == (min(qos, granted), False, False)
        subscriber.quiet()


@EACH_QOS
def test_empty_and_large_payloads(port: int, qos: int) -> None:
    topic = fresh()
    with Peer(port) as peer, Peer(port) as publisher:
        peer.subscribe(topic, qos=qos)
        for payload in (b"", bytes(range(256)) * 1200):
            publisher.publish(topic, payload, qos)
            assert peer.receive().payload == payload


def test_order(port: int) -> None:
    """[MQTT-4.6.0-5], -6: messages of one publisher, topic and QoS keep their order."""
    topic = fresh()
    with Peer(port) as subscriber, Peer(port) as publisher:
        subscriber.subscribe(topic, qos=2)
        for i in range(1, 16):
            publisher.send(PublishPacket(topic, b"%d" % i, qos=QoS(1), packet_id=i))
        assert [publisher.expect(PubAckPacket).packet_id for _ in range(15)] == list(range(1, 16))
        assert subscriber.payloads(15) == [b"%d" % i for i in range(1, 16)]


def test_no_matching_subscribers(port: int) -> None:
    """3.4.2.1, 3.5.2.1: 0x10 may be answered where nobody subscribes."""
    with Peer(port) as peer:
        assert peer.publish(fresh(), qos=1) in {0, 0x10}
        assert peer.publish(fresh(), qos=2) in {0, 0x10}


def test_properties_are_handed_on(port: int) -> None:
    """[MQTT-3.3.2-4], -15, -16, -17, -18, -20: payload format, response topic, correlation data, user properties, type."""
    topic = fresh()
    with Peer(port) as subscriber, Peer(port) as publisher:
        subscriber.subscribe(topic, qos=1)
        users = [("b", "1"), ("a", "2"), ("b", "1"), ("", "")]
        for qos in (0, 1, 2):
            publisher.publish(
                topic,
                "grüße".encode(),
                qos,
                payload_format_indicator=1,
                content_type="text/plain",
                response_topic="answers/here",
                correlation_data=b"\x00\xff7",
                user_properties=users,
            )
            message = subscriber.receive()
            assert message.payload_format_indicator == 1
            assert message.content_type == "text/plain"
            assert message.response_topic == "answers/here"
            assert message.correlation_data == b"\x00\xff7"
            assert list(message.user_properties) == users, "[MQTT-3.3.2-18]: their order"
            assert message.topic_alias is None


def test_request_and_response(port: int) -> None:
    """4.10."""
    question, answers = fresh(), fresh()
    with Peer(port) as asking, Peer(port) as answering:
        asking.subscribe(answers, qos=1)
        answering.subscribe(question, qos=1)
        asking.publish(question, b"?", 1, response_topic=answers, correlation_data=b"17")
        asked = answering.receive()
        assert asked.response_topic is not None
        answering.publish(asked.response_topic, b"!", 1, correlation_data=asked.correlation_data)
        answer = asking.receive()
        assert (answer.payload, answer.correlation_data) == (b"!", b"17")


def test_response_topic_with_a_wildcard(port: int) -> None:
    """[MQTT-3.3.2-14]."""
    with Peer(port) as peer:
        peer.send(b"\x30\x0a\x00\x01a\x06\x08\x00\x03b/#")
        peer.ended(0x81, 0x82, 0x90)


def test_message_expiry(port: int) -> None:
    """[MQTT-3.3.2-5], -6: what waited too long is not delivered; what is delivered says how long it still has."""
    topic, name = fresh(), fresh()
    with Peer(port, name, session_expiry_interval=100) as peer:
        peer.subscribe(topic, qos=1)
        peer.leave()
    with Peer(port) as publisher:
        publisher.publish(topic, b"short", 1, message_expiry_interval=1)
        publisher.publish(topic, b"long", 1, message_expiry_interval=60)
        publisher.publish(topic, b"for ever", 1)
    time.sleep(2.1)
    with Peer(port, name, clean_start=False) as peer:
        first, second = peer.receive(), peer.receive()
        assert (first.payload, second.payload) == (b"long", b"for ever")
        assert first.message_expiry_interval in {57, 58}
        assert second.message_expiry_interval is None
        peer.quiet()


def test_retained_message_expires(port: int) -> None:
    """[MQTT-3.3.2-5], 3.3.1.3."""
    topic = fresh()
    with Peer(port) as peer:
        peer.publish(topic, b"x", 1, retain=True, message_expiry_interval=1)
        peer.publish(topic + "/kept", b"x", 1, retain=True, message_expiry_interval=50)
        time.sleep(2.1)
        peer.subscribe(topic + "/#")
        assert peer.receive().topic == topic + "/kept"
        peer.quiet()


# 3.3.2.3.4 topic aliases


def test_topic_alias_of_the_client(port: int) -> None:
    """[MQTT-3.3.2-7] to -12: set, used, changed; it is for this connection and direction only."""
    one, two = fresh(), fresh()
    with Peer(port) as subscriber, Peer(port) as publisher:
        assert publisher.connack.topic_alias_max >= 1
        subscriber.subscribe(one, two, qos=1)
        publisher.publish(one, b"1", 1, topic_alias=1)
        publisher.publish("", b"2", 1, topic_alias=1)
        publisher.publish("", b"3", 0, topic_alias=1)
        publisher.publish(two, b"4", 1, topic_alias=1)
        publisher.publish("", b"5", 2, topic_alias=1)
        got = [subscriber.receive() for _ in range(5)]
        assert [(m.topic, m.payload) for m in got] == [
            (one, b"1"), (one, b"2"), (one, b"3"), (two, b"4"), (two, b"5")
        ]  # fmt: skip
        assert all(m.topic_alias is None for m in got), "[MQTT-3.1.2-26]: none, where the client takes none"
        publisher.drop()
    with Peer(port) as publisher:
        publisher.send(PublishPacket("", b"x", topic_alias=1))
        publisher.ended(0x82, 0x94)


def test_topic_alias_above_the_maximum(port: int) -> None:
    """[MQTT-3.2.2-18]: a client must not; 3.3.4: 0x94."""
    with Peer(port) as peer:
        peer.send(PublishPacket(fresh(), b"x", topic_alias=peer.connack.topic_alias_max + 1))
        peer.ended(0x94)


@EACH_QOS
def test_topic_alias_of_the_server(port: int, qos: int) -> None:
    """[MQTT-3.1.2-26], -27: at most the client's maximum; each is set before it is used, and again on each connection."""
    topics = [fresh() for _ in range(4)]
    name = fresh()
    for _ in range(2):
        with Peer(port, name, topic_alias_max=2) as peer, Peer(port) as publisher:
            peer.subscribe(*topics, qos=qos)
            known: dict[int, str] = {}
            for topic in topics * 3:
                publisher.publish(topic, topic.encode(), qos)
                message = peer.receive()
                if message.topic_alias is not None:
                    assert 1 <= message.topic_alias <= 2
                    if message.topic:
                        known[message.topic_alias] = message.topic
                assert (message.topic or known[message.topic_alias or 0]).encode() == message.payload


def test_topic_alias_of_the_embedded_server(embedded: int) -> None:
    """3.3.2.3.4: it does use them, for messages with QoS > 0 and topics that are long enough."""
    topic = fresh("a/long/topic/")
    with Peer(embedded, topic_alias_max=1, max_packet_size=200) as peer, Peer(embedded) as publisher:
        peer.subscribe("a/long/topic/+", qos=2)
        publisher.publish(topic, b"x" * 190, 1)  # too large: nothing is set by it
        for qos, properties in ((1, {}), (2, {"user_properties": [("k", "v")]}), (1, {"message_expiry_interval": 9})):
            publisher.publish(topic, b"%d" % qos, qos, **properties)
        publisher.publish(topic + "2", b"other", 1)
        got = [peer.receive() for _ in range(4)]
        assert [(m.topic, m.topic_alias) for m in got] == [(topic, 1), ("", 1), ("", 1), (topic + "2", None)]
        assert [m.payload for m in got] == [b"1", b"2", b"1", b"other"]
        assert list(got[1].user_properties) == [("k", "v")]
        assert got[2].message_expiry_interval in {8, 9}


# 3.1.2.11.3, 4.9: flow control


def test_receive_maximum_of_the_client(port: int) -> None:
    """[MQTT-3.3.4-9]: no more unacknowledged than it takes; QoS 0 goes on."""
    topic = fresh()
    with Peer(port, receive_max=2) as peer, Peer(port) as publisher:
        peer.subscribe(topic, qos=2)
        for i in range(1, 7):
            publisher.publish(topic, b"%d" % i, 1 + i % 2, i)
        first, second = peer.receive(answer=False), peer.receive(answer=False)
        peer.quiet()
        for message in (first, second):
            if int(message.qos) == 1:
                peer.send(PubAckPacket(message.packet_id or 0))
            else:
                peer.send(PubRecPacket(message.packet_id or 0))
                peer.send(PubCompPacket(message.packet_id or 0))
        rest: list[bytes] = []
        while len(rest) < 4:
            packet = peer.read()
            if isinstance(packet, PublishPacket):
                rest.append(packet.payload)
                if int(packet.qos) == 1:
                    peer.send(PubAckPacket(packet.packet_id or 0))
                else:
                    peer.send(PubRecPacket(packet.packet_id or 0), PubCompPacket(packet.packet_id or 0))
            else:
                assert isinstance(packet, PubRelPacket), packet
        assert [first.payload, second.payload, *rest] == [b"%d" % i for i in range(1, 7)]


def test_receive_maximum_of_the_server(port: int) -> None:
    """[MQTT-3.3.4-7], -8: 0x93 to a client that sends more than it may."""
    with Peer(port) as peer:
        most = peer.connack.receive_max
        assert 1 <= most <= 1024
        for i in range(1, most + 1):
            peer.send(PublishPacket(fresh(), b"", qos=QoS(2), packet_id=i))
        for _ in range(most):
            peer.expect(PubRecPacket)
        for i in range(most + 1, most + 3):
            peer.send(PublishPacket(fresh(), b"", qos=QoS(2), packet_id=i))
        peer.ended(0x93)


def test_maximum_packet_size_of_the_client(port: int) -> None:
    """[MQTT-3.1.2-24], -25: what is larger is left out, as if it had been delivered; the rest follows."""
    topic = fresh()
    with Peer(port, max_packet_size=100) as small, Peer(port) as publisher:
        small.subscribe(topic, qos=2)
        for qos in (0, 1, 2):
            publisher.publish(topic, b"x" * 200, qos, 1)
            publisher.publish(topic, b"%d" % qos, qos, 2)
        assert small.payloads(3) == [b"0", b"1", b"2"]


# 3.3.1.3 retained messages


@EACH_QOS
def test_retained(port: int, qos: int) -> None:
    """[MQTT-3.3.1-5] to -8: kept, replaced, cleared by an empty one; RETAIN is set for new subscriptions only."""
    topic = fresh()
    with Peer(port) as there, Peer(port) as publisher:
        there.subscribe(topic, qos=qos)
        publisher.publish(topic, b"1", qos, retain=True)
        publisher.publish(topic, b"2", qos, retain=True)
        assert [there.receive().retain for _ in range(2)] == [False, False], "[MQTT-3.3.1-12]"
        with Peer(port) as late:
            late.subscribe(topic, qos=2)
            message = late.receive()
            assert (message.payload, message.retain, int(message.qos)) == (b"2", True, qos)
            late.quiet()
        publisher.publish(topic, b"not kept", qos)
        publisher.publish(topic, b"", qos, retain=True)
        assert there.payloads(2) == [b"not kept", b""]
        with Peer(port) as late:
            late.subscribe(topic, qos=2)
            late.quiet()


def test_retained_by_wildcard(port: int) -> None:
    topic = fresh()
    with Peer(port) as publisher:
        for below in ("/a", "/a/b", "/c"):
            publisher.publish(topic + below, below.encode(), 1, retain=True)
    for pattern, wanted in (
        ("/#", {b"/a", b"/a/b", b"/c"}),
        ("/+", {b"/a", b"/c"}),
        ("/+/b", {b"/a/b"}),
        ("/x", set()),
    ):
        with Peer(port) as peer:
            peer.subscribe(topic + pattern)
            assert set(peer.payloads(len(wanted))) == wanted


def test_retain_handling(port: int) -> None:
    """[MQTT-3.3.1-9] to -11: 0 always, 1 for a new subscription only, 2 never."""
    topic = fresh()
    with Peer(port) as peer:
        peer.publish(topic, b"kept", 1, retain=True)
        for handling, count in ((2, 0), (1, 0), (0, 1), (0, 1)):
            peer.subscribe(topic, handling=handling)
            assert len(peer.payloads(count)) == count
        peer.unsubscribe(topic)
        peer.subscribe(topic, handling=1)
        assert peer.payloads(1) == [b"kept"]


def test_retain_as_published(port: int) -> None:
    """[MQTT-3.3.1-12], -13."""
    topic = fresh()
    with Peer(port) as plain, Peer(port) as same, Peer(port) as publisher:
        plain.subscribe(topic)
        same.subscribe(topic, retain_as_published=True)
        publisher.publish(topic, retain=True)
        publisher.publish(topic)
        assert [plain.receive().retain for _ in range(2)] == [False, False]
        assert [same.receive().retain for _ in range(2)] == [True, False]


# 3.1.2.5 wills


def test_will(port: int) -> None:
    """[MQTT-3.1.2-7], -8, -14, -15: published when the connection ends without DISCONNECT 0, with its properties."""
    topic = fresh()
    with Peer(port) as watcher:
        watcher.subscribe(topic, qos=2)
        for qos, retain in ((0, False), (1, False), (2, True)):
            will = Will(
                topic, payload=b"gone", qos=QoS(qos), retain=retain, content_type="t", user_properties=[("k", "v")]
            )
            Peer(port, will=will).drop()
            message = watcher.receive()
            assert (message.payload, int(message.qos), message.retain) == (b"gone", qos, False)
            assert (message.content_type, list(message.user_properties)) == ("t", [("k", "v")])
        with Peer(port) as late:
            late.subscribe(topic)
            assert late.receive().payload == b"gone", "[MQTT-3.1.2-15]"


def test_no_will_after_a_normal_disconnect(port: int) -> None:
    """[MQTT-3.14.4-3]; but after 0x04 it is published (3.14.2.1)."""
    topic = fresh()
    with Peer(port) as watcher:
        watcher.subscribe(topic)
        Peer(port, will=Will(topic, payload=b"no")).leave()
        Peer(port, will=Will(topic, payload=b"yes")).leave(
            reason_code=DisconnectReasonCode.DISCONNECT_WITH_WILL_MESSAGE
        )
        assert watcher.payloads(1) == [b"yes"]


def test_will_after_a_protocol_error(port: int) -> None:
    """3.1.2.5."""
    topic = fresh()
    with Peer(port) as watcher, Peer(port, will=Will(topic, payload=b"broken")) as peer:
        watcher.subscribe(topic)
        peer.send(b"\x36\x07\x00\x01a\x00\x01\x00x")
        assert watcher.receive().payload == b"broken"


def test_will_delay(port: int) -> None:
    """[MQTT-3.1.3-9], 3.1.3.2.2: after the delay; not if the client is back before; at the latest with the session's end."""
    topic, one, two, three = fresh(), fresh(), fresh(), fresh()
    with Peer(port) as watcher:
        watcher.subscribe(topic)
        begin = time.monotonic()
        Peer(port, one, session_expiry_interval=100, will=Will(topic, payload=b"late", will_delay_interval=2)).drop()
        Peer(port, two, session_expiry_interval=100, will=Will(topic, payload=b"never", will_delay_interval=2)).drop()
        Peer(port, three, session_expiry_interval=1, will=Will(topic, payload=b"ended", will_delay_interval=30)).drop()
        watcher.quiet()
        with Peer(port, two, clean_start=False) as back:
            got = {watcher.receive().payload for _ in range(2)}
            assert got == {b"late", b"ended"}
            assert 1.9 < time.monotonic() - begin < 6
            watcher.quiet()
            back.leave()


def test_will_at_the_end_of_the_session(port: int) -> None:
    """3.1.3.2.2: a clean start ends the session, and the delay with it."""
    topic, name = fresh(), fresh()
    with Peer(port) as watcher:
        watcher.subscribe(topic)
        Peer(port, name, session_expiry_interval=100, will=Will(topic, payload=b"w", will_delay_interval=50)).drop()
        watcher.quiet()
        with Peer(port, name, clean_start=True):
            assert watcher.receive().payload == b"w"


# 3.8 SUBSCRIBE, 3.10 UNSUBSCRIBE


@pytest.mark.parametrize(
    ("pattern", "topics"),
    [
        ("@/a/+", {"@/a/b", "@/a/"}),
        ("@/a/#", {"@/a", "@/a/b", "@/a/b/c", "@/a/"}),
        ("@/+/b", {"@/a/b"}),
        ("@/+/+/c", {"@/a/b/c"}),
        ("@/a/b/c", {"@/a/b/c"}),
        ("@/+", {"@/a"}),
        ("@/+/#", {"@/a", "@/a/b", "@/a/b/c", "@/a/"}),
    ],
)
def test_wildcards(port: int, pattern: str, topics: set[str]) -> None:
    """4.7.1: +, # with its parent, empty levels."""
    base = fresh()
    with Peer(port) as peer, Peer(port) as publisher:
        peer.subscribe(pattern.replace("@", base))
        for topic in ("@", "@/a", "@/a/", "@/a/b", "@/a/b/c"):
            if topic != "@":
                publisher.publish(topic.replace("@", base), topic.encode())
        assert {p.decode() for p in peer.payloads(len(topics))} == topics


@pytest.mark.parametrize("pattern", ["a#", "a/#/b", "a+", "a/b+/c", "#/a", ""])
def test_wrong_filters(port: int, pattern: str) -> None:
    """[MQTT-4.7.1-1], -2, [MQTT-4.7.3-1]: 0x8F in SUBACK, or the end of the connection."""
    with Peer(port) as peer:
        peer.send(subscribe5(pattern))
        packet = peer.read()
        if packet is None or isinstance(packet, DisconnectPacket):
            assert packet is None or int(packet.reason_code) in {0x81, 0x82, 0x8F}
        else:
            assert [int(code) for code in getattr(packet, "reason_codes", [])] == [0x8F]
            peer.quiet()


def test_topics_are_told_apart(port: int) -> None:
    """4.7.3: case, spaces and a slash at the end make another topic."""
    topic = fresh()
    with Peer(port) as peer:
        peer.subscribe(topic + "/a")
        for other in ("/A", "/a/", "/ a", "/a "):
            peer.publish(topic + other)
        peer.send(PublishPacket(topic + "/a", b"right"))
        assert peer.receive().payload == b"right"
        peer.quiet()


def test_suback_answers_each_filter(port: int) -> None:
    """[MQTT-3.8.4-5] to -7: one reason code for each, in order."""
    topic = fresh()
    with Peer(port) as peer:
        peer.send(SubscribePacket(9, [TopicFilter(f"{topic}/{q}", max_qos=QoS(q)) for q in (2, 0, 1)]))
        packet = peer.read()
        assert [int(code) for code in getattr(packet, "reason_codes", [])] == [2, 0, 1]


def test_overlapping_subscriptions(port: int) -> None:
    """3.3.4, [MQTT-3.3.4-2], -3, -5: at the highest QoS; one copy with all identifiers, or one for each."""
    topic = fresh()
    with Peer(port) as peer, Peer(port) as publisher:
        peer.subscribe(topic + "/#", qos=2, identifier=1)
        peer.subscribe(topic + "/+", qos=1, identifier=2)
        peer.subscribe(topic + "/x/y", qos=0, identifier=3)
        publisher.publish(topic + "/x", b"x", 2)
        first = peer.receive()
        if len(first.subscription_ids) == 2:
            assert set(first.subscription_ids) == {1, 2}
            assert int(first.qos) == 2
        else:
            second = peer.receive()
            assert {*first.subscription_ids, *second.subscription_ids} == {1, 2}
            assert max(int(first.qos), int(second.qos)) == 2
        peer.quiet()


def test_subscription_identifiers(port: int) -> None:
    """[MQTT-3.3.4-4], 3.8.2.1.2: of the subscription that matches, of the last SUBSCRIBE; for retained messages too."""
    topic = fresh()
    with Peer(port) as peer, Peer(port) as publisher:
        publisher.publish(topic + "/kept", b"x", 1, retain=True)
        for identifier in (1, 268_435_455):
            peer.subscribe(topic + "/#", identifier=identifier)
            assert list(peer.receive().subscription_ids) == [identifier]
            publisher.publish(topic + "/live")
            assert list(peer.receive().subscription_ids) == [identifier]
        peer.subscribe(topic + "/#", handling=2)
        publisher.publish(topic + "/live")
        assert list(peer.receive().subscription_ids or []) == []


def test_subscription_identifier_zero(port: int) -> None:
    """3.8.2.1.2."""
    with Peer(port) as peer:
        peer.send(b"\x82\x09\x00\x01\x02\x0b\x00\x00\x01a\x00")
        peer.ended(0x81, 0x82)


def test_a_client_sends_no_subscription_identifier(port: int) -> None:
    """[MQTT-3.3.4-6]."""
    with Peer(port) as peer:
        peer.send(PublishPacket(fresh(), b"x", subscription_ids=[1]))
        peer.ended(0x81, 0x82)


def test_no_local(port: int) -> None:
    """[MQTT-3.8.3-3]."""
    topic = fresh()
    with Peer(port) as one, Peer(port) as two:
        one.subscribe(topic, no_local=True)
        two.subscribe(topic)
        one.publish(topic, b"own")
        two.send(PublishPacket(topic, b"other"))
        assert one.payloads(1) == [b"other"]
        assert two.payloads(2) == [b"own", b"other"]


def test_no_local_on_a_shared_subscription(port: int) -> None:
    """[MQTT-3.8.3-4]."""
    with Peer(port) as peer:
        peer.send(SubscribePacket(1, [TopicFilter(f"$share/g/{fresh()}", no_local=True)]))
        peer.ended(0x82)


def test_unsubscribe(port: int) -> None:
    """[MQTT-3.10.4-1] to -6: exactly that filter; 0x11 where there was none; in order."""
    topic = fresh()
    with Peer(port) as peer, Peer(port) as publisher:
        peer.subscribe(topic + "/#", topic + "/a")
        assert peer.unsubscribe(topic + "/a", topic + "/+", topic + "/#") == [0, 0x11, 0]
        publisher.publish(topic + "/a")
        peer.quiet()


def test_dollar_topics(port: int) -> None:
    """[MQTT-4.7.2-1]: no wildcard at the beginning matches them."""
    name = fresh()
    with Peer(port) as wide, Peer(port) as exact, Peer(port) as publisher:
        wide.subscribe("#", f"+/{name}")
        exact.subscribe(f"$own/{name}", "$own/+")
        publisher.publish(f"$own/{name}", b"x", 1)
        assert exact.receive().payload == b"x"
        publisher.publish(f"plain/{name}", b"y", 1)
        seen = [wide.receive().topic]
        while seen[-1] != f"plain/{name}":
            seen.append(wide.receive().topic)
        assert not any(topic.startswith("$") for topic in seen)


# 4.8.2 shared subscriptions


def test_shared_subscription(port: int) -> None:
    """[MQTT-4.8.2-3], -4: each message to one member; those who subscribe plainly get all."""
    topic = fresh()
    with Peer(port) as one, Peer(port) as two, Peer(port) as plain, Peer(port) as publisher:
        one.subscribe(f"$share/g/{topic}", qos=1)
        two.subscribe(f"$share/g/{topic}", qos=1)
        plain.subscribe(topic, qos=1)
        for i in range(10):
            publisher.publish(topic, b"%d" % i, 1)
        assert len(plain.payloads(10)) == 10
        got: list[bytes] = []
        for member in (one, two):
            member.send(PingReqPacket())
            while not isinstance(packet := member.read(), PingRespPacket):
                assert isinstance(packet, PublishPacket)
                got.append(packet.payload)
        assert sorted(got) == [b"%d" % i for i in range(10)]


def test_two_groups_get_a_copy_each(port: int) -> None:
    topic = fresh()
    with Peer(port) as one, Peer(port) as two, Peer(port) as publisher:
        one.subscribe(f"$share/a/{topic}")
        two.subscribe(f"$share/b/{topic}")
        publisher.publish(topic, b"x")
        assert one.payloads(1) == two.payloads(1) == [b"x"]
        assert one.unsubscribe(f"$share/a/{topic}") == [0]
        publisher.publish(topic, b"y")
        one.quiet()
        assert two.payloads(1) == [b"y"]


def test_no_retained_messages_for_shared_subscriptions(port: int) -> None:
    """3.3.1.3, 4.8.2."""
    topic = fresh()
    with Peer(port) as peer:
        peer.publish(topic, b"kept", 1, retain=True)
        peer.subscribe(f"$share/g/{topic}")
        peer.quiet()


@pytest.mark.parametrize("pattern", ["$share/g", "$share//a", "$share/g/", "$share/+/a", "$share/g#/a"])
def test_wrong_shared_filters(port: int, pattern: str) -> None:
    """[MQTT-4.8.2-1], -2."""
    with Peer(port) as peer:
        peer.send(subscribe5(pattern))
        packet = peer.read()
        if packet is not None and not isinstance(packet, DisconnectPacket):
            assert [int(code) for code in getattr(packet, "reason_codes", [])] == [0x8F]


# 4.3, 4.4: QoS and redelivery


def test_offline_queueing(port: int) -> None:
    """3.1.2.4, 4.1: QoS 1 and 2 wait for a session that is away, in order."""
    topic, name = fresh(), fresh()
    with Peer(port, name, session_expiry_interval=100) as peer:
        peer.subscribe(topic + "/#", qos=2)
        peer.leave()
    with Peer(port) as publisher:
        for i in range(1, 9):
            publisher.publish(f"{topic}/{i}", b"%d" % i, 1 + i % 2, i)
    with Peer(port, name, clean_start=False) as peer:
        assert peer.connack.session_present
        assert peer.payloads(8) == [b"%d" % i for i in range(1, 9)]


def test_redelivery(port: int) -> None:
    """[MQTT-4.4.0-1], [MQTT-3.3.1-1]: what was not acknowledged comes again with DUP and the same identifier, first."""
    topic, name = fresh(), fresh()
    with Peer(port, name, session_expiry_interval=100) as peer, Peer(port) as publisher:
        peer.subscribe(topic, qos=2)
        for i in (1, 2, 3):
            publisher.publish(topic, b"%d" % i, 1 + i % 2, i)
        first = [peer.receive(answer=False) for _ in range(3)]
        peer.send(PubAckPacket(first[1].packet_id or 0))
        peer.quiet()
        peer.drop()
        with Peer(port, name, clean_start=False, session_expiry_interval=100) as back:
            again = [back.receive(answer=False) for _ in range(2)]
            back.quiet()
            assert [(m.payload, m.packet_id, m.duplicate) for m in again] == [
                (m.payload, m.packet_id, True) for m in (first[0], first[2])
            ]


def test_pubrel_is_sent_again(port: int) -> None:
    """[MQTT-4.4.0-1], [MQTT-4.3.3-6]: after PUBREC only PUBREL, never the message."""
    topic, name = fresh(), fresh()
    with Peer(port, name, session_expiry_interval=100) as peer, Peer(port) as publisher:
        peer.subscribe(topic, qos=2)
        publisher.publish(topic, b"x", 2)
        message = peer.receive(answer=False)
        peer.send(PubRecPacket(message.packet_id or 0))
        peer.expect(PubRelPacket)
        peer.drop()
    with Peer(port, name, clean_start=False, session_expiry_interval=100) as back:
        assert back.expect(PubRelPacket).packet_id == message.packet_id
        back.send(PubCompPacket(message.packet_id or 0))
        back.quiet()


def test_a_repeated_qos_2_publication_is_delivered_once(port: int) -> None:
    """[MQTT-4.3.3-10]: before PUBREL the same identifier is the same message; after it, a new one."""
    topic, name = fresh(), fresh()
    with Peer(port) as subscriber:
        subscriber.subscribe(topic, qos=2)
        with Peer(port, name, session_expiry_interval=100) as peer:
            peer.send(PublishPacket(topic, b"once", qos=QoS(2), packet_id=5))
            peer.expect(PubRecPacket)
            peer.drop()
        with Peer(port, name, clean_start=False, session_expiry_interval=100) as peer:
            peer.send(PublishPacket(topic, b"once", qos=QoS(2), packet_id=5, duplicate=True))
            peer.expect(PubRecPacket)
            peer.send(PubRelPacket(5))
            peer.expect(PubCompPacket)
            assert peer.publish(topic, b"new", 2, 5) == 0
        assert subscriber.payloads(2) == [b"once", b"new"]


def test_unknown_identifiers(port: int) -> None:
    """3.6.2.1, 3.7.2.1: 0x92."""
    with Peer(port) as peer:
        peer.send(PubRelPacket(77))
        assert int(peer.expect(PubCompPacket).reason_code) in {0, 0x92}
        peer.quiet()


def test_pubrec_with_an_error_ends_the_exchange(port: int) -> None:
    """4.3.3: the identifier is free, the message is not sent again."""
    topic, name = fresh(), fresh()
    with Peer(port, name, session_expiry_interval=100) as peer, Peer(port) as publisher:
        peer.subscribe(topic, qos=2)
        publisher.publish(topic, b"x", 2)
        message = peer.receive(answer=False)
        peer.send(PubRecPacket(message.packet_id or 0, reason_code=PubRecReasonCode.UNSPECIFIED_ERROR))
        peer.quiet()
        peer.drop()
    with Peer(port, name, clean_start=False) as back:
        back.quiet()


def test_subscriptions_are_part_of_the_session(port: int) -> None:
    """4.1: they are there after a reconnect, with their options."""
    topic, name = fresh(), fresh()
    with Peer(port, name, session_expiry_interval=100) as peer:
        peer.subscribe(topic, qos=1, identifier=3, no_local=True, retain_as_published=True)
        peer.leave()
    with Peer(port, name, clean_start=False) as peer, Peer(port) as publisher:
        peer.publish(topic, b"own")
        publisher.publish(topic, b"x", 1, retain=True)
        message = peer.receive()
        assert (message.payload, message.retain, list(message.subscription_ids)) == (b"x", True, [3])


def test_reason_strings_only_where_wanted(port: int) -> None:
    """[MQTT-3.1.2-29]: request problem information 0."""
    with Peer(port, request_problem_info=False) as peer:
        peer.send(PubRelPacket(77))
        answer = peer.expect(PubCompPacket)
        assert answer.reason_str is None
        assert not answer.user_properties
