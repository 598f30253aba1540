"""Differential privacy: what is clipped and noised, what it costs, and that a run ends where its budget does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated_kit import Plan, alike, perceptron, train
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nodes.federated.weights import Weights, flat, minus, norm
from nodes.privacy.accountant import Accountant, BudgetError, epsilon_of, noise_for, noise_of
from nodes.privacy.dp import Chance, Privacy, central, clipped, drawn, local
from nodes.strategies._strategy import ClientUpdate
from nodes.strategies.fedavg import Config, FedAvg
from schemas.errors import ConfigError

ROOT = Path(__file__).parent.parent


def delta(seed: int, size: float = 1.0) -> Weights:
    draw = np.random.default_rng(seed)
    forms = {"w": (8, 5), "b": (5,), "scalar": ()}
    return {name: np.asarray(draw.normal(0, size, form), np.float32) for name, form in forms.items()}


@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e37]), st.floats(1e-3, 1e3), st.booleans())
def test_nothing_is_longer_than_clip_not_even_after_rounding(seed: int, size: float, most: float, parts: bool) -> None:
    one = delta(seed, size)
    short = clipped(one, most, by_tensor=parts)
    assert norm(short) <= most
    assert norm({name: array.astype(np.float32) for name, array in short.items()}) <= most
    if norm(one) <= most and not parts:
        assert np.array_equal(flat(short), flat(one))
    elif not parts:  # the same direction, all that is allowed of its length
        np.testing.assert_allclose(flat(short), flat(one) * (most / norm(one)), rtol=1e-5)


def test_each_tensor_by_itself_keeps_a_long_one_from_shortening_the_others() -> None:
    one = {"w": np.full(4, 1000, np.float32), "b": np.full(4, 0.1, np.float32)}
    assert np.linalg.norm(clipped(one, 1.0)["b"]) < 1e-3
    assert np.array_equal(clipped(one, 1.0, by_tensor=True)["b"], one["b"].astype(np.float64))


@pytest.mark.parametrize("seed", [3, None])
def test_noise_is_normal(seed: int | None) -> None:
    from scipy import stats  # type: ignore[import-untyped] # has no types

    draws = Chance(seed).normal(40_001)
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    uniform = Chance(seed).uniform(40_000)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-6
    assert not np.array_equal(Chance(None).normal(8), Chance(None).normal(8))
    assert np.array_equal(Chance(5).normal(8), Chance(5).normal(8))


def test_the_sum_of_clipped_updates_is_noised_by_sigma_times_clip() -> None:
    some = [ClientUpdate(f"c{i}", delta(i, 3.0), 10 * i + 1) for i in range(6)]
    plain = sum(flat(update.delta) * min(1, 2.0 / norm(update.delta)) for update in some) / 8
    many = [flat(central(some, clip=2.0, noise=0.7, expected=8, chance=Chance(seed)).delta) for seed in range(2000)]
    spread = 0.7 * 2.0 / 8
    np.testing.assert_allclose(np.std(many, axis=0), spread, rtol=0.1)
    assert np.abs(np.mean(many, axis=0) - plain).max() < 5 * spread / np.sqrt(2000)


def test_whoever_has_many_rows_counts_as_one() -> None:
    some = [ClientUpdate("a", delta(1), 1), ClientUpdate("b", delta(2), 100_000)]
    other = [ClientUpdate("a", delta(1), 7), ClientUpdate("b", delta(2), 1)]
    one, two = (central(u, clip=1, noise=1e-9, expected=2, chance=Chance(1)) for u in (some, other))
    assert np.array_equal(flat(one.delta), flat(two.delta))
    assert one.samples == 2


def test_one_client_more_or_less_moves_the_sum_by_clip_at_most() -> None:
    """What the accountant reckons with."""
    some = [ClientUpdate(f"c{i}", delta(i, 1e5), 10) for i in range(5)]
    with_all, without = (
        flat(central(u, clip=0.5, noise=1e-12, expected=1, chance=Chance(0)).delta) for u in (some, some[1:])
    )
    assert np.linalg.norm(with_all - without) <= 0.5 * (1 + 1e-9)


def test_a_client_noises_its_own() -> None:
    one = delta(1, 10.0)
    many = [flat(local(one, clip=1.0, noise=2.0, chance=Chance(seed))) for seed in range(2000)]
    np.testing.assert_allclose(np.std(many, axis=0), 2.0, rtol=0.1)
    assert np.abs(np.mean(many, axis=0) - flat(clipped(one, 1.0))).max() < 5 * 2.0 / np.sqrt(2000)
    sent = local(one, clip=1.0, noise=2.0, chance=Chance(1))
    assert [(k, a.shape, a.dtype) for k, a in sent.items()] == [(k, a.shape, a.dtype) for k, a in one.items()]


def test_a_cohort_is_drawn_by_each_for_itself() -> None:
    clients = [f"c{i}" for i in range(1000)]
    sizes = [len(drawn(clients, 0.1, Chance(seed))) for seed in range(200)]
    assert abs(np.mean(sizes) - 100) < 5
    assert 70 < np.var(sizes) < 120  # 90 of independent draws, 0 of a fixed size
    assert drawn(clients, 1.0, Chance(1)) == clients
    assert drawn(clients, 0.0, Chance(1)) == []


# -- what it costs ---------------------------------------------------------------------------------------------------

PUBLISHED = [
    # noise, rows of a batch, rows, epochs, epsilon as TensorFlow Privacy's tutorial on MNIST told it, delta 1e-5
    (1.3, 256, 60_000, 15, 1.19),
    (1.1, 256, 60_000, 60, 3.01),
    (0.7, 256, 60_000, 45, 7.10),
]


@pytest.mark.parametrize(("noise", "batch", "rows", "epochs", "published"), PUBLISHED)
def test_epsilon_is_dp_accountings_own(noise: float, batch: int, rows: int, epochs: int, published: float) -> None:
    import dp_accounting as library  # type: ignore[import-untyped] # has no types

    steps = epochs * rows // batch
    event = library.SelfComposedDpEvent(
        library.PoissonSampledDpEvent(batch / rows, library.GaussianDpEvent(noise)), steps
    )
    theirs = library.rdp.RdpAccountant().compose(event).get_epsilon(1e-5)
    ours = Accountant(1e-5)
    ours.restore([[noise, batch / rows, steps]])
    assert ours.cost() == pytest.approx(theirs, rel=1e-9)
    # the tutorial's were found by an older, looser conversion
    assert 0.75 * published < ours.cost() <= published
    assert epsilon_of(((noise, batch / rows, steps),), 1e-5, "pld") < ours.cost()


def test_without_sampling_it_is_one_gaussian_of_less_noise() -> None:
    """n rounds of noise z are one of z / √n, whose epsilon Balle and Wang 2018 gave in closed form."""
    from math import erf, exp, sqrt

    def gaussian_delta(epsilon: float, z: float) -> float:
        def phi(x: float) -> float:
            return (1 + erf(x / sqrt(2))) / 2

        return phi(0.5 / z - epsilon * z) - exp(epsilon) * phi(-0.5 / z - epsilon * z)

    z, rounds, delta = 5.0, 20, 1e-5
    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, z / sqrt(rounds)) > delta else (low, middle)
    assert epsilon_of(((z, 1.0, rounds),), delta, "pld") == pytest.approx(high, rel=0.01)
    assert high <= epsilon_of(((z, 1.0, rounds),), delta, "rdp") <= 1.2 * high


def test_local_noise_hides_what_it_is_and_not_whether_it_is() -> None:
    """Replacing one's data moves an update by twice the clip; sampling hides nothing."""
    ours = Accountant(1e-5, local=True)
    for _ in range(3):
        cost = ours.spend(6.0, 0.01)
    assert cost == pytest.approx(epsilon_of(((3.0, 1.0, 3),), 1e-5))


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (4.0, 1.0), (0.6, 0.01)])
def test_rounds_left_are_those_that_can_be_spent(noise: float, rate: float) -> None:
    ours = Accountant(1e-5, epsilon=6.0)
    left = ours.rounds_left(noise, rate)
    assert left >= 1
    ours.restore([[noise, rate, left - 1]])
    assert ours.rounds_left(noise, rate) == 1
    assert ours.allows(noise, rate)
    assert ours.spend(noise, rate) <= 6.0
    assert not ours.allows(noise, rate)
    before = ours.snapshot()
    with pytest.raises(BudgetError, match=r"the privacy budget is spent: epsilon \S+ of 6 after"):
        ours.spend(noise, rate)
    assert ours.snapshot() == before
    assert ours.rounds_left(noise, rate) == 0
    assert Accountant(1e-5).rounds_left(noise, rate, most=77) == 77


def test_what_was_spent_stays_spent_after_a_restart_with_other_noise() -> None:
    first = Accountant(1e-5, epsilon=8.0)
    for _ in range(5):
        first.spend(3.0, 0.5)
    again = Accountant(1e-5, epsilon=8.0)
    again.restore(first.snapshot())
    assert again.cost() == first.cost()
    assert again.spend(20.0) > first.cost()
    assert again.snapshot() == [[3.0, 0.5, 5], [20.0, 1.0, 1]]


@pytest.mark.campaign
@pytest.mark.parametrize(("epsilon", "rounds", "rate"), [(1.0, 20, 1.0), (3.0, 100, 0.1), (8.0, 10, 0.5)])
def test_the_noise_for_an_epsilon_is_the_least_that_keeps_it(epsilon: float, rounds: int, rate: float) -> None:
    import dp_accounting as library

    noise = noise_for(epsilon, 1e-5, rounds, rate)
    assert 0.99 * epsilon < epsilon_of(((noise, rate, rounds),), 1e-5) <= epsilon
    theirs = library.calibrate_dp_mechanism(
        library.rdp.RdpAccountant,
        lambda z: library.SelfComposedDpEvent(library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(z)), rounds),
        epsilon,
        1e-5,
    )
    assert noise == pytest.approx(theirs, rel=2e-3)
    assert noise_of(Privacy(clip=1, epsilon=epsilon), rounds, rate) == noise
    assert noise_of(Privacy(clip=1, epsilon=epsilon, noise=9.0), rounds, rate) == 9.0
    local_noise = noise_of(Privacy(where="local", clip=1, epsilon=epsilon), rounds, rate)
    assert local_noise == pytest.approx(2 * noise_for(epsilon, 1e-5, rounds), rel=2e-3)


def test_no_noise_is_enough_for_nothing() -> None:
    with pytest.raises(ConfigError, match="no noise makes 1000000 rounds cost an epsilon of 1e-06"):
        noise_for(1e-6, 1e-12, 1_000_000)


def test_a_run_ends_where_its_budget_does() -> None:
    parts, model = alike(10), perceptron(64, 10)
    strategy, chance = FedAvg(Config()), Chance(1)
    accountant = Accountant(1e-5, epsilon=3.0)
    wanted = accountant.rounds_left(6.0)
    rounds = 0
    while accountant.allows(6.0):
        some = [
            ClientUpdate(f"c{i}", minus(train(model, part, Plan(), rounds)[0], model), len(part.y))
            for i, part in enumerate(parts)
        ]
        accountant.spend(6.0)
        model = strategy.aggregate(model, [central(some, clip=1, noise=6.0, expected=10, chance=chance)])
        rounds += 1
    assert rounds == wanted > 2
    assert 2.0 < accountant.cost() <= 3.0


@pytest.mark.parametrize(
    "options",
    [
        {"noise": 1},
        {"clip": 1},
        {"clip": 0, "noise": 1},
        {"clip": 1, "noise": 0},
        {"clip": 1, "epsilon": -1},
        {"clip": 1, "epsilon": 1, "delta": 0},
        {"clip": 1, "epsilon": 1, "where": "client"},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Privacy(**options)


def test_without_the_library_it_says_which_extra_brings_it() -> None:
    code = (
        "import sys; sys.modules['dp_accounting'] = None\n"
        "from nodes.privacy import dp\n"
        "from nodes.privacy.accountant import Accountant\n"
        "assert 'scipy' not in sys.modules\n"
        "Accountant(1e-5)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (
        "MissingError: dp-accounting is not installed; install it with: pip install 'penstock[privacy]'" in ran.stderr
    )
