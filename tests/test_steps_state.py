"""However a stream is cut into calls, and wherever the state is kept and restored, the answer is the same, id for id."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steps_kit import books, operator, plain, reading

from nodes.operator import Emit, Operator
from nodes.steps._state import Memory
from schemas import codec
from schemas.messages import Message

PIPELINES: list[list[Any]] = [
    [{"filter": "x > 0"}],
    [{"derive": {"y": "coalesce(x, 0) * 2", "z": "label == 'a'"}}, {"select": ["y", "z"]}],
    [{"rename": {"x": "value"}}, {"convert": {"value": "°C -> °F"}}],
    [{"fill": {"previous": ["x", "label"]}}],
    [{"fill": {"previous": ["x"], "within": "2s", "fields": {"label": "?"}}}],
    [{"split": {"high": "x > 2", "low": "x < -2"}}, {"on-change": ["label"]}],
    ["dedupe"],
    [{"dedupe": {"by": ["label"], "within": "3s"}}],
    [{"on-change": ["x"]}],
    [{"deadband": {"x": 1}}],
    [{"deadband": {"x": "20%", "n": [2, 4]}}],
    [{"throttle": "2s"}],
    [{"filter": "label != 'b'"}, {"throttle": "1s"}, {"derive": {"k": "n + 1"}}, {"deadband": {"k": 1}}],
    [{"resample": "1s"}],
    [{"resample": {"period": "3s", "method": "mean"}}],
    [{"resample": {"period": "700ms", "method": "linear", "gap": "2s"}}, {"filter": "x > 0"}],
    [{"window": {"size": 3, "fields": ["x", "n"]}}],
    [{"window": {"size": 4, "hop": 1, "fields": ["x"], "gap": "5s"}}, "fft"],
    [{"window": {"size": 2, "hop": 5, "fields": ["n"]}}],
    [{"resample": "1s"}, {"window": {"size": 2, "fields": ["x"]}}],
]

ROW = st.tuples(
    st.sampled_from([-3.0, -1.0, 0.0, 0.4, 1.0, 2.5, 3.0, None]),
    st.sampled_from(["a", "b", None]),
    st.integers(0, 5),
    st.sampled_from(["s1", "s2"]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0, -1.0]),
)


@st.composite
def streams(draw: st.DrawFn) -> list[Message]:
    messages: list[Message] = []
    now = 100.0
    for number, rows in enumerate(draw(st.lists(st.lists(ROW, max_size=4), max_size=9))):
        times = []
        for row in rows:
            now += row[4]
            times.append(now)
        columns: dict[str, Any] = {
            "x": np.array([np.nan if r[0] is None else r[0] for r in rows], np.float64),
            "label": [r[1] for r in rows],
            "n": np.array([r[2] for r in rows], np.int64),
        }
        if draw(st.integers(0, 9)) == 0:
            del columns[draw(st.sampled_from(sorted(columns)))]
        if isinstance(columns.get("label"), list) and all(v is None for v in columns["label"]):
            columns["label"] = np.full(len(rows), np.nan)  # as ingest sends a column that is all missing
        per_row = [r[3] for r in rows] if draw(st.booleans()) else None
        messages.append(
            reading(number, columns, time=times, per_row=per_row, source=draw(st.sampled_from(["s1", "s2"])))
        )
    return messages


@pytest.mark.parametrize(
    "steps", PIPELINES, ids=lambda s: "+".join(k if isinstance(k, str) else next(iter(k)) for k in s)
)
@given(streams(), st.lists(st.integers(1, 4), max_size=9))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_batches_do_not_show(steps: list[Any], messages: list[Message], sizes: list[int]) -> None:
    whole, emit = books(operator(*steps), messages)
    cut, other = books(operator(*steps), messages, sizes, keep=True)
    single, third = books(operator(*steps), messages, [1] * len(messages))
    by_port = {port: [m for m in plain(whole) if m[0] == port] for port, _ in whole}
    for sent, its in ((cut, other), (single, third)):
        assert {port: [m for m in plain(sent) if m[0] == port] for port, _ in sent} == by_port
        assert (its.filtered, its.absorbed, its.dropped) == (emit.filtered, emit.absorbed, emit.dropped)
        assert sorted((m.id, why) for m, why, _ in its.dead) == sorted((m.id, why) for m, why, _ in emit.dead)
    for port in {port for port, _ in whole}:
        ids = [m.id for p, m in whole if p == port]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("steps", PIPELINES, ids=str)
def test_what_comes_off_the_wire_is_only_read(steps: list[Any]) -> None:
    """Decoded arrays are read-only views on the received bytes, aligned or not."""
    fresh = [
        reading(i, {"x": [float(i % 4), None], "label": ["a", "b"], "n": np.array([i, 1])}, time=[i, i + 0.5])
        for i in range(9)
    ]
    received = [decode(bytes(i % 8) + encode(m), skip=i % 8) for i, m in enumerate(fresh)]
    assert plain(books(operator(*steps), received)[0]) == plain(books(operator(*steps), fresh)[0])


def decode(payload: bytes, *, skip: int) -> Message:
    return codec.decode(memoryview(payload)[skip:])


def encode(message: Message) -> bytes:
    return codec.encode(message)


class _FaultError(Exception):
    pass


@pytest.mark.parametrize("steps", PIPELINES[5:], ids=str)
def test_a_call_that_fails_had_no_effect(steps: list[Any]) -> None:
    """What the runtime does after an exception, one message at a time, gives what would have been without it."""
    first = [
        reading(i, {"x": [float(i), None], "label": ["a", "b"], "n": np.array([i, 1])}, time=[i, i + 0.5])
        for i in range(3)
    ]
    second = [
        reading(i, {"x": [i / 2, 4.0], "label": ["b", "a"], "n": np.array([i, 1])}, time=[i, i + 0.5])
        for i in range(3, 8)
    ]
    calm, shaken = operator(*steps), operator(*steps)
    for node in (calm, shaken):
        node.process(first, "e", Emit())
    before = shaken.snapshot()
    last: Any = shaken.steps[-1]  # type: ignore[attr-defined]
    original = last.process

    def failing(messages: list[Message], emit: Emit) -> list[Message]:
        original(messages, emit)
        raise _FaultError

    last.process = failing
    with pytest.raises(_FaultError):
        shaken.process(second, "e", Emit())
    last.process = original
    assert _comparable(shaken.snapshot()) == _comparable(before)
    expected, got = Emit(), Emit()
    calm.process(second, "e", expected)
    shaken.process(second, "e", got)
    assert plain(got.sent) == plain(expected.sent)


def _comparable(state: Any) -> Any:
    """Order of the sources in a memory is only its order of forgetting; NaN equals NaN."""
    if isinstance(state, list):
        parts = [_comparable(v) for v in state]
        return sorted(parts, key=repr) if all(isinstance(p, list) for p in parts) else parts
    if isinstance(state, dict):
        return {k: _comparable(v) for k, v in state.items()}
    return "nan" if state != state else state


def test_memory_is_bounded_and_undoes() -> None:
    memory: Memory[str, int] = Memory(3)
    for i, key in enumerate("abcd"):
        memory.set(key, i)
    assert dict(memory.items()) == {"b": 1, "c": 2, "d": 3}
    memory.begin()
    memory.set("b", 9)
    memory.set("e", 4)
    memory.forget("d")
    assert dict(memory.items()) == {"b": 9, "e": 4}
    memory.rollback()
    assert dict(memory.items()) == {"b": 1, "c": 2, "d": 3}
    other: Memory[str, int] = Memory(3)
    other.restore(memory.snapshot())
    assert dict(other.items()) == dict(memory.items())


def test_stateless_steps_keep_nothing() -> None:
    node: Operator = operator({"filter": "x > 0"}, {"derive": {"y": "1"}})
    books(node, [reading(1, {"x": [1]})])
    assert node.snapshot() is None
