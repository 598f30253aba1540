"""A relay that keeps, between real brokers: what it drops is what its policy says, and nothing else is lost or doubled,
whichever process, broker or link falls.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest
from brokers import KINDS, Broker, free_port, param, started
from harness import advance, run, until
from relay_site import EDGE, RELAY, at, books, restarted, site, stored, taking

from broker.bus import Publication
from broker.connect import connect
from broker.spool import Overflow, Spool
from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

sys.path.append(str(Path(__file__).parent / "broker"))
from bus_site import Mosquitto, Proxy

BUDGET, COMING = 5_000_000, 20_000
"""Bytes, and messages of a kilobyte."""


def check(folder: Path, outcome: Outcome, total: int) -> None:
    """Nothing was dropped: everything is in the sink, each once, in order, and every half of the edge balances."""
    assert outcome.complete
    assert outcome.findings == []
    assert stored(folder) == list(range(total))
    port = books(outcome)
    assert port.taken.messages == port.given.messages == total
    assert port.held.messages == 0
    assert port.dropped == {}
    assert outcome.ledgers["store"].received[EDGE].messages == total


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("overflow", ["drop-oldest", "drop-newest", "block"])
def test_the_far_broker_is_away_with_20_mb_coming_and_5_mb_to_keep(tmp_path: Path, overflow: Overflow) -> None:
    """What the sink gets is what a spool alone, given the same messages one by one, would have kept."""
    away = KINDS["embedded"](tmp_path / "cloud")
    away.port = free_port()
    came: list[int] = []

    async def later(supervisor: Supervisor) -> None:
        reference = Spool(tmp_path / "reference", BUDGET, overflow=overflow, durable=False)
        async with connect(f"mqtt://127.0.0.1:{below.port}", client_id="watch") as bus:
            subscription = await bus.subscribe(["line/meter/out/+"], qos=1, capacity=2 * COMING)
            full = False
            while not full and len(came) < COMING:
                for delivery in (batch := await subscription.receive()):
                    if not full and reference.append([(delivery.topic, bytes(delivery.payload))]):
                        came.append(len(came))
                    else:
                        full = True
                subscription.acknowledge(batch)
        await until(lambda: books(supervisor).taken.messages == len(came), within=60)
        numbers.extend(item.number - 1 for item in reference.read(COMING, 1 << 30))
        before.append(books(supervisor))
        reference.close()
        assert stored(tmp_path) == []
        await asyncio.to_thread(away.start)

    numbers: list[int] = []
    before: list[object] = []
    with started("embedded", tmp_path) as below:
        path = site(
            tmp_path,
            COMING,
            below=at(below.port),
            above=at(away.port),
            relay=f"spool: {BUDGET}B, overflow: {overflow}",
            pad=850,
        )
        try:
            outcome = run(path, meddle=later, within=100)
        finally:
            away.stop(kill=True)
    assert outcome.complete
    assert outcome.findings == []
    port = books(outcome)
    if overflow == "block":
        assert len(came) < COMING // 3  # the producer waited there
        assert stored(tmp_path) == list(range(COMING))
        assert port.dropped == {}
    else:
        assert len(came) == COMING
        # the reference numbers what it stored: with drop-newest that is what came first
        assert stored(tmp_path) == numbers
        assert len(numbers) < COMING // 3
        assert numbers[-1] == COMING - 1 if overflow == "drop-oldest" else numbers == list(range(len(numbers)))
        assert port.dropped["spool-full"].messages == COMING - len(numbers)
    assert port.taken.messages == COMING
    assert outcome.ledgers["store"].received[EDGE].messages == port.given.messages == len(stored(tmp_path))


@pytest.mark.campaign
@pytest.mark.parametrize("name", [param("embedded"), param("mosquitto")])
def test_relay_producer_and_consumer_are_killed_again_and_again(tmp_path: Path, name: str) -> None:
    total, draw = 6000, random.Random(5)

    async def kill(supervisor: Supervisor) -> None:
        for victim in (RELAY, RELAY, "store", RELAY, "meter", RELAY, "store", "meter", RELAY):
            await advance(tmp_path, draw.randrange(50, 250))
            supervisor.kill(victim)

    with started("embedded", tmp_path / "below") as below, started(name, tmp_path / "above") as above:
        path = site(
            tmp_path,
            total,
            below=at(below.port),
            above=at(above.port),
            relay="spool: 20MB, rate: 2000/s",
            pace="1500/s",
        )
        outcome = run(path, meddle=kill)
    check(tmp_path, outcome, total)
    assert outcome.nodes[RELAY].restarts >= 4


def test_killed_while_it_drops_the_sink_has_what_the_books_say(tmp_path: Path) -> None:
    """The link is slow and the spool small, so messages are dropped all the time; and the relay is killed."""
    total, draw = 8_000, random.Random(6)

    async def kill(supervisor: Supervisor) -> None:
        for _ in range(6):
            await advance(tmp_path, draw.randrange(20, 150))
            supervisor.kill(RELAY)

    with started("embedded", tmp_path / "below") as below, started("embedded", tmp_path / "above") as above:
        path = site(
            tmp_path,
            total,
            below=at(below.port),
            above=at(above.port),
            relay="spool: 150kB, overflow: drop-oldest, rate: 250/s",
            pace="3000/s",
        )
        outcome = run(path, meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    port, got = books(outcome), stored(tmp_path)
    assert port.taken.messages == total
    assert port.given.messages == len(got)
    assert port.dropped["spool-full"].messages == total - len(got) > 1000
    assert got == sorted(got)
    assert got[-1] == total - 1
    assert outcome.nodes[RELAY].restarts == 6


@pytest.mark.parametrize("name", [param("embedded"), param("mosquitto")])
@pytest.mark.parametrize("which", ["near", "far"])
def test_a_broker_is_killed_and_comes_back(tmp_path: Path, name: str, which: str) -> None:
    total = 5000

    async def kill(supervisor: Supervisor) -> None:
        broker: Broker = below if which == "near" else above
        for _ in range(2):
            await advance(tmp_path, 300)
            await asyncio.to_thread(broker.stop, kill=True)
            if which == "far":  # the producer goes on meanwhile
                await taking(supervisor, 500, total)
            await asyncio.to_thread(broker.start)

    with started(name, tmp_path / "below") as below, started(name, tmp_path / "above") as above:
        path = site(tmp_path, total, below=at(below.port), above=at(above.port), relay="spool: 20MB", pace="1500/s")
        outcome = run(path, meddle=kill)
    check(tmp_path, outcome, total)


def test_the_link_is_cut_and_everything_is_killed_beside(tmp_path: Path) -> None:
    total = 6000

    async def go() -> Outcome:
        async with Proxy(above.port) as proxy:
            text = site(tmp_path, total, below=at(below.port), above=at(proxy.port), relay="spool: 20MB", pace="1500/s")
            path = tmp_path / "state"
            supervisor = Supervisor(prepare(text, state=path), state=path)
            running = asyncio.create_task(supervisor.run())
            for victim in ("meter", RELAY, "store"):
                await advance(tmp_path, 200)
                proxy.refuse = True
                proxy.cut()
                await taking(supervisor, 100, total)
                if not supervisor.views[victim].gone:  # a slow machine: the source has ended
                    await restarted(supervisor, victim)
                proxy.refuse = False
            async with asyncio.timeout(40):
                return await running

    with started("embedded", tmp_path / "below") as below, started("embedded", tmp_path / "above") as above:
        outcome = asyncio.run(go())
    check(tmp_path, outcome, total)


def test_stopped_while_the_far_broker_is_away_it_goes_on_there_and_begins_anew_when_complete(tmp_path: Path) -> None:
    total = 10_000  # more than anybody remembers the identities of
    away = KINDS["embedded"](tmp_path / "cloud")
    away.port = free_port()

    async def stop(supervisor: Supervisor) -> None:
        await until(lambda: books(supervisor).taken.messages == total)
        await until(lambda: supervisor.views["meter"].state == "ended")
        await supervisor.stop()

    async def start(supervisor: Supervisor) -> None:
        await asyncio.to_thread(away.start)

    with started("embedded", tmp_path / "below") as below:
        path = site(tmp_path, total, below=at(below.port), above=at(away.port), relay="spool: 20MB")
        try:
            stopped = run(path, meddle=stop)
            assert not stopped.complete
            assert stopped.nodes[RELAY].state == "stopped"
            assert books(stopped).held.messages == total
            # the source has ended, and is not read again as long as what it sent is not delivered
            outcome = run(path, meddle=start)
            assert outcome.nodes["meter"].books is None
            assert (books(outcome).taken.messages, books(outcome).given.messages) == (total, total)
            assert outcome.complete
            assert outcome.findings == []
            assert stored(tmp_path) == list(range(total))
            assert not (tmp_path / "state" / RELAY).exists()
            (tmp_path / "out.sqlite").unlink()
            check(tmp_path, run(path), total)
        finally:
            away.stop(kill=True)


def test_fresh_forgets_what_is_kept(tmp_path: Path) -> None:
    async def stop(supervisor: Supervisor) -> None:
        await until(lambda: books(supervisor).taken.messages == 100)
        await supervisor.stop()

    with started("embedded", tmp_path / "below") as below:
        path = site(tmp_path, 100, below=at(below.port), above=at(free_port()), relay="spool: 20MB")
        run(path, meddle=stop)
    state = tmp_path / "state"
    assert (state / RELAY / EDGE / "journal").exists()
    Supervisor(prepare(path, state=state), state=state).forget()
    assert not (state / RELAY).exists()


def test_newest_first_after_an_absence(tmp_path: Path) -> None:
    total = 3000
    away = KINDS["embedded"](tmp_path / "cloud")
    away.port = free_port()

    async def start(supervisor: Supervisor) -> None:
        await until(lambda: books(supervisor).taken.messages == total)
        await asyncio.to_thread(away.start)

    with started("embedded", tmp_path / "below") as below:
        path = site(tmp_path, total, below=at(below.port), above=at(away.port), relay="spool: 20MB, order: newest")
        try:
            outcome = run(path, meddle=start)
        finally:
            away.stop(kill=True)
    assert outcome.findings == []
    assert stored(tmp_path) == list(range(total))[::-1]


READERS = """
  show: {{uplink: {{sink: jsonl, path: show.jsonl}}, from: {{meter: {{delivery: {delivery}}}}}, on: cloud}}
"""


@pytest.mark.parametrize("delivery", ["safe", "fast"])
def test_a_port_with_two_readers_beyond(tmp_path: Path, delivery: str) -> None:
    """Two safe readers share one stream, which crosses the link once, on the usual topic; a fast one beside a safe one has
    its messages as through any relay, and the two do not mix.
    """
    total = 1500
    seen: list[str] = []

    async def watch(supervisor: Supervisor) -> None:
        async with connect(f"mqtt://127.0.0.1:{above.port}", client_id="watch") as bus:
            subscription = await bus.subscribe(["line/meter/out/+"], qos=1, capacity=4 * total)
            await until(lambda: supervisor.views["store"].state == "ready")
            await bus.publish([Publication("line/meter/out/d1", b"no message of ours")])
            while True:
                batch = await subscription.receive()
                seen.extend(delivery.topic for delivery in batch)
                subscription.acknowledge(batch)
                if len(stored(tmp_path)) >= 500 and not supervisor.views[RELAY].restarts:
                    await restarted(supervisor, RELAY)

    with started("embedded", tmp_path / "below") as below, started("embedded", tmp_path / "above") as above:
        path = site(tmp_path, total, below=at(below.port), above=at(above.port), relay="spool: 20MB", pace="1500/s")
        path.write_text(path.read_text() + READERS.format(delivery=delivery))
        outcome = run(path, meddle=watch)
    assert outcome.complete
    assert outcome.findings == []
    assert stored(tmp_path) == list(range(total))
    shown = (tmp_path / "show.jsonl").read_text().splitlines()
    port = books(outcome)
    assert port.taken.messages == port.given.messages == total
    if delivery == "safe":
        assert port.readers == ["store", "show"]
        assert len(shown) == total
    else:
        assert port.readers == ["store"]
        assert len(shown) + outcome.lost.get("meter.out → show", 0) == total
    assert len(seen) >= total * 0.9


def test_what_the_far_broker_does_not_take_is_a_dead_letter(tmp_path: Path, needs_mosquitto: str) -> None:
    from nodes.dead import files

    above = Mosquitto(tmp_path / "above", "max_packet_size 4000").start()
    try:
        with started("embedded", tmp_path / "below") as below:
            path = site(tmp_path, 50, below=at(below.port), above=at(above.port), relay="spool: 20MB")
            lines = (tmp_path / "meter.csv").read_text().splitlines()
            lines = [f"{line},{'note' if not i else 'y' * 9000 if i == 11 else 'x'}" for i, line in enumerate(lines)]
            (tmp_path / "meter.csv").write_text("\n".join(lines) + "\n")
            outcome = run(path)
    finally:
        above.stop()
    assert outcome.complete
    assert outcome.findings == []
    assert stored(tmp_path) == [i for i in range(50) if i != 10]
    assert books(outcome).dead.messages == 1
    assert outcome.ledgers[RELAY].dead == {"too-large": 1}
    [letter] = files(tmp_path / "state")[RELAY].letters()
    assert (letter.reason, letter.edge) == ("too-large", EDGE)
