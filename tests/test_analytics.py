"""Federated analytics: sums of the clients' counts say what all rows together would, and noise what it must."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.federated.analytics import Question, answer, counted, quantile, total
from nodes.privacy.dp import Chance

EDGES = tuple(float(x) for x in range(-10, 11))


def clients(n: int = 20, rows: int = 200) -> list[Any]:
    draw = np.random.default_rng(2)
    return [draw.normal(draw.normal(0, 2), 2, rows + i) for i in range(n)]


def test_a_histogram_of_all_clients_is_that_of_all_rows() -> None:
    question = Question("t", edges=EDGES)
    summed = total([answer(question, values) for values in clients()], question)
    rows = np.concatenate(clients())
    assert summed[1:-1].tolist() == np.histogram(rows, EDGES)[0].tolist()
    assert summed.sum() == len(rows)
    assert counted(question, summed)[0] == ("below -10", float((rows < -10).sum()))
    assert counted(question, summed)[1][0] == "-10 to -9"
    assert counted(question, summed)[-1] == ("10 and above", float((rows >= 10).sum()))


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_is_in_the_bin_of_the_rows_own(rows: list[float], share: float) -> None:
    question = Question("t", edges=EDGES)
    found = quantile(question, answer(question, np.array(rows)), share)
    below = np.mean(np.array(rows) < np.floor(found))
    up_to = np.mean(np.array(rows) <= np.ceil(found) + (1 if found == np.ceil(found) else 0))
    assert EDGES[0] <= found <= EDGES[-1]
    assert below <= share + 1e-9 or found == EDGES[0]
    assert up_to >= share - 1e-9 or found == EDGES[-1]


def test_quantiles_of_many_rows_are_near() -> None:
    question = Question("t", edges=EDGES)
    summed = total([answer(question, values) for values in clients()], question)
    rows = np.concatenate(clients())
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(quantile(question, summed, share) - np.quantile(rows, share)) < 0.2
    assert np.isnan(quantile(question, np.zeros(question.size), 0.5))
    with pytest.raises(ValueError, match="quantiles are of numbers"):
        quantile(Question("t", categories=("a",)), np.zeros(2), 0.5)


def test_categories_and_what_is_missing() -> None:
    question = Question("label", categories=("3", "7"))
    summed = total([answer(question, ["3", "7", "7", None, "x"]), answer(question, ["7"])], question)
    assert counted(question, summed) == [("3", 1.0), ("7", 3.0), ("other", 1.0)]
    numbers = Question("label", categories=(3, 7))
    assert answer(numbers, np.array([3, 7, 7, 1])).tolist() == [1, 2, 1]
    assert answer(Question("t", edges=(0.0, 1.0)), np.array([0.5, np.nan, 1.0])).tolist() == [0, 1, 1]


def test_each_client_the_same() -> None:
    question = Question("label", categories=("a",), weigh="clients")
    answers = [answer(question, ["a"] * 1000), answer(question, ["b"]), answer(question, [])]
    assert total(answers, question, clip=1.0).tolist() == [1, 1]


def test_a_client_moves_the_sum_by_clip_at_most_and_noise_is_of_that_size() -> None:
    question = Question("t", edges=EDGES)
    answers = [answer(question, values) for values in clients()]
    apart = total(answers, question, clip=5.0) - total(answers[1:], question, clip=5.0)
    assert np.linalg.norm(apart) <= 5.0
    plain = total(answers, question, clip=5.0)
    many = [total(answers, question, clip=5.0, noise=2.0, chance=Chance(seed)) - plain for seed in range(1000)]
    np.testing.assert_allclose(np.std(many, axis=0), 10.0, rtol=0.15)
    assert np.abs(np.mean(many, axis=0)).max() < 5 * 10 / np.sqrt(1000)


def test_medians_hold_with_noise_where_there_are_clients_enough() -> None:
    question = Question("t", edges=EDGES, weigh="clients")
    many = clients(2000, 20)
    noisy = total([answer(question, values) for values in many], question, clip=1.0, noise=2.0, chance=Chance(1))
    assert abs(quantile(question, noisy, 0.5) - float(np.median(np.concatenate(many)))) < 0.3


@pytest.mark.parametrize("wrong", [np.zeros(3), np.full(21, np.nan), np.full(21, -1.0), np.zeros(21, np.int64)])
def test_an_answer_that_is_none_is_left_out(wrong: Any) -> None:
    question = Question("t", edges=EDGES[:20])
    good = answer(question, np.arange(5.0))
    assert total([good, wrong, good], question).tolist() == (2 * good).tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"categories": ["a"], "edges": [1.0]},
        {"categories": ["a", "a"]},
        {"edges": [1.0, 1.0]},
        {"edges": [2.0, 1.0]},
        {"edges": [0.0, float("inf")]},
        {"edges": [float(x) for x in range(70_000)]},
        {"categories": ["a"], "weigh": "all"},
    ],
)
def test_questions_that_are_none_are_refused_on_the_wire(fields: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"field": "t", **fields}), type=Question)


def test_a_question_travels() -> None:
    for question in (Question("t", edges=(0.5, 1.0)), Question("t", categories=("a", 1), weigh="clients")):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(question), type=Question) == question
