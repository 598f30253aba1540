"""The behaviour suite of the bus on brokers that are not ours, over the MQTT that they speak: RabbitMQ and NATS.

``test_bus.py`` itself runs on the embedded broker and on mosquitto, over MQTT 5 and 3.1.1. What a broker does otherwise is
said in ``docs/brokers.md``, left out of the suite here, and tested as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import test_bus
from brokers import KINDS, param, shared, started
from bus_site import NetworkSite, Site, collect, nothing, sequence

from broker.bus import Publication
from broker.connect import Negotiated, connect
from broker.legacy import Legacy
from broker.session import Session

pytestmark = pytest.mark.campaign

SUITE = [name for name in vars(test_bus) if name.startswith("test_")]
FOREIGN = ("rabbitmq", "nats")
EXCEPTIONS = {
    ("rabbitmq", "test_a_shared_group_gets_each_message_once"),
    ("rabbitmq", "test_retained_messages_reach_late_subscribers_until_cleared"),
    ("nats", "test_a_shared_group_gets_each_message_once"),
    ("nats", "test_wildcards"),
    ("nats", "test_what_is_not_acknowledged_comes_again_to_the_next_bus_of_the_session"),
    ("nats", "test_nothing_is_lost_while_the_link_is_cut_again_and_again"),
}
Scenario = Callable[[Site], Awaitable[None]]


def on(broker: str, scenario: Scenario) -> None:
    """Run a scenario on the shared broker."""
    port = shared(broker).port

    async def where(_: AsyncExitStack) -> int:
        return port

    async def main() -> None:
        async with asyncio.timeout(50), NetworkSite(Legacy, where) as site:
            await scenario(site)

    asyncio.run(main())


def suite() -> list[Any]:
    return [
        param(broker, name, ident=f"{broker}-{name.removeprefix('test_')}")
        for broker in FOREIGN
        for name in SUITE
        if (broker, name) not in EXCEPTIONS
    ]


@pytest.mark.parametrize(("broker", "name"), suite())
def test_suite(broker: str, name: str) -> None:
    getattr(test_bus, name)(lambda scenario: on(broker, scenario))


def test_exceptions_name_tests_of_the_suite_and_are_written_down() -> None:
    assert len(SUITE) > 25
    assert {name for _, name in EXCEPTIONS} <= set(SUITE)
    text = (Path(__file__).parents[2] / "docs" / "brokers.md").read_text()
    for broker, name in EXCEPTIONS:
        assert f"`{name}`" in text, (broker, name)


@pytest.mark.parametrize("broker", [param(name) for name in KINDS])
def test_the_version_is_negotiated(broker: str) -> None:
    async def main() -> None:
        async with connect(shared(broker).url, patience=10) as bus:
            assert isinstance(bus, Negotiated)
            assert type(bus.bus) is (Session if "5" in KINDS[broker].versions else Legacy)
            subscription = await bus.subscribe(["negotiated"], qos=1)
            await (await bus.publish([Publication("negotiated", b"7", 1)]))
            assert sequence(await collect(subscription, 1)) == [7]

    asyncio.run(main())


@pytest.mark.parametrize("broker", [param(name) for name in FOREIGN])
def test_a_shared_group_gets_nothing(broker: str) -> None:
    async def scenario(site: Site) -> None:
        bus = await site.open()
        member = await (await site.open()).subscribe([site.topic("work")], qos=1, group="crew")
        outside = await bus.subscribe([site.topic("work")], qos=1)
        await (await bus.publish(test_bus.numbers(site, site.topic("work"), 20, qos=1)))
        assert sequence(await collect(outside, 20)) == list(range(20))
        await nothing(member, 0.3)

    on(broker, scenario)


@pytest.mark.parametrize("broker", [param("nats")])
def test_nats_loses_nothing_while_the_link_is_cut_but_may_change_the_order(broker: str) -> None:
    async def scenario(site: Site) -> None:
        assert sorted(set(await test_bus.cut_again_and_again(site))) == list(range(2000))

    on(broker, scenario)


@pytest.mark.parametrize("broker", [param("rabbitmq")])
def test_rabbitmq_gives_what_is_retained_to_exact_topics_only(broker: str) -> None:
    async def scenario(site: Site) -> None:
        topic = site.topic("state/a")
        bus = await site.open()
        await (await bus.publish([Publication(topic, b"1", 1, retain=True)]))
        wide = await bus.subscribe([site.topic("state/#")], qos=1)
        await nothing(wide, 0.3)
        exact = await (await site.open()).subscribe([topic], qos=1)
        assert [(d.payload, d.retain) for d in await collect(exact, 1)] == [(b"1", True)]

    on(broker, scenario)


@pytest.mark.parametrize("broker", [param("nats")])
def test_nats_gives_again_after_a_time_and_behind_what_is_newer(broker: str) -> None:
    async def scenario(site: Site) -> None:
        options = {"client_id": site.topic("client").replace("/", "-"), "session_expiry": 60}
        there, bus = await site.open(), site.bus(**options)
        await bus.open()
        subscription = await bus.subscribe([site.topic("again")], qos=1)
        await (await there.publish(test_bus.numbers(site, site.topic("again"), 5, qos=1)))
        subscription.acknowledge((await collect(subscription, 5, ack=False))[:2])
        await bus.close()
        await (await there.publish(test_bus.numbers(site, site.topic("again"), 2, qos=1, start=5)))
        subscription = await (await site.open(**options)).subscribe([site.topic("again")], qos=1)
        got = await collect(subscription, 5)
        assert sorted(sequence(got)) == [2, 3, 4, 5, 6]
        assert {2, 3, 4} <= set(sequence([d for d in got if d.duplicate]))

    on(broker, scenario)


@pytest.mark.parametrize("broker", [param("nats")])
def test_nats_keeps_the_order_of_a_topic_but_not_between_a_topic_and_those_below_it(broker: str) -> None:
    async def scenario(site: Site) -> None:
        bus = await site.open()
        plus = await bus.subscribe([site.topic("+/out")], qos=1)
        sharp = await bus.subscribe([site.topic("deep/#")], qos=1)
        names = ("a/out", "deep/b/c", "a/in", "deep")
        for i in range(50):
            await bus.publish([Publication(site.topic(name), str(i).encode(), 1) for name in names])
        assert sequence(await collect(plus, 50)) == list(range(50))
        got = await collect(sharp, 100)
        for name in ("deep", "deep/b/c"):
            assert sequence([d for d in got if d.topic == site.topic(name)]) == list(range(50))
        await nothing(sharp)

    on(broker, scenario)


@pytest.mark.parametrize("broker", [param("nats")])
def test_nats_takes_no_full_stop_in_a_topic(broker: str) -> None:
    """Our own topics have none; a foreign device's may."""

    async def scenario(site: Site) -> None:
        bus = await site.open()
        subscription = await bus.subscribe([site.topic("#")], qos=1)
        await (await bus.publish([Publication(site.topic("plain"), b"1", 1)]))
        assert sequence(await collect(subscription, 1)) == [1]
        await bus.publish([Publication(site.topic("a.b"), b"2", 0)])
        await nothing(subscription, 0.3)

    on(broker, scenario)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("broker", "survive", "states"),
    [
        param("mosquitto", False, [[]]),
        param("rabbitmq", True, [[], [b"on"]]),  # it writes what is retained every two seconds
        param("nats", True, [[b"on"]]),
    ],
)
def test_what_a_broker_that_is_killed_still_has(
    tmp_path: Path, broker: str, survive: bool, states: list[list[bytes]]
) -> None:
    """Messages with a PUBACK for a client that is away, and a retained one, after SIGKILL and another start."""

    async def before(url: str) -> None:
        async with connect(url, client_id="away", session_expiry=600, patience=20) as bus:
            await bus.subscribe(["kept"], qos=1)
        async with connect(url, patience=20) as bus:
            await (await bus.publish([Publication("kept", str(i).encode(), 1) for i in range(200)]))
            await (await bus.publish([Publication("state", b"on", 1, retain=True)]))

    async def after(url: str) -> tuple[list[int], list[bytes]]:
        found: list[bytes] = []
        async with connect(url, client_id="away", session_expiry=600, patience=20) as bus:
            subscription = await bus.subscribe(["kept"], qos=1)
            got = sequence(await collect(subscription, 200)) if survive else []
            await nothing(subscription, 0.2)
            state = await bus.subscribe(["state"], qos=1)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    found = [d.payload for d in await state.receive()]
        return got, found

    with started(broker, tmp_path) as server:
        asyncio.run(before(server.url))
        server.stop(kill=True)
        server.start()
        got, state = asyncio.run(after(server.url))
    assert got == (list(range(200)) if survive else [])
    assert state in states
