"""The simulation: the digits, many clients, unlike data, slow ones and dying ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nodes.compressors import int8
from nodes.federated.rules import Rules
from nodes.federated.simulate import Outcome, Scenario, partition, simulate
from nodes.federated.virtual import Link
from nodes.federated.weights import Weights
from nodes.federated.wire import seed_of
from nodes.strategies import fedavg, scaffold
from nodes.strategies._strategy import Strategy
from nodes.trainers._trainer import Examples, Fit, Trainer
from nodes.trainers.mlp import Mlp
from schemas.errors import ConfigError

FIT: dict[str, Any] = {"epochs": 1, "batch": 32, "rate": 0.1}


@pytest.fixture(scope="module")
def digits() -> tuple[Examples, Examples]:
    """1,437 images of digits to learn from, 360 to be tested with."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int64)
    return Examples(x[:1437], y[:1437]), Examples(x[1437:], y[1437:])


def mlp() -> Trainer:
    trainer = Mlp([64, 32, 10], seed=1)
    trainer.open()
    return trainer


def average() -> Strategy:
    return fedavg.build(fedavg.Config())


def run(digits: tuple[Examples, Examples], rules: dict[str, Any], strategy: Any = average, **more: Any) -> Outcome:
    known = {"job": "digits", "fit": FIT, "deadline": 600.0, **rules}
    return simulate(Scenario(Rules(**known), mlp, strategy, digits[0], digits[1], **more))


def two_classes(y: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Ten parts; the k-th has the classes k and k + 1."""
    halves = [np.array_split(np.flatnonzero(y == label), 2) for label in range(10)]
    return [np.sort(np.concatenate([halves[k][0], halves[(k + 1) % 10][1]])) for k in range(10)]


def plain(data: Examples, parts: list[np.ndarray[Any, Any]], rounds: int) -> list[Weights]:
    """FedAvg without a bus: the model after each round."""
    trainer = mlp()
    model, out, total = trainer.weights(), [], sum(map(len, parts))
    for number in range(1, rounds + 1):
        step = {n: np.zeros(a.shape) for n, a in model.items()}
        for k, rows in enumerate(parts):
            trainer.load(model)
            trainer.fit(Examples(data.x[rows], data.y[rows]), Fit(**FIT, seed=seed_of(0, number, f"client-{k}")))
            for n, a in trainer.weights().items():
                step[n] += (a - model[n]).astype(np.float64) * (len(rows) / total)
        model = {n: (a + step[n]).astype(np.float32) for n, a in model.items()}
        out.append(model)
    return out


@pytest.mark.parametrize("alike", [True, False])
def test_twenty_rounds_on_the_digits_are_those_of_the_plain_loop(
    digits: tuple[Examples, Examples], alike: bool
) -> None:
    data, held_out = digits
    parts = partition(data.y, 10, None, 0) if alike else two_classes(data.y)
    models = plain(data, parts, 20)
    outcome = run(
        digits, {"rounds": 20, "least": 10, "quorum": 10}, parts=parts, spread=20.0, link=Link(0.05, jitter=0.3)
    )
    trainer, curve = mlp(), []
    for model in models:
        trainer.load(model)
        curve.append(trainer.evaluate(held_out)["accuracy"])
    assert [row["accuracy"] for row in outcome.rows] == curve
    assert max(np.linalg.norm(outcome.weights[n] - a) for n, a in models[-1].items()) <= 1e-4
    assert curve[-1] > (0.9 if alike else 0.5)


def test_scaffold_needs_fewer_rounds_where_data_differ(digits: tuple[Examples, Examples]) -> None:
    parts = two_classes(digits[0].y)
    rounds = {}
    for name, strategy in (("fedavg", average), ("scaffold", lambda: scaffold.build(scaffold.Config(clients=10)))):
        rules = {"rounds": 90, "least": 10, "quorum": 10, "target": ("accuracy", 0.95), "fit": {**FIT, "epochs": 5}}
        outcome = run(digits, rules, strategy, parts=parts)
        rounds[name] = len(outcome.rows)
    assert rounds["scaffold"] <= rounds["fedavg"] / 3


def test_asynchronously_the_same_accuracy_in_a_third_of_the_time(digits: tuple[Examples, Examples]) -> None:
    seconds = {}
    for buffer in (None, 10):
        rules = {"rounds": 400, "least": 40, "quorum": 40, "target": ("accuracy", 0.95), "buffer": buffer}
        outcome = run(digits, rules, clients=40, alpha=1.0, spread=20.0)
        assert outcome.reason == "target"
        seconds[buffer] = outcome.seconds
    assert seconds[10] <= seconds[None] / 3


def test_int8_learns_the_same_with_a_quarter_of_the_bytes(digits: tuple[Examples, Examples]) -> None:
    up, accuracy = {}, {}
    for name in (None, "int8"):
        rules = {"rounds": 15, "least": 10, "quorum": 10, "compress": name, "fit": {**FIT, "epochs": 2}}
        outcome = run(
            digits, rules, clients=10, compressor=lambda name=name: int8.build(int8.Config()) if name else None
        )
        up[name] = sum(row["bytes_up"] for row in outcome.rows)
        accuracy[name] = outcome.rows[-1]["accuracy"]
    assert up["int8"] < 0.3 * up[None]
    assert accuracy["int8"] > accuracy[None] - 0.02


def test_deaths_and_loss_do_not_stop_it(digits: tuple[Examples, Examples]) -> None:
    rules = {"rounds": 12, "least": 30, "quorum": 20, "grace": 2.0, "deadline": 60.0, "evaluate": True}
    outcome = run(
        digits,
        rules,
        clients=50,
        alpha=0.5,
        spread=10.0,
        dropout=0.2,
        back=10.0,
        gather=5.0,
        link=Link(0.05, jitter=0.2, loss=0.02, twice=0.02),
    )
    assert outcome.reason == "rounds"
    committed = [row for row in outcome.rows if row["status"] == "committed"]
    assert len(committed) == 12
    assert all(20 <= row["clients"] <= 50 and row["seconds"] <= 60.5 for row in committed)
    assert min(row["clients"] for row in committed) < 50
    assert committed[-1]["accuracy"] > committed[0]["accuracy"]
    assert 0 < committed[-1]["local_accuracy"] <= 1


def test_the_same_seed_gives_the_same_run(digits: tuple[Examples, Examples]) -> None:
    def once(seed: int) -> list[str]:
        outcome = run(
            digits,
            {"rounds": 4, "least": 20, "quorum": 10, "share": 0.6},
            clients=30,
            dropout=0.1,
            spread=5.0,
            link=Link(0.05, 0.2, 0.02),
            seed=seed,
        )
        return [str(row) for row in outcome.rows]

    assert once(3) == once(3) != once(4)


@pytest.mark.slow
def test_a_thousand_clients(digits: tuple[Examples, Examples]) -> None:
    outcome = run(digits, {"rounds": 3, "least": 1000, "quorum": 900}, clients=1000, alpha=0.5, spread=10.0)
    assert [row["clients"] for row in outcome.rows] == [1000] * 3
    assert sum(outcome.sizes) == 1437
    # the call, the model, the work and the answer: four messages to each, and no more
    assert outcome.delivered < 1000 * (4 * 3 + 5)


def test_parts_are_as_unlike_as_asked(digits: tuple[Examples, Examples]) -> None:
    y = digits[0].y

    def unlike(alpha: float | None) -> float:
        parts = partition(y, 20, alpha, 1)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(y)))
        assert min(map(len, parts)) >= 1
        shares = [np.bincount(y[rows], minlength=10).max() / len(rows) for rows in parts]
        return float(np.mean(shares))

    assert unlike(0.05) > unlike(1.0) > unlike(100.0)
    assert unlike(None) < 0.3
    assert unlike(0.05) > 0.6


def test_more_clients_than_examples_is_a_mistake(digits: tuple[Examples, Examples]) -> None:
    with pytest.raises(ConfigError, match="1437 examples for 2000 clients"):
        partition(digits[0].y, 2000, 0.5, 0)
