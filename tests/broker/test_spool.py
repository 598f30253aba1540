"""The spool: its policies against a model, killed and torn and full, and what is kept of 20 MB in 5 MB."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from broker.spool import LEAST, RESERVE, Item, NoRoomError, Order, Overflow, Spool
from broker.spool_segment import FRAME, Segment
from broker.throttle import Throttle
from schemas.errors import BusError, ConfigError

ROOT = Path(__file__).parents[2]
TOPIC = "line/meter/out/d1"


def drain(spool: Spool, messages: int = 100) -> list[Item]:
    out = []
    while batch := spool.read(messages):
        spool.remove(batch[0].number, batch[-1].number)
        out += batch
    return out


def numbers(count: int, size: int = 100, start: int = 0) -> list[tuple[str, bytes]]:
    return [(TOPIC, str(i).encode().rjust(size, b"0")) for i in range(start, start + count)]


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def books_balance(spool: Spool) -> None:
    f = spool.figures
    assert f.stored == f.kept.messages + f.removed.messages + f.evicted.messages + f.damaged
    assert f.disk == on_disk(spool.folder) <= spool.budget
    assert spool.waiting == sum(1 for _ in spool._wanted(None))


def test_in_order_and_across_restarts(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST) as spool:
        assert spool.append(numbers(300)) == 300
        first = spool.read(120)
        assert [int(i.payload) for i in first] == list(range(120))
        assert {i.topic for i in first} == {TOPIC}
        assert spool.read(120) == first
        second = spool.read(120, beyond=first[-1].number)
        assert [int(i.payload) for i in second] == list(range(120, 240))
        assert spool.remove(first[0].number, first[-1].number) == 120
        assert spool.remove(first[0].number, first[-1].number) == 0
    with Spool(tmp_path / "s", LEAST) as spool:
        assert len(spool) == 180
        assert spool.cut == 0
        spool.append(numbers(1, start=300))
        assert [int(i.payload) for i in drain(spool)] == list(range(120, 301))
        assert spool.figures.removed.messages == spool.figures.stored == 301
        assert spool.figures.removed.bytes == 301 * (len(TOPIC) + 100)
        books_balance(spool)
    with Spool(tmp_path / "s", LEAST) as spool:
        assert (len(spool), spool.figures.removed.messages) == (0, 301)
        spool.append(numbers(1))
        assert spool.read(1)[0].number == 302


def test_newest_first_leaves_what_came_meanwhile_for_the_next_read(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST, order="newest") as spool:
        spool.append(numbers(200))
        batch = spool.read(50)
        assert [int(i.payload) for i in batch] == list(range(199, 149, -1))
        assert [int(i.payload) for i in spool.read(2, beyond=batch[-1].number)] == [149, 148]
        spool.append(numbers(10, start=200))
        spool.remove(batch[0].number, batch[-1].number)
        assert [int(i.payload) for i in drain(spool, 7)] == [*range(209, 199, -1), *range(149, -1, -1)]
        books_balance(spool)


def test_numbers_have_no_gap_in_a_file_when_the_newest_file_is_gone(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST, order="newest", overflow="block") as spool:
        fit = (LEAST - RESERVE) // (3000 + len(TOPIC) + FRAME)
        spool.append([*numbers(fit, 3000), *numbers(2, 1000, fit)])
        spool.remove(fit + 1, fit + 2)
        spool.append(numbers(1, 300, 777))  # takes the place of the two, and would fit behind the file before them
        assert [int(i.payload) for i in spool.read(3)] == [777, fit - 1, fit - 2]
        books_balance(spool)
    with Spool(tmp_path / "s", LEAST, order="newest") as spool:
        assert [int(i.payload) for i in drain(spool)] == [777, *range(fit - 1, -1, -1)]
        books_balance(spool)


def test_a_smaller_budget_holds_from_the_next_message_on(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", 8 * LEAST) as spool:
        spool.append(numbers(6000))
    with Spool(tmp_path / "s", LEAST) as spool:
        spool.append(numbers(1, start=6000))
        books_balance(spool)
        kept = [int(i.payload) for i in drain(spool)]
        assert kept == list(range(6001 - len(kept), 6001))
        assert spool.figures.evicted.messages == 6001 - len(kept)


def test_a_batch_is_bounded_by_bytes_too_but_one_message_always_comes(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST) as spool:
        spool.append(numbers(5, size=1000))
        assert len(spool.read(10, 2500)) == 2
        assert len(spool.read(10, 10)) == 1
        assert spool.append([]) == 0


def test_a_budget_that_is_too_small_and_a_second_process_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least"):
        Spool(tmp_path / "s", LEAST - 1)
    with Spool(tmp_path / "s", LEAST), pytest.raises(BusError, match="in use"):
        Spool(tmp_path / "s", LEAST)
    (tmp_path / "file").write_text("")
    with pytest.raises(BusError, match="cannot be used"):
        Spool(tmp_path / "file", LEAST)
    with Spool(tmp_path / "s", LEAST) as spool:
        assert len(spool) == 0
        with pytest.raises(ValueError, match="65535"):
            spool.append([("x" * 70_000, b"")])
        assert spool.figures.stored == 0


@pytest.mark.parametrize("overflow", ["drop-oldest", "drop-newest", "block"])
def test_larger_than_the_budget_is_dropped_whatever_the_policy(tmp_path: Path, overflow: Overflow) -> None:
    with Spool(tmp_path / "s", LEAST, overflow=overflow) as spool:
        assert spool.append([*numbers(1), (TOPIC, bytes(LEAST)), *numbers(1, start=1)]) == 3
        assert [int(i.payload) for i in spool.read(9)] == [0, 1]
        assert (spool.figures.refused.messages, spool.figures.refused.bytes) == (1, LEAST + len(TOPIC))
        books_balance(spool)


# the promise: 20 MB come while the far end is away, and the budget is 5 MB

BUDGET, COMING, SIZE, BATCH = 5_000_000, 20_000_000, 1000, 50
RECORD = SIZE + len(TOPIC) + FRAME
ROOM = BUDGET - RESERVE
PER_SEGMENT = ROOM // 32 // RECORD


@pytest.mark.parametrize("overflow", ["drop-oldest", "drop-newest", "block"])
def test_a_minute_away_with_20_mb_coming_and_5_mb_to_keep(tmp_path: Path, overflow: Overflow) -> None:
    """Virtual time: a batch each 150 ms for a minute while away, then draining at 500/s while more comes."""
    count = COMING // SIZE
    taken = 0
    with Spool(tmp_path / "s", BUDGET, overflow=overflow, durable=False) as spool:
        for start in range(0, count, BATCH):
            taken += (dealt := spool.append(numbers(BATCH, SIZE, start)))
            assert on_disk(spool.folder) <= BUDGET
            if dealt < BATCH:
                break
        figures = spool.figures
        books_balance(spool)
    fit = ROOM // RECORD
    if overflow == "drop-oldest":
        # whole segments go, each just when a message does not fit: what is left follows from the sizes alone
        evicted = 0
        while count - evicted > fit:
            evicted += PER_SEGMENT
        kept = list(range(evicted, count))
        assert len(kept) > fit - PER_SEGMENT
        assert (figures.evicted.messages, figures.refused.messages) == (evicted, 0)
        assert figures.evicted.bytes == evicted * (SIZE + len(TOPIC))
    elif overflow == "drop-newest":
        kept = list(range(fit))
        assert (figures.evicted.messages, figures.refused.messages) == (0, count - fit)
        assert figures.refused.bytes == (count - fit) * (SIZE + len(TOPIC))
    else:
        kept = list(range(fit))
        assert taken == fit
        assert (figures.evicted.messages, figures.refused.messages) == (0, 0)
    assert figures.kept.bytes == len(kept) * (SIZE + len(TOPIC))
    assert figures.kept.messages * SIZE > 0.9 * BUDGET

    now, throttle, arrived, sent = 0.0, Throttle(500), count if overflow != "block" else taken, []
    with Spool(tmp_path / "s", BUDGET, overflow=overflow, durable=False) as spool:
        assert replace(spool.figures, disk=0) == replace(figures, disk=0)
        while len(spool):
            batch = spool.read(40)
            wait = throttle.wait(len(batch), now)
            now += wait
            assert throttle.wait(len(batch), now) == 0
            throttle.spend(len(batch))
            sent += [int(i.payload) for i in batch]
            spool.remove(batch[0].number, batch[-1].number)
            if now < 2.0 and overflow != "block":  # a little goes on coming
                spool.append(numbers(1, SIZE, arrived))
                arrived += 1
        books_balance(spool)
        dropped = spool.figures.evicted.messages + spool.figures.refused.messages
    assert len(sent) + dropped == arrived
    assert sent == sorted(sent)
    assert now == pytest.approx((len(sent) - 50) / 500, abs=0.1)
    if overflow == "drop-newest":
        assert sent[: len(kept)] == kept
    elif overflow == "block":
        assert sent == kept


def test_block_takes_the_rest_when_a_segment_is_free_again(tmp_path: Path) -> None:
    waiting = numbers(3000)
    got = []
    with Spool(tmp_path / "s", LEAST, overflow="block", durable=False) as spool:
        while waiting:
            waiting = waiting[spool.append(waiting[:100]) :]
            batch = spool.read(1)
            spool.remove(batch[0].number, batch[0].number)
            got += batch
        got += drain(spool)
        assert [int(i.payload) for i in got] == list(range(3000))
        assert spool.figures.evicted.messages + spool.figures.refused.messages == 0
        books_balance(spool)


def test_what_is_held_is_spared_and_losses_are_told(tmp_path: Path) -> None:
    lost: list[tuple[int, int, bool]] = []
    with Spool(tmp_path / "s", LEAST, durable=False) as spool:
        spool.on_loss = lambda first, last, damaged: lost.append((first, last, damaged))
        spool.append(numbers(100))
        spool.held = [(3, 7), (90, 90)]
        assert spool.append(numbers(2000, start=100)) == 2000
        kept = [i.number for i in spool.read(5000, 1 << 30)]
        gone = {n for first, last, _ in lost for n in range(first, last + 1)}
        assert {*range(3, 8), 90} <= set(kept)
        assert set(kept) == set(range(1, 2101)) - gone
        assert kept == sorted(kept)
        assert len(gone) == spool.figures.evicted.messages > 500
        assert not any(damaged for *_, damaged in lost)
        books_balance(spool)
        spool.held = [(1, 1 << 62)]  # nothing may go: the caller keeps what does not fit
        dealt = spool.append(numbers(100, start=2100))
        assert dealt < 100
        assert spool.append(numbers(1)) == 0
        spool.held = ()
        assert spool.append(numbers(100 - dealt, start=2100 + dealt)) == 100 - dealt
        data = bytearray((path := max(spool.folder.glob("*.seg"))).read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
        lost.clear()
        drain(spool)
        assert lost == [(int(path.stem), int(path.stem), True)]
        books_balance(spool)
    with Spool(tmp_path / "s", LEAST) as spool:
        assert len(spool) == 0
        books_balance(spool)


# for those who keep books of their own


def test_what_is_under_way_is_not_read_again_and_not_evicted_and_is_here_after_a_crash(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST, overflow="block") as spool:
        taken = spool.append(numbers(2000), [3] * 2000)
        assert (spool.figures.kept.messages, spool.figures.kept.weight) == (taken, 3 * taken)
        first = spool.read(10)
        assert first[0].weight == 3
        assert spool.take(first[0].number, first[-1].number) == 10
        assert spool.take(first[-1].number, first[0].number) == 0
        assert spool.waiting == len(spool) - 10
        assert spool.read(1)[0].number == 11
        [one, *others] = spool.victims(2 * (LEAST // 32))
        assert one.first > first[-1].number
        assert one.weight == 3 * one.messages == 3 * (one.last - one.first + 1)
        assert len(others) <= 2
        assert spool.victims(0) == []
        assert spool.evict(one.first, one.last) == one.messages
        assert spool.figures.evicted.weight == one.weight
        assert spool.append(numbers(1000, start=5000)) > 0
        books_balance(spool)
        assert spool.remove(1, 10) == 10
        assert spool.figures.removed.weight == 30
        spool.take(11, 20)
        left = [item.number for item in spool.after(0)]
        assert left[0] == 21
        assert left[-1] == spool.last
        assert [item.number for item in spool.after(spool.last - 3)] == left[-3:]
        books_balance(spool)
        spool.sync()
        figures = spool.figures
    with Spool(tmp_path / "s", LEAST) as spool:
        assert [item.number for item in spool.read(3)] == [11, 12, 13]
        assert replace(spool.figures, disk=0) == replace(figures, disk=0)


def test_who_is_dropped_is_told(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST, overflow="drop-newest") as spool:
        refused: list[int] = []
        batch = [*numbers(20, 6000), (TOPIC, bytes(LEAST)), *numbers(1, 10)]
        assert spool.append(batch, [5] * 22, refused=refused) == 22
        assert refused == [19, 20]
        assert spool.figures.refused.weight == 10
        assert spool.append(numbers(2, 6000), overflow="block") == 0
        assert not spool.fits(LEAST)


def test_the_disk_is_full_when_others_need_what_is_left(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with (
        Spool(tmp_path / "s", LEAST, spare=free + (1 << 30)) as spool,
        pytest.raises(NoRoomError, match="No space left"),
    ):
        spool.append(numbers(1))
    with Spool(tmp_path / "s", LEAST, spare=1) as spool:
        assert spool.append(numbers(1)) == 1


def test_what_the_disk_did_not_confirm_is_offered_again_and_here_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of fdatasync cannot be had from a real disk on demand."""
    with Spool(tmp_path / "s", LEAST, overflow="block") as spool:
        spool.append(numbers(3))

        def fail(self: Segment) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(Segment, "sync", fail)
            with pytest.raises(NoRoomError, match="Input/output"):
                spool.append(numbers(100, start=3))
        assert spool.append(numbers(100, start=3)) == 100
        assert [int(item.payload) for item in spool.read(999)] == list(range(103))
        books_balance(spool)


def test_erased_it_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", LEAST)
    spool.append(numbers(900))
    (tmp_path / "s" / "notes.txt").write_text("mine")
    spool.erase()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]
    spool = Spool(tmp_path / "t", LEAST)
    spool.append(numbers(9))
    spool.erase()
    assert not (tmp_path / "t").exists()


# what the disk does


def test_a_torn_tail_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST) as spool:
        spool.append(numbers(10, 20))
    [segment] = (tmp_path / "s").glob("*.seg")
    whole = segment.read_bytes()
    record = len(whole) // 10
    for cut in (*range(len(whole) - record, len(whole)), 3):
        for tail in (b"", b"\0" * 64, whole[:record]):
            folder = tmp_path / f"c{cut}-{len(tail)}"
            shutil.copytree(tmp_path / "s", folder)
            (folder / segment.name).write_bytes(whole[:cut] + tail)
            with Spool(folder, LEAST) as spool:
                assert [int(i.payload) for i in spool.read(99)] == list(range(cut // record))
                assert spool.cut == cut % record + len(tail)
                spool.append(numbers(1, start=77))
                assert int(drain(spool)[-1].payload) == 77
                books_balance(spool)
            shutil.rmtree(folder)


@pytest.mark.parametrize("at", [0, 53, 107, 108, 200])
def test_torn_notes_bring_back_what_was_delivered_and_nothing_else(tmp_path: Path, at: int) -> None:
    with Spool(tmp_path / "s", LEAST) as spool:
        spool.append(numbers(10))
        for i in range(1, 5):
            spool.remove(i, i)
    notes = tmp_path / "s" / "notes"
    notes.write_bytes(notes.read_bytes()[:at] + b"\xff" * 5)
    with Spool(tmp_path / "s", LEAST) as spool:
        left = [int(i.payload) for i in spool.read(99)]
        assert left == list(range(10 - len(left), 10))
        assert len(left) >= 6
        books_balance(spool)


def test_bytes_that_rot_are_noticed_and_the_others_come(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", LEAST) as spool:
        spool.append(numbers(20))
        [path] = spool.folder.glob("*.seg")
        data = bytearray(path.read_bytes())
        data[len(data) // 20 * 4 + 50] ^= 1
        path.write_bytes(data)
        assert [int(i.payload) for i in drain(spool)] == [*range(4), *range(5, 20)]
        assert spool.figures.damaged == 1
        books_balance(spool)
        spool.append(numbers(3000))  # several segments
        lost = sorted(spool.folder.glob("*.seg"))[2]
        assert lost.stat().st_size > 1000
    lost.unlink()
    with Spool(tmp_path / "s", LEAST) as spool:
        assert spool.figures.damaged > 10
        books_balance(spool)
        again = spool.figures
    with Spool(tmp_path / "s", LEAST) as spool:
        assert spool.figures == again


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The kernel takes no more than that of a file: a real short write, then a real error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_refuses_keeps_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with Spool(folder, 4_000_000) as spool:
        spool.append(numbers(100))
        before = spool.figures
        with files_at_most(20_000), pytest.raises(NoRoomError):
            spool.append(numbers(300, start=100))
        assert spool.figures == before
        books_balance(spool)
        with files_at_most(0):  # not even a note: what was delivered is gone from memory at least
            with pytest.raises(NoRoomError):
                spool.append(numbers(1))
            assert spool.remove(1, 10) == 10
            assert int(spool.read(1)[0].payload) == 10
        assert spool.append(numbers(300, start=100)) == 300
        spool.remove(11, 12)
    with files_at_most(0), Spool(folder, 4_000_000) as spool:  # it can be opened on a full disk, and gives
        assert int(spool.read(1)[0].payload) == 12
    with Spool(folder, 4_000_000) as spool:
        assert [int(i.payload) for i in drain(spool)] == list(range(12, 400))
        books_balance(spool)


def test_on_a_full_file_system(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "x", disk], check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        with Spool(disk / "s", 4_000_000, overflow="block") as spool:
            waiting, got, refusals = numbers(4000), [], 0
            while waiting:
                try:
                    waiting = waiting[spool.append(waiting[:64]) :]
                except NoRoomError:
                    refusals += 1
                    for _ in range(20):
                        got += (batch := spool.read(64))
                        spool.remove(batch[0].number, batch[-1].number)
                    # whole segments must go before there is room
                    got += drain(spool)
                    spool.append([])
            got += drain(spool)
            assert refusals
            assert [int(i.payload) for i in got] == list(range(4000))
    finally:
        subprocess.run(["umount", disk], check=True)


WRITER = """
import sys
from pathlib import Path
from broker.spool import Spool
spool = Spool(Path(sys.argv[1]), 131072 * 4, overflow="block", durable=False)
n = int(sys.argv[2])
while True:
    n += spool.append([("t", str(n + i).encode().rjust(200, b"0")) for i in range(7)])
    sys.stdout.buffer.write(b"+%d\\n" % n)
    sys.stdout.buffer.flush()
    if n % 3 == 0 and (batch := spool.read(5)):
        sys.stdout.buffer.write(b"".join(b"=%d\\n" % int(i.payload) for i in batch) + b"-%d\\n" % batch[-1].number)
        sys.stdout.buffer.flush()
        spool.remove(batch[0].number, batch[-1].number)
"""


def test_killed_again_and_again_it_has_what_it_took_and_gives_it_in_order(tmp_path: Path) -> None:
    taken, given = 0, 0
    for round_ in range(8):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "s"), str(taken)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(400 + 37 * round_)]
        process.send_signal(signal.SIGKILL)
        lines += [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
        process.wait()
        process.stdout.close()
        for line in lines:
            if line[:1] == b"+":
                taken = int(line[1:])
            elif line[:1] == b"=":
                number = int(line[1:])
                assert number <= given, "a gap"  # a batch may come twice: told and killed before it was removed
                given = max(given, number + 1)
        with Spool(tmp_path / "s", 131072 * 4, overflow="block") as spool:
            here = [int(i.payload) for i in spool.read(1_000_000, 1 << 30)]
            assert here == list(range(here[0], here[0] + len(here)))
            assert here[0] <= given
            assert here[-1] + 1 >= taken
            taken = here[-1] + 1  # what was in the file and not told of yet
            assert spool.figures.damaged == 0
            books_balance(spool)
    assert given > 500


# against a model


class Model(RuleBasedStateMachine):
    """The spool and a plain description of it, side by side: lists of (number, topic, payload, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-spool-"))
        self.spool: Spool | None = None

    @initialize(
        overflow=st.sampled_from(["drop-oldest", "drop-newest", "block"]), order=st.sampled_from(["oldest", "newest"])
    )
    def make(self, overflow: Overflow, order: Order) -> None:
        self.options: dict[str, Any] = {"overflow": overflow, "order": order, "durable": False}
        self.spool = Spool(self.folder, LEAST, **self.options)
        # files: (bytes, number of the last record, what is wanted)
        self.pieces: list[tuple[int, int, list[tuple[int, str, bytes]]]] = []
        self.next = 1
        self.removed = self.evicted = self.refused = 0

    @property
    def live(self) -> list[tuple[int, str, bytes]]:
        return [record for *_, records in self.pieces for record in records]

    @property
    def used(self) -> int:
        return sum(size for size, *_ in self.pieces)

    def store(self, topic: str, payload: bytes) -> bool:
        room = LEAST - RESERVE
        size = FRAME + len(topic.encode()) + len(payload)
        if size <= room and self.used + size > room:
            self.pieces = [piece for piece in self.pieces if piece[2]]
        if size > room or (self.used + size > room and self.options["overflow"] == "drop-newest"):
            self.refused += 1
            return True
        if self.used + size > room and self.options["overflow"] == "block":
            return False
        while self.used + size > room:
            self.evicted += len(self.pieces.pop(0)[2])
        if not self.pieces or self.pieces[-1][1] != self.next - 1 or self.pieces[-1][0] + size > room // 32:
            if self.pieces and not self.pieces[-1][2]:
                self.pieces.pop()
            self.pieces.append((0, 0, []))
        total, _, records = self.pieces[-1]
        self.pieces[-1] = (total + size, self.next, [*records, (self.next, topic, payload)])
        self.next += 1
        return True

    @rule(
        sizes=st.lists(st.sampled_from([0, 1, 100, 300, 1000, 3000, 3500, 9000, 60_000, 200_000]), max_size=40),
        topic=st.sampled_from(["t", "line/meter/out/é"]),
    )
    def append(self, sizes: list[int], topic: str) -> None:
        assert self.spool is not None
        batch = [(topic, bytes([i]) * size) for i, size in enumerate(sizes)]
        expected = 0
        for name, payload in batch:
            if not self.store(name, payload):
                break
            expected += 1
        assert self.spool.append(batch) == expected

    @rule(count=st.integers(1, 60), gone=st.integers(0, 60))
    def deliver(self, count: int, gone: int) -> None:
        assert self.spool is not None
        wanted = self.live if self.options["order"] == "oldest" else self.live[::-1]
        got = self.spool.read(count, 1 << 30)
        assert [(i.number, i.topic, i.payload) for i in got] == wanted[:count]
        if got and count < len(wanted):
            assert self.spool.read(1, beyond=got[-1].number)[0].number == wanted[count][0]
        if done := got[:gone]:
            self.spool.remove(done[0].number, done[-1].number)
            numbers = {i.number for i in done}
            self.removed += len(done)
            last = len(self.pieces) - 1
            left = [(size, end, [r for r in records if r[0] not in numbers]) for size, end, records in self.pieces]
            self.pieces = [piece for i, piece in enumerate(left) if piece[2] or i == last]

    @rule()
    def again(self) -> None:
        assert self.spool is not None
        self.spool.close()
        self.spool = Spool(self.folder, LEAST, **self.options)
        self.pieces = [piece for piece in self.pieces if piece[2]]

    @precondition(lambda self: self.spool is not None)
    @invariant()
    def same(self) -> None:
        assert self.spool is not None
        figures = self.spool.figures
        assert len(self.spool) == figures.kept.messages == len(self.live)
        assert figures.kept.bytes == sum(len(topic.encode()) + len(payload) for _, topic, payload in self.live)
        assert (figures.removed.messages, figures.evicted.messages, figures.refused.messages, figures.damaged) == (
            self.removed,
            self.evicted,
            self.refused,
            0,
        )
        books_balance(self.spool)

    def teardown(self) -> None:
        if self.spool is not None:
            self.spool.close()
        shutil.rmtree(self.folder)


TestModel = Model.TestCase
TestModel.settings = settings(deadline=None, derandomize=True, max_examples=30, stateful_step_count=20)


# the rate


def test_the_rate_is_kept_on_average_and_a_pause_saves_up_one_burst() -> None:
    throttle = Throttle(100)
    now, sent = 1000.0, 0
    for _ in range(200):
        while throttle.wait(3, now) == 0:
            throttle.spend(3)
            sent += 3
        now += throttle.wait(3, now)
    assert sent == pytest.approx((now - 1000) * 100 + throttle.burst, abs=4)
    now += 3600
    sent = 0
    while throttle.wait(1, now) == 0:
        throttle.spend(1)
        sent += 1
    assert sent == throttle.burst == 10


def test_what_is_larger_than_a_burst_goes_and_is_paid_for() -> None:
    throttle = Throttle(1000, burst=100)
    assert throttle.wait(5000, 0.0) == 0
    throttle.spend(5000)
    assert throttle.wait(1, 0.0) == pytest.approx(4.901)
    assert throttle.wait(1, -50.0) == pytest.approx(4.901)  # a clock that went back gives nothing away
    assert throttle.wait(1, -50.0 + 4.902) == 0
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="rate"):
            Throttle(wrong)
