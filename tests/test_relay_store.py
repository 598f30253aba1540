"""What a relay keeps of one port: exact whenever it is killed, whatever the policy, and on a full disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.spool import LEAST, RESERVE, Order
from broker.spool_segment import FRAME
from nodes.relay_books import Close, Taken, label, left, unlabel
from nodes.relay_store import Store
from schemas import codec
from schemas.messages import Message, Readings

ROOT = Path(__file__).parents[1]
TOPIC = "line/meter/out/d1"


def message(number: int, *, epoch: int = 7, size: int = 500, rows: int = 1) -> Taken:
    """Number and identity go together here; a restarted producer would give the identity another number."""
    pad: list[str | None] = ["x" * size, *[""] * (rows - 1)]
    body = Readings(n=rows, columns={"value": np.full(rows, number), "pad": pad})
    sent = Message(f"m{number}", "d1", 10**18, body)
    return Taken(epoch, number, sent.id, rows, label(TOPIC, rows, None), codec.encode(sent, epoch=epoch, seq=number))


def numbers(items: Any) -> list[int]:
    return [int(codec.decode(item.payload).id[1:]) for item in items]


def balanced(store: Store) -> None:
    books = store.books
    for what in ("messages", "rows"):
        gone = sum(getattr(flow, what) for flow in books.dropped.values()) + getattr(books.dead, what)
        assert getattr(books.taken, what) == getattr(books.given, what) + gone + getattr(books.held, what)
    assert books.held.messages == len(store.spool)


def give(store: Store, count: int = 100_000) -> list[int]:
    """Send on and have acknowledged."""
    out: list[int] = []
    while len(out) < count and (items := store.next(min(50, count - len(out)), 1 << 20)):
        out += numbers(items)
        store.done([item.number for item in items])
    return out


@pytest.mark.parametrize("overflow", ["block", "drop-oldest", "drop-newest"])
def test_a_full_spool_does_what_the_policy_says(tmp_path: Path, overflow: str) -> None:
    batch = [message(i, rows=1 + i % 3) for i in range(1, 1001)]
    store = Store(tmp_path / "s", ["store"], LEAST, overflow, "oldest", durable=False)
    dealt = store.take(batch)
    balanced(store)
    kept = len(store.spool)
    assert kept < 300
    given = give(store)
    if overflow == "block":
        assert given == list(range(1, dealt + 1))
        assert store.take(batch[dealt:]) > 0  # there is room again
        assert store.books.dropped == {}
    else:
        assert dealt == 1000
        dropped = store.books.dropped["spool-full"]
        assert dropped.messages == 1000 - kept
        assert store.books.taken.rows == sum(t.rows for t in batch)
        assert store.books.given.rows == sum(1 + i % 3 for i in given)
        if overflow == "drop-newest":
            assert given[:100] == list(range(1, 101))  # further ones fit where they are smaller
            assert given == sorted(given)
        else:
            assert given == list(range(1001 - kept, 1001))
    balanced(store)
    store.close()


def test_repeats_are_known_also_by_identity_and_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", ["store"], LEAST, "block", "oldest", durable=False)
    assert store.take([message(1), message(2), message(1)]) == 3
    assert store.take([message(2, epoch=8), message(3, epoch=8)]) == 2
    assert (store.repeated, len(store.spool)) == (2, 3)
    assert give(store) == [1, 2, 3]
    store.close()
    store = Store(tmp_path / "s", ["store"], LEAST, "block", "oldest", durable=False)
    assert store.state.floor == (8, 3)
    assert store.take([message(3, epoch=9), message(4, epoch=9)]) == 2
    assert give(store) == [4]
    assert store.books.taken.messages == store.books.given.messages == 4
    store.close()


def test_what_is_larger_than_the_spool_is_dropped_whatever_the_policy(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", ["store"], LEAST, "block", "oldest", durable=False)
    assert store.take([message(1), message(2, size=LEAST), message(3)]) == 3
    assert give(store) == [1, 3]
    assert store.books.dropped["spool-full"].messages == 1
    store.close()


@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_what_is_under_way_is_never_dropped(tmp_path: Path, order: Order) -> None:
    store = Store(tmp_path / "s", ["store"], LEAST, "drop-oldest", order, durable=False)
    store.take([message(i) for i in range(1, 101)])
    way = store.next(30, 1 << 20)
    assert numbers(way) == (list(range(1, 31)) if order == "oldest" else list(range(100, 70, -1)))
    store.take([message(i) for i in range(101, 1001)])
    balanced(store)
    store.close()
    # killed: what was under way is sent first, in its order, and then the others
    store = Store(tmp_path / "s", ["store"], LEAST, "drop-oldest", order, durable=False)
    store.take([message(i) for i in range(1001, 1501)])
    again = store.next(30, 1 << 20)
    assert numbers(again) == numbers(way)
    store.done([item.number for item in again])
    rest = give(store)
    assert rest == sorted(rest, reverse=order == "newest")
    assert rest[-1 if order == "oldest" else 0] == 1500
    assert store.books.given.messages == 30 + len(rest)
    balanced(store)
    store.close()


def test_newest_first_goes_round_what_is_under_way(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", ["store"], LEAST, "block", "newest", durable=False)
    store.take([message(i) for i in range(1, 21)])
    first = store.next(5, 1 << 20)
    store.take([message(i) for i in range(21, 25)])
    second = store.next(10, 1 << 20)
    assert numbers(first) == [20, 19, 18, 17, 16]
    assert numbers(second) == [24, 23, 22, 21, 15, 14, 13, 12, 11, 10]
    store.done([item.number for item in first[1:3]])
    assert numbers(store.next(100, 1 << 20)) == list(range(9, 0, -1))
    assert store.unsent == 0
    balanced(store)
    store.close()


def test_too_large_for_the_far_side_is_dead_not_given(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", ["store"], LEAST, "block", "oldest", durable=False)
    store.take([message(1), message(2, rows=4)])
    items = store.next(2, 1 << 20)
    store.done([items[1].number], dead=True)
    store.done([items[0].number])
    assert (store.books.dead.rows, store.books.given.rows) == (4, 1)
    balanced(store)
    store.close()


def test_what_the_disk_lost_is_in_the_books(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", ["store"], LEAST, "block", "oldest", durable=False)
    store.take([message(i, rows=2) for i in range(1, 21)])
    path = min(store.spool.folder.glob("*.seg"))
    data = bytearray(path.read_bytes())
    data[2 * (FRAME + len(label(TOPIC, 2, None)) + len(message(1, rows=2).payload)) + 300] ^= 1
    path.write_bytes(data)
    assert give(store) == [i for i in range(1, 21) if i != 3]
    assert store.books.dropped["damaged"].rows == 2
    balanced(store)
    store.take([message(i) for i in range(21, 101)])
    lost = sorted(store.spool.folder.glob("*.seg"))[2]
    store.close()
    lost.unlink()
    store = Store(tmp_path / "s", ["store"], LEAST, "block", "oldest", durable=False)
    assert store.books.dropped["damaged"].messages > 3
    balanced(store)
    assert len(give(store)) + store.books.dropped["damaged"].messages == 100 - 19
    balanced(store)
    store.close()


def test_the_end_is_kept_and_the_books_of_a_relay_that_does_not_run_can_be_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "r" / "meter.out", ["store", "show"], LEAST, "block", "oldest", durable=False)
    store.take([message(i) for i in range(1, 11)])
    give(store, 4)
    assert store.end(Close("meter:end", "meter", 5), 7, 11)
    books = store.books
    store.close()
    ledger = left(tmp_path / "r", "relay-gateway-cloud")
    assert ledger is not None
    assert ledger.held == 6
    assert ledger.spooled
    kept = ledger.spooled["meter.out"]
    assert (kept.taken, kept.given, kept.held, kept.readers) == (books.taken, books.given, books.held, books.readers)
    store = Store(tmp_path / "r" / "meter.out", ["store"], LEAST, "block", "oldest", durable=False)
    assert store.state.end == Close("meter:end", "meter", 5)
    assert store.state.floor == (7, 11)
    store.close()
    store.remove()
    assert left(tmp_path / "r", "relay-gateway-cloud") is None


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("overflow", ["block", "drop-oldest", "drop-newest"])
def test_on_a_full_disk_nothing_is_dropped_and_it_goes_on(tmp_path: Path, overflow: str) -> None:
    store = Store(tmp_path / "s", ["store"], 40 * LEAST, overflow, "oldest")
    batch = [message(i) for i in range(1, 801)]
    assert store.take(batch[:100]) == 100
    with files_at_most(70_000):
        dealt = store.take(batch[100:])
        assert dealt < 100
        assert store.take(batch[100 + dealt :]) == 0
    with files_at_most(0):  # what is there goes on all the same
        assert give(store, 50) == list(range(1, 51))
        assert store.take(batch[100 + dealt :]) == 0
    assert store.take(batch[100 + dealt :]) == 700 - dealt
    assert give(store) == list(range(51, 801))
    assert store.books.dropped == {}
    assert store.books.taken.messages == store.books.given.messages == 800
    balanced(store)
    store.close()


RUNNER = """
import random, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_relay_store import message, numbers
from nodes.relay_store import Store

folder, overflow, order, upto, seed = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
done = int(sys.argv[6])
draw = random.Random(seed)
say = lambda text: (sys.stdout.write(text + "\\n"), sys.stdout.flush())
store = Store(folder, ["store"], 131072, overflow, order, durable=False)
epoch = store.epochs[-1]
way = []
say("ready")
while done < upto or store.unsent or way:
    act = draw.random()
    if act < 0.5 and done < upto:
        n = min(upto - done, draw.randrange(1, 40))
        dealt = store.take([message(done + 1 + i, epoch=epoch, rows=1 + (done + 1 + i) % 3) for i in range(n)])
        done += dealt
        say(f"took {{done}}")
    elif (act < 0.75 or done >= upto) and len(way) < 60:
        items = store.next(draw.randrange(1, 20), 1 << 20)
        say("sent " + " ".join(map(str, numbers(items))))
        way += [i.number for i in items]
    if way and (draw.random() < 0.3 or done >= upto):
        n = draw.randrange(1, len(way) + 1)
        store.done(way[:n])
        way = way[n:]
books = store.books
dropped = sum(f.messages for f in books.dropped.values()), sum(f.rows for f in books.dropped.values())
flows = books.taken, books.given
say("books " + " ".join(str(n) for f in flows for n in (f.messages, f.rows)) + f" {{dropped[0]}} {{dropped[1]}}")
"""


@pytest.mark.parametrize("order", ["oldest", "newest"])
@pytest.mark.parametrize("overflow", ["block", "drop-oldest", "drop-newest"])
def test_killed_at_any_moment_the_books_are_those_of_what_was_sent(tmp_path: Path, overflow: str, order: str) -> None:
    """The child is killed again and again; what it said before is what its neighbours know. What it sent counts as given,
    and nothing else does; a message that it did not send is dropped, and that is known too.
    """
    code = RUNNER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    draw = random.Random(f"{overflow}{order}")
    total, taken = 2000, 0
    got: set[int] = set()
    first_sight: list[int] = []
    for life in range(6):
        command = [sys.executable, "-c", code, str(tmp_path / "s"), overflow, order, str(total), str(life), str(taken)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        lines = []
        if life < 5:
            lines = list(islice(process.stdout, draw.randrange(1, 30)))
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait()
        process.stdout.close()
        lines += [line for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
        for line in lines:
            word, *values = line.split()
            if word == b"took":
                taken = int(values[0])
            elif word == b"sent":
                first_sight += [int(v) for v in values if int(v) not in got]
                got |= {int(v) for v in values}
            else:
                books = [int(v) for v in values]
    rows = sum(1 + i % 3 for i in range(1, total + 1))
    assert books[:2] == [total, rows]
    assert books[2:4] == [len(got), sum(1 + i % 3 for i in got)]
    assert books[4:] == [total - len(got), rows - sum(1 + i % 3 for i in got)]
    if overflow == "block":
        assert len(got) == total
    else:
        assert len(got) < total
    if order == "oldest":
        assert first_sight == sorted(first_sight)


def test_labels() -> None:
    assert label("a/b", 1, None) == "a/b"
    for rows, trace in ((1, "00-1"), (7, None), (0, "00-2")):
        assert unlabel(label("a/b", rows, trace)) == ("a/b", rows, trace or "")
    assert unlabel("a/b") == ("a/b", 1, "")


def test_sizes_are_those_of_the_spool(tmp_path: Path) -> None:
    size = FRAME + len(TOPIC) + len(message(1).payload)
    fit = (LEAST - RESERVE) // size
    store = Store(tmp_path / "s", ["store"], LEAST, "drop-newest", "oldest", durable=False)
    store.take([message(100 + i) for i in range(27)])
    assert store.take([message(128 + i) for i in range(100)]) == 100
    assert store.books.held.messages == min(127, fit)
    store.close()
