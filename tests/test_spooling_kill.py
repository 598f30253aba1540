"""A node with a spool is killed: anywhere while it fills and drains, and at each point between its two stores."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import run, until
from spool_site import Far, received, service, site

from broker.spool import Order, Overflow
from nodes.forks import Nursery
from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

pytestmark = pytest.mark.campaign

COUNT = 3000


@pytest.fixture
def far() -> Iterator[Far]:
    with service() as found:
        yield found


def judge(outcome: Outcome, far: Far, overflow: Overflow, count: int, *, batch: int = 1) -> None:
    """Nothing is lost and nothing is counted twice: what is not in the sink was dropped, to the row."""
    end = outcome.ledgers["store"]
    assert outcome.complete
    assert outcome.findings == []
    assert sum(flow.rows for flow in end.received.values()) == count
    dropped = end.dropped.get("spool-full", 0)
    assert end.dropped == ({"spool-full": dropped} if dropped else {})
    assert (end.dead, end.held) == ({}, 0)
    assert end.passed == far.rows() == count - dropped
    assert (dropped > 0) == (overflow != "block")
    assert dropped % batch == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overflow", "order"), [("block", "oldest"), ("drop-oldest", "newest"), ("drop-newest", "oldest")]
)
def test_killed_while_it_fills_and_while_it_drains(tmp_path: Path, far: Far, overflow: Overflow, order: Order) -> None:
    draw = random.Random(f"{overflow} {order}")
    spool = f"{{size: {'1400kB' if overflow == 'block' else '256KiB'}, overflow: {overflow}, order: {order}}}"
    path = site(tmp_path, far, spool, count=COUNT, size=600, batch=3)
    far.away = True

    async def kill(supervisor: Supervisor) -> None:
        view = supervisor.views["store"]
        for _ in range(3):  # filling
            goal = received(supervisor) + draw.randrange(300)
            await until(lambda goal=goal: received(supervisor) >= min(goal, COUNT // 2))  # type: ignore[misc]
            before = view.restarts
            supervisor.kill("store")
            await until(lambda before=before: view.restarts > before and view.state == "ready")  # type: ignore[misc]
        if overflow != "block":
            await until(lambda: received(supervisor) == COUNT)
        far.away = False
        for _ in range(3):  # draining
            goal = len(far.taken) + draw.randrange(1, 40)
            await until(lambda goal=goal: len(far.taken) >= goal or view.gone)  # type: ignore[misc]
            if view.gone:
                return
            before = view.restarts
            supervisor.kill("store")
            await until(lambda before=before: view.restarts > before or view.gone)  # type: ignore[misc]

    outcome = run(path, meddle=kill)
    assert outcome.nodes["store"].restarts >= 3
    judge(outcome, far, overflow, COUNT, batch=3)
    if order == "oldest":  # of each device, in spite of all
        ids = [int(ident.rsplit(":", 1)[1]) for ident in far.taken]
        assert ids == sorted(ids)


def deaths(
    path: Path, plan: str, far: Far, overflow: Overflow, monkeypatch: pytest.MonkeyPatch, *, filling: bool
) -> Outcome:
    """Run while the node dies as planned; the far end comes back when that was, or when everything has arrived.

    :param filling: it dies while it fills: the source goes on until it has, and gives at least :data:`COUNT` rows.
    """
    graves = path.parent / "graves"
    graves.mkdir()
    monkeypatch.setenv("SPOOL_DEATHS", plan)
    monkeypatch.setenv("SPOOL_GRAVES", str(graves))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    planned = plan.count(",") + 1

    async def come_back(supervisor: Supervisor) -> None:
        if filling:
            await until(lambda: len(list(graves.iterdir())) == planned, within=40)
        await until(lambda: received(supervisor) >= COUNT, within=40)
        supervisor.end()
        far.away = False

    async def go() -> Outcome:
        state = path.parent / "state"
        supervisor = Supervisor(prepare(path, state=state), state=state)
        supervisor._nursery = Nursery(["spool_deaths"])
        meddling = asyncio.create_task(come_back(supervisor))
        try:
            async with asyncio.timeout(50):
                return await supervisor.run()
        finally:
            meddling.cancel()
            await asyncio.gather(meddling, return_exceptions=True)

    outcome = asyncio.run(go())
    assert len(list(graves.iterdir())) == planned
    assert outcome.nodes["store"].restarts == planned
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overflow", "filling", "plan"),
    [
        ("block", True, "appended 2,reconciled 1,appended 1,resumed 1,appended 3"),
        ("drop-oldest", True, "appended 9,reconciled 1,appended 1,resumed 1,appended 3"),
        ("block", True, "committed 2,opened 1,committed 2,committed 1,committed 3"),
        ("drop-oldest", True, "doomed 1,reconciled 1,doomed 2,resumed 1,doomed 1"),
        ("drop-newest", True, "appended 12,reconciled 1,committed 1,appended 2,appended 2"),
        ("block", False, "read 1,written 3,reconciled 1,written 1,written 2"),
        ("block", False, "gone 1,gone 2,reconciled 1,gone 1,gone 3"),
        ("drop-oldest", True, "gone 1,gone 2,reconciled 1,gone 1,gone 3"),
        ("drop-oldest", False, "written 2,removed 2,reconciled 1,removed 1,written 3"),
    ],
)
def test_killed_between_the_two_stores(
    tmp_path: Path, far: Far, overflow: Overflow, filling: bool, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = "20MB" if overflow == "block" else "256KiB"
    rows = 10 * COUNT if filling else COUNT
    path = site(tmp_path, far, f"{{size: {size}, overflow: {overflow}}}", count=rows, size=300, rate="1500/s")
    far.away = True
    outcome = deaths(path, plan, far, overflow, monkeypatch, filling=filling)
    judge(outcome, far, overflow, outcome.ledgers["meter"].emitted["out"].rows)
    assert list(far.taken) == sorted(far.taken, key=lambda ident: int(ident.rsplit(":", 1)[1]))


@pytest.mark.slow
def test_the_whole_process_is_killed(tmp_path: Path, far: Far) -> None:
    """Nodes of one process hand over in memory: the source reads again, and what is in the spool already is known."""
    path = site(tmp_path, far, "4MB", count=COUNT, rate="1500/s")
    path.write_text(path.read_text().replace("}}\n  store:", "}, process: all}\n  store:") + "    process: all\n")
    far.away = True

    async def kill(supervisor: Supervisor) -> None:
        view = supervisor.views["store"]
        assert view.process == supervisor.views["meter"].process == "all"
        for goal in (300, 1200, 2100):
            await until(lambda goal=goal: received(supervisor) >= goal)  # type: ignore[misc]
            before = view.restarts
            supervisor.kill("store")
            await until(lambda before=before: view.restarts > before and view.state == "ready")  # type: ignore[misc]
        await until(lambda: received(supervisor) == COUNT)
        far.away = False

    outcome = run(path, meddle=kill)
    assert outcome.nodes["store"].restarts == 3
    judge(outcome, far, "block", COUNT)
    assert far.times == COUNT
