"""Messages as rows: what aggregates, steps and sinks see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import SAMPLES, equal

from schemas.messages import Aggregate, Body, Event, Message, Model, Predictions, Readings, Scalar, Window
from schemas.rows import concat, from_scalars, rows, take

MODEL = Model(name="m", version="1", digest="")
NAN = float("nan")


def message(body: Body, source: str = "s", time: int = 5) -> Message:
    return Message(id="a", source=source, time=time, body=body)


def test_no_messages_are_no_rows() -> None:
    seen = rows([])
    assert (seen.n, seen.columns, seen.source) == (0, {}, [])
    assert seen.time.dtype == np.int64
    assert seen.message.shape == (0,)


def test_readings_keep_their_columns_times_and_sources() -> None:
    body = Readings(n=2, columns={"x": np.array([1.0, 2.0])}, time=np.array([7, 8]), source=["a", "b"])
    seen = rows([message(body), message(Readings(n=1, columns={"x": np.array([3.0])}), "c")])
    assert equal(seen.columns["x"], np.array([1.0, 2.0, 3.0]))
    assert seen.time.tolist() == [7, 8, 5]
    assert seen.source == ["a", "b", "c"]
    assert seen.message.tolist() == [0, 0, 1]


def test_one_message_is_not_copied() -> None:
    column = np.array([1.0, 2.0])
    assert rows([message(Readings(n=2, columns={"x": column}))]).columns["x"] is column


def test_a_field_that_some_lack_is_missing_there() -> None:
    first = Readings(n=1, columns={"x": np.array([1]), "t": ["u"]})
    second = Readings(n=2, columns={"y": np.array([True, False])})
    seen = rows([message(first), message(second)])
    assert equal(seen.columns["x"], np.array([1.0, NAN, NAN]))
    assert seen.columns["t"] == ["u", None, None]
    assert equal(seen.columns["y"], np.array([NAN, 1.0, 0.0]))


def test_texts_and_numbers_in_one_field_become_texts() -> None:
    seen = rows([message(Readings(n=1, columns={"x": ["a"]})), message(Readings(n=1, columns={"x": np.array([2.5])}))])
    assert seen.columns["x"] == ["a", "2.5"]


def test_a_classification_is_one_row_of_its_best_answer() -> None:
    body = Predictions(
        model=MODEL, seen="x", labels=["7", "1"], scores=np.array([0.75, 0.25], "<f4"), attributes={"truth": "7"}
    )
    seen = rows([message(body)])
    assert seen.n == 1
    assert seen.columns["label"] == ["7"]
    assert equal(seen.columns["score"], np.array([0.75], "<f4"))
    assert seen.columns["truth"] == ["7"]
    assert seen.columns["model"] == ["m"]


def test_a_detection_is_one_row_a_box_and_none_if_nothing_was_found() -> None:
    boxes = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], "<f4")
    body = Predictions(model=MODEL, seen="x", labels=["a", "b"], scores=np.array([0.5, 0.4], "<f4"), boxes=boxes)
    seen = rows([message(body)])
    assert seen.n == 2
    assert seen.columns["label"] == ["a", "b"]
    assert equal(seen.columns["y1"], np.array([3, 7], "<f4"))
    nothing = Predictions(model=MODEL, seen="x", boxes=np.zeros((0, 4), "<f4"))
    assert rows([message(nothing)]).n == 0


def test_values_of_a_regression_are_fields() -> None:
    body = Predictions(
        model=MODEL, seen="x", values={"wear": np.array([0.5], "<f4"), "n": np.array(3), "map": np.zeros((2, 2))}
    )
    seen = rows([message(body)])
    assert equal(seen.columns["wear"], np.array([0.5], "<f4"))
    assert equal(seen.columns["n"], np.array([3]))
    assert "map" not in seen.columns


def test_values_go_before_the_names_of_the_envelope_of_an_aggregate() -> None:
    values: dict[str, Scalar] = {"mean": 1.5, "count": 9, "any": True, "none": None, "last": "on"}
    seen = rows([message(Aggregate(window=Window(start=1, end=2), key="k", values=values, count=3))])
    assert equal(seen.columns["mean"], np.array([1.5]))
    assert equal(seen.columns["none"], np.array([NAN]))
    assert equal(seen.columns["any"], np.array([True]))
    assert seen.columns["last"] == ["on"]
    assert equal(seen.columns["end"], np.array([2]))


def test_an_events_values_are_fields() -> None:
    seen = rows([message(Event(name="hot", severity="alarm", values={"t": 80}))])
    assert seen.columns["name"] == ["hot"]
    assert equal(seen.columns["t"], np.array([80]))


@pytest.mark.parametrize("name", ["frame-1", "tensors-1", "end-1", "update-1"])
def test_what_has_no_rows_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="has no rows"):
        rows([SAMPLES[name]])


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([], np.array([], np.float64)),
        ([1, 2], np.array([1, 2], np.int64)),
        ([1, 2.5, None], np.array([1.0, 2.5, NAN])),
        ([True, False], np.array([True, False])),
        ([True, None], np.array([1.0, NAN])),
        ([1, "a", None], ["1", "a", None]),
        ([2**64 - 1], np.array([2.0**64])),
    ],
)
def test_single_values_as_a_column(values: list[Scalar], column: object) -> None:
    assert equal(from_scalars(values), column)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats() | st.none(), max_size=4), min_size=1, max_size=5), st.data())
def test_taking_rows_of_a_concatenation(parts: list[list[float | None]], data: st.DataObject) -> None:
    """Masks and indices pick the same from arrays and from texts."""
    numbers = concat([from_scalars(p) for p in parts], [len(p) for p in parts])
    texts = concat([[None if v is None else str(v) for v in p] for p in parts], [len(p) for p in parts])
    flat = [v for p in parts for v in p]
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(flat), max_size=len(flat))), np.bool_)
    picked = [v for v, keep in zip(flat, mask, strict=True) if keep]
    assert equal(take(numbers, mask), np.array([NAN if v is None else v for v in picked], np.float64))
    assert take(texts, mask) == take(texts, np.flatnonzero(mask)) == [None if v is None else str(v) for v in picked]


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=3))


@given(
    names=st.lists(st.sampled_from(["label", "score", "index", "model", "x", "known_label"]), unique=True, max_size=4),
    data=st.data(),
)
@settings(deadline=None, derandomize=True)
def test_classifications_together_are_as_each_alone(names: list[str], data: st.DataObject) -> None:
    """Predictions with the same attributes have a way of their own; it gives what one after the other gives."""
    one_kind: dict[str, st.SearchStrategy[Scalar]] = {
        name: data.draw(st.sampled_from([st.integers(-5, 5), st.text(max_size=3), SCALARS])) for name in names
    }
    messages = [
        Message(
            f"i{i}",
            f"s{i % 2}",
            i,
            Predictions(
                model=MODEL,
                seen="",
                labels=["a", "b"][: 1 + i % 2],
                scores=np.array([0.5, 0.25], np.float32)[: 1 + i % 2],
                attributes={name: data.draw(one_kind[name]) for name in names},
            ),
        )
        for i in range(4)
    ]
    together = rows(messages)
    single = [rows([message]) for message in messages]
    assert together.n == 4
    assert together.time.tolist() == [0, 1, 2, 3]
    assert together.source == ["s0", "s1", "s0", "s1"]
    assert together.message.tolist() == [0, 1, 2, 3]
    wanted = {name: concat([part.columns[name] for part in single], [1] * 4) for name in single[0].columns}
    assert together.columns.keys() == wanted.keys()
    for name, column in wanted.items():
        found = together.columns[name]
        assert isinstance(found, list) == isinstance(column, list)
        assert repr(list(found)) == repr(list(column))
        if isinstance(found, np.ndarray) and isinstance(column, np.ndarray):
            assert found.dtype == column.dtype


def test_an_attribute_may_have_the_name_that_another_gets() -> None:
    attributes: dict[str, Scalar] = {"label": 1, "score": 2, "known_label": 3}
    scores = np.array([0.5], np.float32)
    body = Predictions(model=MODEL, seen="", labels=["a"], scores=scores, attributes=attributes)
    one, two = rows([Message("i", "s", 1, body)]), rows([Message(f"i{i}", "s", 1, body) for i in range(2)])
    assert list(two.columns) == list(one.columns)
    for name, column in one.columns.items():
        assert two.columns[name][0] == column[0]
        assert two.columns[name][1] == column[0]
