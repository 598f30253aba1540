"""The store of examples: bounded, the same whatever comes twice, whole after SIGKILL."""

from __future__ import annotations

import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.federated.examples import Example, ExampleStore, MisshapenError, Policy
from schemas.errors import ConfigError, RunError, SinkAwayError

ROOT = Path(__file__).resolve().parents[2]


def example(number: int, label: int = 0, *, time: int | None = None) -> Example:
    x = np.full((2, 3), number % 251, np.uint8)
    return Example(f"camera:1:{number}", number if time is None else time, x, label)


def numbers(store: ExampleStore) -> list[int]:
    return [int(v) for v in store.to_learn().x[:, 0, 0]]


def test_the_latest_stay_in_the_order_of_their_times() -> None:
    store = ExampleStore(None, keep=5)
    store.add([example(i, i % 3) for i in (3, 1, 2, 0)])
    assert numbers(store) == [0, 1, 2, 3]
    store.add([example(i, i % 3) for i in range(4, 9)])
    learned = store.to_learn()
    assert numbers(store) == [4, 5, 6, 7, 8]
    assert learned.x.dtype == np.float32
    assert learned.y.tolist() == [1, 2, 0, 1, 2]
    store.add([example(2)])
    assert numbers(store) == [4, 5, 6, 7, 8], "older than all that are here"
    assert store.counts() == {0: 1, 1: 2, 2: 2}
    assert len(store) == store.learnable == 5


def test_of_equal_times_those_that_came_last_stay() -> None:
    store = ExampleStore(None, keep=3)
    for i in range(7):
        store.add([example(i, time=5)])
    assert numbers(store) == [4, 5, 6]


@pytest.mark.parametrize("policy", ["latest", "reservoir", "balanced"])
def test_what_comes_again_changes_nothing(policy: Policy) -> None:
    store = ExampleStore(None, keep=20, policy=policy)
    stream = [example(i, i % 2) for i in range(100)]
    store.add(stream)
    before, version = sorted(numbers(store)), store.version
    for i in range(0, 100, 10):
        store.add(stream[i : i + 10])
    assert sorted(numbers(store)) == before
    assert len(before) == 20
    if policy != "balanced":
        assert store.version == version, "what is displaced at once is not written"


def test_a_reservoir_is_a_uniform_sample_of_all_that_came() -> None:
    seen: Counter[int] = Counter()
    for turn in range(200):
        store = ExampleStore(None, keep=10, policy="reservoir")
        for start in range(0, 50, 7):
            store.add([Example(f"{turn}:{i}", i, np.array([i], np.uint8), 0) for i in range(start, min(start + 7, 50))])
        seen.update(int(v) for v in store.to_learn().x[:, 0])
    assert sum(seen.values()) == 2000
    halves = sum(seen[i] for i in range(25)), sum(seen[i] for i in range(25, 50))
    assert abs(halves[0] - halves[1]) < 200, "early ones and late ones have the same chance (4.5 σ)"


def test_balanced_keeps_a_rare_class() -> None:
    store = ExampleStore(None, keep=30, policy="balanced")
    for i in range(1000):
        store.add([example(i, 0 if i % 100 else 1 + i // 500)])
    assert store.counts() == {0: 20, 1: 5, 2: 5}
    for i in range(1000, 1200):
        store.add([example(i, 3)])
    assert store.counts() == {0: 10, 1: 5, 2: 5, 3: 10}


def test_the_budget_in_bytes_counts_too() -> None:
    store = ExampleStore(None, keep=1000, size=10 * (6 + 64))
    store.add([example(i) for i in range(50)])
    assert numbers(store) == list(range(40, 50))


def test_some_are_set_aside_always_the_same_ones() -> None:
    one, other = ExampleStore(None, held=0.2), ExampleStore(None, held=0.2)
    stream = [example(i) for i in range(500)]
    one.add(stream)
    random.Random(1).shuffle(stream)
    for each in stream:
        other.add([each])
    assert 60 < len(one.held_out()) < 140
    assert len(one.held_out()) + one.learnable == 500
    assert np.array_equal(one.held_out().x, other.held_out().x)


def test_values_are_scaled_when_they_are_read() -> None:
    store = ExampleStore(None, factor=0.5)
    store.add([example(7)])
    assert np.array_equal(store.to_learn().x, np.full((1, 2, 3), 3.5, np.float32))


def test_numbers_are_labels_too() -> None:
    store = ExampleStore(None, numbers=True, keep=2)
    store.add([Example(str(i), i, np.zeros(1, np.float32), i / 4) for i in range(3)])
    assert store.to_learn().y.tolist() == [0.25, 0.5]
    assert store.to_learn().y.dtype == np.float32
    assert store.counts() == {0: 2}
    with pytest.raises(ConfigError, match="no classes to balance"):
        ExampleStore(None, numbers=True, policy="balanced")


def test_another_form_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "examples.sqlite"
    store = ExampleStore(path)
    store.add([example(0)])
    with pytest.raises(MisshapenError, match=r"uint8 \[3\]; the examples before are uint8 \[2, 3\]"):
        store.add([example(1), Example("a", 0, np.zeros(3, np.uint8), 0)])
    with pytest.raises(MisshapenError, match="float32"):
        store.add([Example("a", 0, np.zeros((2, 3), np.float32), 0)])
    assert numbers(store) == [0]
    store.close()
    again = ExampleStore(path)
    assert again.form == ("|u1", (2, 3)), "also by a later life"
    with pytest.raises(MisshapenError):
        again.add([Example("a", 0, np.zeros(3, np.uint8), 0)])
    again.close()


def test_nothing_there_is_an_answer_too() -> None:
    store = ExampleStore(None)
    store.add([])
    assert len(store.to_learn()) == len(store) == store.learnable == 0
    assert store.counts() == {}
    assert store.form is None


def test_a_locked_file_is_tried_again_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "examples.sqlite"
    store = ExampleStore(path)
    store._db.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(SinkAwayError, match="locked"):
        store.add([example(0)])
    assert len(store) == 0
    other.execute("ROLLBACK")
    other.close()
    store.add([example(0)])
    assert len(store) == 1
    store.close()
    path.write_bytes(b"something else" * 100)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    with pytest.raises(RunError, match="cannot be used"):
        ExampleStore(path)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=80),
    st.sampled_from(["latest", "reservoir", "balanced"]),
    st.integers(1, 12),
)
def test_the_books_of_the_store_are_right_whatever_comes(
    stream: list[tuple[int, int]], policy: Policy, keep: int
) -> None:
    store = ExampleStore(None, keep=keep, policy=policy, held=0.3)
    known: dict[int, int] = {}
    for number, label in stream:
        label = known.setdefault(number, label)
        store.add([example(number, label)])
    learned, held = store.to_learn(), store.held_out()
    assert len(learned) == store.learnable
    assert len(learned) + len(held) == len(store) == min(keep, len(known))
    labels = Counter(learned.y.tolist()) + Counter(held.y.tolist())
    assert store.counts() == dict(sorted(labels.items()))
    if policy == "latest":
        stay = sorted(int(x.flat[0]) for some in (learned.x, held.x) for x in some)
        assert stay == sorted(known)[-keep:]


_WRITER = """
from pathlib import Path
import sys
import numpy as np
from nodes.federated.examples import Example, ExampleStore
store = ExampleStore(Path(sys.argv[1]), keep=300, policy="balanced")
for start in range(0, 10**9, 16):
    store.add([Example(str(i), i, np.full(200, i % 7, np.uint8), i % 7) for i in range(start, start + 16)])
    print(start + 16, flush=True)
"""


def test_it_is_whole_after_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "examples.sqlite"
    drawn = random.Random(5)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(drawn.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        told = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        writer.stdout.close()
        store = ExampleStore(path, keep=300, policy="balanced")
        learned = store.to_learn()
        assert len(learned) == len(store) >= min(300, told[-1] if told else 16)
        assert (learned.x == learned.y[:, None]).all(), "each has its own label"
        store.close()


def test_five_thousand_images_are_arrays_within_moments_and_little_memory(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "examples.sqlite", keep=5000)
    block = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for start in range(0, 5000, 250):
        store.add([Example(f"c:{i}", i, block + i % 100, i % 10) for i in range(start, start + 250)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learned = store.to_learn()
    assert learned.x.shape == (5000, 8, 8)
    assert store.to_learn() is learned, "kept until something changes"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12 * 1024, "1.3 MB of arrays"
    store.add([example_like(block)])
    assert store.to_learn() is not learned
    store.close()


def example_like(x: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Example:
    return Example("new", 10**6, x, 3)
