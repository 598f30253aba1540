"""What fuzzing has found (``tests/fuzz/corpus``), and changes of it, in every test run; see ``run_fuzz.py``."""

from __future__ import annotations

import pytest
from fuzz_targets import TARGETS, read_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

# The codec of the client session panics on text that is not UTF-8; the session catches that, Python still tells of it.
PANICS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@PANICS
@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs(name: str) -> None:
    inputs = read_corpus(name)
    assert inputs, "the corpus is missing"
    for data in inputs:
        TARGETS[name](data)


def _changed(data: bytes, changes: list[tuple[int, int]], other: bytes, cut: int) -> bytes:
    made = bytearray(data)
    for at, byte in changes:
        if made:
            made[at % len(made)] = byte
    return bytes(made[: cut % (len(made) + 1)] + other)


@PANICS
@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs(name: str) -> None:
    inputs = st.sampled_from(read_corpus(name))
    changes = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)

    @given(st.builds(_changed, inputs, changes, st.just(b"") | inputs, st.integers(0, 400)))
    @settings(deadline=None, derandomize=True, max_examples=150)
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()
