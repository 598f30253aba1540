"""The ring of slots: what is leased stays as it is, what is overwritten is told, and nothing is left of the dead."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgpack  # type: ignore[import-untyped] # it has no types
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_seen import holders, rings

from broker.shared_memory import OverwrittenError, Reader, Ring, UnreachableError, working
from schemas.detached import Place

ROOT = Path(__file__).parent.parent.parent
PAGE = os.sysconf("SC_PAGE_SIZE")


def free() -> int:
    found = os.statvfs("/dev/shm")  # noqa: S108 - what is tested
    return found.f_bavail * found.f_frsize


def test_a_reader_sees_what_was_put_without_a_copy_and_cannot_write_it() -> None:
    ring, reader = Ring(4, 100_000, [True]), Reader(0)
    image = np.arange(60_000, dtype=np.uint8)
    put = ring.put([image, b"tail"])
    assert put is not None
    place, (first, second) = put
    leased = reader.lease(place)
    assert (first, second % 64) == (0, 0)
    assert bytes(leased[second : second + 4]) == b"tail"
    assert np.array_equal(leased[:60_000], image)
    assert not leased.flags.writeable
    assert not leased.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        leased[0] = 1


def test_memory_is_taken_as_slots_are_used_and_has_neither_a_name_nor_other_users() -> None:
    before = set(os.listdir("/dev/shm"))  # noqa: S108
    ring, reader = Ring(64, 1 << 20, [True]), Reader(0)
    descriptors = set()
    for _ in range(20):
        put = ring.put([b"x"])
        assert put is not None
        descriptors.add(put[0].descriptor)
        reader.lease(put[0])
    assert ring.memory == 1 << 20, "one slot does for a reader that keeps up"
    found = os.stat(f"/proc/self/fd/{descriptors.pop()}")
    assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0o600, 0)
    assert set(os.listdir("/dev/shm")) == before  # noqa: S108


def test_a_slot_stays_while_any_view_of_it_is_alive() -> None:
    ring, reader = Ring(2, PAGE, [True]), Reader(0)
    views = []
    for i in range(2):
        put = ring.put([bytes([i]) * 100])
        assert put is not None
        views.append(reader.lease(put[0])[10:20].data)  # the view of a view
    assert ring.put([b"new"]) is None
    assert [bytes(view) for view in views] == [b"\0" * 10, b"\1" * 10]
    views[0].release()
    views.pop(0)
    assert ring.put([b"new"]) is not None
    assert bytes(views[0]) == b"\1" * 10


def test_a_reader_that_is_waited_for_gets_everything_and_one_that_is_not_is_told() -> None:
    patient, hasty = Ring(2, PAGE, [True], patience=1e6), Ring(2, PAGE, [False])
    for ring, taken in ((patient, 2), (hasty, 5)):
        places = [put[0] for i in range(5) if (put := ring.put([bytes([i])])) is not None]
        assert len(places) == taken
        reader, seen = Reader(0), []
        for place in places:
            try:
                seen.append(reader.lease(place)[0])
            except OverwrittenError:
                seen.append(None)
        assert seen == ([0, 1] if ring is patient else [None, None, None, 3, 4])


def test_what_is_pinned_stays_until_it_is_released() -> None:
    ring, reader = Ring(2, PAGE, [False]), Reader(0)
    places = []
    for number in (1, 2):
        put = ring.put([bytes([number])], number)
        assert put is not None
        places.append(put[0])
        reader.lease(put[0])
    assert ring.put([b"x"]) is None
    assert bytes(ring.view(places[0])[:1]) == b"\1"
    ring.release(1)
    put = ring.put([b"x"], 3)
    assert put is not None
    with pytest.raises(OverwrittenError):
        ring.view(places[0])
    assert bytes(ring.view(places[1])[:1]) == b"\2"


def test_a_place_is_leased_once() -> None:
    ring, reader = Ring(2, PAGE, [True]), Reader(0)
    put = ring.put([b"x"])
    assert put is not None
    reader.lease(put[0])
    with pytest.raises(OverwrittenError):
        reader.lease(put[0])


def test_two_readers_are_both_waited_for() -> None:
    ring, one, two = Ring(1, PAGE, [True, True], patience=1e6), Reader(0), Reader(1)
    put = ring.put([b"x"])
    assert put is not None
    one.lease(put[0])
    assert ring.put([b"y"]) is None
    two.lease(put[0])
    assert ring.put([b"y"]) is not None


@pytest.mark.parametrize("what", ["socket", "file", "nothing", "closed", "other ring"])
def test_what_is_no_ring_of_ours_is_not_opened(what: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    plain = (tmp_path / "file").open("w+b")
    ring = Ring(1, PAGE, [True])
    put = ring.put([b"x"])
    assert put is not None
    number = {"socket": read, "file": plain.fileno(), "nothing": 1 << 20, "closed": put[0].descriptor}
    process = 2**31 if what == "closed" else os.getpid()
    place = Place(process, number.get(what, put[0].descriptor), os.urandom(16), 0, 1)
    with pytest.raises(UnreachableError):
        Reader(0).lease(place)
    with pytest.raises(OverwrittenError):
        Reader(0).lease(Place(os.getpid(), put[0].descriptor, put[0].mark, 5000, 1))
    os.close(read)
    os.close(write)
    plain.close()


def test_too_many_bytes_find_no_slot_and_a_full_system_is_an_error() -> None:
    ring = Ring(1, PAGE, [])
    assert ring.put([b"x" * (PAGE + 1)]) is None
    with pytest.raises(OSError, match=r"space|large|memory"):
        Ring(1, free() * 4, []).claim()


WRITER = """
import sys
from broker.shared_memory import Ring
import msgspec
ring = Ring(4, 1 << 20, [False])
data = [bytes([i]) * (1 << 20) for i in range(256)]
n = 0
while True:
    n += 1
    place, _ = ring.put([data[n % 256]])
    sys.stdout.buffer.write(msgspec.msgpack.encode(place)); sys.stdout.buffer.flush()
"""


def test_a_writer_killed_at_any_moment_leaves_nothing_torn_and_nothing_behind() -> None:
    whole = 0
    used: set[int] = set()
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout is not None
            unpacker, places, reader = msgpack.Unpacker(), list[Place](), Reader(0)
            while len(places) < 40:
                unpacker.feed(os.read(writer.stdout.fileno(), 4096))
                for each in unpacker:
                    places.append(msgspec.convert(each, Place))
                    if len(places) == 1:  # from now on the ring is reached without its writer
                        with contextlib.suppress(OverwrittenError):
                            reader.lease(places[0])
            mine = rings(writer.pid)
            assert mine
            used |= mine
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
            unpacker.feed(writer.stdout.read())
            places += [msgspec.convert(each, Place) for each in unpacker]
        for place in places[-4:]:
            with contextlib.suppress(OverwrittenError):
                held = reader.lease(place)
                assert (held == held[0]).all()
                whole += 1
                del held
        with pytest.raises(UnreachableError):
            Reader(0).lease(places[-1])
        del reader
    assert holders(used) == []
    assert whole, "the last message is there, unless the writer died in the middle of the one after it"


READER = """
import sys, time
import msgspec
from broker.shared_memory import Reader
from schemas.detached import Place
reader = Reader(0)
kept = reader.lease(msgspec.msgpack.decode(sys.stdin.buffer.read(int(sys.argv[1])), type=Place))
print("leased", flush=True)
time.sleep(60)
"""


def test_a_killed_reader_holds_nothing_back() -> None:
    ring = Ring(1, PAGE, [True])
    put = ring.put([b"first"])
    assert put is not None
    told = msgspec.msgpack.encode(put[0])
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(len(told))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(told)
        reader.stdin.flush()
        assert reader.stdout.readline() == b"leased\n"
        assert ring.put([b"second"]) is None, "it is leased"
        os.kill(reader.pid, signal.SIGKILL)
        reader.wait()
    assert ring.put([b"second"]) is not None
    assert ring.put([b"third"]) is not None, "who is gone is not waited for"


def rung(ring: Ring, within: float = 0.0) -> bool:
    if not select.select([ring.bell], [], [], within)[0]:
        return False
    ring.hush()
    return True


def test_the_bell_is_rung_when_as_many_slots_are_free_as_are_asked_for() -> None:
    ring, reader = Ring(4, PAGE, [True], patience=1e6), Reader(0)
    places = [put[0] for i in range(4) if (put := ring.put([bytes([i])])) is not None]
    assert (len(places), ring.claim(2)) == (4, 0)
    ring.call(2)
    held = [reader.lease(place) for place in places]
    assert not rung(ring), "all are leased"
    held.pop(0)
    assert not rung(ring), "two were asked for"
    held.pop(0)
    assert rung(ring)
    held.clear()
    assert not rung(ring), "once"
    assert ring.claim(4) == 4
    ring.call(4)
    assert not rung(ring), "nothing is missing"


def test_whatever_order_slots_get_free_in_all_that_are_free_are_found() -> None:
    ring, reader = Ring(8, PAGE, [True], patience=1e6), Reader(0)
    held = [reader.lease(put[0]) for i in range(8) if (put := ring.put([bytes([i])])) is not None]
    assert len(held) == 8
    assert ring.claim(8) == 0
    del held[6], held[3:5], held[0]
    assert ring.claim(8) == 4


def test_a_killed_writer_is_rung_for_without_harm_and_a_full_pipe_too() -> None:
    ring, reader = Ring(2, PAGE, [True]), Reader(0)
    for _ in range(70_000):  # a pipe holds 65,536 bytes
        put = ring.put([b"x"])
        assert put is not None
        lease = reader.lease(put[0])
        ring.call(1)
        del lease
    assert rung(ring)
    put = ring.put([b"x"])
    assert put is not None
    lease = reader.lease(put[0])
    ring.call(1)
    ring.close()
    del lease


def test_few_slots_are_in_use_until_more_are_asked_for() -> None:
    ring = Ring(40, PAGE, [True], patience=1e6)
    assert working(40) == ring.reach == 10
    assert ring.claim(40) == 10
    ring.reach = 40
    assert ring.claim(40) == 40


class Machine(RuleBasedStateMachine):
    """Any order of putting, leasing, letting go and dying: what a reader holds is what was put, and stays it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = [True, False]
        self.ring = Ring(4, PAGE, self.waits, patience=1e6)
        self.readers = [Reader(0), Reader(1)]
        self.queues: list[list[tuple[Place, int]]] = [[], []]
        self.held: list[list[tuple[object, int]]] = [[], []]
        self.pins: dict[int, tuple[Place, int]] = {}
        self.count = 0

    @rule(pin=st.booleans())
    def put(self, pin: bool) -> None:
        self.count += 1
        value = self.count % 256
        put = self.ring.put([bytes([value]) * PAGE], self.count if pin else 0)
        if put is None:
            return
        if pin:
            self.pins[self.count] = (put[0], value)
        for queue in self.queues:
            queue.append((put[0], value))

    @rule(reader=st.integers(0, 1))
    def lease(self, reader: int) -> None:
        if not self.queues[reader]:
            return
        place, value = self.queues[reader].pop(0)
        try:
            array = self.readers[reader].lease(place)
        except OverwrittenError:
            assert not self.waits[reader], "a reader that is waited for is never told that it is late"
        else:
            self.held[reader].append((array, value))

    @precondition(lambda self: any(self.held))
    @rule(reader=st.integers(0, 1), which=st.integers(0, 3))
    def let_go(self, reader: int, which: int) -> None:
        if self.held[reader]:
            self.held[reader].pop(which % len(self.held[reader]))

    @rule()
    def acknowledge(self) -> None:
        if self.pins:
            upto = min(self.pins)
            del self.pins[upto]
            self.ring.release(upto)

    @rule()
    def writer_begins_anew(self) -> None:
        self.ring.close()
        self.ring = Ring(4, PAGE, self.waits, patience=1e6)
        self.pins.clear()
        self.queues = [[], []]

    @invariant()
    def what_is_held_is_what_was_put(self) -> None:
        for some in self.held:
            for array, value in some:
                assert (np.asarray(array) == value).all()
        for place, value in self.pins.values():
            assert bytes(self.ring.view(place)[:PAGE]) == bytes([value]) * PAGE

    def teardown(self) -> None:
        self.held = [[], []]
        self.ring.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.builds(Place, st.integers(), st.integers(), st.binary(max_size=20), st.integers(), st.integers()))
@settings(deadline=None, derandomize=True)
def test_no_place_does_more_than_be_refused(place: Place) -> None:
    with pytest.raises((UnreachableError, OverwrittenError)):
        Reader(0).lease(place)
