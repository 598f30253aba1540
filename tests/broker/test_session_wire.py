"""The session against a broker that does exactly what the test says, packet by packet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

import mqtt5
import pytest
from bus_site import collect, nothing, until
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import session_client
from broker.bus import Bus, Publication, Will
from broker.connect import Negotiated, connect
from broker.local import LocalBus
from broker.session import Session
from broker.session_options import Options, parse
from schemas.errors import ConfigError, ConnectError, DeniedError, PacketTooLargeError, PublishFailedError

P = TypeVar("P")
QOS = mqtt5.QoS


class Scripted:
    """A server that reads packets and writes what it is told.

    :param connack: the answer to CONNECT: a packet, bytes, or None for none.
    """

    def __init__(self, connack: mqtt5.ConnAckPacket | bytes | None = None, *, silent: bool = False) -> None:
        self.connack: Any = b"" if silent else connack or mqtt5.ConnAckPacket()
        self.got: list[mqtt5.Packet] = []
        self.connections = 0
        self.suback = mqtt5.SubAckReasonCode.GRANTED_QOS_EXACTLY_ONCE
        self.greeting = b""  # written together with the CONNACK
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self._writer = writer
        data = b""
        try:
            while chunk := await reader.read(65536):
                data += chunk
                while data:
                    try:
                        packet, size = mqtt5.read(memoryview(data))
                    except IndexError:
                        break
                    data = data[size:]
                    self.got.append(packet)
                    if isinstance(packet, mqtt5.ConnectPacket):
                        self.send(self.connack, self.greeting)
                    elif isinstance(packet, mqtt5.SubscribePacket):
                        self.send(mqtt5.SubAckPacket(packet.packet_id, [self.suback] * len(packet.topic_filters)))
                    elif isinstance(packet, mqtt5.UnsubscribePacket):
                        codes = [mqtt5.UnsubAckReasonCode.SUCCESS] * len(packet.patterns)
                        self.send(mqtt5.UnsubAckPacket(packet.packet_id, codes))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    def send(self, *packets: Any) -> None:
        assert self._writer is not None
        self._writer.write(b"".join(p if isinstance(p, bytes) else p.write() for p in packets))

    def hang_up(self) -> None:
        assert self._writer is not None
        self._writer.transport.abort()

    def all(self, kind: type[P]) -> list[P]:
        return [p for p in self.got if isinstance(p, kind)]

    async def wait(self, kind: type[P], count: int = 1) -> list[P]:
        await until(lambda: len(self.all(kind)) >= count)
        return self.all(kind)


def scripted(server: Scripted, scenario: Callable[[Scripted, Session], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        made = Options(backoff=0.01, patience=2.0, **options)
        async with asyncio.timeout(20), server, Session(server.url, made) as session:
            await scenario(server, session)

    asyncio.run(main())


def refused(server: Scripted, **options: Any) -> ConnectError:
    async def main() -> ConnectError:
        async with asyncio.timeout(20), server:
            with pytest.raises(ConnectError) as caught:
                await Session(server.url, Options(backoff=0.01, **{"patience": 0.2, **options})).open()
            return caught.value

    return asyncio.run(main())


def publish(topic: str, number: int, qos: int = 1, packet_id: int | None = None, **more: Any) -> mqtt5.PublishPacket:
    return mqtt5.PublishPacket(
        topic, str(number).encode(), qos=(QOS(0), QOS(1), QOS(2))[qos], packet_id=packet_id, **more
    )


# connecting


def test_what_we_say_in_connect() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        hello = server.all(mqtt5.ConnectPacket)[0]
        assert (hello.client_id, hello.username, hello.password) == ("me", "u", b"p")
        assert (hello.keep_alive, hello.session_expiry_interval, hello.clean_start) == (7, 60, False)
        assert (hello.receive_max, hello.max_packet_size) == (9, 4096)
        assert hello.will is not None
        assert (hello.will.topic, hello.will.payload, hello.will.will_delay_interval) == ("w", b"gone", 3)

    scripted(
        Scripted(),
        scenario,
        client_id="me",
        user="u",
        password="p",  # noqa: S106 # of a test
        keep_alive=7,
        session_expiry=60,
        receive_maximum=9,
        max_packet_size=4096,
        will=Will("w", b"gone", delay=3),
    )


def test_the_assigned_client_id_is_kept_for_reconnects() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        assert session.client_id == "given"
        server.hang_up()
        assert (await server.wait(mqtt5.ConnectPacket, 2))[1].client_id == "given"

    scripted(Scripted(mqtt5.ConnAckPacket(assigned_client_id="given")), scenario)


@pytest.mark.parametrize(
    ("code", "permanent"),
    [(134, True), (135, True), (133, True), (136, False), (137, False), (132, True), (159, False)],
)
def test_a_refusal_has_its_code_and_permanent_ones_are_not_tried_again(code: int, permanent: bool) -> None:
    server = Scripted(mqtt5.ConnAckPacket(reason_code=mqtt5.ConnAckReasonCode(code), reason_str="because"))
    error = refused(server)
    assert (error.code, error.permanent) == (code, permanent)
    assert "because" in str(error)
    assert (server.connections == 1) is permanent


def test_an_answer_in_mqtt_3_1_1_is_told_apart() -> None:
    assert refused(Scripted(b"\x20\x02\x00\x01")).code == 132


def test_no_answer_at_all() -> None:
    error = refused(Scripted(silent=True), timeout=0.1)
    assert not error.permanent
    assert "no answer" in str(error)


@pytest.mark.parametrize(
    "junk",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00" * 10,
        b"\x20\xff\xff\xff\xff\xff",
        mqtt5.PubAckPacket(3).write(),
        mqtt5.PingRespPacket().write(),
        mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode.SERVER_BUSY).write(),
    ],
)
def test_junk_instead_of_a_connack(junk: bytes) -> None:
    assert isinstance(refused(Scripted(junk)), ConnectError)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.binary(max_size=60), st.integers(0, 15))
def test_fuzzed_packets_end_the_link_and_nothing_else(junk: bytes, kind: int) -> None:
    async def main() -> None:
        states: list[str] = []
        server = Scripted()
        async with asyncio.timeout(20), server:
            options = Options(backoff=0.005, max_backoff=0.01, on_state=lambda s, _: states.append(s))
            async with Session(server.url, options) as session:
                subscription = await session.subscribe(["v"])
                length = len(junk)
                server.send(bytes([kind << 4 | (junk[0] & 15 if junk else 0), length]) + junk)
                server.hang_up() if length % 2 else server.send(junk)
                server.hang_up()
                await until(lambda: states.count("connected") >= 2 and session.connected)
                found = session._inbox.filters["v"]
                await until(lambda: len(server.all(mqtt5.SubscribePacket)) >= 2)
                server.send(publish("v", 1, 1, 9, subscription_ids=[found.identifier]))
                got: list[Any] = []
                while not got or got[-1].payload != b"1":
                    got += await collect(subscription, 1)

    asyncio.run(main())


# sending


def test_the_server_s_receive_maximum_bounds_what_is_in_flight_and_order_is_kept() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        task = asyncio.create_task(session.publish([publication(i) for i in range(10)]))
        first = await server.wait(mqtt5.PublishPacket, 3)
        await asyncio.sleep(0.02)
        assert len(server.all(mqtt5.PublishPacket)) == 3
        assert not task.done()
        server.send(mqtt5.PubAckPacket(first[0].packet_id or 0))
        await server.wait(mqtt5.PublishPacket, 4)
        for n in range(1, 10):
            packets = await server.wait(mqtt5.PublishPacket, min(n + 1, 10))
            server.send(mqtt5.PubAckPacket(packets[n].packet_id or 0))
        await (await task)
        assert [int(p.payload) for p in server.all(mqtt5.PublishPacket)] == list(range(10))

    scripted(Scripted(mqtt5.ConnAckPacket(receive_max=3)), scenario)


def publication(number: int, topic: str = "v", qos: int = 1, **more: Any) -> Publication:
    return Publication(topic, str(number).encode(), qos, **more)


def test_unacknowledged_publications_are_sent_again_in_order_with_dup() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        receipt = await session.publish([publication(i) for i in range(5)])
        packets = await server.wait(mqtt5.PublishPacket, 5)
        server.send(mqtt5.PubAckPacket(packets[1].packet_id or 0))
        await until(lambda: len(session._outbox.inflight) == 4)
        server.connack = mqtt5.ConnAckPacket(session_present=True, receive_max=2)
        server.hang_up()
        for n in range(5, 9):
            again = await server.wait(mqtt5.PublishPacket, n + 1)
            server.send(mqtt5.PubAckPacket(again[n].packet_id or 0))
        await receipt
        assert [(int(p.payload), p.duplicate) for p in server.all(mqtt5.PublishPacket)[5:]] == [
            (0, True),
            (2, True),
            (3, True),
            (4, True),
        ]
        ids = {int(p.payload): p.packet_id for p in packets}
        assert all(p.packet_id == ids[int(p.payload)] for p in server.all(mqtt5.PublishPacket)[5:])

    scripted(Scripted(), scenario, session_expiry=60)


def test_limits_of_the_server_are_errors_of_single_publications() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        receipt = await session.publish(
            [
                publication(0, qos=0),
                publication(1),
                publication(2, qos=0, retain=True),
                Publication("v", b"x" * 200),
                Publication("v", b"x" * 70_000),
            ]
        )
        with pytest.raises(PublishFailedError) as caught:
            await receipt
        failures = dict(caught.value.failures)
        assert set(failures) == {1, 2, 3, 4}
        assert isinstance(failures[1], DeniedError)
        assert failures[1].code == 155
        assert isinstance(failures[2], DeniedError)
        assert failures[2].code == 154
        for i in (3, 4):
            error = failures[i]
            assert isinstance(error, PacketTooLargeError)
            assert error.limit == 150
        assert [p.payload for p in await server.wait(mqtt5.PublishPacket)] == [b"0"]
        with pytest.raises(DeniedError) as denied:
            await session.subscribe(["a"], group="g")
        assert denied.value.code == 158
        with pytest.raises(DeniedError) as denied:
            await session.subscribe(["a/#"])
        assert denied.value.code == 162

    limits = mqtt5.ConnAckPacket(
        max_packet_size=150,
        max_qos=QOS(0),
        retain_available=False,
        shared_subscription_available=False,
        wildcard_subscription_available=False,
    )
    scripted(Scripted(limits), scenario)


def test_a_denied_publish_does_not_look_like_success() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        receipt = await session.publish([publication(i) for i in range(3)])
        for packet, code in zip(await server.wait(mqtt5.PublishPacket, 3), (0, 135, 16), strict=True):
            server.send(mqtt5.PubAckPacket(packet.packet_id or 0, reason_code=mqtt5.PubAckReasonCode(code)))
        with pytest.raises(PublishFailedError) as caught:
            await receipt
        ((index, error),) = caught.value.failures
        assert isinstance(error, DeniedError)
        assert (index, error.code, error.reason) == (1, 135, "not authorized")

    scripted(Scripted(), scenario)


def test_topic_aliases_are_set_once_and_used_after() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        for _ in range(2):
            for topic in ("long/topic/one", "long/topic/two", "long/topic/three", "v"):
                await session.publish([publication(0, topic, 0)])
        packets = await server.wait(mqtt5.PublishPacket, 8)
        assert [(p.topic, p.topic_alias) for p in packets] == [
            ("long/topic/one", 1),
            ("long/topic/two", 2),
            ("long/topic/three", None),
            ("v", None),
            ("", 1),
            ("", 2),
            ("long/topic/three", None),
            ("v", None),
        ]
        server.hang_up()
        await server.wait(mqtt5.ConnectPacket, 2)
        await session.publish([publication(0, "long/topic/two", 0)])
        assert [(p.topic, p.topic_alias) for p in (await server.wait(mqtt5.PublishPacket, 9))[8:]] == [
            ("long/topic/two", 1)
        ]

    scripted(Scripted(mqtt5.ConnAckPacket(topic_alias_max=2)), scenario)


def test_large_payloads_are_written_as_the_codec_would() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        for size in (65_535, 65_536, 70_000, 2_097_152, 2_200_000):
            await session.publish([Publication("v", bytes(size), 0, True, 5, (("a", "b"),), "text/plain")])
            await until(lambda: bool(server.all(mqtt5.PublishPacket)))
            packet = server.all(mqtt5.PublishPacket)[0]
            assert (len(packet.payload), packet.retain, packet.user_properties) == (size, True, [("a", "b")])
            assert packet.content_type == "text/plain"
            server.got.clear()

    scripted(Scripted(), scenario)


# receiving


def test_pubacks_leave_in_the_order_of_the_publishes() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        subscription = await session.subscribe(["v"])
        one = session._inbox.filters["v"].identifier
        server.send(*(publish("v", i, 1, 10 - i, subscription_ids=[one]) for i in range(5)))
        got = await collect(subscription, 5, ack=False)
        for i in (3, 1, 4):
            subscription.acknowledge([got[i]])
        await asyncio.sleep(0.02)
        assert server.all(mqtt5.PubAckPacket) == []
        subscription.acknowledge([got[0]])
        await server.wait(mqtt5.PubAckPacket, 2)
        subscription.acknowledge([got[2]])
        assert [p.packet_id for p in await server.wait(mqtt5.PubAckPacket, 5)] == [10, 9, 8, 7, 6]

    scripted(Scripted(), scenario)


def test_qos_2_is_handed_over_once_per_packet_id() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        subscription = await session.subscribe(["v"])
        ids: dict[str, Any] = {"subscription_ids": [session._inbox.filters["v"].identifier]}
        server.send(publish("v", 1, 2, 5, **ids), publish("v", 1, 2, 5, duplicate=True, **ids))
        got = await collect(subscription, 1, ack=False)
        assert [d.qos for d in got] == [2]
        server.connack = mqtt5.ConnAckPacket(session_present=True)
        server.greeting = publish("v", 1, 2, 5, duplicate=True, **ids).write()
        server.hang_up()
        await server.wait(mqtt5.ConnectPacket, 2)
        await until(lambda: session.connected)
        subscription.acknowledge(got)
        assert [p.packet_id for p in await server.wait(mqtt5.PubRecPacket)] == [5]
        server.send(publish("v", 1, 2, 5, duplicate=True, **ids))
        await server.wait(mqtt5.PubRecPacket, 2)
        server.send(mqtt5.PubRelPacket(5), mqtt5.PubRelPacket(5))
        codes = [p.reason_code.value for p in await server.wait(mqtt5.PubCompPacket, 2)]
        assert codes == [0, 146]
        await nothing(subscription, 0.02)
        server.send(publish("v", 2, 2, 5, **ids))
        assert [d.payload for d in await collect(subscription, 1)] == [b"2"]

    scripted(Scripted(), scenario, session_expiry=60)


def test_a_message_for_two_subscriptions_is_acknowledged_when_both_are_done() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        first, second = await session.subscribe(["a/#"]), await session.subscribe(["a/b"])
        ids = [f.identifier for f in session._inbox.filters.values()]
        server.send(publish("a/b", 1, 1, 5, subscription_ids=ids))
        one, two = await first.receive(), await second.receive()
        first.acknowledge(one)
        await asyncio.sleep(0.02)
        assert server.all(mqtt5.PubAckPacket) == []
        second.acknowledge(two)
        await server.wait(mqtt5.PubAckPacket)

    scripted(Scripted(), scenario)


def test_without_subscription_identifiers_routing_is_by_topic() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        first, second = await session.subscribe(["a/#"]), await session.subscribe(["a/b"], group="g")
        assert {p.subscription_id for p in server.all(mqtt5.SubscribePacket)} == {None}
        server.send(publish("a/b", 1, 0), publish("a/c", 2, 0), publish("other", 3, 0))
        assert [d.payload for d in await collect(first, 2)] == [b"1", b"2"]
        assert [d.payload for d in await collect(second, 1)] == [b"1"]

    scripted(Scripted(mqtt5.ConnAckPacket(subscription_id_available=False)), scenario)


def test_bytes_in_any_pieces_give_the_same_packets() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        subscription = await session.subscribe(["v"], capacity=10_000)
        ids: dict[str, Any] = {"subscription_ids": [session._inbox.filters["v"].identifier]}
        data = b"".join(publish("v", i, i % 2, i if i % 2 else None, **ids).write() for i in range(1, 60))
        link = session._link
        assert link is not None
        for piece in (1, 2, 3, 7, 100, len(data)):
            for start in range(0, len(data), piece):
                part = data[start : start + piece]
                buffer = link.get_buffer(-1)
                buffer[: len(part)] = part
                link.buffer_updated(len(part))
            assert [int(d.payload) for d in await collect(subscription, 59)] == list(range(1, 60))

    scripted(Scripted(), scenario)


def test_a_packet_larger_than_we_take_ends_the_link_with_its_reason() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        server.send(publish("v", 1, 0, user_properties=[("x", "y" * 5000)]))
        assert (await server.wait(mqtt5.DisconnectPacket))[0].reason_code.value == 149
        await server.wait(mqtt5.ConnectPacket, 2)

    scripted(Scripted(), scenario, max_packet_size=4096)


def test_aliases_of_the_server() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        subscription = await session.subscribe(["long/+"])
        ids: dict[str, Any] = {"subscription_ids": [session._inbox.filters["long/+"].identifier]}
        server.send(publish("long/a", 1, 0, topic_alias=4, **ids), publish("", 2, 1, 3, topic_alias=4, **ids))
        assert [d.topic for d in await collect(subscription, 2)] == ["long/a", "long/a"]
        server.send(publish("", 2, 0, topic_alias=5, **ids))
        assert (await server.wait(mqtt5.DisconnectPacket))[0].reason_code.value == 148

    scripted(Scripted(), scenario)


def test_messages_of_a_resumed_session_wait_for_their_subscription() -> None:
    server = Scripted(mqtt5.ConnAckPacket(session_present=True, subscription_id_available=False))
    server.greeting = publish("v", 1, 1, 1).write() + publish("w", 2, 1, 2).write() + publish("v", 3, 1, 3).write()

    async def scenario(server: Scripted, session: Session) -> None:
        await until(lambda: len(session._inbox._orphans) == 3)
        subscription = await session.subscribe(["v"])
        assert [d.payload for d in await collect(subscription, 2)] == [b"1", b"3"]
        session._refuse_orphans()
        assert [p.packet_id for p in await server.wait(mqtt5.PubAckPacket, 3)] == [1, 2, 3]

    scripted(server, scenario, session_expiry=60)


def test_a_broker_that_sends_too_much_is_not_read() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        subscription = await session.subscribe(["v"], capacity=3)
        ids: dict[str, Any] = {"subscription_ids": [session._inbox.filters["v"].identifier]}
        server.send(*(publish("v", i, 1, i, **ids) for i in range(1, 100)))
        got: list[int] = []
        while len(got) < 99:
            batch = await subscription.receive()
            assert len(batch) <= 4
            got += [int(d.payload) for d in batch]
            subscription.acknowledge(batch)
        assert got == list(range(1, 100))
        assert [p.packet_id for p in await server.wait(mqtt5.PubAckPacket, 99)] == got

    scripted(Scripted(), scenario, receive_maximum=3)


def test_a_flood_before_the_suback_does_not_block_it() -> None:
    server = Scripted(mqtt5.ConnAckPacket(session_present=True, subscription_id_available=False))

    async def scenario(server: Scripted, session: Session) -> None:
        task = asyncio.create_task(session.subscribe(["v"], capacity=2))
        await asyncio.sleep(0)
        server.send(*(publish("v", i, 0) for i in range(5)))
        subscription = await task
        server.send(*(publish("v", i, 0) for i in range(5, 9)))
        assert [int(d.payload) for d in await collect(subscription, 9)] == list(range(9))
        assert subscription.dropped == 0

    scripted(server, scenario, session_expiry=60)


# life


def test_a_subscription_refused_after_a_reconnect_ends_with_the_reason() -> None:
    async def scenario(server: Scripted, session: Session) -> None:
        subscription = await session.subscribe(["v"])
        server.suback = mqtt5.SubAckReasonCode.NOT_AUTHORIZED
        server.hang_up()
        with pytest.raises(DeniedError) as caught:
            await subscription.receive()
        assert caught.value.code == 135
        with pytest.raises(DeniedError):
            await session.subscribe(["w"])

    scripted(Scripted(), scenario)


def test_the_server_s_keep_alive_is_obeyed_and_its_reasons_are_told() -> None:
    states: list[tuple[str, str]] = []

    async def scenario(server: Scripted, session: Session) -> None:
        await server.wait(mqtt5.PingReqPacket)
        server.send(
            mqtt5.DisconnectPacket(
                reason_code=mqtt5.DisconnectReasonCode.SESSION_TAKEN_OVER, reason_str="somebody else"
            )
        )
        await until(lambda: any(s == "disconnected" for s, _ in states))
        assert ("disconnected", "the broker ended the connection: session taken over: somebody else") in states
        await server.wait(mqtt5.ConnectPacket, 2)

    scripted(
        Scripted(mqtt5.ConnAckPacket(server_keep_alive=1)),
        scenario,
        keep_alive=60,
        on_state=lambda s, r: states.append((s, r)),
    )


def test_closing_says_so_and_does_not_wait_for_a_peer_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.session.FAREWELL", 0.1)
    assert session_client.FAREWELL <= 5

    async def scenario(server: Scripted, session: Session) -> None:
        await session.close()
        assert (await server.wait(mqtt5.DisconnectPacket))[0].reason_code.value == 0

    scripted(Scripted(), scenario)

    async def stuck() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(mqtt5.ConnAckPacket().write())
            reader._transport.pause_reading()  # type: ignore[attr-defined] # the point of this peer
            await done.wait()
            writer.close()

        done = asyncio.Event()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        session = Session(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await session.open()
        data = [Publication("v", bytes(1_000_000))] * 50
        task = asyncio.create_task(session.publish(data))
        await asyncio.sleep(0.1)
        assert not task.done()  # the write buffer is full
        async with asyncio.timeout(2):
            await session.close()
        with pytest.raises(Exception, match="closed"):
            await task
        done.set()
        server.close()

    asyncio.run(stuck())


# addresses


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mqtt://h", "mqtt://h:1883"),
        ("mqtts://u:p%40ss@h:99", "mqtts://h:99"),
        ("mqtt://[::1]:5", "mqtt://[::1]:5"),
        ("unix:///run/b.sock", "unix:///run/b.sock"),
        ("mqtt+unix:///run/b.sock", "unix:///run/b.sock"),
        ("wss://h/path", "wss://h:443/path"),
    ],
)
def test_addresses(url: str, text: str) -> None:
    assert str(parse(url)) == text


def test_user_and_password_of_the_url() -> None:
    address = parse("mqtt://u:p%40ss@h")
    options = Options().signed_in(address)
    assert (options.user, options.password) == ("u", "p@ss")
    assert "p@ss" not in repr(address) + repr(options) + str(address)
    assert Options(user="x").signed_in(address).user == "x"


@pytest.mark.parametrize(
    "url",
    ["", "h", "mqtt:h", "mqt://h", "mqtt://", "mqtt://h:port", "mqtt://h/x", "unix://h/x", "unix://", "local://x"],
)
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ConfigError):
        connect(url)


@pytest.mark.parametrize("wrong", [{"keep_alive": -1}, {"receive_maximum": 0}, {"session_expiry": 2**32}])
def test_wrong_options(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Options(**wrong)  # type: ignore[arg-type] # one name of many


def test_the_scheme_chooses() -> None:
    assert isinstance(connect("mqtt://h"), Negotiated)
    assert type(connect("mqtt3://h")).__name__ == "Legacy"
    assert type(connect("wss://h/mqtt")).__name__ == "Legacy"
    bus: Bus = connect("local:a")
    assert isinstance(bus, LocalBus)
    other = connect("local:a")
    assert isinstance(other, LocalBus)
    assert bus.hub is other.hub
