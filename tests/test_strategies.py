"""Strategies against their papers' formulas, written out plainly; and under attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from pydantic import ValidationError

from nodes import kinds
from nodes.federated.weights import Weights, flat
from nodes.strategies._strategy import ClientUpdate, Strategy
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


EVERY: list[tuple[str, dict[str, Any]]] = [("fedavg", {})]


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_the_same_updates_give_the_same_bytes_and_nothing_given_is_changed(name: str, options: dict[str, Any]) -> None:
    some, before = updates(11), flat(MODEL)
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
    some = updates(11)
    mixed = [some[i] for i in np.random.default_rng(5).permutation(11)]
    near(strategy(name, **options).aggregate(MODEL, mixed), flat(strategy(name, **options).aggregate(MODEL, some)))


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_restart_between_rounds_changes_nothing(name: str, options: dict[str, Any]) -> None:
    straight, model = strategy(name, **options), dict(MODEL)
    broken, again = strategy(name, **options), dict(MODEL)
    for number in range(4):
        some = updates(11, number)
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
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        strategy(name, **options)
