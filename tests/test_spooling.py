"""An uplink with a spool: what is kept and dropped while its far end is away, in which order it goes, and what is told."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped] # has no types
import numpy as np
import pytest
from harness import events, run, until
from spool_site import books, quiet, received, service, site

from broker.spool import RESERVE, Order, Overflow, Spool
from broker.spool_segment import FRAME
from nodes.dead import DeadLetters
from nodes.spool_shelf import unpack
from nodes.supervisor import Supervisor

MINUTE = "PENSTOCK_MINUTE" in os.environ
"""The full form: 20 MB in a minute, of which 5 MB are kept."""
BUDGET, COUNT = (5_000_000, 20_000) if MINUTE else (640_000, 2_560)
SIZE = 800
RATE = "334/s" if MINUTE else ""


def record(message: bytes) -> int:
    """Bytes that a message takes in the spool."""
    payload = msgpack.packb([2**63, None, message])
    return FRAME + len("meter.out") + len(payload)


def model(sizes: list[int], overflow: Overflow, budget: int, under_way: set[int]) -> list[int]:
    """Which of the messages the policy keeps, in plain words.

    A file takes messages up to a 32nd. Oldest files go, as wholes, unless something in them is under way to the far end.
    """
    room = budget - RESERVE
    files: list[list[int]] = [[]]
    used = 0
    for i, size in enumerate(sizes):
        if used + size > room and overflow != "drop-oldest":
            if overflow == "block":
                break
            continue
        while used + size > room:
            goes = next(f for f in files if f and not under_way.intersection(f))
            used -= sum(sizes[n] for n in goes)
            goes.clear()
        if files[-1] and sum(sizes[n] for n in files[-1]) + size > room // 32:
            files.append([])
        files[-1].append(i)
        used += size
    return [n for file in files for n in file]


def kept_in(folder: Path, tmp_path: Path) -> tuple[list[str], Any]:
    """Ids of what a spool has, and its figures; looked at in a copy."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with Spool(copy, BUDGET, overflow="block") as spool:
        items = spool.read(1_000_000, 1 << 40)
        return [unpack(item.payload)[0].id for item in items], spool.figures


@pytest.mark.timeout(240 if MINUTE else 60)
@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("overflow", get_args(Overflow))
def test_the_far_end_is_away_and_four_times_the_budget_comes(tmp_path: Path, overflow: Overflow, order: Order) -> None:
    """What is kept and dropped is exactly what the policy says: in the books, on the disk, and in the sink."""
    seen: dict[str, Any] = {}
    with service() as far:
        far.away = True
        spool = f"{{size: {BUDGET}, overflow: {overflow}, order: {order}}}"
        path = site(tmp_path, far, spool, count=COUNT, size=SIZE, rate=RATE, compare=True)

        async def away(supervisor: Supervisor) -> None:
            if overflow == "block":
                await until(lambda: books(supervisor).held > 0 and _still(supervisor, seen), within=150)
            else:
                await quiet(supervisor, COUNT, within=150)
                await until(lambda: len(far.every) == COUNT)
            seen["book"], seen["under way"] = books(supervisor), list(far.attempted)
            seen["kept"], seen["figures"] = kept_in(tmp_path / "state" / "store" / "spool", tmp_path)
            far.away = False

        outcome = run(path, meddle=away, within=200 if MINUTE else 50)
        assert outcome.complete
        assert outcome.findings == []
    ids = list(far.every)
    assert len(ids) == COUNT
    under_way = {ids.index(ident) for ident in seen["under way"]}
    assert under_way
    kept = [ids[n] for n in model([record(message) for message in far.every.values()], overflow, BUDGET, under_way)]

    # while it was away
    book, figures = seen["book"], seen["figures"]
    assert seen["kept"] == kept
    assert 0.85 * BUDGET < figures.disk <= BUDGET
    assert figures.kept.messages == figures.kept.weight == book.held == len(kept)
    dropped = COUNT - len(kept) if overflow != "block" else 0
    assert book.dropped == ({"spool-full": dropped} if dropped else {})
    assert (figures.evicted.weight, figures.refused.weight) == {
        "drop-oldest": (dropped, 0),
        "drop-newest": (0, dropped),
        "block": (0, 0),
    }[overflow]
    if overflow == "drop-oldest":  # beside what is under way, which is an eighth at most
        assert set(ids[-len(kept) // 4 * 3 :]) <= set(kept)

    # when it was there again
    end = outcome.ledgers["store"]
    assert (end.passed, end.held, end.dropped) == (COUNT - dropped, 0, book.dropped)
    assert far.times == len(far.taken) == end.passed  # nothing twice
    arrived, first = list(far.taken), seen["under way"]
    assert sorted(arrived, key=ids.index) == (ids if overflow == "block" else kept)
    assert arrived[: len(first)] == first
    rest = [ident for ident in kept if ident not in set(first)]
    if order == "oldest":
        assert arrived == (ids if overflow == "block" else kept)
    elif overflow != "block":
        assert arrived[len(first) :] == rest[::-1]
    else:  # more came while it drained
        assert arrived[len(first)] == rest[-1]
    assert not (tmp_path / "state" / "store" / "spool").exists()


def _still(supervisor: Supervisor, seen: dict[str, Any]) -> bool:
    """Two reports of the books in a row say the same."""
    view = supervisor.views["store"]
    if seen.get("at") == view.seen_at:
        return False
    same = seen.get("held") == books(supervisor).held
    seen["at"], seen["held"] = view.seen_at, books(supervisor).held
    return same


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("overflow", get_args(Overflow))
def test_a_far_end_that_is_slow(tmp_path: Path, overflow: Overflow, order: Order) -> None:
    """It drains while it is full: each row is in the sink or dropped, none is both."""
    with service() as far:
        far.pause = 0.03
        spool = f"{{size: 128KiB, overflow: {overflow}, order: {order}}}"
        outcome = run(site(tmp_path, far, spool, count=3000, size=200, batch=3))
        assert outcome.complete
        assert outcome.findings == []
        end = outcome.ledgers["store"]
        assert end.passed == far.rows() == 3000 - sum(end.dropped.values())
        assert far.times == len(far.taken)
        assert bool(end.dropped) == (overflow != "block")
        if order == "oldest":
            numbers = [n for message in far.taken.values() for n in _numbers(message)]
            for device in range(4):
                of_it = [n for n in numbers if n % 4 == device]
                assert of_it == sorted(of_it)


def test_nobody_waits_for_a_far_end_that_is_away_and_each_source_keeps_its_order(tmp_path: Path) -> None:
    with service() as far:
        far.away = True
        path = site(tmp_path, far, "20MB", count=3000, batch=3)

        async def away(supervisor: Supervisor) -> None:
            book = await quiet(supervisor, 3000)
            assert (book.held, book.dropped) == (3000, {})
            far.away = False

        outcome = run(path, meddle=away)
        assert outcome.complete
        assert outcome.findings == []
        assert outcome.ledgers["store"].passed == far.rows() == 3000
        numbers = [_numbers(message) for message in far.taken.values()]
    for device in range(4):
        of_it = [n for some in numbers for n in some if n % 4 == device]
        assert of_it == list(range(device, 3000, 4))


def _numbers(message: dict[str, Any]) -> list[int]:
    column = message["body"]["columns"]["number"]
    return [int(n) for n in np.frombuffer(column["data"], column["dtype"])]


def test_a_run_that_is_stopped_leaves_it_and_says_so_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with service() as far:
        far.away = True
        path = site(tmp_path, far, "20MB", count=2000)

        async def stop(supervisor: Supervisor) -> None:
            await quiet(supervisor, 2000)
            await supervisor.stop()

        for _ in range(2):  # and once more, with nothing new
            with events() as said:
                outcome = run(path, meddle=stop)
            assert not outcome.complete
            assert outcome.ledgers["store"].held == 2000
            [left] = [fields for event, fields in said if event == "left in the spool"]
            assert (left["node"], left["messages"], left["rows"]) == ("store", 2000, 2000)
            assert "did not finish in time, ended" not in [event for event, _ in said]
        far.away = False
        outcome = run(path)
        assert outcome.complete
        assert outcome.findings == []
        assert far.times == len(far.taken) == outcome.ledgers["store"].passed == 2000
        assert [path.name for path in (tmp_path / "state").glob("*.journal")] == []
        assert not (tmp_path / "state" / "store" / "spool").exists()


def test_an_aggregate_before_it_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """Its answers and its end are not done at the consumer when it is stopped, however that is."""
    with service() as far:
        far.away = True
        path = site(tmp_path, far, "20MB", count=2000, edge="means")
        means = "  means: {aggregate: {window: 10s, by: source, fields: {mean: mean(number)}}, from: meter}\n"
        path.write_text(path.read_text() + means)

        async def stop(supervisor: Supervisor) -> None:
            await quiet(supervisor, 800)
            await until(lambda: books(supervisor, "means").passed == 2000)
            await supervisor.stop()

        async def kill(supervisor: Supervisor) -> None:
            await until(lambda: books(supervisor).held == 800)
            supervisor.kill("means")
            await until(lambda: supervisor.views["means"].restarts == 1)
            far.away = False

        assert not run(path, meddle=stop).complete
        outcome = run(path, meddle=kill)
        assert outcome.complete
        assert outcome.findings == []
        assert len(far.taken) == outcome.ledgers["store"].passed == 800


def test_what_the_far_end_refuses_is_a_dead_letter_and_only_that(tmp_path: Path) -> None:
    with service() as far:
        path = site(tmp_path, far, "1MB", count=300, batch=3)

        async def come_back(supervisor: Supervisor) -> None:
            await quiet(supervisor, 300)
            await until(lambda: bool(far.attempted))
            far.refuse = {far.attempted[0]}
            far.away = False

        far.away = True
        outcome = run(path, meddle=come_back)
        assert outcome.complete
        assert outcome.findings == []
        end = outcome.ledgers["store"]
        assert (end.passed, end.dead) == (297, {"rejected": 3})
        assert far.rows() == 297
        [letter] = DeadLetters(tmp_path / "state" / "store.dead").letters()
        assert (letter.reason, letter.edge, letter.rows, {letter.position}) == ("rejected", "meter.out", 3, far.refuse)


def test_larger_than_the_whole_spool_is_a_dead_letter(tmp_path: Path) -> None:
    with service() as far:
        path = site(tmp_path, far, "128KiB", count=40, size=20_000, batch=20)  # 400 kB a message
        text = (tmp_path / "meter.csv").read_text().splitlines()
        (tmp_path / "meter.csv").write_text("\n".join([*text, "1700009999,d1,41,short"]) + "\n")
        outcome = run(path)
        assert outcome.complete
        assert outcome.findings == []
        assert outcome.ledgers["store"].dead == {"too-large": 40}
        assert outcome.ledgers["store"].passed == far.rows() == 1


def test_a_backlog_drains_at_the_rate(tmp_path: Path) -> None:
    with service() as far:
        far.away = True
        path = site(tmp_path, far, "{size: 1MB, rate: 150/s}", count=300)
        began: list[float] = []

        async def come_back(supervisor: Supervisor) -> None:
            await quiet(supervisor, 300)
            began.append(asyncio.get_running_loop().time())
            far.away = False
            await until(lambda: len(far.taken) == 300)
            began.append(asyncio.get_running_loop().time())

        assert run(path, meddle=come_back).complete
    # a burst of a tenth of a second at once, and the one that was under way
    assert began[1] - began[0] >= (300 - 15 - 15) / 150 * 0.9
    assert max(map(len, far.batches)) <= 15


def test_a_damaged_end_is_cut_off_and_what_it_held_is_counted(tmp_path: Path) -> None:
    with service() as far:
        far.away = True
        path = site(tmp_path, far, "20MB", count=900, batch=3)

        async def stop(supervisor: Supervisor) -> None:
            await quiet(supervisor, 900)
            await supervisor.stop()

        run(path, meddle=stop)
        last = max((tmp_path / "state" / "store" / "spool").glob("*.seg"))
        os.truncate(last, last.stat().st_size - 10)
        with last.open("ab") as file:
            file.write(b"\xff" * 100)
        far.away = False
        with events() as said:
            outcome = run(path)
        assert outcome.complete
        assert outcome.findings == []
        end = outcome.ledgers["store"]
        assert (end.dropped, end.passed) == ({"spool-damaged": 3}, 897)
        assert far.rows() == 897
        told = [event for event, _ in said]
        assert "the end of the spool was damaged" in told
        assert "the disk has lost rows of the spool" in told


def test_a_folder_of_ones_own_and_beginning_anew(tmp_path: Path) -> None:
    with service() as far:
        far.away = True
        path = site(tmp_path, far, "{size: 1MB, path: elsewhere}", count=500)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "mine").write_text("")

        async def stop(supervisor: Supervisor) -> None:
            await quiet(supervisor, 500)
            await supervisor.stop()

        run(path, meddle=stop)
        spool = tmp_path / "elsewhere" / "away-store"
        assert list(spool.glob("*.seg"))
        # the journal is lost: what the spool has is taken over, and the source, which begins anew, repeats it
        for file in (tmp_path / "state").glob("*.journal*"):
            file.unlink()
        book = run(path, meddle=stop).ledgers["store"]
        assert book.held == 500
        assert sum(book.repeated.values()) >= 500

        from nodes.plan import prepare

        state = tmp_path / "state"
        Supervisor(prepare(path, state=state), state=state).forget()
        assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["mine"]
        far.away = False
        outcome = run(path)
        assert outcome.complete
        assert outcome.findings == []
        assert far.times == len(far.taken) == 500


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("may not mount a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "spool", folder], check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(path: Path) -> None:
    """Take the rest of a file system."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("overflow", get_args(Overflow))
def test_a_full_disk_takes_no_more_and_loses_nothing(tmp_path: Path, disk: Path, overflow: Overflow) -> None:
    """The state of all nodes is on it too."""
    with service() as far, events() as said:
        far.away = True
        path = site(tmp_path, far, f"{{size: 20MB, overflow: {overflow}}}", count=6000, size=SIZE)

        async def full(supervisor: Supervisor) -> None:
            full = "the disk is full, nothing is taken in until there is room"
            await until(lambda: full in [event for event, _ in said])
            before: dict[str, Any] = {}
            await until(lambda: _still(supervisor, before))
            book = books(supervisor)
            assert 1000 < book.held == received(supervisor) < 6000
            fill(disk / "ballast")
            assert [event for event, _ in said].count(full) == 1
            supervisor.kill("store")
            (disk / "ballast").unlink()
            far.away = False

        outcome = run(path, state=disk / "state", meddle=full)
        assert outcome.complete
        assert outcome.findings == []
        assert outcome.ledgers["store"].dropped == {}
        assert outcome.ledgers["store"].passed == len(far.taken) == 6000
