"""What carries a machine: committed, then published, then computed; over real brokers that are killed and started again."""

from __future__ import annotations

import asyncio
import math
import sqlite3
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import brokers
import msgspec
import pytest
from harness import until

from broker.bus import Bus
from broker.connect import connect
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.party import Party
from nodes.federated.store import Store
from schemas.errors import RunError

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode
ROOT = "plant/fed/squares"


class Asks(Machine):
    """Asks for the square of one number after the other, until it has the last."""

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self.number = 0
        self.relinked = 0
        self.starts = 0
        self.next = 0

    def filters(self) -> tuple[str, ...]:
        return ("answer/+", "state/+")

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        self.number = kept.get("number", 0)
        self.starts = kept.get("starts", 0) + 1
        return self._ask(now, {"starts": self.starts})

    def _ask(self, now: int, commit: dict[str, Any]) -> Answer:
        over = self.number >= self.numbers
        self.next = now + 200_000_000
        return Answer(commit, [Say("ask", pack(-1 if over else self.number), retain=True)], over=over)

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        if topic != "answer/one" or payload == b"":
            return Answer()
        number, square = unpack(payload)
        if number != self.number:
            return Answer()
        self.number += 1
        answer = self._ask(now, {"number": self.number, f"last/{number}": b"x" * 1000, f"last/{number - 1}": None})
        answer.rows += [{"round": number, "square": square}] * 2
        return answer

    def worked(self, name: str, result: Any, now: int) -> Answer:
        raise AssertionError(name, result, now)

    def linked(self, now: int) -> Answer:
        self.relinked += 1
        return self._ask(now, {})

    def wake(self) -> int | None:
        return self.next

    def tick(self, now: int) -> Answer:
        return self._ask(now, {})


class Answers(Machine):
    """Squares, in a thread. Fails now and then, and is asked again."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.busy = False
        self.failures = 0
        self.here = True

    def filters(self) -> tuple[str, ...]:
        return ("ask",)

    def will(self) -> Say:
        return Say("state/one", b"away", retain=True)

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        del kept, now
        return Answer(say=[Say("state/one", b"here", retain=True)])

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        del topic, now
        self.asked = unpack(payload)
        if self.asked == -1:
            return Answer(over=True)
        if self.busy:
            return Answer()
        self.busy = True
        return Answer(work=Work("square", self._square(self.asked)))

    def _square(self, number: int | None) -> Callable[[], tuple[int, int]]:
        def act() -> tuple[int, int]:
            if number is None or (number % 3 == 2 and self.failures <= number // 3):
                raise ValueError("not today")
            return number, number**2

        return act

    def worked(self, name: str, result: Any, now: int) -> Answer:
        del now
        assert name == "square"
        self.busy = False
        if isinstance(result, Exception):
            self.failures += 1
            return Answer()
        return Answer({"answered": result[0]}, [Say("answer/one", pack(result))])

    def wake(self) -> int | None:
        return None

    def tick(self, now: int) -> Answer:
        raise AssertionError(now)


def party(machine: Machine, url: str, path: Path | None, name: str) -> Party:
    def link(**options: Any) -> Bus:
        return connect(url, client_id=f"party-{name}", patience=math.inf, **options)

    return Party(machine, Store(path), link, ROOT, node=name)


@pytest.mark.parametrize("kind", [brokers.param("embedded"), brokers.param("mosquitto")])
def test_two_machines_come_to_their_end_though_the_broker_dies_under_them(kind: str, tmp_path: Path) -> None:
    async def scenario(broker: brokers.Broker) -> tuple[Asks, Answers, list[Any], dict[str, Any]]:
        asks, answers = Asks(60), Answers()
        one, other = party(asks, broker.url, None, "asks"), party(answers, broker.url, None, "answers")
        await one.open()
        await other.open()
        running = [asyncio.create_task(each.run()) for each in (one, other)]
        for at in (15, 40):
            await until(lambda at=at: asks.number >= at)  # type: ignore[misc] # mypy cannot infer lambdas with defaults
            await asyncio.to_thread(broker.stop, kill=True)
            await asyncio.to_thread(broker.start)
        await asyncio.wait_for(asyncio.gather(*running), 40)
        rows, kept = one.store.rows(), dict(one.store.kept())
        await one.close()
        await other.close()
        return asks, answers, rows, kept

    with brokers.started(kind, tmp_path) as broker:
        asks, answers, rows, kept = asyncio.run(scenario(broker))
    assert [(n, row["round"], row["square"]) for n, row in rows] == [(i + 1, i, i * i) for i in range(60)]
    assert all(isinstance(row["time"], int) for _, row in rows)
    assert asks.relinked >= 2
    assert answers.failures >= 1, "work that raised came back as what it raised"
    assert kept == {"number": 60, "starts": 1, "last/59": b"x" * 1000}, "what is forgotten is gone"


def test_a_machine_goes_on_from_what_was_committed(tmp_path: Path) -> None:
    async def life(url: str, until_number: int) -> Asks:
        """A life that is cut off in the middle: nothing is closed, as if the process had died."""
        asks, answers = Asks(20), Answers()
        one = party(asks, url, tmp_path / "asks.sqlite", "asks")
        other = party(answers, url, None, "answers")
        await one.open()
        await other.open()
        running = [asyncio.create_task(each.run()) for each in (one, other)]
        await until(lambda: asks.number >= until_number)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await one._lines[0]._bus.close()
        await other.close()
        return asks

    with brokers.started("embedded", tmp_path) as broker:
        lives = [asyncio.run(life(broker.url, number)) for number in (5, 11, 20)]
    store = Store(tmp_path / "asks.sqlite")
    assert [each.starts for each in lives] == [1, 2, 3]
    assert [row["round"] for _, row in store.rows()] == list(range(20)), "each once, over three lives"
    assert [number for number, _ in store.rows(after=18)] == [19, 20]
    store.close()


def test_nothing_is_published_that_could_not_be_committed(tmp_path: Path) -> None:
    class Full(Store):
        full = True
        tried = 0

        def commit(self, *arguments: Any, **options: Any) -> None:
            self.tried += 1
            if self.full:
                raise sqlite3.OperationalError("database or disk is full")
            super().commit(*arguments, **options)

    async def scenario(url: str) -> None:
        heard: list[bytes] = []
        store = Full(None)
        listener = connect(url, client_id="listener")
        await listener.open()
        subscription = await listener.subscribe([f"{ROOT}/#"])

        async def listen() -> None:
            while True:
                heard.extend(bytes(delivery.payload) for delivery in await subscription.receive())

        listening = asyncio.create_task(listen())
        one = Party(Asks(1), store, lambda **options: connect(url, client_id="full", **options), ROOT, node="full")
        await one.open()
        running = asyncio.create_task(one.run())
        await until(lambda: store.tried >= 2)
        assert heard == []
        store.full = False
        await until(lambda: set(heard) == {pack(0)})
        running.cancel()
        listening.cancel()
        await asyncio.gather(running, listening, return_exceptions=True)
        await one.close()
        await listener.close()

    with brokers.started("embedded", tmp_path) as broker:
        asyncio.run(scenario(broker.url))


@pytest.mark.parametrize("orderly", [True, False])
def test_others_hear_that_it_is_gone(orderly: bool, tmp_path: Path) -> None:
    async def scenario(broker: brokers.Broker) -> None:
        heard: list[bytes] = []
        listener = connect(broker.url, client_id="listener")
        await listener.open()
        subscription = await listener.subscribe([f"{ROOT}/state/+"])

        async def listen() -> None:
            while True:
                heard.extend(bytes(delivery.payload) for delivery in await subscription.receive())

        listening = asyncio.create_task(listen())
        if orderly:
            one = party(Answers(), broker.url, None, "gone")
            await one.open()
            running = asyncio.create_task(one.run())
            await until(lambda: b"here" in heard)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await one.close()
        else:
            code = (
                "import asyncio, sys; sys.path[:0] = ['tests']; from test_federated_party import *\n"
                f"async def go():\n one = party(Answers(), {broker.url!r}, None, 'gone')\n await one.open()\n await one.run()\n"
                "asyncio.run(go())"
            )
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=brokers.ROOT)
            await until(lambda: b"here" in heard)
            process.kill()
            await process.wait()
        await until(lambda: heard[-1] == b"away")
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await listener.close()

    with brokers.started("embedded", tmp_path) as broker:
        asyncio.run(scenario(broker))


def test_a_machine_that_fails_ends_with_one_clear_line(tmp_path: Path) -> None:
    class Fails(Asks):
        def heard(self, topic: str, payload: bytes, now: int) -> Answer:
            raise KeyError("round")

    async def scenario(url: str) -> None:
        one, other = party(Fails(3), url, None, "fails"), party(Answers(), url, None, "answers")
        await one.open()
        await other.open()
        running = asyncio.create_task(other.run())
        try:
            async with asyncio.timeout(20):
                await one.run()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await one.close()
            await other.close()

    with brokers.started("embedded", tmp_path) as broker, pytest.raises(RunError) as caught:
        asyncio.run(scenario(broker.url))
    assert str(caught.value) == "Fails.heard failed: KeyError: 'round'"


def test_the_clock_brings_a_tick_though_nothing_is_heard_and_nobody_takes_what_is_said(tmp_path: Path) -> None:
    """The broker is away, and more waits for it than may: deadlines come all the same."""

    class Talks(Machine):
        ticks = 0

        def filters(self) -> tuple[str, ...]:
            return ("nothing",)

        def start(self, kept: Mapping[str, Any], now: int) -> Answer:
            return Answer()

        def heard(self, topic: str, payload: bytes, now: int) -> Answer:
            return Answer()

        def worked(self, name: str, result: Any, now: int) -> Answer:
            return Answer()

        def wake(self) -> int | None:
            return 0

        def tick(self, now: int) -> Answer:
            self.ticks += 1
            return Answer(say=[Say("much", b"x" * 2**20)] if self.ticks < 40 else [])

    async def scenario(broker: brokers.Broker) -> None:
        machine = Talks()
        one = party(machine, broker.url, None, "talks")
        await one.open()
        await asyncio.to_thread(broker.stop, kill=True)
        running = asyncio.create_task(one.run())
        await until(lambda: machine.ticks > 100)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await one.close()

    with brokers.started("embedded", tmp_path) as broker:
        asyncio.run(scenario(broker))


def test_large_values_are_files_that_come_and_go_with_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "lead" / "job.sqlite"
    folder = path.with_suffix(".large")
    store = Store(path, synced=("model",))
    store.commit({"model": {"data": b"m" * 300_000}, "update/1": b"u" * 300_000, "small": 1})
    assert len(list(folder.iterdir())) == 2
    store.commit({"model": {"data": b"n" * 300_000}, "update/1": None})
    (only,) = folder.iterdir()
    assert store.kept()["model"] == {"data": b"n" * 300_000}
    assert list(store.kept()) == ["model", "small"]
    store.commit({"update/2": b"v" * 300_000})
    store.close()
    torn = next(each for each in folder.iterdir() if each != only)
    torn.write_bytes(torn.read_bytes()[:-1] + b"?")  # what a power cut may leave
    (folder / "abandoned").write_bytes(b"written, and never committed")
    again = Store(path)
    assert list(again.kept()) == ["model", "small"]
    assert list(folder.iterdir()) == [only]
    only.unlink()
    folder.rmdir()
    with pytest.raises(sqlite3.OperationalError, match="No such file"):
        again.commit({"small": 2, "model": b"o" * 300_000})
    assert again.kept()["small"] == 1, "all of it or nothing"
    again.close()
