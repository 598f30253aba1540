"""Of ten clients, each a process, three are killed or cut off in each phase of a round: no round hangs, no update counts twice.

``LAPS=20 python -m pytest -n 0 --timeout 0 tests/federated/test_federated_deaths.py`` goes through all phases so many times.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import brokers
import pytest
from harness import run
from phases import Job

from nodes.drill.proxy import Link
from nodes.supervisor import Outcome, Supervisor

pytestmark = pytest.mark.campaign

LAPS = int(os.environ.get("LAPS", "1"))
"""How often each phase is struck."""
PHASES = ("announce", "train", "upload")
DEADLINE = 20.0


def led(job: Job, scenario: Any, **lead: str) -> Outcome:
    """Run the side that leads, and the scenario beside it."""

    async def meddle(supervisor: Supervisor) -> None:
        async with job:
            await scenario(supervisor)

    outcome = run(job.topology(**lead), meddle=meddle, within=55.0 * LAPS)
    assert outcome.complete
    assert outcome.findings == []
    return outcome


def options(rounds: int, least: int, quorum: int, deadline: float = DEADLINE, grace: str = "10s") -> dict[str, str]:
    return {
        "rounds": str(rounds),
        "clients": f"{{least: {least}, quorum: {quorum}}}",
        "deadline": f"{deadline}s",
        "grace": grace,
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [brokers.param("mosquitto")])
def test_three_of_ten_are_killed_in_each_phase_and_come_back(kind: str, tmp_path: Path) -> None:
    names = [f"c-{k}" for k in range(10)]

    async def scenario(supervisor: Supervisor) -> None:
        del supervisor
        job.start(names)
        for lap in range(LAPS):
            for shift, phase in enumerate(PHASES):
                victims = [names[(3 * shift + lap + i) % 10] for i in range(3)]
                number = await getattr(job, phase)(victims, job.kill)
                seen = {name: len(job.watch.chunks.get((name, number), ())) for name in victims}
                assert all(0 < seen[name] < 76 for name in victims) == (phase == "upload"), seen
                if phase == "train":  # the round is over without them
                    await job.finish(number)
                    assert len(job.watch.used(number)) == 7
                    job.start(victims)
                else:  # the others wait: they are asked again, or go on with what they had sent, in the same round
                    job.start(victims)
                    await job.until(lambda: all(job.watch.here[name] for name in names))
                    await job.finish(number)
                    assert job.watch.used(number) == names
        await job.run_out()

    with brokers.started(kind, tmp_path) as broker:
        job = Job(tmp_path, broker.url, 10)
        led(job, scenario, **options(6 * LAPS, 10, 5))
    found = job.audit(tmp_path / "state", DEADLINE)
    assert [status for _, status, _ in found] == ["committed"] * 6 * LAPS


@pytest.mark.slow
@pytest.mark.parametrize("kind", [brokers.param("embedded")])
def test_three_of_ten_are_killed_for_ever_in_each_phase(kind: str, tmp_path: Path) -> None:
    """Three others come in their places; nobody waits for the dead."""

    async def scenario(supervisor: Supervisor) -> None:
        del supervisor
        job.start([f"c-{k}" for k in range(10)])
        dead: set[str] = set()
        for lap in range(LAPS):
            for phase in PHASES:
                victims = sorted(job.alive)[:3]
                number = await getattr(job, phase)(victims, job.kill)
                dead |= set(victims)
                await job.finish(number)
                assert len(job.watch.used(number)) == 7
                assert not dead & set(job.watch.used(number))
                job.start(f"{phase}{lap}-{name.rpartition('-')[2]}" for name in victims)
        await job.run_out()

    with brokers.started(kind, tmp_path) as broker:
        job = Job(tmp_path, broker.url, 10)
        led(job, scenario, **options(6 * LAPS, 10, 5))
    found = job.audit(tmp_path / "state", DEADLINE)
    assert [status for _, status, _ in found] == ["committed"] * 6 * LAPS


@pytest.mark.slow
@pytest.mark.parametrize("kind", [brokers.param("mosquitto")])
def test_links_of_three_of_ten_are_cut_in_each_phase_and_restored(kind: str, tmp_path: Path) -> None:
    names = [f"c-{k}" for k in range(10)]
    victims = names[2:5]

    async def scenario(supervisor: Supervisor) -> None:
        del supervisor
        async with Link(broker.url) as link:

            async def cut(name: str) -> None:
                """All three go by one link, so the first strike cuts it for all."""
                link.refuse = True
                link.cut()
                await job.until(lambda: not job.watch.here[name])

            job.start([name for name in names if name not in victims])
            job.start(victims, url=link.url)
            for lap in range(LAPS):
                for phase in PHASES:
                    number = await getattr(job, phase)(victims[:1] if phase == "upload" else victims, cut)
                    for name in victims:
                        job.thaw(name)
                    if phase != "train":
                        link.refuse = False  # back in the same round
                        await job.until(lambda: all(job.watch.here[name] for name in names))
                        await job.finish(number)
                        assert job.watch.used(number) == names
                    else:  # they learn on, and cannot tell: the round goes on without them
                        await job.finish(number)
                        assert len(job.watch.used(number)) == 7
                        link.refuse = False
                # silent: the link stands, nothing comes through, and no will tells of it
                number = await job.gathered()
                link.stall()
                await job.finish(number)
                assert len(job.watch.used(number)) == 7, lap
                link.go_on()
            await job.run_out()

    with brokers.started(kind, tmp_path) as broker:
        job = Job(tmp_path, broker.url, 10)
        led(job, scenario, **options(7 * LAPS, 10, 5, grace="3s"))
    found = job.audit(tmp_path / "state", DEADLINE)
    assert [status for _, status, _ in found] == ["committed"] * 7 * LAPS


def test_of_two_clients_one_is_killed_for_ever(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        del supervisor
        job.start(["c-0", "c-1"])
        number = await job.train(["c-1"], job.kill)
        await job.finish(number)
        await job.run_out()

    with brokers.started("embedded", tmp_path) as broker:
        job = Job(tmp_path, broker.url, 2, layers=[64, 32, 10])
        led(job, scenario, **options(3, 2, 1, grace="1s"))
    assert [clients for *_, clients in job.audit(tmp_path / "state", DEADLINE)] == [1, 1, 1]


def test_nothing_of_a_dead_round_is_applied(tmp_path: Path) -> None:
    """One of three is killed; without it the round is below its quorum: two good updates came to nothing."""

    async def scenario(supervisor: Supervisor) -> None:
        del supervisor
        job.start(["c-0", "c-1", "c-2"])
        number = await job.train(["c-1"], job.kill)
        await job.let_through(number)
        await job.until(lambda: job.watch.used(number) == ["c-0", "c-2"])
        await job.until(lambda: number in (job.watch.call or job.watch.calls[number]).aborted)
        job.start(["c-1"])
        await job.run_out()

    with brokers.started("embedded", tmp_path) as broker:
        job = Job(tmp_path, broker.url, 3, layers=[64, 32, 10])
        led(job, scenario, **options(3, 3, 3, deadline=5.0))
    found = job.audit(tmp_path / "state", 5.0)
    assert found[0] == (1, "aborted", 0)
    assert [row for row in found if row[1] == "committed"][-3:] == [(n, "committed", 3) for n in (2, 3, 4)]
