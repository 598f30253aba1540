"""Each step on readings, by plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from steps_kit import CONTEXT, SECOND, books, only, operator, plain, reading, refused, run, table

from nodes.operator import Flow
from nodes.preprocess import Config
from nodes.steps._units import UNITS, conversion
from schemas.errors import ConfigError
from schemas.messages import Aggregate, Message, Model, Predictions, Readings, Window


def predictions(labels: list[str], scores: list[float], number: int = 0, *, boxes: bool = True) -> Message:
    body = Predictions(
        model=Model(name="m", version="1", digest="00"),
        seen=f"camera:a:{number}",
        labels=labels,
        scores=np.array(scores, np.float32),
        boxes=np.arange(4 * len(labels), dtype=np.float32).reshape(-1, 4) if boxes else None,
    )
    return Message(f"camera:a:{number}", "camera", 0, body)


# -- select, rename ---------------------------------------------------------------------------------------------------


def test_select_keeps_in_the_order_asked_for() -> None:
    message = reading(1, {"a": [1], "b": [2], "c": ["x"]})
    assert list(table(only(operator({"select": ["c", "a"]}), message))) == ["c", "a"]
    assert list(table(only(operator({"select": {"but": ["b", "nowhere"]}}), message))) == ["a", "c"]
    assert refused(operator({"select": ["d"]}), message) == "missing-field"


def test_rename() -> None:
    message = reading(1, {"a": [1], "b": [2]})
    assert table(only(operator({"rename": {"a": "x"}}), message)) == {"x": [1], "b": [2]}
    assert table(only(operator({"rename": {"a": "b", "b": "a"}}), message)) == {"b": [1], "a": [2]}
    assert refused(operator({"rename": {"a": "b"}}), message) == "duplicate-field"
    assert refused(operator({"rename": {"z": "b"}}), message) == "missing-field"
    with pytest.raises(ValidationError, match="two fields would be named"):
        operator({"rename": {"a": "x", "b": "x"}})


# -- filter, split ----------------------------------------------------------------------------------------------------


def test_filter_rows_times_and_sources() -> None:
    message = reading(1, {"t": [1, None, 90, 95]}, time=[0, 1, 2, 3], per_row=["p", "q", "r", "s"])
    sent, emit = books(operator({"filter": "t > 80"}), [message])
    ((_, out),) = sent
    body = out.body
    assert isinstance(body, Readings)
    assert (table(out), body.source, out.time, out.id) == ({"t": [90, 95]}, ["r", "s"], 2 * SECOND, message.id)
    assert body.time is not None
    assert body.time.tolist() == [2 * SECOND, 3 * SECOND]
    assert emit.filtered == 2


def test_filter_sees_time_and_source() -> None:
    message = reading(1, {"t": [1, 2, 3]}, time=[0, 1, 2], per_row=["p", "q", "p"])
    assert table(only(operator({"filter": "source == 'p' and time > 0"}), message)) == {"t": [3]}
    own = reading(1, {"time": [5, 6], "source": ["x", "y"]})
    assert table(only(operator({"filter": "time > 5 and source == 'y'"}), own)) == {"time": [6], "source": ["y"]}


def test_filter_passes_what_is_whole_unchanged_and_nothing_of_nothing() -> None:
    message = reading(1, {"t": [1.0, 2.0]})
    assert only(operator({"filter": "t > 0"}), message) is message
    assert run(operator({"filter": "t > 5"}), [message]) == []
    empty = reading(2, {"t": np.zeros(0)})
    assert run(operator({"filter": "t > 5"}), [empty]) == [("out", empty)]


def test_filter_refuses_the_message_not_the_batch() -> None:
    good, bad, text = reading(1, {"t": [9.0]}), reading(2, {"u": [9.0]}), reading(3, {"t": ["x"]})
    sent, emit = books(operator({"filter": "t > 1"}), [good, bad, text, good])
    assert [m.id for _, m in sent] == [good.id, good.id]
    assert [(m.id, reason) for m, reason, _ in emit.dead] == [(bad.id, "missing-field"), (text.id, "wrong-type")]


def test_filter_boxes_of_predictions() -> None:
    node = operator({"filter": "label == 'defect' and score > 0.5"})
    some = predictions(["defect", "ok", "defect"], [0.9, 0.8, 0.6])
    out = only(node, some).body
    assert isinstance(out, Predictions)
    assert out.boxes is not None
    assert (out.labels, out.boxes[:, 0].tolist()) == (["defect", "defect"], [0, 8])
    sent, emit = books(node, [predictions(["ok"], [0.9]), predictions([], [])])
    assert (sent, emit.filtered) == ([], 2)
    best = predictions(["defect", "ok"], [0.9, 0.1], boxes=False)
    assert only(node, best) is best


def test_filter_aggregates() -> None:
    message = Message(
        "rate:0", "s", 0, Aggregate(window=Window(start=0, end=1), key="a", values={"mean": 3.0}, count=2)
    )
    assert only(operator({"filter": "mean > 2 and key == 'a'"}), message) is message
    assert run(operator({"filter": "mean > 3"}), [message]) == []


def test_split_by_ports() -> None:
    node = operator({"split": {"hot": "t > 80", "warm": "t > 50"}}, {"derive": {"cold": "true"}})
    sent, emit = books(node, [reading(1, {"t": [90, 60, 1, None]}), reading(2, {"t": [99]}), reading(3, {"t": [1]})])
    assert [(port, m.id, m.rows) for port, m in sent] == [
        ("hot", "ingest:a:1/hot", 1),
        ("warm", "ingest:a:1/warm", 1),
        ("hot", "ingest:a:2/hot", 1),
        ("out", "ingest:a:1", 2),
        ("out", "ingest:a:3", 1),
    ]
    assert "cold" not in table(sent[0][1])
    assert emit.filtered == 0


def test_split_keeps_predictions_whole() -> None:
    node = operator({"split": {"bad": "label == 'defect'"}})
    mixed, fine, none = predictions(["ok", "defect"], [0.9, 0.8]), predictions(["ok"], [1.0]), predictions([], [])
    sent = run(node, [mixed, fine, none])
    assert [(port, m.body) for port, m in sent] == [("bad", mixed.body), ("out", fine.body), ("out", none.body)]


@pytest.mark.parametrize("port", ["out", "dead", "Hot", "a/b"])
def test_split_refuses_port_names(port: str) -> None:
    with pytest.raises(ValidationError):
        operator({"split": {port: "t > 1"}})


# -- derive, convert, fill --------------------------------------------------------------------------------------------


def test_derive_in_order() -> None:
    node = operator({"derive": {"power": "volt * ampere", "high": "power > 10", "volt": "volt / 1000"}})
    out = table(only(node, reading(1, {"volt": [5, 10], "ampere": [1, 2]})))
    assert out == {"volt": [0.005, 0.01], "ampere": [1, 2], "power": [5, 20], "high": [False, True]}


@pytest.mark.parametrize(
    ("start", "end", "value", "expected"),
    [
        ("°C", "°F", 100, 212),
        ("°F", "°C", -40, -40),
        ("degC", "K", 0, 273.15),
        ("K", "°F", 0, -459.67),
        ("bar", "Pa", 1, 1e5),
        ("psi", "bar", 1, 0.0689475729),
        ("mmHg", "atm", 760, 1.0000001),
        ("km/h", "m/s", 36, 10),
        ("kn", "km/h", 1, 1.852),
        ("rpm", "Hz", 60, 1),
        ("kWh", "MJ", 1, 3.6),
        ("l/min", "m3/h", 1000, 60),
        ("in", "mm", 1, 25.4),
        ("ft²", "m2", 1, 0.09290304),
        ("%", "1", 50, 0.5),
        ("deg", "rad", 180, np.pi),
        ("lb", "kg", 1, 0.45359237),
        ("h", "s", 1, 3600),
        ("kΩ", "ohm", 1, 1000),
    ],
)
def test_convert_units(start: str, end: str, value: float, expected: float) -> None:
    out = table(only(operator({"convert": {"x": f"{start} -> {end}"}}), reading(1, {"x": [float(value), None]})))
    assert out["x"] == [pytest.approx(expected, rel=1e-6), None]


def test_every_unit_converts_back() -> None:
    for name, unit in UNITS.items():
        for other in (n for n, u in UNITS.items() if u.quantity == unit.quantity):
            there, back = conversion(name, other), conversion(other, name)
            assert (7.0 * there[0] + there[1]) * back[0] + back[1] == pytest.approx(7.0)


def test_convert_dtypes() -> None:
    message = reading(1, {"x": [-1.0, 2.5, 300.0], "n": np.array([1, 2, 3]), "m": [1.0, None, 2.0]})
    out = only(
        operator({"convert": {"x": "uint8", "n": "float32", "m": {"from": "m", "to": "mm", "dtype": "float32"}}}),
        message,
    )
    assert table(out) == {"x": [0, 2, 255], "n": [1, 2, 3], "m": [1000, None, 2000]}
    body = out.body
    assert isinstance(body, Readings)
    assert [c.dtype.name for c in body.columns.values() if not isinstance(c, list)] == ["uint8", "float32", "float32"]
    huge = table(only(operator({"convert": {"x": "int64"}}), reading(1, {"x": [1e300, -1e300]})))["x"]
    assert huge[0] > 2**62
    assert huge[1] == -(2**63)
    assert table(only(operator({"convert": {"x": "int8"}}), reading(1, {"x": np.array([-500, 500])}))) == {
        "x": [-128, 127]
    }
    assert table(only(operator({"convert": {"x": "bool"}}), reading(1, {"x": [0, 2]}))) == {"x": [False, True]}


def test_convert_refuses() -> None:
    assert refused(operator({"convert": {"x": "int8"}}), reading(1, {"x": [1.0, None]})) == "missing-value"
    assert refused(operator({"convert": {"x": "m -> km"}}), reading(1, {"x": ["far"]})) == "wrong-type"
    assert refused(operator({"convert": {"y": "m -> km"}}), reading(1, {"x": [1]})) == "missing-field"
    for wrong, part in (
        ("m -> s", "is a length"),
        ("C -> K", "did you mean '°C'"),
        ("floaty", "float"),
        ({"from": "m"}, "both"),
        ({}, "expected units"),
    ):
        with pytest.raises(ValidationError, match=part):
            operator({"convert": {"x": wrong}})


def test_fill_constants() -> None:
    node = operator({"fill": {"x": 0, "label": "none", "new": True, "count": 7}})
    message = reading(1, {"x": [None, 2.0], "label": ["a", None], "count": np.array([1, 2])})
    assert table(only(node, message)) == {"x": [0, 2], "label": ["a", "none"], "count": [1, 2], "new": [True, True]}
    assert table(only(operator({"fill": {"x": "?"}}), reading(1, {"x": [None]}))) == {"x": ["?"]}
    assert refused(operator({"fill": {"x": "?"}}), reading(1, {"x": [1.0, None]})) == "wrong-type"
    assert refused(operator({"fill": {"x": 1}}), reading(1, {"x": ["a", None]})) == "wrong-type"


def test_fill_with_the_previous_value() -> None:
    node = operator({"fill": {"previous": ["x", "w"], "fields": {"x": -1}, "within": "5s"}})
    first = reading(1, {"x": [None, 1.0, None, None], "w": [None, "on", None, "off"]}, time=[0, 1, 6, 7])
    second = reading(2, {"x": [None, None], "w": [None, None]}, time=[8, 13])
    assert [table(m) for _, m in run(node, [first, second])] == [
        {"x": [-1, 1, 1, -1], "w": [None, "on", "on", "off"]},
        {"x": [-1, -1], "w": ["off", None]},
    ]


# -- dedupe, on-change, deadband, throttle ----------------------------------------------------------------------------


def test_dedupe_by_fields_within_a_time() -> None:
    node = operator({"dedupe": {"by": ["serial"], "within": "10s"}})
    message = reading(1, {"serial": ["a", "b", "a", "a", None, None]}, time=[0, 1, 9, 10, 10, 11])
    assert table(only(node, message)) == {"serial": ["a", "b", "a", None]}
    assert run(node, [reading(2, {"serial": ["a"]}, time=[5])]) == []
    assert len(run(node, [reading(3, {"serial": ["a"]}, time=[5], source="other")])) == 1


def test_dedupe_by_all_fields() -> None:
    node = operator("dedupe")
    assert table(only(node, reading(1, {"x": [1, 1, None, None, 2], "y": [0, 0, 0, 0, 0]}))) == {
        "x": [1, None, 2],
        "y": [0, 0, 0],
    }


def test_dedupe_forgets() -> None:
    node = operator({"dedupe": {"within": "1s"}})
    run(node, [reading(i, {"x": [float(i)]}, time=float(i)) for i in range(500)])
    assert len(node.snapshot()[0][0]) <= 3
    small = operator({"dedupe": {"remember": 2}})
    assert len(run(small, [reading(i, {"x": [i % 3]}) for i in range(9)])) == 9


def test_on_change() -> None:
    node = operator({"on-change": ["door"]})
    message = reading(1, {"door": ["open", "open", "shut", None, None, "shut"], "x": [1, 2, 3, 4, 5, 6]})
    assert table(only(node, message))["x"] == [1, 3, 4, 6]
    assert run(node, [reading(2, {"door": ["shut"], "x": [7]})]) == []
    assert len(run(node, [reading(3, {"door": ["shut"], "x": [7]}, source="s2")])) == 1
    numbers = operator("on-change")
    assert table(only(numbers, reading(1, {"x": [1, 1, None, None, 2]}))) == {"x": [1, None, 2]}


def test_deadband_absolute_follows_what_was_sent() -> None:
    node = operator({"deadband": {"t": 1}})
    values = [20, 20.6, 21, 21.1, 22, 22.2, 20, None, None, 20]
    assert table(only(node, reading(1, {"t": values})))["t"] == [20, 21.1, 22.2, 20, None, 20]
    assert run(node, [reading(2, {"t": [20.5]})]) == []


def test_deadband_percent_and_several_fields() -> None:
    node = operator({"deadband": {"t": "10%", "p": 5}})
    out = table(only(node, reading(1, {"t": [100, 109, 111, 112, -112], "p": [0, 0, 0, 6, 6]})))
    assert out == {"t": [100, 111, 112, -112], "p": [0, 0, 6, 6]}


def test_deadband_leaving_a_band() -> None:
    node = operator({"deadband": {"level": [20, 80]}})
    values = [50, 60, 81, 82, 79, 50, None, None, 50, 10]
    assert table(only(node, reading(1, {"level": values})))["level"] == [50, 81, 82, 79, None, 50, 10]


def test_deadband_finds_one_move_in_a_long_calm() -> None:
    values = np.zeros(10_000)
    values[7_777:] = 3
    out = table(only(operator({"deadband": {"t": 1}}), reading(1, {"t": values, "i": np.arange(10_000)})))
    assert out["i"] == [0, 7_777]


def test_deadband_refuses() -> None:
    assert refused(operator({"deadband": {"t": 1}}), reading(1, {"t": ["x"]})) == "wrong-type"
    for wrong in (-1, "x%", [3, 1], [1], True, "5"):
        with pytest.raises(ValidationError, match="expected a number from 0"):
            operator({"deadband": {"t": wrong}})


def test_throttle_rows_of_each_source() -> None:
    node = operator({"throttle": "1s"})
    message = reading(1, {"x": range(6)}, time=[0, 0.5, 1, 0.2, 1.9, 2.1], per_row=["a", "a", "a", "b", "a", "a"])
    assert table(only(node, message))["x"] == [0, 2, 3, 5]
    assert run(node, [reading(2, {"x": [9]}, time=3.0, source="a")]) == []
    assert len(run(node, [reading(3, {"x": [9]}, time=3.1, source="a")])) == 1


def test_throttle_frames() -> None:
    from steps_kit import frame

    node = operator({"throttle": "1s"})
    image = frame(np.zeros((2, 2, 3), np.uint8))
    messages = [Message(f"c:{i}", "camera", i * SECOND // 4, image.body) for i in range(9)]
    sent, emit = books(node, messages, [2, 3])
    assert [m.id for _, m in sent] == ["c:0", "c:4", "c:8"]
    assert emit.filtered == 6


# -- resample ---------------------------------------------------------------------------------------------------------


def rows_of(sent: list[tuple[str, Message]]) -> list[tuple[float, Any]]:
    out: list[tuple[float, Any]] = []
    for _, message in sent:
        body = message.body
        assert isinstance(body, Readings)
        assert body.time is not None
        out.extend((t / SECOND, v) for t, v in zip(body.time.tolist(), table(message)["x"], strict=True))
    return out


def test_resample_last_and_linear() -> None:
    message = reading(1, {"x": [0, 10, 30.0]}, time=[0.5, 1.5, 4])
    assert rows_of(run(operator({"resample": "1s"}), [message])) == [(1, 0), (2, 10), (3, 10), (4, 30)]
    linear = rows_of(run(operator({"resample": {"period": "1s", "method": "linear"}}), [message]))
    assert linear == [(1, 5), (2, 14), (3, 22), (4, 30)]


def test_resample_mean() -> None:
    node = operator({"resample": {"period": "2s", "method": "mean"}})
    sent = run(node, [reading(1, {"x": [1, 3, None, 5]}, time=[0, 1, 1.5, 2]), reading(2, {"x": [7, 1]}, time=[3, 6])])
    assert rows_of(sent) == [(0, 2), (2, 6), (6, 1)]
    assert [m.id for _, m in sent] == ["ingest:a:1", "ingest:a:2", f"clean:s1:{6 * SECOND}"]


def test_resample_leaves_holes_and_drops_late_rows() -> None:
    node = operator({"resample": {"period": "1s", "gap": "3s"}})
    sent, emit = books(node, [reading(1, {"x": [1, 2, 9, 3]}, time=[0, 100, 50, 101.5])])
    assert rows_of(sent) == [(0, 1), (100, 2), (101, 2)]
    assert emit.dropped == {"late": 1}


def test_resample_text_and_sources() -> None:
    node = operator({"resample": "1s"})
    message = reading(1, {"x": ["a", "p", "b", "q"]}, time=[0, 0, 1.5, 1.5], per_row=["s", "t", "s", "t"])
    sent = run(node, [message])
    assert [(m.source, m.id, table(m)["x"]) for _, m in sent] == [
        ("s", "ingest:a:1/0", ["a", "a"]),
        ("t", "ingest:a:1/1", ["p", "p"]),
    ]


def test_resample_is_bounded() -> None:
    with pytest.raises(ValidationError, match="periods long"):
        operator({"resample": {"period": "1ms", "gap": "1d"}})
    sent = run(operator({"resample": "1ms"}), [reading(1, {"x": [1, 2]}, time=[0, 10**8])])
    assert len(rows_of(sent)) == 2


# -- what is known before running -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "path", "part"),
    [
        ({"select": ["tmp"]}, ("select", 0), "did you mean 'temp'"),
        ({"rename": {"tmp": "x"}}, ("rename", "tmp"), "did you mean"),
        ({"rename": {"temp": "line"}}, ("rename", "temp"), "already"),
        ({"filter": "tmp > 1"}, ("filter",), "did you mean 'temp'"),
        ({"filter": {"where": "tmp > 1"}}, ("filter", "where"), "did you mean 'temp'"),
        ({"split": {"hot": "1 + tmp > 1"}}, ("split", "hot"), "unknown field 'tmp'"),
        ({"derive": {"x": "temp", "y": "x + z"}}, ("derive", "y"), "unknown field 'z'"),
        ({"convert": {"tmp": "°C -> K"}}, ("convert", "tmp"), "unknown field"),
        ({"fill": {"previous": ["tmp"]}}, ("fill", "previous", 0), "unknown field"),
        ({"dedupe": ["tmp"]}, ("dedupe", 0), "unknown field"),
        ({"on-change": ["tmp"]}, ("on-change", 0), "unknown field"),
        ({"deadband": {"tmp": 1}}, ("deadband", "tmp"), "unknown field"),
        ({"window": {"size": 4, "fields": ["tmp"]}}, ("window", "fields", 0), "unknown field"),
        ({"resize": [4, 4]}, ("resize",), "takes frame/1, and readings/1 comes in"),
    ],
)
def test_fields_are_checked_before_running(step: Any, path: tuple[str | int, ...], part: str) -> None:
    flow = Flow("readings/1", frozenset({"temp", "line"}))
    config = Config.model_validate({"steps": [{"throttle": "1s"}, step]})
    with pytest.raises(ConfigError) as caught:
        config.emits([flow], CONTEXT)
    problem = caught.value.problems[0]
    assert problem.path == ("steps", 1, *path)
    assert part in problem.message


def test_fields_flow_through_the_steps() -> None:
    steps: list[Any] = [
        {"rename": {"t": "temp"}},
        {"derive": {"hot": "temp > 80"}},
        {"fill": {"label": "none"}},
        {"split": {"alarm": "hot"}},
        {"select": {"but": ["hot"]}},
    ]
    flows = Config.model_validate({"steps": steps}).emits([Flow("readings/1", frozenset({"t"}))], CONTEXT)
    assert flows == {
        "alarm": Flow("readings/1", frozenset({"temp", "hot", "label"})),
        "out": Flow("readings/1", frozenset({"temp", "label"})),
    }


def test_same_answer_in_any_order_of_schemas() -> None:
    """Sources with different fields take turns; each message keeps its place."""
    messages = [
        reading(i, {"x": [float(i)]} if i % 2 else {"x": [float(i)], "y": ["t"]}, source=f"s{i % 2}") for i in range(10)
    ]
    sent = run(operator({"filter": "x > 2"}, {"derive": {"z": "x * 2"}}), messages)
    assert [m.id for _, m in sent] == [f"ingest:a:{i}" for i in range(3, 10)]
    assert plain(sent)[0][4][1] == {"x": [3], "z": [6]}
