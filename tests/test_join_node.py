"""Joins against their definition, under any interleaving of the inputs, batching and snapshots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.join import Config, build
from nodes.operator import Context, Emit, Flow
from nodes.windowing.pairing import Pairing
from schemas.errors import ConfigError
from schemas.messages import End, Event, Message, Model, Predictions, Readings

EDGES = ("weight.out", "camera-1.out")
HOME = Path()


def context(*edges: str) -> Context:
    return Context("plant", "both", HOME, HOME, inputs=edges or EDGES)


def operator(*edges: str, **options: Any) -> Pairing:
    config = Config.model_validate({"within": "2ns", **options})
    config.check(context(*edges))
    return build(config, context(*edges))


def reading(ident: str, time: int, source: str = "dev", **values: float | str) -> Message:
    columns: dict[str, Any] = {n: [v] if isinstance(v, str) else np.array([v]) for n, v in values.items()}
    return Message(ident, source, time, Readings(n=1, columns=columns))


def table(ident: str, *rows: tuple[int, str, float]) -> Message:
    body = Readings(
        n=len(rows),
        columns={"x": np.array([r[2] for r in rows])},
        time=np.array([r[0] for r in rows], np.int64),
        source=[r[1] for r in rows],
    )
    return Message(ident, "gateway", rows[0][0], body)


def plain(message: Message) -> tuple[str, str, int, dict[str, Any]]:
    assert isinstance(message.body, Readings)
    return message.id, message.source, message.time, {n: next(iter(c)) for n, c in message.body.columns.items()}


def test_nearest_partner_once_time_has_passed() -> None:
    op, emit = operator(), Emit()
    op.process([reading("w:1", 10, x=1.0)], EDGES[0], emit)
    op.process([reading("c:1", 8, x=5.0), reading("c:2", 11, x=6.0), reading("c:3", 12, x=7.0)], EDGES[1], emit)
    assert not emit.sent, "a row at 12 could still come"
    op.process([reading("c:4", 13, x=8.0)], EDGES[1], emit)
    assert [plain(m) for m in emit.messages()] == [("w:1", "dev", 10, {"x": 1.0, "camera_1_x": 6.0})]
    assert (emit.absorbed, op.held()) == (2, 3)
    op.finish(emit)
    assert (emit.absorbed, emit.filtered, op.held()) == (2, 3, 0)


def test_all_partners_and_row_numbers() -> None:
    op, emit = operator(match="all", by=[]), Emit()
    op.process([table("w:1", (10, "a", 1.0), (20, "b", 2.0))], EDGES[0], emit)
    op.process([reading("c:1", 9, y=5.0), reading("c:2", 11, y=6.0)], EDGES[1], emit)
    op.finish(emit)
    assert [plain(m) for m in emit.messages()] == [
        ("w:1/0/0", "a", 10, {"x": 1.0, "camera_1_y": 5.0}),
        ("w:1/0/1", "a", 10, {"x": 1.0, "camera_1_y": 6.0}),
    ]
    assert (emit.absorbed, emit.filtered) == (3, 1)


def test_three_inputs_left_and_outer() -> None:
    edges = ("a.out", "b.out", "c.out")
    for kind, expected in {
        "inner": ["1"],
        "left": ["1", "2"],
        "outer": ["1", "2", "b9/b"],
    }.items():
        op, emit = operator(*edges, type=kind), Emit()
        op.process([reading("1", 10, x=1.0), reading("2", 50, x=2.0)], "a.out", emit)
        op.process([reading("b1", 11, x=3.0), reading("b9", 90, x=4.0)], "b.out", emit)
        op.process([reading("c1", 9, x=5.0), reading("c2", 50, x=5.0)], "c.out", emit)
        op.finish(emit)
        assert [m.id for m in emit.messages()] == expected
        assert plain(emit.messages()[0])[3] == {"x": 1.0, "b_x": 3.0, "c_x": 5.0}
        assert emit.absorbed + emit.filtered == 6


def test_prefix_texts_and_fields_as_keys() -> None:
    op, emit = operator(by="line", prefix={"camera-1": "", "weight": "w_"}), Emit()
    op.process([reading("w:1", 1, line="a", x=1.0)], EDGES[0], emit)
    op.process([reading("c:1", 1, line="b", x=2.0), reading("c:2", 1, line="a", x=3.0)], EDGES[1], emit)
    op.finish(emit)
    assert plain(emit.messages()[0])[3] == {"w_line": "a", "w_x": 1.0, "line": "a", "x": 3.0}


def test_late_rows_a_full_buffer_and_frames_without_a_find() -> None:
    op, emit = operator(limit=2), Emit()
    op.process([reading("w:1", 10, x=1.0), reading("w:2", 9, x=1.0)], EDGES[0], emit)
    assert emit.dropped == {"late": 1}
    op.process([reading(f"w:{i}", 10 + i, x=1.0) for i in range(3, 6)], EDGES[0], emit)
    assert (emit.dropped, op.held()) == ({"late": 1, "buffer-full": 2}, 2)
    empty = Predictions(model=Model(name="m", version="1", digest=""), seen="f", boxes=np.zeros((0, 4), np.float32))
    op.process([Message("p:1", "dev", 100, empty)], EDGES[1], emit)
    assert (emit.filtered, op.held()) == (3, 0), "time went on; nothing was there to join with"


def test_detections_count_as_one_row() -> None:
    boxes = np.arange(8, dtype=np.float32).reshape(2, 4)
    model = Model(name="m", version="1", digest="")
    found = Predictions(model=model, seen="f", labels=["a", "b"], scores=np.array([0.9, 0.8], "<f4"), boxes=boxes)
    op, emit = operator(), Emit()
    op.process([reading("w:1", 10, x=1.0)], EDGES[0], emit)
    op.process([Message("p:1", "dev", 10, found)], EDGES[1], emit)
    op.finish(emit)
    assert (emit.absorbed, emit.filtered) == (2, 0)
    assert plain(emit.messages()[0])[3]["camera_1_label"] == "a"


def test_silence_answers_what_waits() -> None:
    op = operator(type="left", idle="5s")
    op.clock = lambda: 1000
    emit = Emit()
    assert op.wake() is None
    op.process([reading("w:1", 10, x=1.0)], EDGES[0], emit)
    assert op.wake() == 1000 + 5 * 10**9
    op.tick(5 * 10**9, emit)
    assert not emit.sent
    op.tick(1000 + 5 * 10**9, emit)
    assert [m.id for m in emit.messages()] == ["w:1"]
    assert op.wake() is None


def test_an_ended_input_is_not_waited_for() -> None:
    op, emit = operator(type="left"), Emit()
    op.process([reading("w:1", 10, x=1.0)], EDGES[0], emit)
    op.ended(EDGES[1], emit)
    assert [m.id for m in emit.messages()] == ["w:1"]


def test_a_message_without_rows_is_refused() -> None:
    with pytest.raises(TypeError):
        operator().process([Message("a", "b", 1, End(messages=1))], EDGES[0], Emit())
    op, emit = operator(), Emit()
    op.process([Message("a", "dev", 1, Event(name="x", values={"v": 1}))], EDGES[0], emit)
    assert op.held() == 1


Row = tuple[int, str, float]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from("ab"), st.booleans()), max_size=30),
    st.randoms(use_true_random=False),
    st.sampled_from(["inner", "left", "outer"]),
    st.sampled_from(["nearest", "all"]),
)
def test_against_the_definition(steps: list[tuple[int, str, bool]], random: Any, kind: str, match: str) -> None:
    sides: tuple[list[Row], list[Row]] = ([], [])
    time = 0
    for step, key, second in steps:
        time += step
        sides[second].append((time, key, float(len(sides[second]))))
    expected: dict[tuple[int, float], list[float | None]] = {}
    used: set[int] = set()
    for t, key, x in sides[0]:
        near = [(abs(u - t), u, i) for i, (u, k, _) in enumerate(sides[1]) if k == key and abs(u - t) <= 2]
        picked = [min(near)[2]] if near and match == "nearest" else [i for _, _, i in sorted(near, key=lambda n: n[1:])]
        used.update(picked)
        if picked or kind != "inner":
            expected[t, x] = [sides[1][i][2] for i in picked] or [None]
    alone = {i for i in range(len(sides[1])) if i not in used} if kind == "outer" else set()

    def run(make: Callable[[], Pairing], stop: bool) -> list[Message]:
        op, emit = make(), Emit()
        at = [0, 0]
        while at[0] < len(sides[0]) or at[1] < len(sides[1]):
            side = random.randrange(2)
            part = sides[side][at[side] : at[side] + random.randrange(1, 4)]
            if not part:
                continue
            messages = [reading(f"{side}:{at[side] + i}", t, k, x=x) for i, (t, k, x) in enumerate(part)]
            op.process(messages, EDGES[side], emit)
            at[side] += len(part)
            if stop:
                state = msgspec.msgpack.decode(msgspec.msgpack.encode(op.snapshot()))
                op = make()
                op.restore(state)
            assert emit.absorbed + emit.filtered + op.held() == sum(at)
        op.finish(emit)
        assert emit.absorbed + emit.filtered == len(steps)
        assert not emit.dropped
        return emit.messages()

    def make() -> Pairing:
        return operator(type=kind, match=match)

    sent = [plain(m) for m in run(make, False)]
    got: dict[tuple[int, float], list[float | None]] = {}
    lonely = set()
    for _, _, t, values in sent:
        if "x" in values:
            got.setdefault((t, values["x"]), []).append(values.get("camera_1_x"))
        else:
            lonely.add(int(values["camera_1_x"]))
    assert got == expected
    assert lonely == alone
    assert len({ident for ident, *_ in sent}) == len(sent)
    assert sorted(plain(m) for m in run(make, True)) == sorted(sent), (
        "no other interleaving, batching or restart changes it"
    )


def test_what_comes_out_and_what_is_wrong() -> None:
    config = Config.model_validate({"within": "1s"})
    flows = [Flow("readings/1", frozenset({"x", "y"})), Flow("event/1", frozenset({"x"}))]
    assert config.emits(flows, context()) == {"out": Flow("readings/1", frozenset({"x", "y", "camera_1_x"}))}
    assert config.emits([flows[0], Flow("event/1")], context()) == {"out": Flow("readings/1")}
    wrong: list[tuple[dict[str, Any], tuple[str, ...], tuple[str | int, ...], str]] = [
        ({}, ("a.out",), (), "at least two inputs"),
        ({"match": "all"}, ("a.out", "b.out", "c.out"), ("match",), "two inputs"),
        ({"prefix": {"camra-1": "c_"}}, EDGES, ("prefix", "camra-1"), "did you mean 'camera-1"),
        ({"prefix": {"camera-1": ""}}, EDGES, ("prefix",), "two inputs bring a field 'x'"),
        ({"by": ["z"]}, EDGES, ("by", 0), "weight.out has no field 'z'"),
    ]
    for options, edges, path, said in wrong:
        made = Config.model_validate({"within": "1s", **options})
        with pytest.raises(ConfigError) as caught:
            made.emits(flows[:1] * len(edges), context(*edges))
        assert caught.value.problems[0].path == path
        assert said in caught.value.problems[0].message
    with pytest.raises(ConfigError, match="there twice"):
        Config.model_validate({"within": "1s", "by": ["a", "a"]}).check(context())
    with pytest.raises(ValueError, match="is none of this node's inputs"):
        operator().process([reading("a", 1, x=1.0)], "other.out", Emit())
