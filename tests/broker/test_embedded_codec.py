"""The codecs of the embedded broker: MQTT 3.1.1 against paho, checks before ``mqtt5``."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import mqtt5
import pytest
from embedded_fixtures import Bench, Client
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from broker.embedded import codec3, codec5
from broker.embedded.codec5 import FaultError, encode_varint, varint

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
TOPIC = TEXT.filter(lambda t: t and "+" not in t and "#" not in t)
QOS = st.integers(0, 2)


class Paho(paho.Client):
    """paho without a network: it writes to a socket pair, and is fed bytes."""

    def __init__(self, version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311, **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, protocol=version, **options)

        self._sock, self._peer = socket.socketpair()
        self._peer.setblocking(False)

    def shut(self) -> None:
        self._peer.close()
        self._sock_close()

    def sent(self) -> bytes:
        try:
            return self._peer.recv(1 << 20)
        except BlockingIOError:
            return b""

    def feed(self, data: bytes) -> None:
        """Give it whole packets as its read loop would."""
        while data:
            at = 1
            while data[at] > 0x7F:
                at += 1
            size, start = varint(data, 1, len(data))
            packet = data[start : start + size]
            self._in_packet = {
                "command": data[0],
                "have_remaining": 1,
                "remaining_count": [],
                "remaining_mult": 1,
                "remaining_length": size,
                "packet": bytearray(packet),
                "to_process": 0,
                "pos": 0,
            }
            assert self._packet_handle() == MQTTErrorCode.MQTT_ERR_SUCCESS
            data = data[start + size :]


_open: list[Paho] = []


def paho_client(*arguments: Any, **options: Any) -> Paho:
    """A fresh one; the last one's sockets are closed."""
    while _open:
        _open.pop().shut()
    _open.append(Paho(*arguments, **options))
    return _open[0]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _open:
        _open.pop().shut()


def frame(data: bytes) -> tuple[bytes, int]:
    size, start = varint(data, 1, len(data))
    assert start + size == len(data)
    return data, start


@given(
    client_id=TEXT.filter(bool),
    clean=st.booleans(),
    user=st.none() | TEXT,
    password=st.none() | TEXT,
    will=st.none() | st.tuples(TOPIC, st.binary(max_size=50), QOS, st.booleans()),
    keep_alive=st.integers(1, 65_535),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_connect_of_paho(
    client_id: str,
    clean: bool,
    user: str | None,
    password: str | None,
    will: tuple[str, bytes, int, bool] | None,
    keep_alive: int,
) -> None:
    client = paho_client(client_id=client_id, clean_session=clean)
    if user is not None:
        client.username_pw_set(user, password)
    if will is not None:
        client.will_set(will[0], will[1], will[2], will[3])
    client._send_connect(keep_alive)
    packet = codec3.read(*frame(client.sent()))
    assert isinstance(packet, mqtt5.ConnectPacket)
    assert (packet.client_id, packet.clean_start, packet.keep_alive) == (client_id, clean, keep_alive)
    assert packet.session_expiry_interval == (0 if clean else codec3.NEVER)
    assert packet.username == user
    assert packet.password == (password.encode() if password is not None and user is not None else None)
    if will is None:
        assert packet.will is None
    else:
        assert packet.will is not None
        assert (packet.will.topic, packet.will.payload or b"") == will[:2]
        assert (int(packet.will.qos), packet.will.retain) == will[2:]


@given(st.lists(st.tuples(TOPIC, QOS), min_size=1, max_size=10))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_subscribe_and_unsubscribe_of_paho(wanted: list[tuple[str, int]]) -> None:
    client = paho_client()
    client._send_subscribe(False, [(t.encode(), q) for t, q in wanted])
    packet = codec3.read(*frame(client.sent()))
    assert isinstance(packet, mqtt5.SubscribePacket)
    assert [(f.pattern, int(f.max_qos)) for f in packet.topic_filters] == wanted
    assert not any(f.no_local or f.retain_as_published for f in packet.topic_filters)
    client._send_unsubscribe(False, [t.encode() for t, _ in wanted])
    packet = codec3.read(*frame(client.sent()))
    assert isinstance(packet, mqtt5.UnsubscribePacket)
    assert packet.patterns == [t for t, _ in wanted]


@given(st.lists(st.tuples(TOPIC, st.binary(max_size=300), QOS), min_size=1, max_size=12), st.sampled_from([4, 5]))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_publish_to_paho(wanted: list[tuple[str, bytes, int]], version: int) -> None:
    """What an MQTT 5 client publishes, paho reads in either version, and its answers are understood."""
    bench = Bench()
    reader = paho_client(MQTTProtocolVersion(version), client_id="s", manual_ack=False)
    found: list[tuple[str, bytes, int]] = []
    codes: list[Any] = []
    reader.on_message = lambda _c, _u, m: found.append((m.topic, bytes(m.payload), m.qos))
    reader.on_subscribe = lambda _c, _u, _m, granted, _p: codes.extend(granted)
    link = Client(bench, bench.core.accept(bench.now))
    reader._send_connect(60)
    link.send(reader.sent())
    reader.feed(link.written())
    reader._send_subscribe(False, [(b"#", 2)] if version == 4 else [(b"#", SubscribeOptions(2))])
    link.send(reader.sent())
    reader.feed(link.written())
    assert [c.value for c in codes] == [2]
    publisher = bench.client("p")
    for number, (topic, payload, qos) in enumerate(wanted, 1):
        publisher.publish(topic, payload, qos, number, content_type="x")
    while data := link.written():
        reader.feed(data)
        link.send(reader.sent())
    # paho hands a QoS 2 message over at PUBREL: the order is one for each QoS.
    for qos in range(3):
        assert [f for f in found if f[2] == qos] == [w for w in wanted if not w[0].startswith("$") and w[2] == qos]
    assert bench.core.entrance.sessions["s"].inflight == {}


@given(st.lists(st.tuples(TOPIC, st.binary(max_size=300), QOS, st.booleans()), min_size=1, max_size=12))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_publish_of_paho(wanted: list[tuple[str, bytes, int, bool]]) -> None:
    bench = Bench()
    reader = bench.client("s")
    reader.subscribe("#", 2, as_published=True)
    writer = paho_client(client_id="p")
    link = Client(bench, bench.core.accept(bench.now))
    writer._send_connect(60)
    link.send(writer.sent())
    writer.feed(link.written())
    for number, (topic, payload, qos, retain) in enumerate(wanted, 1):
        writer._send_publish(number, topic.encode(), payload, qos, retain, info=paho.MQTTMessageInfo(number))
        link.send(writer.sent())
    messages = reader.messages()
    assert [(m.topic, m.payload, int(m.qos), m.retain) for m in messages] == [
        w for w in wanted if not w[0].startswith("$")
    ]
    answers = b"".join((b"", b"\x40\x02\x00%c", b"\x50\x02\x00%c")[w[2]] % n for n, w in enumerate(wanted, 1) if w[2])
    assert link.written() == answers


@pytest.mark.parametrize(
    "data",
    [
        b"\x10\x0c\x00\x04MQTT\x04\x42\x00\x00\x00\x00",  # password without user [MQTT-3.1.2-22]
        b"\x82\x06\x00\x01\x00\x01a\x04",  # reserved bits [MQTT-3-8.3-4]
        b"\x82\x02\x00\x01",  # no filter
        b"\x40\x03\x00\x01\x00",  # PUBACK with a reason
        b"\xe0\x01\x00",  # DISCONNECT with a reason
        b"\xf0\x00",  # AUTH
        b"\x82\x01\x00",
    ],
)
def test_what_3_1_1_does_not_have(data: bytes) -> None:
    with pytest.raises(FaultError):
        codec3.read(*frame(data))


@pytest.mark.parametrize(
    ("connect", "answer"),
    [
        (
            b"\x10\x0c\x00\x04MQTT\x04\x00\x00\x00\x00\x00",
            b"\x20\x02\x00\x02",
        ),  # no client id, not clean [MQTT-3.1.3-8]
        (b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x00\x00\x01x", b"\x20\x02\x00\x00"),
        (b"\x10\x0e\x00\x06MQIsdp\x03\x00\x00\x00\x00\x00"[:2] + b"\x00\x06MQIsdp\x03\x00\x00\x00\x00\x00", None),
    ],
)
def test_connack_of_3_1_1(connect: bytes, answer: bytes | None) -> None:
    bench = Bench()
    client = bench.raw()
    client.send(connect)
    if answer is not None:
        assert client.written() == answer
    assert client.closed is (answer != b"\x20\x02\x00\x00")


def test_session_present_in_3_1_1() -> None:
    """[MQTT-3.2.2-2]: a session without CleanSession is there again, and what came meanwhile."""
    bench = Bench()
    connect = b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x00\x00\x01x"
    client = bench.raw()
    client.send(connect, b"\x82\x06\x00\x01\x00\x01a\x01")
    assert client.written() == b"\x20\x02\x00\x00\x90\x03\x00\x01\x01"
    client.lose()
    bench.client("p").publish("a", b"m", 1, content_type="is left out")
    client = bench.raw()
    client.send(connect)
    assert client.written() == b"\x20\x02\x01\x00\x32\x06\x00\x01a\x00\x01m"


@given(st.integers(0, 2**28 - 1))
@settings(deadline=None, derandomize=True)
def test_variable_byte_integers(number: int) -> None:
    """1.5.5"""
    data = encode_varint(number)
    assert varint(data, 0, len(data)) == (number, len(data))
    for cut in range(len(data)):
        with pytest.raises(FaultError):
            varint(data, 0, cut)


@given(
    st.binary(max_size=60), st.sampled_from([1, 4, 5, 6, 7, 8, 10, 12, 14, 15, 0, 2, 3, 9, 11, 13]), st.integers(0, 15)
)
@settings(deadline=None, derandomize=True, max_examples=600)
def test_only_faults_escape(body: bytes, kind: int, flags: int) -> None:
    """Neither a panic of the codec nor any other exception, whatever the bytes."""
    data = bytes([kind << 4 | flags]) + encode_varint(len(body)) + body
    for read in (codec5.read, codec3.read):
        code = 0
        try:
            read(*frame(data))
        except FaultError as fault:
            code = fault.code
        assert code in {0, 0x81, 0x82, 0x84, 0x90, 0x94}


SOUND = [
    mqtt5.ConnectPacket(
        "cé", username="ü", password=b"\xff", will=mqtt5.Will("w", payload=b"\xff", content_type="ß")
    ).write(),
    mqtt5.SubscribePacket(1, [mqtt5.TopicFilter("é/#")], subscription_id=300, user_properties=[("k", "ü")]).write(),
    mqtt5.UnsubscribePacket(1, ["é"], user_properties=[("k", "ü")]).write(),
    mqtt5.PubAckPacket(1, reason_str="é", user_properties=[("a", "b")]).write(),
    mqtt5.DisconnectPacket(session_expiry_interval=5, reason_str="é").write(),
]


@given(st.sampled_from(SOUND), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
@settings(deadline=None, derandomize=True, max_examples=1000)
def test_only_faults_escape_from_nearly_sound_packets(data: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for at, byte in changes:
        changed[2 + at % (len(data) - 2)] = byte
    try:
        codec5.read(bytes(changed), 2)
    except FaultError:
        return
    assert codec5.read(bytes(changed), 2).write()


@pytest.mark.parametrize("data", SOUND)
def test_sound_packets_pass(data: bytes) -> None:
    assert codec5.read(data, 2).write() == data


def test_cut_packets_are_malformed() -> None:
    for data in SOUND:
        for cut in range(2, len(data)):
            short = data[:1] + struct.pack("B", cut - 2) + data[2:cut]
            try:
                codec5.read(short, 2)
            except FaultError:
                continue
            # PUBACK and DISCONNECT may end early, the filter lists between two filters.
            assert short[0] >> 4 in {4, 8, 10, 14}
