"""Blobs on a disk: what survives a restart, a kill, a full disk, two writers; what is evicted; what is damaged."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from blob_link import BEGIN
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.blob_format import Ack, BlobError, Chunk, Held, Offer, offer
from broker.blob_receive import Incoming
from broker.blob_store import BlobStore
from broker.spool_figures import NoRoomError
from schemas.errors import BusError

ROOT = Path(__file__).parents[2]
BUDGET = 1_000_000


def content(size: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(size)


def chunks(data: bytes, wanted: Offer) -> list[bytes]:
    view = memoryview(data)
    return [
        Chunk(wanted.digest, i, view[i * wanted.chunk : i * wanted.chunk + wanted.length(i)]).encode()
        for i in range(wanted.count)
    ]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """No file takes a byte beyond ``size``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_put_is_there_after_a_restart(tmp_path: Path) -> None:
    data = content(100_000)
    with BlobStore(tmp_path / "b", BUDGET) as store:
        digest = store.put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert store.put(data) == digest
        empty = store.put(b"")
        assert store.used == len(data)
    with BlobStore(tmp_path / "b", BUDGET) as store:
        assert set(store.digests()) == {digest, empty}
        with store.open(digest) as blob, store.open(empty) as nothing:
            assert blob.view() == data
            assert blob.read(99_990, 100) == data[-10:]
            assert blob.offer(1024) == offer(data, 1024)
            assert (nothing.size, bytes(nothing.view()), nothing.read(0, 9)) == (0, b"", b"")
        assert names(store.folder) == {digest, empty}


def test_a_view_outlives_the_blob(tmp_path: Path) -> None:
    with BlobStore(tmp_path / "b", BUDGET) as store:
        digest = store.put(content(5000))
        with store.open(digest) as blob:
            view = blob.view()
        store.remove(digest)
        assert view == content(5000)
        assert digest not in store
        with pytest.raises(BlobError, match="no blob"):
            store.open(digest)


@pytest.mark.parametrize("wrong", ["../lock", "", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "é" * 64])
def test_nothing_but_a_digest_names_a_file(tmp_path: Path, wrong: str) -> None:
    with BlobStore(tmp_path / "b", BUDGET) as store:
        store.remove(wrong)
        assert (tmp_path / "b" / "lock").exists()
        with pytest.raises(BlobError) as caught:
            store.open(wrong)
        assert caught.value.reason == "absent"
        with pytest.raises(BlobError) as caught:
            store.partial(Offer(wrong, 10, 1024))
        assert caught.value.reason == "bad-offer"


def test_one_process_at_a_time_and_a_folder_that_is_none(tmp_path: Path) -> None:
    with BlobStore(tmp_path / "b", BUDGET), pytest.raises(BusError, match="in use"):
        BlobStore(tmp_path / "b", BUDGET)
    BlobStore(tmp_path / "b", BUDGET).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(BusError, match="cannot be used"):
        BlobStore(tmp_path / "file", BUDGET)


def test_the_least_recently_used_goes_first_unless_it_is_in_use(tmp_path: Path) -> None:
    with BlobStore(tmp_path / "b", 1000) as store:
        a, b, _ = (store.put(content(300, seed)) for seed in (1, 2, 3))
        store.pin(a)
        with store.open(b):
            d = store.put(content(300, 4))
            assert set(store.digests()) == {a, b, d}
            store.pin(d)
            with pytest.raises(BlobError) as caught:
                store.put(content(300, 5))
            assert caught.value.reason == "no-room"
            with pytest.raises(BlobError) as caught:
                store.partial(Offer("0" * 64, 300, 1024))
            assert caught.value.reason == "no-room"
        e = store.put(content(300, 5))
        assert set(store.digests()) == {a, d, e}
        store.unpin(a)
        with pytest.raises(BlobError) as caught:
            store.put(content(1001))
        assert caught.value.reason == "too-big"
        store.open(a).close()  # used now
    with BlobStore(tmp_path / "b", 700) as store:  # a smaller budget holds at once, and the order is remembered
        assert store.digests() == [e, a]


def test_an_offer_beyond_the_cap_takes_nothing(tmp_path: Path) -> None:
    with BlobStore(tmp_path / "b", 1 << 40) as store:
        for size, most in ((1 << 39, 1000), (1001, 1000)):
            with pytest.raises(BlobError) as caught:
                store.partial(Offer("0" * 64, size, 1 << 20), most)
            assert caught.value.reason == "too-big"
        with pytest.raises(BlobError) as caught:
            store.partial(Offer("0" * 64, 1 << 39, 256))
        assert caught.value.reason == "bad-offer"  # its bitmap would be 256 MiB
        assert names(store.folder) == set()
        assert store.used == 0


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(0, 20_000),
    order=st.randoms(use_true_random=False),
    restarts=st.lists(st.integers(0, 25), max_size=4),
    sizes=st.lists(st.sampled_from([512, 1000, 1024, 4096]), min_size=5, max_size=5),
)
def test_it_goes_on_where_it_was_even_in_chunks_of_another_size(
    tmp_path_factory: pytest.TempPathFactory, size: int, order: Random, restarts: list[int], sizes: list[int]
) -> None:
    data, folder = content(size), tmp_path_factory.mktemp("b")
    written = 0
    for number, taken in enumerate([*restarts, 1 << 30]):
        with BlobStore(folder, BUDGET, durable=False) as store:
            wanted = offer(data, sizes[number])
            with store.partial(wanted) as partial:
                all_ = list(range(wanted.count))
                order.shuffle(all_)
                for index in all_[:taken]:
                    at = index * wanted.chunk
                    piece = memoryview(data)[at : at + wanted.length(index)]
                    if partial.write(index, piece):
                        written += len(piece)
                if partial.held.full:
                    assert partial.finish()
                    assert partial.whole
    with BlobStore(folder, BUDGET) as store, store.open(offer(data).digest) as blob:
        assert blob.view() == data
        assert names(folder) == {blob.digest}
    if len(set(sizes[: len(restarts) + 1])) == 1:
        assert written == size


KILLED = """
import sys
from pathlib import Path
from broker.blobs import Chunk, Incoming, Offer
from broker.blob_store import BlobStore
store = BlobStore(Path(sys.argv[1]), 1 << 30)
offer = Offer(sys.argv[2], int(sys.argv[3]), 1024)
come = Incoming(store.partial(offer), 1)
print(come.hold.held.total, flush=True)
data = sys.stdin.buffer
for index in range(come.hold.held.edge, offer.count):
    come.take(Chunk(offer.digest, index, memoryview(data.read(offer.length(index)))), index)
    print(index, flush=True)
"""


def test_killed_at_any_moment_it_keeps_what_it_had(tmp_path: Path) -> None:
    data, draw, had = content(400_000), Random(3), 0
    wanted = offer(data, 1024)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "b"), wanted.digest, str(wanted.size)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            began = int(process.stdout.readline())
            assert began >= had
            given = draw.randint(2, 60)
            process.stdin.write(data[began * 1024 : (began + given) * 1024])
            for _ in range(draw.randint(1, given)):
                had = int(process.stdout.readline()) + 1
            process.kill()
    with BlobStore(tmp_path / "b", BUDGET) as store, store.partial(wanted) as partial:
        assert wanted.count > partial.held.edge >= had
        come = Incoming(partial, BEGIN)
        for payload in chunks(data, wanted)[partial.held.edge :]:
            assert come.take(payload, BEGIN) == "new"
        assert come.whole
        with store.open(wanted.digest) as blob:
            assert blob.view() == data


def test_a_corrupted_chunk_is_found_and_all_comes_again(tmp_path: Path) -> None:
    data = content(10_000)
    wanted = offer(data, 1024)
    good = chunks(data, wanted)
    bad = chunks(data[:5000] + b"?" + data[5001:], wanted)[4]
    with BlobStore(tmp_path / "b", BUDGET) as store, store.partial(wanted) as partial:
        come = Incoming(partial, BEGIN)
        for payload in (*good[:4], bad, *good[5:]):
            come.take(payload, BEGIN)
        assert (come.spoiled, come.whole, partial.held.total) == (1, False, 0)
        assert wanted.digest not in store
        assert names(store.folder) == {partial.name, partial.name.replace(".part", ".map")}
        for payload in good:
            come.take(payload, BEGIN)
        assert come.whole
        assert names(store.folder) == {wanted.digest}


def test_a_damaged_file_is_set_aside_and_can_come_again(tmp_path: Path) -> None:
    data = content(3_000_000)
    with BlobStore(tmp_path / "b", 1 << 23) as store:
        digest, other = store.put(data), store.put(b"fine")
        with (store.folder / digest).open("r+b") as file:
            file.seek(2_500_000)
            file.write(b"?")
        store.open(digest).close()  # this process wrote it and does not look again
    with BlobStore(tmp_path / "b", 1 << 23) as store:
        assert store.audit() == [digest]
        with pytest.raises(BlobError) as caught:
            store.open(digest)
        assert caught.value.reason == "absent"
        assert names(store.folder) == {f"{digest}.damaged", other}
        assert store.put(data) == digest
        with store.open(digest) as blob:
            assert blob.view() == data
        os.truncate(store.folder / digest, 10)
        os.unlink(store.folder / other)
        assert set(store.audit()) == {digest, other}
        assert store.digests() == []


def test_a_damaged_file_makes_room_first(tmp_path: Path) -> None:
    with BlobStore(tmp_path / "b", 1000) as store:
        kept, bad = store.put(content(400, 1)), store.put(content(400, 2))
        (store.folder / bad).write_bytes(b"?" * 400)
        assert store.audit() == [bad]
        store.put(content(400, 3))
        assert kept in store
        assert len(names(store.folder)) == 2


def test_a_full_disk_stops_it_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    data = content(20_000)
    wanted = offer(data, 1024)
    sent = chunks(data, wanted)
    with BlobStore(tmp_path / "b", BUDGET) as store, store.partial(wanted) as partial:
        come = Incoming(partial, BEGIN)
        assert come.say(BEGIN) is not None
        with full_disk(5000):
            took = [come.take(payload, BEGIN) for payload in sent]
            assert took == ["new"] * 4 + ["no-room"] * 16
            assert come.lack is not None
            said = come.say(BEGIN)
            assert said is not None
            assert Ack.decode(said).upto == 4
            assert come.take(sent[4], BEGIN) == "no-room"
            assert come.say(BEGIN) is None  # the sender waits, and tries again
            with pytest.raises(NoRoomError):
                store.put(content(6000, 1))
        assert names(store.folder) == {partial.name, partial.name.replace(".part", ".map")}
        took = [come.take(payload, BEGIN) for payload in sent]
        assert took == ["repeat"] * 4 + ["new"] * 16
        assert come.whole
        assert store.used == len(data)


def test_a_tmpfs_that_is_full(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "blobs", folder], check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        data = content(100_000)
        wanted = offer(data, 4096)
        with BlobStore(folder / "b", BUDGET) as store, store.partial(wanted) as partial:
            come = Incoming(partial, BEGIN)
            took = [come.take(payload, BEGIN) for payload in chunks(data, wanted)]
            assert "new" in took
            assert took[-1] == "no-room"
            assert come.hold.held.total == took.count("new")
            with pytest.raises(NoRoomError):
                store.put(data)
            subprocess.run(["mount", "-o", "remount,size=1m", folder], check=True)
            for payload in chunks(data, wanted):
                come.take(payload, BEGIN)
            assert come.whole
            with store.open(wanted.digest) as blob:
                assert bytes(blob.view()) == data
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_two_writers_of_one_digest_in_two_threads(tmp_path: Path) -> None:
    """In the same chunks and in others, beside one that puts it as a whole, all at once."""
    data = content(300_000)
    with BlobStore(tmp_path / "b", 4 * BUDGET, durable=False) as store:
        for _ in range(5):
            start, faults = threading.Barrier(5), list[BaseException]()

            def write(size: int, start: threading.Barrier = start, faults: list[BaseException] = faults) -> None:
                try:
                    wanted = offer(data, size)
                    with store.partial(wanted) as partial:
                        come = Incoming(partial, BEGIN)
                        start.wait()
                        for payload in chunks(data, wanted):
                            come.take(payload, BEGIN)
                        assert come.whole
                except BaseException as error:  # noqa: BLE001 # shown by the test
                    faults.append(error)

            threads = [threading.Thread(target=write, args=(size,)) for size in (1024, 1024, 4096, 1000)]
            for thread in threads:
                thread.start()
            start.wait()
            digest = store.put(data)
            for thread in threads:
                thread.join()
            assert faults == []
            assert names(store.folder) == {digest}
            assert store.used == len(data)
            assert store.audit() == []
            store.remove(digest)
            assert store.used == 0


def test_who_has_it_open_or_pinned_counts_whatever_happens_to_the_file(tmp_path: Path) -> None:
    with BlobStore(tmp_path / "b", 1000) as store:
        digest = store.put(content(600))
        before = store.open(digest)
        store.remove(digest)
        assert store.put(content(600)) == digest
        store.pin(digest)
        before.close()  # it had the file that was removed
        before.close()
        with pytest.raises(BlobError):
            store.put(content(500, 1))
        store.unpin(digest)
        store.unpin(digest)
        store.put(content(500, 1))
        assert digest not in store
        wanted = offer(content(300, 2), 256)
        with store.partial(wanted) as arriving:
            store.put(content(300, 2))
            with store.open(wanted.digest):
                for index, payload in enumerate(chunks(content(300, 2), wanted)):
                    arriving.write(index, Chunk.decode(payload).data)
            assert arriving.whole
        store.put(content(900, 3))  # nobody has any of it open now
        assert names(store.folder) == {offer(content(900, 3)).digest}


def test_what_is_left_of_a_crash_is_put_in_order(tmp_path: Path) -> None:
    data = content(5000)
    wanted = offer(data, 1024)
    with BlobStore(tmp_path / "b", BUDGET) as store, store.partial(wanted) as partial:
        assert partial.write(0, memoryview(data)[:1024])
        name = partial.name
    folder = tmp_path / "b"
    (folder / "abc.1.new").write_bytes(b"half")
    (folder / "orphan.map").write_bytes(b"\xff")
    (folder / name.replace(".part", ".map")).write_bytes(b"\xff" * 1000)  # says more than there can be, and is wrong
    (folder / "notes.txt").write_text("somebody else's")
    with BlobStore(folder, BUDGET) as store, store.partial(wanted) as partial:
        assert names(folder) == {name, name.replace(".part", ".map"), "notes.txt"}
        come = Incoming(partial, BEGIN)  # it is full, it seems: looked at, and found to be nothing
        assert come.spoiled == 1
        assert partial.held.total == 0
        for payload in chunks(data, wanted):
            come.take(payload, BEGIN)
        assert come.whole


@given(st.integers(1, 70), st.sets(st.integers(0, 69)))
def test_held_is_a_set(count: int, some: set[int]) -> None:
    some = {i for i in some if i < count}
    held = Held(count)
    assert all(held.add(i) for i in some)
    assert not any(held.add(i) for i in some)
    for each in (held, Held(count, bytes(held.bits) + b"\xff")):
        assert {i for i in range(count) if i in each} == some
        assert list(each.missing()) == [i for i in range(count) if i not in some]
        assert each.edge == next(each.missing(), count)
        assert (each.total, each.full) == (len(some), len(some) == count)
        assert each.top == max(some, default=-1) + 1
