"""The behaviour of every bus: one suite for the session, the legacy client and the in-process bus."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from bus_site import NetworkSite, Run, Site, collect, nothing, sequence, until

from broker.bus import Publication, Will
from broker.session import Session
from schemas.errors import BusError, ClosedError, ConnectError, DeniedError, PublishFailedError

Scenario = Callable[[Site], Awaitable[None]]


def everywhere(scenario: Scenario) -> Callable[[Run], None]:
    """Make a test of a scenario, for every arrangement."""

    @functools.wraps(scenario)
    def test(run: Run) -> None:
        run(scenario)

    del test.__wrapped__  # pytest would look there for the fixtures' names
    return test


def numbers(site: Site, topic: str, count: int, *, qos: int, start: int = 0, **more: Any) -> list[Publication]:
    return [Publication(topic, site.payload(i), qos, **more) for i in range(start, start + count)]


def want(site: Site, reason: str, *, networked: bool = False, v5: bool = False) -> None:
    """Skip where the arrangement has no such thing."""
    if (networked and not site.networked) or (v5 and not site.v5):
        pytest.skip(reason)


# order and acknowledgement


@everywhere
async def test_order_is_kept_at_qos_0_and_1(site: Site) -> None:
    topic = site.topic("order")
    there, here = await site.open(), await site.open()
    subscription = await here.subscribe([topic], qos=1, capacity=5000)
    receipts = []
    for i in range(0, 1200, 40):
        receipts.append(await there.publish(numbers(site, topic, 20, qos=0, start=i)))
        receipts.append(await there.publish(numbers(site, topic, 20, qos=1, start=i + 20)))
    got = await collect(subscription, 1200)
    await asyncio.gather(*receipts)
    if site.networked:
        # the order of QoS 0 among QoS 1 is the broker's own affair (MQTT 5, 4.6); within each it is not
        for half in (0, 1):
            assert [n for n in sequence(got) if n // 20 % 2 == half] == [n for n in range(1200) if n // 20 % 2 == half]
    else:
        assert sequence(got) == list(range(1200))
    assert {d.qos for d in got} == {0, 1}
    assert {d.topic for d in got} == {topic}
    assert subscription.dropped == 0


@everywhere
async def test_a_receipt_of_qos_0_is_done_at_once_and_of_nothing_too(site: Site) -> None:
    bus = await site.open()
    receipt = await bus.publish([Publication(site.topic("x"), site.payload(1))])
    assert receipt.done()
    assert (await bus.publish([])).done()


@everywhere
async def test_a_lower_qos_of_either_side_wins(site: Site) -> None:
    bus = await site.open()
    zero = await bus.subscribe([site.topic("zero")], qos=0)
    one = await bus.subscribe([site.topic("one")], qos=1)
    await (await bus.publish([Publication(site.topic("zero"), site.payload(1), 1)]))
    await bus.publish([Publication(site.topic("one"), site.payload(1), 0)])
    assert [d.qos for d in await collect(zero, 1) + await collect(one, 1)] == [0, 0]


@everywhere
async def test_what_is_not_acknowledged_comes_again_to_the_next_bus_of_the_session(site: Site) -> None:
    topic = site.topic("again")
    name = site.topic("client").replace("/", "-")
    there = await site.open()
    options = {"client_id": name, "session_expiry": 60}
    bus = site.bus(**options)
    await bus.open()
    subscription = await bus.subscribe([topic], qos=1)
    receipt = await there.publish(numbers(site, topic, 5, qos=1))
    got = await collect(subscription, 5, ack=False)
    assert sequence(got) == [0, 1, 2, 3, 4]
    assert not any(d.duplicate for d in got)
    subscription.acknowledge(got[:2])
    if site.networked:
        await receipt
    await bus.close()
    assert bus.connected is False
    more = await there.publish(numbers(site, topic, 2, qos=1, start=5))
    bus = await site.open(**options)
    subscription = await bus.subscribe([topic], qos=1)
    got = await collect(subscription, 5)
    assert sequence(got) == [2, 3, 4, 5, 6]
    assert all(d.duplicate for d in got[:3])
    await asyncio.gather(receipt, more)
    await nothing(subscription)


@everywhere
async def test_acknowledging_in_any_order_and_twice_is_fine(site: Site) -> None:
    topic = site.topic("acks")
    bus = await site.open(receive_maximum=10)
    subscription = await bus.subscribe([topic], qos=1)
    writer = asyncio.create_task(bus.publish(numbers(site, topic, 100, qos=1)))
    got: list[Any] = []
    while len(got) < 100:
        batch = await subscription.receive()
        subscription.acknowledge(batch[::-1])
        subscription.acknowledge(batch)
        got.extend(batch)
    await (await writer)
    assert sequence(got) == list(range(100))


# filters


@everywhere
async def test_wildcards(site: Site) -> None:
    bus = await site.open()
    plus = await bus.subscribe([site.topic("+/out")], qos=1)
    sharp = await bus.subscribe([site.topic("deep/#")], qos=1)
    for name in ("a/out", "deep/b/c", "a/in", "deep", "b/out"):
        await bus.publish([Publication(site.topic(name), site.payload(name), 1)])
    assert [d.topic for d in await collect(plus, 2)] == [site.topic("a/out"), site.topic("b/out")]
    assert [d.topic for d in await collect(sharp, 2)] == [site.topic("deep/b/c"), site.topic("deep")]
    await nothing(plus)
    await nothing(sharp)


@everywhere
async def test_several_filters_and_overlapping_subscriptions_give_each_its_copy(site: Site) -> None:
    want(site, "MQTT 3.1.1 has no subscription identifiers", v5=True)
    bus = await site.open()
    wide = await bus.subscribe([site.topic("x/#")], qos=1)
    narrow = await bus.subscribe([site.topic("x/y"), site.topic("z")], qos=1)
    same = await bus.subscribe([site.topic("x/y")], qos=1)
    await bus.publish([Publication(site.topic(t), site.payload(t), 1) for t in ("x/y", "z", "x/w")])
    assert [d.topic for d in await collect(wide, 2)] == [site.topic("x/y"), site.topic("x/w")]
    assert [d.topic for d in await collect(narrow, 2)] == [site.topic("x/y"), site.topic("z")]
    assert [d.topic for d in await collect(same, 1)] == [site.topic("x/y")]
    for each in (wide, narrow, same):
        await nothing(each, 0.05)


@everywhere
async def test_a_shared_group_gets_each_message_once(site: Site) -> None:
    topic = site.topic("work")
    buses = [await site.open() for _ in range(3)]
    there = await site.open()
    members = [await bus.subscribe([topic], qos=1, group="crew") for bus in buses]
    outside = await there.subscribe([topic], qos=1)
    shares: list[list[int]] = [[], [], []]

    async def work(i: int) -> None:
        while True:
            batch = await members[i].receive()
            members[i].acknowledge(batch)
            shares[i] += sequence(batch)

    tasks = [asyncio.create_task(work(i)) for i in range(3)]
    receipt = await there.publish(numbers(site, topic, 300, qos=1))
    assert sequence(await collect(outside, 300)) == list(range(300))
    await receipt
    await until(lambda: sum(map(len, shares)) >= 300)
    for task in tasks:
        task.cancel()
    assert sorted(n for share in shares for n in share) == list(range(300))
    assert all(shares)


@everywhere
async def test_unsubscribing_ends_it_and_leaves_what_is_queued(site: Site) -> None:
    topic = site.topic("ended")
    bus = await site.open()
    subscription = await bus.subscribe([topic], qos=1)
    receipt = await bus.publish(numbers(site, topic, 3, qos=1))
    await until(lambda: subscription.queued == 3)
    await subscription.unsubscribe()
    assert sequence(await collect(subscription, 3)) == [0, 1, 2]
    await receipt
    await (await bus.publish(numbers(site, topic, 3, qos=1)))
    with pytest.raises(ClosedError):
        await subscription.receive()
    await subscription.unsubscribe()
    other = await bus.subscribe([topic], qos=1)
    await bus.publish(numbers(site, topic, 1, qos=1, start=9))
    assert sequence(await collect(other, 1)) == [9]


@everywhere
async def test_a_wrong_filter_or_topic_is_refused_and_the_bus_lives(site: Site) -> None:
    bus = await site.open()
    for wrong in ("", "a/#/b", "a\0b", "a+/b", "\ud800"):
        with pytest.raises(DeniedError):
            await bus.subscribe([wrong])
    with pytest.raises(DeniedError):
        await bus.subscribe(["a"], group="b/c")
    receipt = await bus.publish(
        [
            Publication(site.topic("good"), site.payload(1), 1),
            Publication("bad/+", site.payload(2), 1),
            Publication("", site.payload(3), 0),
            Publication(site.topic("x"), site.payload(4), 2),
            Publication("x" * 70000, site.payload(5), 0),
            Publication("\ud800", site.payload(6), 0),
        ]
    )
    with pytest.raises(PublishFailedError) as caught:
        await receipt
    assert [i for i, _ in caught.value.failures] == [1, 2, 3, 4, 5]
    assert all(isinstance(e, DeniedError) for _, e in caught.value.failures)
    subscription = await bus.subscribe([site.topic("good")])
    await bus.publish([Publication(site.topic("good"), site.payload(7), 1)])
    assert sequence(await collect(subscription, 1)) == [7]


# retained messages, wills, late subscribers


@everywhere
async def test_retained_messages_reach_late_subscribers_until_cleared(site: Site) -> None:
    bus = await site.open()
    early = await bus.subscribe([site.topic("state/+")], qos=1)
    await (await bus.publish([Publication(site.topic("state/a"), site.payload(1), 1, retain=True)])) if (
        site.networked
    ) else await bus.publish([Publication(site.topic("state/a"), site.payload(1), 1, retain=True)])
    assert [d.retain for d in await collect(early, 1)] == [False]
    await bus.publish([Publication(site.topic("state/b"), site.payload(2), 1)])
    await collect(early, 1)
    other = await site.open()
    late = await other.subscribe([site.topic("state/#")], qos=1)
    got = await collect(late, 1)
    assert [(d.topic, int(d.payload), d.retain) for d in got] == [(site.topic("state/a"), 1, True)]
    await nothing(late)
    third = await site.open()
    unwanted = await third.subscribe([site.topic("state/#")], qos=1, retained=False)
    await nothing(unwanted)
    await late.unsubscribe()
    await early.unsubscribe()
    await unwanted.unsubscribe()
    await (await bus.publish([Publication(site.topic("state/a"), b"", 1, retain=True)]))
    fourth = await site.open()
    await nothing(await fourth.subscribe([site.topic("state/#")], qos=1))


@everywhere
async def test_a_late_subscriber_gets_nothing_from_before(site: Site) -> None:
    bus = await site.open()
    await (await bus.publish(numbers(site, site.topic("x"), 5, qos=1)))
    subscription = await bus.subscribe([site.topic("x")], qos=1)
    await bus.publish(numbers(site, site.topic("x"), 1, qos=1, start=5))
    assert sequence(await collect(subscription, 1)) == [5]


@everywhere
async def test_the_will_is_published_when_we_vanish_and_not_when_we_close(site: Site) -> None:
    watcher = await site.open()
    subscription = await watcher.subscribe([site.topic("state")], qos=1)
    will = Will(site.topic("state"), b"offline")
    clean = site.bus(will=will)
    await clean.open()
    await clean.close()
    await nothing(subscription)
    bus = await site.open(will=will)
    site.vanish(bus)
    got = await collect(subscription, 1)
    assert [(d.payload, d.qos) for d in got] == [(b"offline", 1)]
    other = await site.open()
    assert [d.retain for d in await collect(await other.subscribe([site.topic("state")]), 1)] == [True]


# saturation


@everywhere
async def test_latest_drops_the_oldest_and_counts(site: Site) -> None:
    there, here = await site.open(), await site.open()
    subscription = await here.subscribe([site.topic("v")], qos=0, capacity=50, overflow="latest")
    marker = await here.subscribe([site.topic("mark")], qos=0)
    await there.publish(numbers(site, site.topic("v"), 500, qos=0))
    await there.publish([Publication(site.topic("mark"), site.payload(0))])
    await collect(marker, 1)
    assert subscription.queued == 50
    assert sequence(await subscription.receive()) == list(range(450, 500))
    assert subscription.dropped == 450


@everywhere
async def test_sample_drops_the_newest_and_counts(site: Site) -> None:
    there, here = await site.open(), await site.open()
    subscription = await here.subscribe([site.topic("v")], qos=0, capacity=50, overflow="sample")
    marker = await here.subscribe([site.topic("mark")], qos=0)
    await there.publish(numbers(site, site.topic("v"), 500, qos=0))
    await there.publish([Publication(site.topic("mark"), site.payload(0))])
    await collect(marker, 1)
    assert sequence(await subscription.receive()) == list(range(50))
    assert subscription.dropped == 450


@everywhere
async def test_block_drops_nothing_at_qos_0(site: Site) -> None:
    there, here = await site.open(), await site.open()
    subscription = await here.subscribe([site.topic("v")], qos=0, capacity=50, overflow="block")
    writer = asyncio.create_task(there.publish(numbers(site, site.topic("v"), 3000, qos=0)))
    await until(lambda: subscription.queued >= 50)
    got: list[int] = []
    while len(got) < 3000:
        batch = await subscription.receive()
        assert len(batch) <= 50 + (64 if isinstance(site, NetworkSite) and not site.v5 else 0)
        got += sequence(batch)
        await asyncio.sleep(0)
    await writer
    assert got == list(range(3000))
    assert subscription.dropped == 0


@everywhere
async def test_a_stalled_consumer_holds_qos_1_within_bounds_and_loses_nothing(site: Site) -> None:
    count = 50_000 if site.v5 else 5_000
    there, here = await site.open(), await site.open(receive_maximum=256)
    subscription = await here.subscribe([site.topic("v")], qos=1, capacity=256)
    receipts: dict[int, Any] = {}  # grows as it goes on

    async def write() -> None:
        for i in range(0, count, 500):
            receipts[i] = await there.publish(numbers(site, site.topic("v"), 500, qos=1, start=i))

    writer = asyncio.create_task(write())
    bound = 257 if site.v5 else 600
    await until(lambda: subscription.queued >= min(bound, 20))
    stalled = -1
    for _ in range(10):  # as long as the broker takes them
        if stalled == len(receipts):
            break
        stalled = len(receipts)
        await asyncio.sleep(0.1)
    assert subscription.queued <= bound
    got: list[int] = []
    while len(got) < count:
        batch = await subscription.receive()
        assert len(batch) <= bound
        subscription.acknowledge(batch)
        got += sequence(batch)
    await writer
    await asyncio.gather(*receipts.values())
    assert got == list(range(count))
    assert subscription.dropped == 0


@everywhere
async def test_two_publishers_and_a_slow_consumer_keep_each_ones_order(site: Site) -> None:
    first, second, here = await site.open(), await site.open(), await site.open(receive_maximum=20)
    subscription = await here.subscribe([site.topic("+")], qos=1, capacity=20)
    tasks = [
        asyncio.create_task(bus.publish(numbers(site, site.topic(name), 400, qos=1)))
        for bus, name in ((first, "a"), (second, "b"))
    ]
    got: dict[str, list[int]] = {"a": [], "b": []}
    while sum(map(len, got.values())) < 800:
        for delivery in await subscription.receive():
            got[delivery.topic[-1]].append(int(delivery.payload))
            subscription.acknowledge([delivery])
    for task in tasks:
        await (await task)
    assert got == {"a": list(range(400)), "b": list(range(400))}


# closing and cancelling


@everywhere
async def test_closing_fails_who_waits_and_is_idempotent(site: Site) -> None:
    there, here = await site.open(), await site.open(receive_maximum=5)
    subscription = await here.subscribe([site.topic("v")], qos=1, capacity=5)
    quiet = await there.subscribe([site.topic("quiet")])
    if isinstance(site, NetworkSite):
        site.proxy.stall()
    receipt = await there.publish(numbers(site, site.topic("v"), 3, qos=1))
    writer = asyncio.create_task(there.publish(numbers(site, site.topic("v"), 100_000, qos=1)))
    reader = asyncio.create_task(quiet.receive())
    await until(lambda: subscription.queued >= 3 or site.networked)
    await asyncio.sleep(0.02)
    assert not writer.done()
    await there.close()
    for waiting in (receipt, writer, reader):
        with pytest.raises(ClosedError):
            await waiting
    assert not there.connected
    await there.close()
    with pytest.raises(ClosedError):
        await there.publish([Publication(site.topic("v"), site.payload(1))])
    with pytest.raises(ClosedError):
        await there.subscribe([site.topic("v")])
    with pytest.raises(ClosedError):
        await there.open()
    if isinstance(site, NetworkSite):
        site.proxy.go_on()


@everywhere
async def test_what_was_accepted_goes_out_before_closing(site: Site) -> None:
    here = await site.open()
    subscription = await here.subscribe([site.topic("v")], qos=1, capacity=5000)
    bus = site.bus()
    await bus.open()
    receipt = await bus.publish(numbers(site, site.topic("v"), 1000, qos=0))
    await bus.close()
    assert receipt.done()
    assert sequence(await collect(subscription, 1000)) == list(range(1000))


@everywhere
async def test_a_cancelled_receive_loses_nothing(site: Site) -> None:
    bus = await site.open()
    subscription = await bus.subscribe([site.topic("v")], qos=1)
    got: list[int] = []
    for i in range(30):
        task = asyncio.create_task(subscription.receive())
        await asyncio.sleep(0)
        publishing = asyncio.create_task(bus.publish(numbers(site, site.topic("v"), 1, qos=1, start=i)))
        for _ in range(i % 7):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            batch = await task
            subscription.acknowledge(batch)
            got += sequence(batch)
        await publishing
    while len(got) < 30:
        got += sequence(await collect(subscription, 1))
    assert got == list(range(30))


@everywhere
async def test_a_cancelled_publish_leaves_the_bus_in_order(site: Site) -> None:
    there, here = await site.open(), await site.open(receive_maximum=5)
    subscription = await here.subscribe([site.topic("v")], qos=1, capacity=5)
    writer = asyncio.create_task(there.publish(numbers(site, site.topic("v"), 20_000, qos=1)))
    await until(lambda: subscription.queued >= 5)
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    after = asyncio.create_task(there.publish(numbers(site, site.topic("v"), 1, qos=1, start=1_000_000)))
    got: list[int] = []
    while not got or got[-1] != 1_000_000:
        got += sequence(await collect(subscription, 1))
    await (await after)
    assert got[:-1] == list(range(len(got) - 1))
    assert 5 <= len(got) < 20_000


@everywhere
async def test_a_cancelled_subscribe_leaves_no_subscription(site: Site) -> None:
    want(site, "the in-process bus answers at once", networked=True)
    assert isinstance(site, NetworkSite)
    bus = await site.open()
    site.proxy.stall()
    task = asyncio.create_task(bus.subscribe([site.topic("v")]))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    site.proxy.go_on()
    subscription = await bus.subscribe([site.topic("v")], qos=1)
    await (await bus.publish(numbers(site, site.topic("v"), 2, qos=1)))
    assert sequence(await collect(subscription, 2)) == [0, 1]
    await nothing(subscription)


# links


async def cut_again_and_again(site: Site) -> list[int]:
    """2000 numbers at QoS 1 over a link that is cut four times: what came, until each had come."""
    assert isinstance(site, NetworkSite)
    states: list[str] = []
    there = await site.open(client_id=site.topic("a").replace("/", "-"), session_expiry=60)
    here = await site.open(
        client_id=site.topic("b").replace("/", "-"), session_expiry=60, on_state=lambda s, _: states.append(s)
    )
    subscription = await here.subscribe([site.topic("v")], qos=1, capacity=300)
    receipts: list[Any] = []

    async def write() -> None:
        for i in range(0, 2000, 10):
            receipts.append(await there.publish(numbers(site, site.topic("v"), 10, qos=1, start=i)))
            await asyncio.sleep(0.001)

    writer = asyncio.create_task(write())
    got: list[int] = []
    cuts = 0
    seen: set[int] = set()
    while len(seen) < 2000:
        batch = await subscription.receive()
        if len(seen) > 400 * (cuts + 1) and cuts < 4:
            cuts += 1
            site.proxy.cut()
        subscription.acknowledge(batch)
        got += sequence(batch)
        seen.update(sequence(batch))
    await writer
    await asyncio.gather(*receipts)
    assert cuts == 4
    assert states.count("connected") >= 4
    assert states.count("disconnected") >= 4
    return got


@everywhere
async def test_nothing_is_lost_while_the_link_is_cut_again_and_again(site: Site) -> None:
    want(site, "the in-process bus has no link", networked=True)
    assert list(dict.fromkeys(await cut_again_and_again(site))) == list(range(2000))


@everywhere
async def test_unacknowledged_deliveries_come_again_after_a_cut(site: Site) -> None:
    want(site, "the in-process bus has no link", networked=True)
    assert isinstance(site, NetworkSite)
    there = await site.open()
    here = await site.open(client_id=site.topic("b").replace("/", "-"), session_expiry=60)
    subscription = await here.subscribe([site.topic("v")], qos=1)
    await (await there.publish(numbers(site, site.topic("v"), 4, qos=1)))
    first = await collect(subscription, 4, ack=False)
    subscription.acknowledge(first[:1])
    await asyncio.sleep(0.05)  # the PUBACK goes out
    site.proxy.cut()
    await until(lambda: not here.connected)
    subscription.acknowledge(first[1:2])  # too late: dropped
    again = await collect(subscription, 3)
    assert sequence(again) == [1, 2, 3]
    assert all(d.duplicate for d in again)
    await nothing(subscription)


@everywhere
async def test_a_session_that_is_not_kept_subscribes_again_after_a_cut(site: Site) -> None:
    want(site, "the in-process bus has no link", networked=True)
    assert isinstance(site, NetworkSite)
    bus = await site.open()
    subscription = await bus.subscribe([site.topic("v")], qos=1)
    gone = await bus.subscribe([site.topic("w")], qos=1)
    await gone.unsubscribe()
    site.proxy.cut()
    await until(lambda: not bus.connected)
    receipt = await bus.publish([Publication(site.topic(t), site.payload(1), q) for t in "vw" for q in (0, 1)])
    assert [d.topic for d in await collect(subscription, 2)] == [site.topic("v")] * 2
    await receipt


@everywhere
async def test_a_silent_link_is_found_out_by_the_keep_alive(site: Site) -> None:
    want(site, "the in-process bus has no link", networked=True)
    want(site, "paho looks at its keep-alive once a second; tested with the session", v5=True)
    assert isinstance(site, NetworkSite)
    why: list[str] = []
    bus = await site.open(keep_alive=1, on_state=lambda s, reason: why.append(f"{s}: {reason}"))
    subscription = await bus.subscribe([site.topic("v")], qos=1)
    site.proxy.stall()
    await until(lambda: not bus.connected)
    site.proxy.cut()
    site.proxy.go_on()
    await bus.publish(numbers(site, site.topic("v"), 1, qos=1))
    assert sequence(await collect(subscription, 1)) == [0]
    assert "disconnected: the broker does not answer to a ping" in why


@everywhere
async def test_a_broker_that_is_away_is_an_error_after_the_patience(site: Site) -> None:
    want(site, "the in-process bus is always there", networked=True)
    assert isinstance(site, NetworkSite)
    site.proxy.refuse = True
    bus = site.bus(patience=0.3)
    with pytest.raises(ConnectError) as caught:
        await bus.open()
    assert not caught.value.permanent
    assert site.proxy.seen >= 2
    late = asyncio.create_task(site.open(patience=10.0))
    await asyncio.sleep(0.1)
    site.proxy.refuse = False
    assert (await late).connected


# payloads


@everywhere
async def test_large_payloads(site: Site) -> None:
    want(site, "the in-process bus hands objects over", networked=True)
    there, here = await site.open(), await site.open()
    subscription = await here.subscribe([site.topic("big")], qos=1)
    data = bytes(range(256)) * 4096
    for payload in (data, bytearray(data), memoryview(data), data[:65536], data[:65535], b""):
        for qos in (0, 1):
            await (await there.publish([Publication(site.topic("big"), payload, qos)]))
            got = await collect(subscription, 1)
            assert [d.payload for d in got] == [bytes(payload)]
            assert isinstance(got[0].payload, bytes)
    receipt = await there.publish([Publication(site.topic("big"), "text", 0)])
    with pytest.raises(PublishFailedError, match="not bytes") as caught:
        await receipt
    assert isinstance(caught.value.failures[0][1], BusError)


@everywhere
async def test_properties_travel(site: Site) -> None:
    want(site, "MQTT 3.1.1 has none", v5=True)
    bus = await site.open()
    subscription = await bus.subscribe([site.topic("p")], qos=1)
    properties = (("traceparent", "00-1"), ("traceparent", "00-2"))
    for qos in (0, 1):
        await bus.publish(
            [Publication(site.topic("p"), site.payload(1), qos, False, 60, properties, "application/msgpack")]
        )
    assert [d.properties for d in await collect(subscription, 2)] == [properties] * 2


@everywhere
async def test_objects_are_handed_over_as_they_are_in_one_process(site: Site) -> None:
    if site.encoded:
        with pytest.raises(PublishFailedError):
            await (await (await site.open()).publish([Publication(site.topic("o"), object())]))
        return
    bus = await site.open()
    subscription = await bus.subscribe([site.topic("o")])
    thing = object()
    await bus.publish([Publication(site.topic("o"), thing, qos) for qos in (0, 1)])
    assert [d.payload is thing for d in await collect(subscription, 2)] == [True, True]


@everywhere
async def test_opening_twice_is_refused(site: Site) -> None:
    bus = await site.open()
    assert bus.connected
    with pytest.raises(BusError):
        await bus.open()
    assert bus.connected
    assert bus.encoded is site.encoded


@everywhere
async def test_many_publishers_on_one_bus_at_once(site: Site) -> None:
    bus = await site.open()
    subscription = await bus.subscribe([site.topic("+")], qos=1, capacity=10_000)
    tasks = [asyncio.create_task(bus.publish(numbers(site, site.topic(f"{i}"), 50, qos=i % 2))) for i in range(20)]
    got = await collect(subscription, 1000)
    for task in tasks:
        await (await task)
    for i in range(20):
        assert sequence([d for d in got if d.topic == site.topic(f"{i}")]) == list(range(50))


@everywhere
async def test_aliases_are_used_where_offered(site: Site) -> None:
    want(site, "MQTT 3.1.1 has none", networked=True, v5=True)
    bus = await site.open()
    assert isinstance(bus, Session)
    assert bus.limits is not None
    assert bus.limits.topic_alias_max > 0
    topics = [site.topic(f"alias/{i}") for i in range(20)]
    subscription = await bus.subscribe([site.topic("alias/#")], qos=1)
    for _ in range(3):
        await bus.publish([Publication(t, b"1", q) for t in topics for q in (0, 1)])
    got = await collect(subscription, 120)
    assert sorted(d.topic for d in got) == sorted(topics * 6)
