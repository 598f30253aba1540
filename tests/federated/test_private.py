"""Differential privacy in a job: what leaves a client, what the sum is, and that the job ends where its budget does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_site import Softmax, parts

from nodes.federate import Config
from nodes.federated import wire
from nodes.federated.local import Memory, Trained, train
from nodes.federated.rules import Rules
from nodes.federated.simulate import Outcome, Scenario, simulate
from nodes.federated.weights import digest, flat, minus, norm, shapes
from nodes.operator import Context
from nodes.privacy.accountant import epsilon_of
from nodes.privacy.dp import Chance, Privacy, clipped
from nodes.privacy.private import Private
from nodes.strategies import fedavg
from nodes.trainers._trainer import Examples, Fit
from schemas.errors import ConfigError
from schemas.problems import validated

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")

FIT: dict[str, Any] = {"epochs": 1, "batch": 8, "rate": 0.3}


def privacy(**options: Any) -> Privacy:
    return validated(Privacy, {"clip": 0.5, **options})


def private(seed: int | None = 3, rounds: int = 10, **options: Any) -> Private:
    return Private(fedavg.build(fedavg.Config()), privacy(**options), rounds, None if seed is None else Chance(seed))


def run(strategy: Any, rounds: int = 10, clients: int = 6) -> Outcome:
    data = parts(clients)
    whole = Examples(np.concatenate([one.x for one in data]), np.concatenate([one.y for one in data]))
    starts = np.cumsum([0, *(len(one) for one in data)])
    owned = [np.arange(a, b) for a, b in pairwise(starts)]
    rules = Rules(job="job", rounds=rounds, least=clients, quorum=clients, fit=FIT)
    return simulate(Scenario(rules, Softmax, strategy, whole, whole, parts=owned))


def test_the_job_ends_where_its_budget_does() -> None:
    outcome = run(lambda: private(noise=2.0, epsilon=4.0), rounds=50)
    assert outcome.reason == "budget"
    spent = [row["epsilon"] for row in outcome.rows]
    assert spent == sorted(spent)
    assert 1 < len(spent) < 50
    made = len(spent)
    assert spent[-1] == pytest.approx(epsilon_of(((2.0, 1.0, made),), 1e-5))
    assert spent[-1] <= 4.0
    assert epsilon_of(((2.0, 1.0, made + 1),), 1e-5) > 4.0


def test_a_budget_alone_is_spread_over_the_rounds() -> None:
    outcome = run(lambda: private(epsilon=8.0, rounds=12), rounds=12)
    assert outcome.reason == "rounds"
    assert 7.8 <= outcome.rows[-1]["epsilon"] <= 8.0


def test_the_sum_is_the_clipped_ones_with_noise() -> None:
    """The first round, computed by hand with the same noise."""
    outcome = run(lambda: private(noise=0.1), rounds=1)
    model, total = Softmax().weights(), np.zeros(flat(Softmax().weights()).size)
    for k, one in enumerate(parts(6)):
        trainer = Softmax()
        trainer.fit(one, Fit(**FIT, seed=wire.seed_of(0, 1, f"client-{k}")))
        total += flat(clipped(minus(trainer.weights(), model), 0.5))
    drawn = Chance(3)
    noise = np.concatenate([0.1 * 0.5 * drawn.normal(array.size) for array in model.values()])
    np.testing.assert_allclose(flat(outcome.weights), flat(model) + (total + noise) / 6, atol=1e-6)
    assert outcome.rows[0]["samples"] == 6  # of each client nothing but that it is there
    assert np.isnan(outcome.rows[0]["train_loss"])


def test_what_was_spent_outlives_the_coordinator() -> None:
    """Its state goes with the model; under a smaller budget no other round is made."""
    before = private(noise=2.0, epsilon=4.0)
    updates = [update(k) for k in range(3)]
    before.aggregate(Softmax().weights(), updates)
    after = private(noise=2.0, epsilon=4.0)
    after.restore(before.snapshot())
    assert after.epsilon == before.epsilon > private(noise=2.0).epsilon
    assert not after.over()
    less = private(noise=2.0, epsilon=float(before.epsilon) * 1.01)
    less.restore(before.snapshot())
    assert less.over() == "budget"


def update(k: int) -> Any:
    from nodes.strategies._strategy import ClientUpdate

    draw = np.random.default_rng(k)
    weights = Softmax().weights()
    return ClientUpdate(
        f"c{k}", {name: np.asarray(draw.normal(0, 1, array.shape), np.float32) for name, array in weights.items()}, 5
    )


def trained(asked: dict[str, Any]) -> Any:
    trainer, data = Softmax(), parts(1)[0]
    model = trainer.weights()
    call = wire.Call(
        job="job", run=1, epoch=1, round=1, phase=wire.COLLECTING, base=digest(model), fit=FIT, evaluate=True,
        private=asked,
    )  # fmt: skip
    memory = Memory.of(None)
    made = train(call, "c", wire.pack_model(model, {}), shapes(model), trainer, lambda: data, lambda _: None, memory, 7)
    assert isinstance(made, Trained)
    return wire.unpack_update(made.payload)[1]


def test_nothing_but_the_update_leaves_a_client() -> None:
    plain, quiet = trained({}), trained({"where": "central"})
    assert plain.samples > 1
    assert plain.metrics
    assert quiet.samples == 1
    assert quiet.metrics == {}
    assert np.array_equal(flat(quiet.tensors), flat(plain.tensors))


def test_with_local_privacy_it_leaves_with_noise_of_its_own() -> None:
    asked = private(where="local", noise=5.0).asked()
    seen = [trained(asked) for _ in range(2)]
    assert not np.array_equal(flat(seen[0].tensors), flat(seen[1].tensors))
    size = flat(seen[0].tensors).size
    assert norm(seen[0].tensors) == pytest.approx(5.0 * 0.5 * np.sqrt(size), rel=0.8)
    assert all(one.metrics == {} and one.samples == 1 for one in seen)
    outcome = run(lambda: private(where="local", noise=0.01), rounds=3)
    assert outcome.rows[-1]["epsilon"] > 1000  # as good as none, and it says so


@pytest.mark.parametrize(
    "asked",
    [{"where": "elsewhere"}, {"where": "local"}, {"where": "local", "clip": 1, "noise": 0, "by_tensor": False},
     {"where": "local", "clip": "much", "noise": 1, "by_tensor": False}],
)  # fmt: skip
def test_a_client_sends_nothing_where_it_does_not_know_what_is_asked(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the round asks for"):
        trained(asked)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"strategy": "median"}, "median has to see each update"),
        ({"strategy": "scaffold"}, "scaffold has to see each update"),
        ({"buffer": 5}, "with 'buffer' there are none"),
        ({"report": True}, "leave 'report' out"),
        ({"tolerance": 0.1}, "leave 'tolerance' out"),
    ],
)
def test_what_does_not_go_together_with_privacy(tmp_path: Path, options: dict[str, Any], wrong: str) -> None:
    job = {"job": "j", "trainer": {"mlp": {"layers": [4, 2]}}, "privacy": {"clip": 1, "noise": 1}}
    with pytest.raises(ConfigError, match=wrong):
        validated(Config, {**job, **options}).check(Context("line", "lead", tmp_path, tmp_path))


def test_a_budget_that_does_not_reach_for_one_round(tmp_path: Path) -> None:
    job = {"job": "j", "trainer": {"mlp": {"layers": [4, 2]}}, "privacy": {"clip": 1, "noise": 0.1, "epsilon": 1}}
    config = validated(Config, job)
    config.check(Context("line", "lead", tmp_path, tmp_path))
    with pytest.raises(ConfigError, match="costs more than the budget"):
        config.chosen_strategy()
