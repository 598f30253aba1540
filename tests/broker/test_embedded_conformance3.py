"""MQTT 3.1.1 on a real socket, by bytes. Numbers are those of the OASIS standard *MQTT Version 3.1.1*.

As for MQTT 5, the same cases run on mosquitto where it is installed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from bus_site import Mosquitto
from conformance_kit import Line, Old, Peer, Served, frame3, fresh
from conftest import NEEDS_MOSQUITTO

EACH_QOS = pytest.mark.parametrize("qos", [0, 1, 2])


@pytest.fixture(scope="module")
def embedded() -> Iterator[int]:
    with Served() as served:
        yield served.port


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=[pytest.mark.connected, NEEDS_MOSQUITTO])])
def port(request: pytest.FixtureRequest) -> int:
    """Of each broker in turn."""
    if request.param == "embedded":
        return int(request.getfixturevalue("embedded"))
    broker: Mosquitto = request.getfixturevalue("shared_mosquitto")
    return broker.port


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x36\x06\x00\x01a\x00\x01x", id="[MQTT-3.3.1-4] QoS 3"),
        pytest.param(b"\x30\x04\x00\x01#x", id="[MQTT-3.3.2-2] a topic with a wildcard"),
        pytest.param(b"\x30\x05\x00\x02\xc3\x28x", id="[MQTT-1.5.3-1] a topic that is not UTF-8"),
        pytest.param(b"\x32\x06\x00\x01a\x00\x00x", id="[MQTT-2.3.1-1] packet identifier 0"),
        pytest.param(b"\x80\x06\x00\x01\x00\x01a\x00", id="[MQTT-3.8.1-1] SUBSCRIBE flags"),
        pytest.param(b"\x82\x02\x00\x01", id="[MQTT-3.8.3-3] SUBSCRIBE without a filter"),
        pytest.param(b"\x82\x06\x00\x01\x00\x01a\x03", id="[MQTT-3.8.3-4] QoS 3 asked for"),
        pytest.param(b"\x82\x06\x00\x01\x00\x01a\x04", id="[MQTT-3.8.3-4] reserved bits"),
        pytest.param(b"\xa0\x05\x00\x01\x00\x01a", id="[MQTT-3.10.1-1] UNSUBSCRIBE flags"),
        pytest.param(b"\xa2\x02\x00\x01", id="[MQTT-3.10.3-2] UNSUBSCRIBE without a filter"),
        pytest.param(b"\x60\x02\x00\x01", id="[MQTT-3.6.1-1] PUBREL flags"),
        pytest.param(b"\xf0\x00", id="2.2.1 a reserved packet type"),
        pytest.param(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01x", id="[MQTT-3.1.0-2] a second CONNECT"),
    ],
)
def test_malformed_packets_end_the_connection(port: int, data: bytes) -> None:
    """4.8: the connection ends; there is nothing to be said."""
    with Old(port) as peer:
        peer.put(data)
        peer.ended()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(0x03, id="[MQTT-3.1.2-3] reserved"),
        pytest.param(0x42, id="[MQTT-3.1.2-22] password without user name"),
        pytest.param(0x0A, id="[MQTT-3.1.2-13] will QoS without will"),
        pytest.param(0x22, id="[MQTT-3.1.2-15] will retain without will"),
    ],
)
def test_connect_flags(port: int, flags: int) -> None:
    with Line(port) as line:
        extra = b"\x00\x01p" if flags & 0x40 else b""
        line.put(frame3(0x10, b"\x00\x04MQTT\x04", bytes((flags,)), b"\x00\x00\x00\x01f", extra))
        frame = line.frame()
        assert frame is None or frame[3] != 0
        assert frame is None or line.frame() is None


def test_client_ids(port: int) -> None:
    """[MQTT-3.1.3-6] to -8: an empty one only with CleanSession 1, else return code 2."""
    with Old(port, "", clean=True) as peer:
        peer.quiet()
    with Old(port, "", clean=False, code=2) as peer:
        peer.ended()


def test_take_over(port: int) -> None:
    """[MQTT-3.1.4-2]."""
    name = fresh()
    with Old(port, name) as old, Old(port, name) as new:
        old.ended()
        new.quiet()


@pytest.mark.parametrize("granted", [0, 1, 2])
@EACH_QOS
def test_delivered_at_the_lower_qos(port: int, qos: int, granted: int) -> None:
    """[MQTT-3.8.4-6]."""
    topic = fresh()
    with Old(port) as subscriber, Old(port) as publisher:
        assert subscriber.subscribe((topic, granted)) == bytes((granted,))
        publisher.publish(topic, b"payload", qos)
        assert subscriber.receive() == (topic, b"payload", min(qos, granted), False, False)
        subscriber.quiet()


@pytest.mark.parametrize("pattern", ["a#", "a/#/b", "a+", "#/a"])
def test_wrong_filters(port: int, pattern: str) -> None:
    """4.7.1: 0x80, or the end of the connection."""
    with Old(port) as peer:
        text = pattern.encode()
        peer.put(frame3(0x82, b"\x00\x09", len(text).to_bytes(2, "big"), text, b"\x00"))
        assert peer.frame() in {b"\x90\x03\x00\x09\x80", None}


def test_session_and_redelivery(port: int) -> None:
    """[MQTT-3.1.2-4] to -6, [MQTT-3.2.2-2], [MQTT-4.4.0-1]: kept without an end; sent again with DUP, in order."""
    topic, name = fresh(), fresh()
    with Old(port, name, clean=False) as peer:
        assert not peer.present
        peer.subscribe((topic, 2))
        peer.leave()
    with Old(port) as publisher:
        for i in range(6):
            publisher.publish(topic, b"%d" % i, 1 + i % 2)
    with Old(port, name, clean=False) as peer:
        assert peer.present
        got = [peer.receive(answer=False) for _ in range(6)]
        assert [(p, q, dup) for _, p, q, _, dup in got] == [(b"%d" % i, 1 + i % 2, False) for i in range(6)]
        peer.drop()
    with Old(port, name, clean=False) as peer:
        assert peer.present
        again = [peer.receive(answer=False) for _ in range(6)]
        assert [(p, dup) for _, p, _, _, dup in again] == [(b"%d" % i, True) for i in range(6)]
    with Old(port, name, clean=True) as peer:
        assert not peer.present
        peer.quiet()


def test_a_repeated_qos_2_publication_is_delivered_once(port: int) -> None:
    """[MQTT-4.3.3-2]."""
    topic, name = fresh(), fresh()
    packet = frame3(0x34, len(topic).to_bytes(2, "big"), topic.encode(), b"\x00\x07once")
    with Old(port) as subscriber:
        subscriber.subscribe((topic, 2))
        with Old(port, name, clean=False) as peer:
            peer.put(packet)
            assert peer.frame() == b"\x50\x02\x00\x07"
            peer.drop()
        with Old(port, name, clean=False) as peer:
            peer.put(b"\x3c" + packet[1:])
            assert peer.frame() == b"\x50\x02\x00\x07"
            peer.put(b"\x62\x02\x00\x07")
            assert peer.frame() == b"\x70\x02\x00\x07"
        assert subscriber.receive()[1] == b"once"
        subscriber.quiet()


@EACH_QOS
def test_retained(port: int, qos: int) -> None:
    """[MQTT-3.3.1-5] to -11."""
    topic = fresh()
    with Old(port) as there, Old(port) as publisher:
        there.subscribe((topic, 2))
        publisher.publish(topic, b"kept", qos, retain=True)
        assert there.receive() == (topic, b"kept", qos, False, False)
        with Old(port) as late:
            late.subscribe((topic, 2))
            assert late.receive() == (topic, b"kept", qos, True, False)
            late.subscribe((topic, 2))
            assert late.receive()[1] == b"kept", "[MQTT-3.8.4-3]: again with each SUBSCRIBE"
        publisher.publish(topic, b"", qos, retain=True)
        with Old(port) as late:
            late.subscribe((topic, 2))
            late.quiet()


def test_will(port: int) -> None:
    """[MQTT-3.1.2-8], -10, -17: after a broken connection, not after DISCONNECT."""
    topic = fresh()
    with Old(port) as watcher:
        watcher.subscribe((topic, 2))
        Old(port, will=(topic, b"no", 1, False)).leave()
        Old(port, will=(topic, b"yes", 2, True)).drop()
        assert watcher.receive() == (topic, b"yes", 2, False, False)
        watcher.quiet()
        with Old(port) as late:
            late.subscribe((topic, 0))
            assert late.receive() == (topic, b"yes", 0, True, False)


def test_keep_alive(port: int) -> None:
    """[MQTT-3.1.2-24]."""
    begin = time.monotonic()
    with Old(port, keep_alive=1) as peer:
        peer.ended()
    assert 1.2 < time.monotonic() - begin < 20  # mosquitto 2.0 looks some seconds late


def test_suback_and_unsuback(port: int) -> None:
    """[MQTT-3.8.4-4], -5; [MQTT-3.10.4-5]: UNSUBACK also where there was nothing."""
    topic = fresh()
    with Old(port) as peer:
        assert peer.subscribe((topic, 2), (topic + "/a", 0), (topic + "/b", 1)) == b"\x02\x00\x01"
        name = topic.encode()
        for _ in range(2):
            peer.put(frame3(0xA2, b"\x00\x03", len(name).to_bytes(2, "big"), name))
            assert peer.frame() == b"\xb0\x02\x00\x03"
        peer.publish(topic)


def test_the_versions_meet(port: int) -> None:
    """A 3.1.1 client gets the payload of MQTT 5 messages without their properties, and the other way round."""
    topic = fresh()
    with Old(port) as old, Peer(port) as new:
        old.subscribe((topic, 2))
        new.subscribe(topic, qos=2)
        with Old(port) as other3:
            other3.publish(topic, b"old", 1)
        assert new.receive().payload == b"old"
        assert old.receive()[1] == b"old"
        with Peer(port) as other:
            other.publish(topic, b"new", 2, content_type="t", user_properties=[("a", "b")], message_expiry_interval=9)
        assert old.receive() == (topic, b"new", 2, False, False)
        assert new.receive().content_type == "t"
