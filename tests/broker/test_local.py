"""What only the in-process bus has: end-to-end acknowledgement, back-pressure, sessions kept at the hub."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from bus_site import collect, nothing, until

from broker.bus import Publication
from broker.local import LocalBus, LocalSubscription
from broker.local_hub import Hub, hub
from broker.session_options import Options
from schemas.errors import ClosedError


def go(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await main

    asyncio.run(limited())


def numbers(count: int, qos: int = 1, start: int = 0) -> list[Publication]:
    return [Publication("v", i, qos) for i in range(start, start + count)]


def acts(at: Hub, queue: LocalSubscription, act: Callable[[], None]) -> None:
    """What arrives at ``queue`` leads to ``act`` when it is handed over."""

    def told() -> None:
        at.after(act)

    queue.tell(told)


def test_a_receipt_waits_for_every_consumer() -> None:
    async def main() -> None:
        at = Hub()
        async with LocalBus(at) as there, LocalBus(at) as here:
            first, second = await here.subscribe(["v"]), await here.subscribe(["#"])
            receipt = await there.publish(numbers(2))
            one, two = await first.receive(), await second.receive()
            first.acknowledge(one)
            second.acknowledge(two[:1])
            assert not receipt.done()
            second.acknowledge(two[1:])
            await receipt

    go(main())


def test_nobody_to_wait_for_is_done_at_once() -> None:
    async def main() -> None:
        async with LocalBus(Hub()) as bus:
            assert (await bus.publish(numbers(3))).done()
            await bus.subscribe(["v"], qos=0)
            assert (await bus.publish(numbers(3))).done()

    go(main())


def test_publishing_waits_for_room_which_acknowledgement_makes() -> None:
    async def main() -> None:
        at = Hub()
        async with LocalBus(at) as there, LocalBus(at) as here:
            subscription = await here.subscribe(["v"], capacity=3)
            task = asyncio.create_task(there.publish(numbers(5)))
            got = await collect(subscription, 3, ack=False)
            await asyncio.sleep(0.01)
            assert (subscription.queued, task.done()) == (0, False)
            subscription.acknowledge(got[:1])
            await until(lambda: subscription.queued == 1)
            assert not task.done()
            subscription.acknowledge(got[1:])
            await (await collect_all(task, subscription))

    async def collect_all(task: asyncio.Task[Any], subscription: Any) -> Any:
        await collect(subscription, 2)
        return await task

    go(main())


def test_a_consumer_that_goes_counts_as_done_unless_its_session_is_kept() -> None:
    async def main() -> None:
        at = Hub()
        async with LocalBus(at) as there:
            gone = LocalBus(at)
            await gone.open()
            subscription = await gone.subscribe(["v"], capacity=2)
            task = asyncio.create_task(there.publish(numbers(5)))
            await until(lambda: subscription.queued == 2)
            await gone.close()
            await (await task)
            assert [d.payload for d in await subscription.receive()] == [0, 1]
            with pytest.raises(ClosedError):
                await subscription.receive()

            kept = LocalBus(at, Options(client_id="k", session_expiry=60))
            await kept.open()
            await kept.subscribe(["v"], capacity=2)
            await kept.close()
            receipt = await there.publish(numbers(2))
            third = asyncio.create_task(there.publish(numbers(1, start=2)))
            zero = await there.publish(numbers(1, 0, 9))  # nobody is there for it
            assert zero.done()
            await asyncio.sleep(0.01)
            assert not third.done()
            async with LocalBus(at, Options(client_id="k", session_expiry=60)) as again:
                subscription = await again.subscribe(["v"], capacity=2)
                assert [d.payload for d in await collect(subscription, 3)] == [0, 1, 2]
                await receipt
                await (await third)
            # a fresh one forgets what was kept
            waiting = await there.publish(numbers(1))
            assert not waiting.done()
            async with LocalBus(at, Options(client_id="k", clean_start=True)) as fresh:
                await waiting
                await nothing(await fresh.subscribe(["v"]), 0.02)

    go(main())


def test_a_kept_session_expires() -> None:
    async def main() -> None:
        at = Hub()
        async with LocalBus(at) as there:
            kept = LocalBus(at, Options(client_id="k", session_expiry=1))
            await kept.open()
            await kept.subscribe(["v"])
            await kept.close()
            receipt = await there.publish(numbers(2))
            assert not receipt.done()
            await receipt
            assert at.sessions.keys() == {there.client_id}

    go(main())


def test_a_group_takes_over_what_a_member_left() -> None:
    async def main() -> None:
        at = Hub()
        async with LocalBus(at) as there, LocalBus(at) as stays:
            leaves = LocalBus(at)
            await leaves.open()
            first = await stays.subscribe(["v"], group="g")
            second = await leaves.subscribe(["v"], group="g")
            receipt = await there.publish(numbers(10))
            mine = [d.payload for d in await collect(first, 5)]
            await collect(second, 5, ack=False)
            await leaves.close()
            rest = await collect(first, 5)
            assert sorted([*mine, *(d.payload for d in rest)]) == list(range(10))
            assert all(d.duplicate for d in rest)
            await receipt

    go(main())


def test_a_full_group_member_is_passed_over() -> None:
    async def main() -> None:
        at = Hub()
        async with LocalBus(at) as there, LocalBus(at) as here:
            first = await here.subscribe(["v"], group="g", capacity=2)
            second = await here.subscribe(["v"], group="g", capacity=100)
            await there.publish(numbers(20))
            assert (first.queued, second.queued) == (2, 18)

    go(main())


def test_taking_over_closes_the_first() -> None:
    async def main() -> None:
        at = Hub()
        states: list[str] = []
        first = LocalBus(at, Options(client_id="x", on_state=lambda s, _: states.append(s)))
        await first.open()
        subscription = await first.subscribe(["v"])
        async with LocalBus(at, Options(client_id="x")):
            assert not first.connected
            assert states == ["connected", "disconnected"]
            with pytest.raises(ClosedError):
                await subscription.receive()
            with pytest.raises(ClosedError):
                await first.publish(numbers(1))

    go(main())


def test_hubs_have_names() -> None:
    assert hub("a") is hub("a")
    assert hub("a") is not hub("b")


def test_a_publisher_that_never_waits_lets_others_run() -> None:
    async def main() -> None:
        at = Hub()
        async with LocalBus(at) as bus:
            await bus.subscribe(["v"], qos=0, capacity=1, overflow="latest")
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            for i in range(5000):
                await bus.publish(numbers(1, 0, i))
            task.cancel()
            assert turns > 3

    go(main())


def test_who_wants_to_be_told_takes_without_waiting() -> None:
    async def main() -> None:
        at, told = Hub(), list[int]()
        async with LocalBus(at) as there, LocalBus(at) as here:
            subscription = await here.subscribe(["v"], capacity=4)
            subscription.tell(lambda: told.append(subscription.queued))
            assert subscription.take() == []
            first = await there.publish(numbers(3))
            assert told == [1]  # once for what comes together, as soon as there is something
            taken = subscription.take()
            assert [delivery.payload for delivery in taken] == [0, 1, 2]
            second = asyncio.create_task(there.publish(numbers(3, start=3)))  # there is room for one
            await until(lambda: len(told) == 2)
            assert not second.done()
            subscription.acknowledge(taken)
            assert first.done()
            rest = await second
            await until(lambda: subscription.queued == 3)
            subscription.acknowledge(subscription.take())
            await rest

    go(main())


def test_a_reader_that_acts_after_each_publication_never_leaves_the_publisher_waiting() -> None:
    async def main() -> None:
        at, turns = Hub(), 0
        seen: list[object] = []
        async with LocalBus(at) as there, LocalBus(at) as here:
            queue = await here.subscribe(["v"], qos=0, capacity=8)

            def act() -> None:
                seen.extend(delivery.payload for delivery in queue.take())

            acts(at, queue, act)

            async def others() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            beside = asyncio.create_task(others())
            await there.publish(numbers(2000, qos=0))
            beside.cancel()
            assert seen == list(range(2000))
            assert turns > 100  # it gives others their turn although there is always room

    go(main())


def test_readers_of_a_reader_come_before_its_neighbours() -> None:
    async def main() -> None:
        at = Hub()
        order: list[str] = []
        async with LocalBus(at) as bus:
            below = await bus.subscribe(["w"], qos=0)
            later, first = await bus.subscribe(["v"], qos=0), await bus.subscribe(["v"], qos=0)
            acts(at, below, lambda: order.append("below"))

            def pass_on() -> None:
                order.append("first")
                at.giving = True
                at.offer(Publication("w", 1, 0), None)
                at.giving = False

            acts(at, later, lambda: order.append("later"))
            acts(at, first, pass_on)
            await bus.publish(numbers(1, qos=0))
            assert order == ["first", "below"]  # what they have written leaves before the neighbour has its turn
            await until(lambda: order == ["first", "below", "later"])

    go(main())


class Taker:
    """A reader that takes messages without their being queued."""

    def __init__(self) -> None:
        self.ready = True
        self.given: list[object] = []
        self.acted = 0

    def give(self, payloads: Sequence[object]) -> Callable[[], None]:
        self.given += payloads
        return self.act

    def act(self) -> None:
        self.acted += 1


def test_messages_are_handed_over_directly_only_where_every_reader_waits_for_them_and_has_nothing_before() -> None:
    async def main() -> None:
        at, one, two = Hub(), Taker(), Taker()
        async with LocalBus(at) as bus:
            assert not at.hand("v", [0])  # nobody reads it
            first = await bus.subscribe(["v"], qos=0, capacity=2)
            first.queue.direct = one
            assert at.hand("v", [1, 2])
            assert (one.given, one.acted, first.queued) == ([1, 2], 1, 0)
            assert not at.hand("v", [3, 3, 3])  # more than may wait: its overflow policy is to see them
            await bus.publish(numbers(1, qos=0))
            assert not at.hand("v", [3])  # it would overtake
            first.take()
            second = await bus.subscribe(["#"], qos=0)
            assert not at.hand("v", [3])  # must be queued for this one
            second.queue.direct = two
            two.ready = False
            assert not at.hand("v", [3])
            two.ready = True
            assert at.hand("v", [3])
            assert (one.given, two.given) == ([1, 2, 3], [3])
            await until(lambda: one.acted + two.acted == 3)
            await second.unsubscribe()
            assert at.hand("v", [4])
            assert two.given == [3]

    go(main())
