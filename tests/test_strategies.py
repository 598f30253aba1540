"""Strategies against their papers' formulas, written out plainly; and under attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
from federated_kit import Federation, Plan, alike, perceptron, train, two_classes
from federated_tables import ATTACKS, attacked
from pydantic import ValidationError

from nodes import kinds
from nodes.federated.weights import UnfitError, Weights, flat, minus, shapes
from nodes.strategies import scaffold
from nodes.strategies._strategy import ClientUpdate, Strategy, TooFewError
from schemas.messages import Array

FORMS = {"w": (5, 3), "b": (3,), "scale": ()}


def strategy(name: str, **options: Any) -> Strategy:
    module = kinds.module("strategy", name)
    made: Strategy = module.build(module.Config(**options))
    return made


def weights(draw: np.random.Generator, scale: float = 1.0) -> Weights:
    return {name: np.asarray(draw.normal(0, scale, form), np.float32) for name, form in FORMS.items()}


def updates(n: int, seed: int = 0, **fields: Any) -> list[ClientUpdate]:
    draw = np.random.default_rng(seed)
    return [ClientUpdate(f"c{i:02}", weights(draw), int(draw.integers(1, 200)), **fields) for i in range(n)]


def rows(some: Sequence[ClientUpdate]) -> Array:
    """[n, numbers] deltas."""
    return np.stack([flat(update.delta) for update in some])


def near(model: Weights, wanted: Array) -> None:
    np.testing.assert_allclose(flat(model), wanted, rtol=2e-6, atol=2e-6)


MODEL = weights(np.random.default_rng(99))


def test_fedavg() -> None:
    some = updates(7)
    n = np.array([update.samples for update in some], np.float64)
    near(strategy("fedavg").aggregate(MODEL, some), flat(MODEL) + (n @ rows(some)) / n.sum())
    near(strategy("fedavg", weigh="clients").aggregate(MODEL, some), flat(MODEL) + rows(some).mean(0))
    near(strategy("fedavg", rate=0.5).aggregate(MODEL, some), flat(MODEL) + 0.5 * (n @ rows(some)) / n.sum())


def test_fedavg_of_averages_is_that_of_all() -> None:
    """Gateway, site, cloud: a site's answer counts for the rows of all below it."""
    some = updates(9)
    sites = []
    for name, part in (("a", some[:4]), ("b", some[4:])):
        n = sum(update.samples for update in part)
        mean = strategy("fedavg").aggregate({k: np.zeros_like(v) for k, v in MODEL.items()}, part)
        sites.append(ClientUpdate(name, mean, n))
    near(strategy("fedavg").aggregate(MODEL, sites), flat(strategy("fedavg").aggregate(MODEL, some)))


def test_a_stale_update_counts_less() -> None:
    some = updates(3)
    late = [ClientUpdate(u.client, u.delta, u.samples, staleness=s) for u, s in zip(some, (0, 3, 8), strict=True)]
    n = np.array([update.samples for update in some], np.float64)
    faded = n * (1 + np.array([0, 3, 8])) ** -0.5
    near(strategy("fedavg").aggregate(MODEL, late), flat(MODEL) + (faded @ rows(some)) / n.sum())
    same = strategy("fedavg", stale=0).aggregate(MODEL, late)
    near(same, flat(strategy("fedavg").aggregate(MODEL, some)))


def test_fedprox_is_the_average_and_tells_the_clients() -> None:
    some = updates(5)
    near(strategy("fedprox").aggregate(MODEL, some), flat(strategy("fedavg").aggregate(MODEL, some)))
    assert strategy("fedprox", proximal=0.3).task() == {"proximal": 0.3}
    assert strategy("fedavg").task() == {}


def test_fedavgm_is_momentum_on_the_server() -> None:
    made, model = strategy("fedavgm", rate=0.7, momentum=0.8), dict(MODEL)
    wanted, step = flat(MODEL), np.zeros(19)
    for number in range(5):
        some = updates(6, number)
        n = np.array([update.samples for update in some], np.float64)
        step = 0.8 * step + (n @ rows(some)) / n.sum()
        wanted = wanted + 0.7 * step
        model = made.aggregate(model, some)
        near(model, wanted)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_strategies_number_by_number(name: str) -> None:
    """Algorithm 2 of the paper, for each number by itself."""
    made, model = strategy(name, rate=0.1, momentum=0.6, floor=0.01, weigh="clients"), dict(MODEL)
    wanted, d, v = flat(MODEL).tolist(), [0.0] * 19, [0.01**2] * 19
    for number in range(5):
        some = updates(6, number)
        mean = rows(some).mean(0)
        for i in range(19):
            d[i] = 0.6 * d[i] + 0.4 * mean[i]
            if name == "fedadagrad":
                v[i] += d[i] ** 2
            elif name == "fedadam":
                v[i] = 0.99 * v[i] + 0.01 * d[i] ** 2
            else:
                v[i] -= 0.01 * d[i] ** 2 * (1 if v[i] > d[i] ** 2 else -1)
            wanted[i] += 0.1 * d[i] / (v[i] ** 0.5 + 0.01)
        model = made.aggregate(model, some)
        near(model, np.array(wanted))


def test_scaffold_keeps_the_mean_of_the_clients_controls() -> None:
    """Whoever takes part: c is the mean over all clients, of whom those not yet seen have zeros."""
    draw = np.random.default_rng(3)
    made, model = strategy("scaffold", clients=8), dict(MODEL)
    controls = np.zeros((8, 19))
    for _ in range(6):
        chosen = np.sort(draw.choice(8, 3, replace=False))
        some = [ClientUpdate(f"c{i}", weights(draw), 10, extra=weights(draw)) for i in chosen]
        controls[chosen] += np.stack([flat(update.extra) for update in some])
        before = flat(model)
        model = made.aggregate(model, some)
        near(model, before + rows(some).mean(0))
        near(made.shared(), controls.mean(0))


def test_scaffold_counts_those_it_has_seen_where_nobody_says_how_many() -> None:
    made = strategy("scaffold")
    assert made.shared() == {}
    extra = {name: np.ones(form, np.float32) for name, form in FORMS.items()}
    for client in ("a", "b", "a", "c"):
        made.aggregate(MODEL, [ClientUpdate(client, MODEL, 1, extra)])
    near(made.shared(), np.full(19, 4 / 3))
    assert made.extras(shapes(MODEL)) == shapes(MODEL)


def test_scaffolds_client_by_option_two() -> None:
    """One client by the paper's algorithm 1, written out with models where the product has deltas."""
    data, rate = alike(5)[0], 0.1
    x = perceptron(64, 10, seed=2)
    c = {name: np.full_like(array, 0.01) for name, array in x.items()}
    ci = {name: np.full_like(array, -0.02) for name, array in x.items()}
    y, steps = train(x, data, Plan(rate=rate, correction=scaffold.correction(c, ci, x)), 1)
    changed = scaffold.change(minus(y, x), c, steps, rate)
    for name in x:
        after = ci[name] - c[name] + (x[name] - y[name]) / (steps * rate)
        np.testing.assert_allclose(scaffold.adopted(ci, changed)[name], after, atol=1e-5)
    assert not any(array.any() for array in scaffold.change(minus(y, x), c, 0, rate).values())
    zeros = scaffold.correction({}, {}, x)
    assert all(array.shape == x[name].shape and not array.any() for name, array in zeros.items())
    with pytest.raises(UnfitError):
        scaffold.correction({"w0": np.zeros(3, np.float32)}, {}, x)


def test_scaffold_learns_two_classes_each_in_fewer_rounds_than_fedavg() -> None:
    begin, plan = perceptron(64, 32, 10, seed=1), Plan(epochs=2, rate=0.1)
    rounds = {
        name: len(Federation(strategy(name), two_classes(), begin, plan).run(80, until=0.93))
        for name in ("fedavg", "scaffold")
    }
    assert rounds["scaffold"] < rounds["fedavg"] / 2


def test_state_of_another_model_is_refused() -> None:
    made = strategy("fedavgm")
    made.aggregate(MODEL, updates(2))
    other = {"w": np.zeros(2, np.float32)}
    with pytest.raises(UnfitError):
        made.aggregate(other, [ClientUpdate("a", other, 1)])
    with pytest.raises(UnfitError):
        made.restore({"step": {"w": {"dtype": "<f8", "shape": [3], "data": b"123"}}})


def test_fednova_with_as_many_steps_each_is_the_average() -> None:
    some = updates(5, metrics={"steps": 12.0})
    near(strategy("fednova").aggregate(MODEL, some), flat(strategy("fedavg").aggregate(MODEL, some)))


def test_fednova_by_its_formula() -> None:
    taken = [5.0, 10.0, 40.0, 1.0]
    some = [replace(u, metrics={"steps": steps}) for u, steps in zip(updates(4), taken, strict=True)]
    n = np.array([update.samples for update in some], np.float64)
    p, tau = n / n.sum(), np.array(taken)
    near(strategy("fednova").aggregate(MODEL, some), flat(MODEL) + (p @ tau) * ((p / tau) @ rows(some)))


def test_fednova_believes_no_fancy_number_of_steps() -> None:
    some = [replace(u, metrics={"steps": steps}) for u, steps in zip(updates(3), (10.0, 10.0, 1e30), strict=True)]
    same = [replace(u, metrics={"steps": steps}) for u, steps in zip(updates(3), (10.0, 10.0, 100.0), strict=True)]
    near(strategy("fednova").aggregate(MODEL, some), flat(strategy("fednova").aggregate(MODEL, same)))
    for nonsense in (float("nan"), float("inf")):
        with pytest.raises(UnfitError, match="no client says"):
            strategy("fednova").aggregate(MODEL, [replace(some[0], metrics={"steps": nonsense})])


def test_fednova_takes_who_does_not_say_for_usual() -> None:
    """One such client must not end everybody's round."""
    some = [
        replace(u, metrics=told) for u, told in zip(updates(3), ({"steps": 10.0}, {}, {"steps": 10.0}), strict=True)
    ]
    same = [replace(u, metrics={"steps": 10.0}) for u in updates(3)]
    near(strategy("fednova").aggregate(MODEL, some), flat(strategy("fednova").aggregate(MODEL, same)))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
def test_median(n: int) -> None:
    some = updates(n)
    near(strategy("median").aggregate(MODEL, some), flat(MODEL) + np.median(rows(some), 0))


@pytest.mark.parametrize(("n", "trim", "out"), [(10, 0.3, 3), (10, 0.25, 3), (100, 0.29, 29), (3, 0.4, 1), (5, 0, 0)])
def test_trimmed_mean(n: int, trim: float, out: int) -> None:
    some = updates(n)
    wanted = [sum(sorted(column)[out : n - out]) / (n - 2 * out) for column in rows(some).T.tolist()]
    near(strategy("trimmed-mean", trim=trim).aggregate(MODEL, some), flat(MODEL) + wanted)


def krum_scores(some: Sequence[Array], faulty: int) -> list[tuple[float, float]]:
    """As the paper says it, with loops; and the distance to all, for two who are each other's nearest."""
    out = []
    for i, one in enumerate(some):
        apart = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(some) if j != i)
        out.append((sum(apart[: max(len(some) - faulty - 2, 1)]), sum(apart)))
    return out


@pytest.mark.parametrize(("n", "faulty", "choose"), [(9, 3, 1), (12, 3, 6), (3, 0, 1), (15, 2, 5)])
def test_krum(n: int, faulty: int, choose: int) -> None:
    some = updates(n)
    found = krum_scores(list(rows(some)), faulty)
    best = sorted(range(n), key=lambda i: found[i])[:choose]
    made = strategy("krum", faulty=faulty, choose=choose)
    assert made.least() == 2 * faulty + 3
    near(made.aggregate(MODEL, some), flat(MODEL) + rows(some)[best].mean(0))


@pytest.mark.parametrize(("n", "faulty"), [(7, 1), (11, 2), (13, 2), (5, 0)])
def test_bulyan(n: int, faulty: int) -> None:
    some = updates(n)
    left = list(rows(some))
    chosen: list[Array] = []
    while len(chosen) < n - 2 * faulty:
        found = krum_scores(left, faulty)
        chosen.append(left.pop(found.index(min(found))))
    wanted = []
    for column in np.array(chosen).T:
        near_first = np.argsort(np.abs(column - np.median(column)))
        wanted.append(column[near_first[: n - 4 * faulty]].mean())
    made = strategy("bulyan", faulty=faulty)
    assert made.least() == 4 * faulty + 3
    near(made.aggregate(MODEL, some), flat(MODEL) + wanted)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 11])
def test_geometric_median_is_where_the_sum_of_distances_is_least(n: int) -> None:
    some = updates(n)
    step = flat(strategy("geometric-median", steps=2000).aggregate(MODEL, some)) - flat(MODEL)

    def summed(point: Array) -> float:
        return float(np.linalg.norm(rows(some) - point, axis=1).sum())

    draw = np.random.default_rng(1)
    assert all(
        summed(step) <= summed(step + draw.normal(0, size, 19)) + 1e-4 for size in (1e-3, 1e-2, 1) for _ in range(50)
    )
    assert all(summed(step) <= summed(point) + 1e-4 for point in [*rows(some), rows(some).mean(0)])


def test_geometric_median_step_by_step() -> None:
    """Weiszfeld's algorithm with the points themselves, where the product has only their inner products."""
    some = updates(8)
    points = rows(some)
    point = points.mean(0)
    for _ in range(500):
        far = np.linalg.norm(points - point, axis=1)
        point = (points / far[:, None]).sum(0) / (1 / far).sum()
    near(strategy("geometric-median", steps=500).aggregate(MODEL, some), flat(MODEL) + point)


@pytest.mark.parametrize("far", [1e3, 1e30])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("median", {}),
        ("trimmed-mean", {"trim": 0.3}),
        ("krum", {"faulty": 3}),
        ("krum", {"faulty": 3, "choose": 4}),
        ("bulyan", {"faulty": 3}),
        ("geometric-median", {}),
    ],
)
def test_three_far_away_do_not_carry_it_off(name: str, options: dict[str, Any], far: float) -> None:
    """What comes out stays among the honest, however far the others are."""
    n = 15 if name == "bulyan" else 10
    some = updates(n)
    size = float(np.linalg.norm(rows(some), axis=1).max())
    bad = [
        replace(update, delta={key: np.float32(far) * np.ones_like(array) for key, array in update.delta.items()})
        for update in some[:3]
    ]
    model = strategy(name, **options).aggregate(MODEL, bad + some[3:])
    assert np.linalg.norm(flat(model) - flat(MODEL)) <= size
    assert np.linalg.norm(flat(strategy("fedavg").aggregate(MODEL, bad + some[3:]))) > 10 * size


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack != "nobody"])
def test_three_of_ten_who_poison_do_not_spoil_the_model(attack: str) -> None:
    """Within two points of a run without them; fedavg falls by four and more."""
    clean = clean_run()
    assert clean >= 0.97
    assert attacked("fedavg", {}, attack) < clean - 0.04
    for name, options in (
        ("median", {}),
        ("trimmed-mean", {"trim": 0.3}),
        ("krum", {"faulty": 3, "choose": 6}),
        ("geometric-median", {}),
    ):
        assert attacked(name, options, attack) >= clean - 0.02, name
    assert attacked("krum", {"faulty": 3}, attack) >= attacked("krum", {"faulty": 3}, "nobody") - 0.02


@cache
def clean_run() -> float:
    return attacked("fedavg", {}, "nobody")


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [("krum", {"faulty": 3}, 9), ("bulyan", {"faulty": 2}, 11), ("trimmed-mean", {"trim": 0.1}, 3)],
)
def test_too_few_updates_are_told(name: str, options: dict[str, Any], least: int) -> None:
    made = strategy(name, **options)
    assert made.least() == least
    with pytest.raises(TooFewError, match=f"{least - 1} updates, this strategy needs {least}"):
        made.aggregate(MODEL, updates(least - 1))
    made.aggregate(MODEL, updates(least))


def test_only_what_needs_the_sum_alone_says_so() -> None:
    """Those that do give with the weighted mean, as one client's, what they give with all."""
    some = updates(6)
    n = sum(update.samples for update in some)
    mean = strategy("fedavg").aggregate({k: np.zeros_like(v) for k, v in MODEL.items()}, some)
    summing = {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"}
    for name, options in EVERY:
        made = strategy(name, **options)
        assert made.sums == (name in summing)
        if made.sums:
            whole = strategy(name, **options).aggregate(MODEL, some)
            near(made.aggregate(MODEL, [ClientUpdate("all", mean, n)]), flat(whole))


EVERY: list[tuple[str, dict[str, Any]]] = [
    ("fedavg", {}),
    ("fedprox", {}),
    ("fedavgm", {}),
    ("fedadam", {}),
    ("fedyogi", {}),
    ("fedadagrad", {}),
    ("scaffold", {}),
    ("fednova", {}),
    ("median", {}),
    ("trimmed-mean", {}),
    ("krum", {"faulty": 2}),
    ("krum", {"faulty": 4, "choose": 3}),
    ("bulyan", {"faulty": 2}),
    ("geometric-median", {}),
]


def test_every_strategy_is_in_these_tests() -> None:
    assert {name for name, _ in EVERY} == set(kinds.names("strategy")) - {"sum"}  # makes no model: test_counting.py


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_the_same_updates_give_the_same_bytes_and_nothing_given_is_changed(name: str, options: dict[str, Any]) -> None:
    some, before = updates(11, metrics={"steps": 3.0}), flat(MODEL)
    kept = rows(some)
    one, other = (strategy(name, **options).aggregate(MODEL, some) for _ in range(2))
    assert all(one[key].tobytes() == other[key].tobytes() for key in FORMS)
    assert [(key, array.shape, array.dtype) for key, array in one.items()] == [
        (key, array.shape, array.dtype) for key, array in MODEL.items()
    ]
    assert np.array_equal(flat(MODEL), before)
    assert np.array_equal(rows(some), kept)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_the_order_of_the_clients_does_not_matter(name: str, options: dict[str, Any]) -> None:
    some = updates(11, metrics={"steps": 3.0})
    mixed = [some[i] for i in np.random.default_rng(5).permutation(11)]
    near(strategy(name, **options).aggregate(MODEL, mixed), flat(strategy(name, **options).aggregate(MODEL, some)))


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_restart_between_rounds_changes_nothing(name: str, options: dict[str, Any]) -> None:
    straight, model = strategy(name, **options), dict(MODEL)
    broken, again = strategy(name, **options), dict(MODEL)
    for number in range(4):
        some = updates(11, number, metrics={"steps": 3.0})
        model = straight.aggregate(model, some)
        state = msgspec.msgpack.decode(msgspec.msgpack.encode(broken.snapshot()))
        broken = strategy(name, **options)
        if state is not None:
            broken.restore(state)
        again = broken.aggregate(again, some)
    assert all(model[key].tobytes() == again[key].tobytes() for key in FORMS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavg", {"rate": 0}),
        ("fedavg", {"weigh": "rows"}),
        ("fedavg", {"stale": -1}),
        ("fedavg", {"proximal": 1}),
        ("fedprox", {"proximal": 0}),
        ("fedavgm", {"momentum": 1}),
        ("fedadam", {"floor": 0}),
        ("scaffold", {"clients": 0}),
        ("fednova", {"most": 0}),
        ("trimmed-mean", {"trim": 0.5}),
        ("krum", {}),
        ("krum", {"faulty": -1}),
        ("krum", {"faulty": 3, "choose": 7}),
        ("bulyan", {}),
        ("geometric-median", {"smooth": 0}),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        strategy(name, **options)
