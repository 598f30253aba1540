"""QoS 0 messages on known ways: what a session delivers does not depend on whether it knows the way."""

from __future__ import annotations

import asyncio
from typing import Any

import mqtt5
from bare_link import Wire, feed
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.bus import Delivery
from broker.session import Session
from broker.session_link import Link


async def _delivered(chunks: list[bytes], *, knows: bool) -> list[tuple[str, bytes, int, bool, tuple[Any, ...]]]:
    client = Session("mqtt://nowhere")
    inbox = client._inbox
    learn = inbox.learn if knows else lambda before, packet: None
    link = client._link = client._last = Link(client._packets, client._outbox.progress, 100_000, inbox.ways, learn)
    wire: Any = Wire()
    link.connection_made(wire)
    feed(link, mqtt5.ConnAckPacket().write())
    subscribing = asyncio.create_task(client.subscribe(["a/#", "b"], qos=1, capacity=10_000))
    await asyncio.sleep(0)
    for asked in list(client._asked):
        feed(link, mqtt5.SubAckPacket(asked, [mqtt5.SubAckReasonCode(1)]).write())
    subscription = await subscribing
    got: list[Delivery] = []
    for chunk in chunks:
        feed(link, chunk)
    if subscription.queued:
        got = await subscription.receive()
    assert bool(inbox.ways) <= knows
    link.closing = True
    return [(d.topic, bytes(d.payload), d.qos, d.retain, d.properties) for d in got]


_PACKETS = st.builds(
    lambda topic, payload, qos, retain, user, expiry, content: mqtt5.PublishPacket(
        topic,
        payload,
        qos=mqtt5.QoS(qos),
        retain=retain,
        packet_id=7 if qos else None,
        user_properties=user,
        message_expiry_interval=expiry,
        content_type=content,
    ).write(),
    st.sampled_from(["a/1", "a/2", "a/" + "x" * 130, "b", "elsewhere"]),
    st.binary(max_size=200) | st.just(b"y" * 5000),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([False, False, True]),
    st.sampled_from([[], [], [("traceparent", "00-1")]]),
    st.sampled_from([None, None, 5]),
    st.sampled_from([None, None, "application/msgpack"]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(_PACKETS, max_size=40), st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_what_is_delivered_does_not_depend_on_known_ways(packets: list[bytes], steps: list[int]) -> None:
    blob, at = b"".join(packets), 0
    chunks: list[bytes] = []
    while at < len(blob):
        step = steps[len(chunks) % len(steps)]
        chunks.append(blob[at : at + step])
        at += step
    known, unknown = (asyncio.run(_delivered(chunks, knows=knows)) for knows in (True, False))
    assert known == unknown


def test_ways_are_used_and_forgotten_with_the_subscriptions() -> None:
    async def scene() -> None:
        client = Session("mqtt://nowhere")
        packet = mqtt5.PublishPacket("a/1", b"x").write()
        inbox = client._inbox
        link = client._link = client._last = Link(client._packets, lambda: None, 1000, inbox.ways, inbox.learn)
        wire: Any = Wire()
        link.connection_made(wire)
        feed(link, mqtt5.ConnAckPacket().write())
        feed(link, packet)
        assert not inbox.ways, "nobody subscribed to it"
        tasks = [asyncio.create_task(client.subscribe([pattern])) for pattern in ("a/+", "a/1")]
        await asyncio.sleep(0)
        feed(link, packet * 3)
        (way,) = inbox.ways.values()
        assert way.topic == "a/1"
        assert [s.queued for s in way.targets] == [3, 3]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not inbox.ways
        feed(link, packet)
        assert not inbox.ways
        link.closing = True

    asyncio.run(scene())
