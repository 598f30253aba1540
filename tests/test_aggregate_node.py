"""aggregate: its config, its clock, its books, its keys, and messages of every type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from pydantic import ValidationError

from nodes.aggregate import Config, build
from nodes.operator import Context, Emit, Flow
from nodes.windowing.aggregator import GRACE, Aggregator
from schemas import codec
from schemas.errors import ConfigError
from schemas.expressions import WrongTypeError
from schemas.messages import Aggregate, Event, Message, Model, Predictions, Readings, Window
from schemas.rows import ROW_TYPES

S = 10**9
EDGE = "in.out"
NOW = 1_800_000_000 * S


def context(*edges: str) -> Context:
    return Context("plant", "agg", Path(), Path(), inputs=edges)


def operator(*edges: str, **options: Any) -> Aggregator:
    config = Config.model_validate({"window": "10s", "fields": {"m": "mean(x)"}, **options})
    config.check(context(*edges))
    op = build(config, context(*edges))
    op.clock = lambda: NOW
    return op


def rows(source: str, *pairs: tuple[float, float], **columns: Any) -> Message:
    time = np.array([int(t * S) for t, _ in pairs], np.int64)
    body = Readings(n=len(pairs), columns={"x": np.array([x for _, x in pairs]), **columns}, time=time)
    return Message(f"in:{source}:{pairs[0][0]}", source, int(time[0]), body, None, 5)


def put(op: Aggregator, *messages: Message, edge: str = EDGE) -> Emit:
    emit = Emit()
    op.process(list(messages), edge, emit)
    return emit


def brief(emit: Emit) -> list[tuple[str, int, Any]]:
    return [
        (m.id, m.body.count, next(iter(m.body.values.values())))
        for m in emit.messages()
        if isinstance(m.body, Aggregate)
    ]


def end(op: Aggregator) -> Emit:
    emit = Emit()
    op.finish(emit)
    return emit


def test_one_answer_and_its_envelope() -> None:
    op = operator(by="source")
    put(op, rows("b", (1, 2.0), (2, 4.0)), rows("a", (3, 7.0)))
    emit = put(op, rows("a", (10, 1.0)))
    body = Aggregate(window=Window(start=0, end=10 * S), key="a", values={"m": 7.0}, count=1)
    first, second = emit.messages()
    assert first == Message("agg:a:0", "a", 10 * S - 1, body, None, 5)
    assert (second.id, second.source) == ("agg:b:0", "b")
    assert codec.decode(codec.encode(first)) == first


def test_no_rows_no_answer() -> None:
    op = operator()
    assert end(op).messages() == []
    assert put(op).messages() == []
    emit = put(op, Message("a", "b", 5 * S, Readings(n=0, columns={})))
    assert (emit.absorbed, op.wake()) == (0, None)


# -- keys ---------------------------------------------------------------------------------------------------------


def test_keys_by_fields() -> None:
    columns = {"line": ["a", "b/1", None], "n": np.array([1.0, 2.0, np.nan]), "ok": np.array([True, False, True])}
    op = operator(by=["line", "n", "ok"])
    put(op, rows("s", (1, 1.0), (2, 2.0), (3, 3.0), **columns))
    assert [i for i, _, _ in brief(end(op))] == ["agg://true:0", "agg:a/1/true:0", "agg:b%2F1/2/false:0"]
    alone = operator(by="line")
    put(alone, rows("s", (1, 1.0), (2, 2.0), (3, 3.0), **columns))
    emit = end(alone)
    assert [i for i, _, _ in brief(emit)] == ["agg::0", "agg:a:0", "agg:b/1:0"]
    assert {m.source for m in emit.messages()} == {"agg"}, "a field's value is no device"


def test_the_source_among_keys_is_the_answers_source() -> None:
    op = operator(by=["line", "source"])
    put(op, rows("dev/1", (1, 1.0), line=["a"]))
    [message] = end(op).messages()
    assert (message.id, message.source) == ("agg:a/dev%2F1:0", "dev/1")


def test_keys_that_come_and_go_are_forgotten() -> None:
    op = operator(by="source", window="1s")
    for i in range(12):
        emit = put(op, *[rows(f"d{i}-{k}", (i, 1.0)) for k in range(1000)])
        assert emit.absorbed == 1000
    assert len(op.keys) < 9000
    assert op.groups.used == 1000


def test_a_bounded_number_of_groups() -> None:
    op = operator(by="source", limit=3)
    emit = put(op, *[rows(f"d{i}", (1, float(i))) for i in range(5)])
    assert (emit.absorbed, emit.dropped) == (3, {"too-many-groups": 2})
    assert [k for k, _, _ in brief(end(op))] == ["agg:d0:0", "agg:d1:0", "agg:d2:0"]
    assert put(op, rows("d9", (1, 1.0))).absorbed == 1, "there is room again"
    for window in ({"session": {"gap": "1s"}}, {"count": 2}, {"sliding": {"size": "2s", "every": "1s"}}):
        other = operator(by="source", limit=3, window=window)
        emit = put(other, *[rows(f"d{i}", (1, float(i))) for i in range(5)])
        assert (emit.absorbed, emit.dropped) == (3, {"too-many-groups": 2})
        assert len(brief(end(other))) == (6 if "sliding" in window else 3)


# -- watermark, lateness ------------------------------------------------------------------------------------------


def test_the_slowest_of_known_inputs_holds_the_windows() -> None:
    op = operator("a.out", "b.out")
    assert not put(op, rows("s", (1, 1.0), (25, 1.0)), edge="a.out").messages()
    assert put(op, rows("s", (3, 3.0)), edge="b.out").absorbed == 1
    assert brief(put(op, rows("s", (12, 3.0)), edge="b.out")) == [("agg::0", 2, 2.0)]
    emit = Emit()
    op.ended("b.out", emit)
    assert brief(emit) == [("agg::10000000000", 1, 3.0)]
    assert brief(end(op)) == [("agg::20000000000", 1, 1.0)]


def test_late_rows_are_counted_or_answered_anew() -> None:
    op = operator(lateness="20s")
    assert len(put(op, rows("s", (1, 1.0), (11, 1.0))).messages()) == 1
    emit = put(op, rows("s", (2, 3.0)))
    assert brief(emit) == [("agg::0/1", 2, 2.0)]
    body = emit.messages()[0].body
    assert isinstance(body, Aggregate)
    assert body.revision == 1
    emit = put(op, rows("s", (3, 2.0), (4, 2.0), (35, 0.0), (5, 9.0)))
    assert brief(emit) == [("agg::0/3", 4, 2.0), ("agg::10000000000", 1, 1.0)]
    assert (emit.absorbed, emit.dropped) == (3, {"late": 1})
    assert not op.windows.answered.keys() - {(10 * S, 0)}, "what is out of reach is forgotten"


def test_late_rows_of_sessions() -> None:
    op = operator(window={"session": {"gap": "5s"}}, lateness="20s")
    put(op, rows("s", (0, 1.0), (2, 1.0)))
    assert brief(put(op, rows("s", (12, 2.0)))) == [("agg::0", 2, 1.0)]
    assert brief(put(op, rows("s", (1, 4.0)))) == [("agg::0/1", 3, 2.0)]
    assert brief(put(op, rows("s", (6, 10.0)))) == [("agg::0/2", 4, 4.0)]
    assert brief(put(op, rows("s", (-4, 4.0)))) == [("agg::0/3", 5, 4.0)], "its name stays when it grows backwards"
    assert brief(put(op, rows("s", (9, 4.0)))) == [], "joined with an open one it waits for that one's end"
    assert brief(end(op)) == [("agg::0/5", 7, pytest.approx(26 / 7))]


# -- the clock ----------------------------------------------------------------------------------------------------


def test_idle_answers_and_loses_nothing() -> None:
    op = operator(idle="5s")
    assert op.wake() is None
    put(op, rows("s", (1, 1.0)))
    assert op.wake() == NOW + 5 * S
    emit = Emit()
    op.tick(NOW + 5 * S - 1, emit)
    assert not emit.sent
    op.tick(NOW + 5 * S, emit)
    assert brief(emit) == [("agg::0", 1, 1.0)]
    assert op.wake() is None
    assert not put(op, rows("s", (2, 3.0))).messages()
    assert brief(put(op, rows("s", (12, 0.0)))) == [("agg::0/1", 2, 2.0)], "the rest came: a new revision"
    assert brief(end(op)) == [("agg::10000000000", 1, 0.0)]


@pytest.mark.parametrize(
    "window", [{"count": 3}, {"session": {"gap": "1h"}}, {"sliding": {"size": "10s", "every": "5s"}}]
)
def test_idle_of_every_window(window: dict[str, Any]) -> None:
    op = operator(idle="5s", window=window)
    put(op, rows("s", (6, 1.0)))
    emit = Emit()
    op.tick(NOW + 5 * S, emit)
    assert len(emit.messages()) == (2 if "sliding" in window else 1)
    emit = Emit()
    op.tick(NOW + 50 * S, emit)
    assert not emit.sent
    put(op, rows("s", (7, 3.0)))
    assert all(c == 2 and m == 2.0 and i.endswith("/1") for i, c, m in brief(end(op)))


def test_live_windows_answer_soon_after_their_end() -> None:
    op = operator(watermark={"delay": "1s"})
    at = NOW / S
    put(op, rows("s", (at + 1, 1.0), (at + 2, 2.0)))
    assert op.wake() == NOW + 8 * S + S + GRACE, "8 s to the end, 1 s of delay, and some grace"
    emit = Emit()
    op.tick(NOW + 9 * S + GRACE - 1, emit)
    assert not emit.sent
    op.tick(NOW + 9 * S + GRACE, emit)
    assert brief(emit) == [(f"agg::{NOW}", 2, 1.5)]
    assert op.wake() is None
    assert end(op).messages() == [], "answered already, with all that came"


def test_replayed_data_wait_for_data_or_the_end() -> None:
    op = operator()
    put(op, rows("s", (1, 1.0)))
    assert op.wake() is None
    live = operator(idle="never")
    put(live, rows("s", (NOW / S, 1.0)))
    assert live.wake() is None
    assert len(end(live).messages()) == 1


def test_a_silent_input_stops_holding_the_others() -> None:
    op = operator("a.out", "b.out", idle="5s")
    put(op, rows("s", (1, 1.0)), edge="a.out")
    op.clock = lambda: NOW + 6 * S
    assert [i for i, _, _ in brief(put(op, rows("s", (12, 1.0)), edge="a.out"))] == ["agg::0"]


# -- books and bad input --------------------------------------------------------------------------------------------


def test_every_type_of_row_and_its_account() -> None:
    model = Model(name="m", version="1", digest="d")
    boxes = np.arange(8, dtype=np.float32).reshape(2, 4)

    def predictions(number: int, labels: list[str], found: Any = None) -> Message:
        scores = np.linspace(0.9, 0.5, len(labels)).astype("<f4")
        return Message(
            f"p:{number}",
            "cam",
            number * S,
            Predictions(model=model, seen="f", labels=labels, scores=scores, boxes=found),
        )

    op = operator(by="label", fields={"n": "count()", "s": "max(score)", "seen": "last(label)"})
    emit = put(
        op,
        predictions(1, ["cat", "dog"]),
        predictions(2, ["dog", "dog"], boxes),
        predictions(3, [], boxes[:0]),
        predictions(4, ["cat"]),
        Message("e:1", "cam", 5 * S, Event(name="x", values={"label": "cat", "score": 2.0})),
    )
    assert (emit.absorbed, emit.dropped) == (5, {})
    answers = {m.body.key: m.body for m in end(op).messages() if isinstance(m.body, Aggregate)}
    assert {k: (b.count, b.values["s"], b.values["seen"]) for k, b in answers.items()} == {
        "cat": (3, 2.0, "cat"),
        "dog": (2, pytest.approx(0.9), "dog"),
    }
    emit = put(operator(), predictions(1, ["a"]), predictions(11, [], boxes[:0]), predictions(2, ["a", "b"], boxes))
    assert (emit.absorbed, emit.dropped) == (2, {"late": 1}), "nothing found at 11 s moved the time past the window"


def test_aggregates_of_aggregates_fall_into_the_right_window() -> None:
    fine, coarse = operator(window="5s", fields={"m": "mean(x)"}), operator(window="10s", fields={"t": "sum(m)"})
    put(fine, rows("s", (1, 1.0), (6, 2.0), (11, 4.0)))
    assert brief(end(fine))
    again = operator(window="5s", fields={"m": "mean(x)"})
    sent = put(again, rows("s", (1, 1.0), (6, 2.0), (11, 4.0))).messages() + end(again).messages()
    emit = put(coarse, *sent)
    assert brief(emit) + brief(end(coarse)) == [("agg::0", 2, 3.0), ("agg::10000000000", 1, 4.0)]


def test_texts_where_numbers_are_needed_change_nothing() -> None:
    op = operator()
    put(op, rows("s", (1, 1.0)))
    before = msgspec.msgpack.encode(op.snapshot())
    bad = Message("b", "s", 2 * S, Readings(n=1, columns={"x": ["warm"]}))
    with pytest.raises(WrongTypeError, match="x is text; a number is needed"):
        put(op, rows("s", (2, 1.0)), bad)
    assert msgspec.msgpack.encode(op.snapshot()) == before
    with pytest.raises(ValueError, match="event time"):
        put(op, Message("b", "s", 2**62, Readings(n=1, columns={"x": np.array([1.0])})))
    assert msgspec.msgpack.encode(op.snapshot()) == before
    assert put(op, rows("s", (2, 3.0))).absorbed == 1


def test_a_field_that_is_not_there_is_missing() -> None:
    op = operator(fields={"m": "mean(nothing)", "n": "count()"})
    put(op, rows("s", (1, 1.0)))
    [message] = end(op).messages()
    assert isinstance(message.body, Aggregate)
    assert message.body.values == {"m": None, "n": 1}


def test_restore_of_a_run_that_ended() -> None:
    op = operator(by="source")
    put(op, rows("s", (1, 1.0), (12, 1.0)))
    end(op)
    again = operator(by="source")
    again.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(op.snapshot())))
    assert put(again, rows("s", (21, 1.0))).absorbed == 1


# -- config -------------------------------------------------------------------------------------------------------


def problem(inputs: list[Flow] | None = None, **options: Any) -> tuple[tuple[str | int, ...], str]:
    config = Config.model_validate({"window": "10s", "fields": {"m": "mean(x)"}, **options})

    def check() -> None:
        config.check(context())
        config.emits(inputs or [], context())

    with pytest.raises(ConfigError) as caught:
        check()
    [found] = caught.value.problems
    return found.path, found.message


@pytest.mark.parametrize(
    ("options", "path", "said"),
    [
        ({"fields": {"m": "maen(x)"}}, ("fields", "m"), "unknown statistic 'maen'; did you mean 'mean'?"),
        ({"fields": {"m": "avg(x)"}}, ("fields", "m"), "did you mean 'mean'?"),
        ({"fields": {"m": "mean()"}}, ("fields", "m"), "mean is written mean(x)"),
        ({"fields": {"m": "mean('a')"}}, ("fields", "m"), "needs a number"),
        ({"fields": {"m": "quantile(x, 95)"}}, ("fields", "m"), "from 0 to 1, got 95; did you mean 0.95?"),
        ({"fields": {"m": "quantile(x, y)"}}, ("fields", "m"), "expected the quantile"),
        ({"fields": {"m": "histogram(x, 3, 1)"}}, ("fields", "m"), "edges rise: 1 comes after 3"),
        ({"fields": {"count": "mean(x)"}}, ("fields", "count"), "has 'count' of its own"),
        ({"fields": {"h": "histogram(x, 1)", "h_lt_1": "sum(x)"}}, ("fields", "h_lt_1"), "is there twice"),
        ({"by": ["a", "a"]}, ("by", 1), "'a' is there twice"),
        ({"window": {"count": 3}, "lateness": "1s"}, ("lateness",), "no late rows"),
        ({"window": {"count": 3}, "watermark": {"delay": "1s"}}, ("watermark",), "no watermark"),
        ({"idle": 0}, ("idle",), "above 0"),
    ],
)
def test_check(options: dict[str, Any], path: tuple[str | int, ...], said: str) -> None:
    found = problem(**options)
    assert found[0] == path
    assert said in found[1]


def test_fields_of_the_inputs() -> None:
    known = [Flow("readings/1", frozenset({"temp", "line"}))]
    assert problem(known, fields={"m": "mean(tmep)"}) == (("fields", "m"), "unknown field 'tmep'; did you mean 'temp'?")
    assert problem(known, fields={"m": "mean(temp)"}, by="lien")[0] == ("by", 0)
    config = Config.model_validate(
        {"window": "1s", "by": "source", "fields": {"m": "mean(temp)", "h": "histogram(temp, 5)"}}
    )
    out = config.emits(known, context())["out"]
    assert out == Flow("aggregate/1", frozenset({"m", "h_lt_5", "h_ge_5", "key", "count", "start", "end"}))
    assert config.emits([Flow("readings/1")], context())["out"] == out
    assert config.accepts() == ROW_TYPES


@pytest.mark.parametrize(
    "window",
    [
        0, "0s", "-1s", "10", 10, True, None, [], {}, {"tumbling": "0s"}, {"tumbling": "5000d"}, {"count": 0}, {"count": True},
        {"count": {"size": 3, "every": 4}}, {"session": {"gap": "0s"}}, {"session": "30s"}, {"sliding": {"size": "1s"}},
        {"sliding": {"size": "1s", "every": "2s"}}, {"sliding": {"size": "1h", "every": "1ms"}},
        {"tumbling": "1s", "count": 3}, {"hopping": "1s"}, {"tumbling": None},
    ],
)  # fmt: skip
def test_windows_that_are_none(window: Any) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"window": window, "fields": {"m": "mean(x)"}})


@pytest.mark.parametrize(
    "options", [{"fields": {}}, {"lateness": 5}, {"idle": "soon"}, {"limit": 0}, {"fields": {"m": "mean(x"}}]
)
def test_options_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"window": "1s", "fields": {"m": "mean(x)"}, **options})
