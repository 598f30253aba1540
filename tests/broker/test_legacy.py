"""What only the legacy client has: the traps of aiomqtt and paho, and what MQTT 3.1.1 cannot do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from bus_site import Mosquitto, Proxy, collect, nothing, sequence, until

from broker.bus import Publication
from broker.embedded.server import EmbeddedBroker
from broker.legacy import WINDOW, Legacy
from broker.session_options import Options
from schemas.errors import ConnectError


def go(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await main

    asyncio.run(limited())


def numbers(count: int, topic: str = "v") -> list[Publication]:
    return [Publication(topic, str(i).encode(), 1) for i in range(count)]


def test_nothing_is_acknowledged_before_we_say_so_and_reading_stops_when_full() -> None:
    async def main() -> None:
        async with EmbeddedBroker() as broker:
            options = Options(client_id="slow", session_expiry=60, receive_maximum=50)
            here = Legacy(broker.url, options)
            await here.open()
            async with Legacy(broker.url) as there:
                subscription = await here.subscribe(["v"], capacity=50)
                writer = asyncio.create_task(there.publish(numbers(1000)))
                await until(lambda: subscription.queued >= 20)
                await asyncio.sleep(0.05)
                assert subscription.queued <= 100 + 64
                await here.close()
                async with Legacy(broker.url, options) as again:
                    subscription = await again.subscribe(["v"], capacity=50)
                    got = await collect(subscription, 1000)
                    assert sequence(got) == list(range(1000))
                    await (await writer)
                    await nothing(subscription)

    go(main())


def test_what_was_in_flight_is_sent_again_once_by_us_and_not_by_paho() -> None:
    async def main() -> None:
        async with EmbeddedBroker() as broker, Proxy(broker.port) as proxy, Legacy(broker.url) as here:
            subscription = await here.subscribe(["v"])
            options = Options(backoff=0.02)
            async with Legacy(f"mqtt3://127.0.0.1:{proxy.port}", options) as there:
                proxy.stall()
                receipt = await there.publish(numbers(WINDOW))
                await asyncio.sleep(0.02)
                proxy.cut()
                proxy.go_on()
                await receipt
                got = sequence(await collect(subscription, WINDOW))
                assert got == list(range(WINDOW))
                await nothing(subscription)

    go(main())


def test_a_name_is_made_where_none_is_given() -> None:
    async def main() -> None:
        async with EmbeddedBroker() as broker, Legacy(broker.url) as one, Legacy(broker.url) as two:
            assert one.client_id
            assert one.client_id != two.client_id

    go(main())


def test_cancelling_the_first_connection() -> None:
    async def main() -> None:
        async with EmbeddedBroker() as broker, Proxy(broker.port) as proxy:
            proxy.stall()
            bus = Legacy(f"mqtt3://127.0.0.1:{proxy.port}", Options(timeout=5.0))
            task = asyncio.create_task(bus.open())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(ConnectError, match="no answer"):
                await Legacy(f"mqtt3://127.0.0.1:{proxy.port}", Options(patience=0.2)).open()
            proxy.go_on()

    go(main())


@pytest.mark.connected
def test_retained_messages_that_are_not_wanted_are_kept_from_us(mosquitto: Callable[..., Mosquitto]) -> None:
    broker = mosquitto()

    async def main() -> None:
        async with Legacy(f"mqtt3://127.0.0.1:{broker.port}") as bus:
            await (await bus.publish([Publication("r", b"1", 1, retain=True)]))
            subscription = await bus.subscribe(["r"], retained=False)
            await nothing(subscription)
            await bus.publish([Publication("r", b"2", 1, retain=True)])
            assert sequence(await collect(subscription, 1)) == [2]
            wanted = await bus.subscribe(["+"])
            assert sequence(await collect(wanted, 1)) == [2]

    go(main())
