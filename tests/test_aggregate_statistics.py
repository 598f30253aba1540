"""Statistics of many values: precision, sketches beyond the exact bound, merging, bounded memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nodes.statistics import STATISTICS, Plan, compile_fields
from nodes.statistics.curve import POINTS, Curve
from nodes.statistics.sketches import ERROR, EXACT, Distinct, Mode, Values, bucket_value, buckets
from nodes.statistics.state import Accumulator
from nodes.windowing.groups import Groups
from nodes.windowing.keys import Keys
from schemas.expressions import parse_call
from schemas.messages import Scalar

SECONDS = np.array([10.0])


def run(text: str, values: Any, *, time: Any = None, parts: int = 1, merge: bool = False) -> Scalar:
    """One statistic of one group, in ``parts`` batches; ``merge``: each batch in a group of its own, merged at the end."""
    plan = compile_fields({"r": parse_call(text)})
    groups = Groups(plan, Keys(), 10**6, spans=True)
    kid = groups.keys.lookup(["k"])
    slots = [groups.open(kid) for _ in range(parts if merge else 1)]
    x = np.asarray(values) if not isinstance(values, list) else values
    times = np.arange(len(x)) * 10**9 if time is None else np.asarray(time, np.int64)
    bounds = np.linspace(0, len(x), parts + 1).astype(int)
    for i in range(parts):
        a, b = int(bounds[i]), int(bounds[i + 1])
        series = plan.evaluate({"x": x[a:b]}, b - a)
        slot = slots[i if merge else 0]
        groups.update(np.repeat(slot, b - a), times[a:b], series, None)
    for other in slots[1:]:
        groups.merge(slots[0], other)
    saved = msgspec.msgpack.decode(msgspec.msgpack.encode(groups.snapshot(slots[0])))
    answer = plan.results(slots[0], SECONDS)["r"][0]
    again = Groups(compile_fields({"r": parse_call(text)}), Keys(), 10**6, spans=True)
    again.keys.lookup(["k"])
    restored = again.restore(saved, np.zeros(1, np.int64))
    assert again.plan.results(restored, SECONDS)["r"][0] == answer
    assert int(again.count[restored[0]]) == len(x)
    return answer


def test_variance_far_from_zero_and_after_an_outlier() -> None:
    rng = np.random.default_rng(1)
    x = 1e9 + rng.normal(size=50_000) * 1e-3
    for text in ("stddev(x)", "variance(x)"):
        expected = np.std(x - 1e9, ddof=1) ** (2 if text == "variance(x)" else 1)
        assert run(text, x, parts=7) == pytest.approx(expected, rel=1e-6)
        assert run(text, x, parts=7, merge=True) == pytest.approx(expected, rel=1e-6)
    outlier = np.concatenate([[1e9], rng.normal(size=10_000)])
    assert run("variance(x)", outlier) == pytest.approx(np.var(outlier, ddof=1), rel=1e-9)
    assert run("stddev(x)", np.full(1000, 0.1)) == 0.0


def test_sums_have_the_same_bits_in_any_batches() -> None:
    x = np.random.default_rng(2).normal(size=5000) * 1e3
    for text in ("sum(x)", "mean(x)", "variance(x)"):
        assert len({run(text, x, parts=n) for n in (1, 3, 50, 5000)}) == 1


def test_infinities_stay_infinities() -> None:
    x = np.array([np.inf, 1.0, 2.0])
    assert run("mean(x)", x) == np.inf
    assert run("max(x)", x) == np.inf
    assert run("min(x)", x) == 1.0
    assert run("stddev(x)", x) is None
    assert run("median(x)", x) == 2.0
    assert run("quantile(x, 0.9)", np.concatenate([x, np.zeros(2000)])) == 0.0


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("parts", [1, 40])
def test_quantiles_beyond_the_exact_bound(parts: int, merge: bool) -> None:
    x = np.random.default_rng(3).lognormal(2, 3, size=20_000) * np.random.default_rng(4).choice([-1, 1], 20_000)
    for q in (0, 0.01, 0.25, 0.5, 0.9, 0.999, 1):
        got = run(f"quantile(x, {q})", x, parts=parts, merge=merge)
        low, high = np.quantile(x, q, method="lower"), np.quantile(x, q, method="higher")
        assert isinstance(got, float)
        assert low - abs(low) * ERROR * 1.01 <= got <= high + abs(high) * ERROR * 1.01
    assert run("median(x)", x[:EXACT], parts=parts) == pytest.approx(np.median(x[:EXACT]))


def test_buckets_keep_order_and_error() -> None:
    x = np.array([-np.inf, -1e300, -3.0, -1e-5, -0.0, 0.0, 1e-301, 1e-5, 1.0, 1e300, np.inf])
    made = buckets(x)
    assert (np.diff(made) >= 0).all()
    for value, bucket in zip(x.tolist(), made.tolist(), strict=True):
        assert bucket_value(bucket) == pytest.approx(value, rel=ERROR * 1.001, abs=1e-300)


def test_quantiles_of_many_groups_spill_and_stay_right() -> None:
    plan = compile_fields({"q": parse_call("quantile(x, 0.5)")})
    groups = Groups(plan, Keys(), 10**6, spans=False)
    slots = groups.open(groups.keys.lookup([f"k{i}" for i in range(50)]))
    rng = np.random.default_rng(5)
    x, which = rng.normal(100, 5, 200_000), rng.integers(0, 50, 200_000)
    which[which == 3] = 4
    which[:5] = 3
    for at in range(0, len(x), 1000):
        piece = slice(at, at + 1000)
        groups.update(slots[which[piece]], np.zeros(1000, np.int64), plan.evaluate({"x": x[piece]}, 1000), None)
    values = plan.accumulators[0][1]
    assert isinstance(values, Values)
    assert values.log.size < 70_000, "values beyond the bound are in sketches"
    for i, got in enumerate(plan.results(slots, np.ones(50))["q"]):
        tolerance = 1e-12 if i == 3 else ERROR * 1.01
        assert got == pytest.approx(np.median(x[which == i]), rel=tolerance)
    groups.close(slots)
    assert (values.log.size, values.sketch) == (0, {})


@pytest.mark.parametrize("merge", [False, True])
def test_distinct(merge: bool) -> None:
    x = np.random.default_rng(6).integers(0, 900, 5000)
    assert run("distinct(x)", x.astype(float), parts=5, merge=merge) == len(set(x.tolist()))
    assert run("distinct(x)", [f"t{v}" for v in x], parts=5, merge=merge) == len(set(x.tolist()))
    assert run("distinct(x)", np.array([0.0, -0.0, np.nan])) == 1
    many = np.arange(100_000.0)
    got = run("distinct(x)", many, parts=5, merge=merge)
    assert isinstance(got, int)
    assert abs(got - 100_000) < 4 * 0.032 * 100_000


def test_distinct_keeps_few() -> None:
    distinct = Distinct()
    distinct.resize(4)
    for at in range(0, 2_000_000, 50_000):
        distinct.update(np.zeros(50_000, np.int64), np.zeros(50_000, np.int64), np.arange(at, at + 50_000.0))
    assert distinct.log.size <= 120_000


def test_mode() -> None:
    assert run("mode(x)", ["b", "a", None, "b", "a"]) == "a"
    assert run("mode(x)", np.array([3.0, 1.0, np.nan, 3.0]), parts=2, merge=True) == 3.0
    rng = np.random.default_rng(7)
    x = np.concatenate([np.full(3000, 5.0), rng.normal(size=20_000)])
    rng.shuffle(x)
    assert run("mode(x)", x, parts=20) == 5.0
    mode = Mode()
    mode.update(np.zeros(len(x), np.int64), np.zeros(len(x), np.int64), x)
    assert len(mode.counts[0]) <= 2 * EXACT


@pytest.mark.parametrize("merge", [False, True])
def test_integral_of_more_points_than_are_kept(merge: bool) -> None:
    t = np.sort(np.random.default_rng(8).choice(10**6, 100_000, replace=False)) * 10**6
    x = np.sin(t / 1e11) + 5
    area = np.trapezoid(x, t / 1e9)
    assert run("integral(x)", x, time=t, parts=10, merge=merge) == pytest.approx(area, rel=1e-9)
    assert run("time_mean(x)", x, time=t, parts=10, merge=merge) == pytest.approx(
        area / ((t[-1] - t[0]) / 1e9), rel=1e-9
    )
    mixed = np.random.default_rng(9).permutation(2000)
    assert run("integral(x)", x[:2000][mixed], time=t[:2000][mixed]) == pytest.approx(
        np.trapezoid(x[:2000], t[:2000] / 1e9)
    )


def test_a_curve_keeps_few_points() -> None:
    curve = Curve()
    curve.resize(1)
    for at in range(0, 1_000_000, 10_000):
        t = np.arange(at, at + 10_000) * 1000
        curve.update(np.zeros(10_000, np.int64), t, np.ones(10_000))
    assert curve.log.size < 150_000
    assert POINTS < 150_000


def test_first_and_last_keep_their_type() -> None:
    assert run("last(x)", ["a", "b", None]) == "b"
    assert run("first(x)", ["a", "b"], time=[5, 4]) == "b"
    assert run("last(x)", np.array([True, False])) is False
    assert run("first(x)", np.array([np.nan, np.nan])) is None
    assert run("delta(x)", np.array([1, 5])) == 4.0
    assert run("rate(x)", np.array([1.0, 5.0]), time=[0, 2 * 10**9]) == 2.0
    assert run("rate(x > 2)", np.array([1.0, 5.0])) == 0.1


def test_every_statistic_of_nothing_and_of_one() -> None:
    for name, kind in STATISTICS.items():
        args = {"quantile": "x, 0.5", "histogram": "x, 0"}.get(name, "x")
        for values, parts in ((np.array([np.nan]), 1), (np.array([2.0]), 1), (np.zeros(0), 1)):
            plan = compile_fields({"r": parse_call(f"{name}({args})")})
            groups = Groups(plan, Keys(), 10, spans=False)
            slot = groups.open(groups.keys.lookup(["k"]))
            groups.update(
                np.repeat(slot, len(values)),
                np.zeros(len(values), np.int64),
                plan.evaluate({"x": values}, len(values)),
                None,
            )
            for column in plan.results(slot, SECONDS).values():
                assert column[0] is None or isinstance(column[0], (int, float)), (name, parts)
            assert kind.form.startswith(name)


def test_calls_of_one_expression_share_their_state() -> None:
    fields = {
        n: parse_call(t)
        for n, t in {"a": "mean(x)", "b": "sum(x)", "c": "min(x)", "d": "max(x)", "e": "mean(x*2)"}.items()
    }
    plan: Plan = compile_fields(fields)
    assert [e.source for e in plan.expressions] == ["x", "x*2"]
    assert len(plan.accumulators) == 3
    assert all(isinstance(a, Accumulator) for _, a in plan.accumulators)


def test_one_condition_may_be_counted_and_averaged() -> None:
    for calls in (("count(x > 2)", "mean(x > 2)"), ("mean(x > 2)", "count(x > 2)")):
        plan = compile_fields({text: parse_call(text) for text in calls})
        groups = Groups(plan, Keys(), 10, spans=True)
        slots = groups.open(groups.keys.lookup(["k"]))
        series = plan.evaluate({"x": np.array([1.0, 2, 3, 4])}, 4)
        groups.update(np.repeat(slots, 4), np.arange(4), series, None)
        answers = plan.results(slots, SECONDS)
        assert {text: value for text, (value,) in answers.items()} == {"count(x > 2)": 2, "mean(x > 2)": 0.5}


def test_the_page_lists_every_statistic() -> None:
    page = (Path(__file__).parent.parent / "docs" / "aggregate.md").read_text()
    for kind in STATISTICS.values():
        for form in re.findall(r"\w+\([^)]*\)", kind.form):
            assert f"`{form}`" in page, form
