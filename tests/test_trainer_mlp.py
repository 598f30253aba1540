"""The trainer ``mlp``: its gradients against differences of the loss, its steps against the textbook's, and torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes.federated.weights import UnfitError, Weights, digest, flat, minus, norm, shapes, unflat
from nodes.operator import Context
from nodes.trainers import mlp
from nodes.trainers._trainer import Examples, Fit
from schemas.errors import ConfigError
from schemas.messages import Array
from schemas.problems import validated

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}


def made(layers: list[int], **options: Any) -> mlp.Mlp:
    config = validated(mlp.Config, {"layers": layers, "seed": 1, **options})
    trainer = mlp.build(config, Context("t", "n", Path(), Path()))
    trainer.open()
    assert isinstance(trainer, mlp.Mlp)
    return trainer


def drawn(n: int, inputs: int, outputs: int, *, classify: bool = True, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, inputs)).astype(np.float32)
    y = rng.integers(0, outputs, n) if classify else rng.standard_normal((n, outputs)).astype(np.float32)
    return Examples(x, y)


def loss_of(vector: Array, trainer: mlp.Mlp, activation: str, examples: Examples) -> float:
    """The mean loss by definition, in float64."""
    weights = {s.name: a for s, a in zip(trainer.shapes, _split(vector, trainer), strict=True)}
    h = examples.x.astype(np.float64)
    layers = len(weights) // 2
    for i in range(1, layers + 1):
        h = h @ weights[f"w{i}"] + weights[f"b{i}"]
        if i < layers:
            h = ACTIVATIONS[activation](h)
    if examples.y.dtype.kind == "f":
        return float(np.mean((h - examples.y) ** 2))
    logs = h - np.log(np.exp(h).sum(1, keepdims=True))
    return float(-logs[np.arange(len(h)), examples.y].mean())


def _split(vector: Array, trainer: mlp.Mlp) -> list[Array]:
    out, at = [], 0
    for shape in trainer.shapes:
        out.append(vector[at : at + shape.size].reshape(shape.shape))
        at += shape.size
    return out


def slope(trainer: mlp.Mlp, activation: str, examples: Examples) -> Array:
    """The gradient by central differences, in float64."""
    at = flat(trainer.weights())
    out = np.zeros_like(at)
    for i in range(len(at)):
        step = np.zeros_like(at)
        step[i] = 1e-6
        out[i] = (
            loss_of(at + step, trainer, activation, examples) - loss_of(at - step, trainer, activation, examples)
        ) / 2e-6
    return out


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
@pytest.mark.parametrize("layers", [[5, 3], [5, 7, 3], [5, 6, 4, 3]], ids=str)
def test_one_step_goes_down_the_gradient(layers: list[int], loss: str, activation: str) -> None:
    trainer = made(layers, loss=loss, activation=activation)
    examples = drawn(8, 5, 3, classify=loss == "cross-entropy")
    before = trainer.weights()
    wanted = slope(trainer, activation, examples)
    fitted = trainer.fit(examples, Fit(batch=8, rate=0.5))
    assert fitted.steps == 1
    assert fitted.loss == pytest.approx(loss_of(flat(before), trainer, activation, examples), rel=1e-5)
    went = flat(minus(before, trainer.weights())) / 0.5
    np.testing.assert_allclose(went, wanted, atol=2e-6, rtol=2e-4)
    assert np.abs(wanted).max() > 0.01


def test_a_step_has_momentum_a_proximal_term_and_a_correction() -> None:
    """Three steps on one batch, by the formulas: v ← m v + ∇ + μ (w - w₀) + c;  w ← w - r v."""
    trainer = made([5, 4, 3], activation="tanh")
    examples = drawn(8, 5, 3)
    rng = np.random.default_rng(5)
    start = flat(trainer.weights())
    correction = unflat(rng.standard_normal(len(start)) * 0.1, trainer.shapes)
    at, speed = start.copy(), np.zeros_like(start)
    mirror = made([5, 4, 3], activation="tanh")
    for _ in range(3):
        mirror.load(unflat(at, trainer.shapes))
        speed = 0.9 * speed + slope(mirror, "tanh", examples) + 0.3 * (at - start) + flat(correction)
        at = at - 0.2 * speed
    fitted = trainer.fit(examples, Fit(epochs=3, batch=8, rate=0.2, momentum=0.9, proximal=0.3, correction=correction))
    assert fitted.steps == 3
    np.testing.assert_allclose(flat(trainer.weights()), at, atol=1e-5)


def test_torch_takes_the_same_way() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: the steps are not compared with its own")
    trainer = made([64, 32, 10])
    examples = drawn(100, 64, 10)
    weights = trainer.weights()
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    with torch.no_grad():
        for layer, n in ((model[0], 1), (model[2], 2)):
            layer.weight.copy_(torch.from_numpy(weights[f"w{n}"].T.copy()))
            layer.bias.copy_(torch.from_numpy(weights[f"b{n}"].copy()))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    drawing = np.random.default_rng(3)
    for _ in range(3):
        order = drawing.permutation(100)
        for at in range(0, 100, 32):
            rows = order[at : at + 32]
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                model(torch.from_numpy(examples.x[rows])), torch.from_numpy(examples.y[rows])
            )
            loss.backward()
            optimiser.step()
    fitted = trainer.fit(examples, Fit(epochs=3, batch=32, rate=0.1, momentum=0.9, seed=3))
    assert fitted.steps == 12
    ours = trainer.weights()
    for layer, n in ((model[0], 1), (model[2], 2)):
        np.testing.assert_allclose(ours[f"w{n}"], layer.weight.detach().numpy().T, atol=2e-5)
        np.testing.assert_allclose(ours[f"b{n}"], layer.bias.detach().numpy(), atol=2e-5)


def test_the_same_calls_give_the_same_bytes() -> None:
    def run() -> str:
        trainer = made([64, 32, 10])
        trainer.fit(drawn(70, 64, 10), Fit(epochs=2, seed=4, momentum=0.5))
        trainer.fit(drawn(70, 64, 10, seed=1), Fit(seed=5, proximal=0.1))
        return digest(trainer.weights())

    assert run() == run()


def test_what_was_trained_before_leaves_no_trace_after_load() -> None:
    one, other = made([6, 5, 3]), made([6, 5, 3])
    begun = one.weights()
    one.fit(drawn(40, 6, 3), Fit(momentum=0.9, epochs=3))
    one.load(begun)
    for trainer in (one, other):
        trainer.fit(drawn(33, 6, 3, seed=2), Fit(momentum=0.9, epochs=2))
    assert digest(one.weights()) == digest(other.weights())


def test_other_seeds_begin_and_mix_differently() -> None:
    assert digest(made([6, 3]).weights()) != digest(made([6, 3], seed=2).weights())
    one, other = made([6, 3]), made([6, 3])
    one.fit(drawn(40, 6, 3), Fit(seed=1, batch=8))
    other.fit(drawn(40, 6, 3), Fit(seed=2, batch=8))
    assert digest(one.weights()) != digest(other.weights())


def test_weights_are_copies() -> None:
    trainer = made([6, 4, 3])
    before = trainer.weights()
    kept = digest(before)
    trainer.fit(drawn(10, 6, 3), Fit())
    assert digest(before) == kept
    before["w1"][:] = 9
    assert trainer.weights()["w1"].max() < 9
    given = trainer.weights()
    trainer.load(given)
    given["w1"][:] = 9
    assert trainer.weights()["w1"].max() < 9


def test_nothing_to_learn_from_changes_nothing() -> None:
    trainer = made([6, 4, 3])
    before = digest(trainer.weights())
    for examples, plan in ((drawn(10, 6, 3), Fit(epochs=0)), (drawn(0, 6, 3), Fit())):
        fitted = trainer.fit(examples, plan)
        assert fitted.steps == 0
        assert np.isnan(fitted.loss)
    assert digest(trainer.weights()) == before
    assert trainer.predict(np.zeros((0, 6), np.float32)).shape == (0, 3)


def test_a_proximal_term_holds_the_weights_near() -> None:
    def went(proximal: float) -> float:
        trainer = made([8, 6, 3])
        before = trainer.weights()
        trainer.fit(drawn(64, 8, 3), Fit(epochs=20, rate=0.1, proximal=proximal))
        return norm(minus(trainer.weights(), before))

    assert went(5.0) < went(0.5) < went(0.0)


def test_examples_of_any_shape_and_a_regression() -> None:
    flat_one, square = made([16, 3]), made([16, 3])
    examples = drawn(20, 16, 3)
    flat_one.fit(examples, Fit())
    square.fit(Examples(examples.x.reshape(20, 4, 4), examples.y), Fit())
    assert digest(flat_one.weights()) == digest(square.weights())
    line = made([2, 1], loss="mse")
    x = np.random.default_rng(0).standard_normal((200, 2)).astype(np.float32)
    line.fit(Examples(x, (3 * x[:, 0] - x[:, 1] + 0.5)), Fit(epochs=30))
    np.testing.assert_allclose(line.weights()["w1"].ravel(), [3, -1], atol=1e-3)
    assert line.evaluate(Examples(x, 3 * x[:, 0] - x[:, 1] + 0.5))["loss"] < 1e-5


def test_it_learns_the_digits() -> None:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn is not installed: its digits are not learned"
    )
    data = datasets.load_digits()
    mixed = np.random.default_rng(0).permutation(len(data.data))  # in their order the last are in other hands
    x, y = (data.data[mixed] / 16).astype(np.float32), data.target[mixed]
    trainer = made([64, 32, 10])
    begun = trainer.evaluate(Examples(x[1347:], y[1347:]))
    fitted = trainer.fit(Examples(x[:1347], y[:1347]), Fit(epochs=30))
    after = trainer.evaluate(Examples(x[1347:], y[1347:]))
    assert fitted.steps == 30 * 43
    assert begun["accuracy"] < 0.3
    assert after["accuracy"] > 0.95
    assert after["loss"] < begun["loss"]
    answers = trainer.predict(x[:50])
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)


def test_divergence_is_seen_in_the_weights_and_warns_nobody() -> None:
    trainer = made([8, 6, 3], loss="mse")
    trainer.fit(drawn(64, 8, 3, classify=False), Fit(epochs=50, rate=1e6))
    assert not np.isfinite(flat(trainer.weights())).all()


@pytest.mark.parametrize(
    ("examples", "plan", "words"),
    [
        (drawn(4, 7, 3), Fit(), "7 values each; the model takes 6"),
        (drawn(4, 6, 9, seed=3), Fit(), "the model knows the classes 0 to 2"),
        (Examples(np.zeros((4, 6), np.float32), np.array([0, 1, -1, 0])), Fit(), "labels from -1"),
        (drawn(4, 6, 3, classify=False), Fit(), "learns from whole numbers"),
        (Examples(np.zeros((4, 6), np.float32), np.zeros(3, np.int64)), Fit(), "4 inputs and 3 labels"),
        (drawn(4, 6, 3), Fit(epochs=-1), "fit.epochs is -1"),
        (drawn(4, 6, 3), Fit(batch=0), "fit.batch is 0"),
        (drawn(4, 6, 3), Fit(rate=float("nan")), "fit.rate is nan"),
        (drawn(4, 6, 3), Fit(momentum=1.0), "fit.momentum is 1.0"),
        (drawn(4, 6, 3), Fit(seed=-1), "fit.seed is -1"),
        (drawn(4, 6, 3), Fit(proximal=-0.5), "fit.proximal is -0.5"),
    ],
    ids=[
        "width",
        "label",
        "negative-label",
        "real-labels",
        "lengths",
        "epochs",
        "batch",
        "rate",
        "momentum",
        "seed",
        "proximal",
    ],
)
def test_what_cannot_be_done_is_said(examples: Examples, plan: Fit, words: str) -> None:
    trainer = made([6, 3])
    before = digest(trainer.weights())
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        trainer.fit(examples, plan)
    assert digest(trainer.weights()) == before


def test_foreign_weights_and_corrections_are_refused() -> None:
    trainer = made([6, 4, 3])
    good = trainer.weights()
    wrong: dict[str, Weights] = {
        "names": {"w": good["w1"]},
        "shape": {**good, "w1": good["w1"].T.copy()},
        "dtype": {**good, "b1": good["b1"].astype(np.float64)},
        "not-finite": {**good, "b2": good["b2"] * np.float32("nan")},
    }
    for reason, weights in wrong.items():
        for act in (
            lambda w=weights: trainer.load(w),
            lambda w=weights: trainer.fit(drawn(4, 6, 3), Fit(correction=w)),
        ):
            with pytest.raises(UnfitError) as caught:
                act()
            assert caught.value.reason == reason
    assert digest(trainer.weights()) == digest(good)
    assert shapes(good) == trainer.shapes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"layers": [64]}, "layers"),
        ({"layers": [64, 0, 10]}, "0 is no size"),
        ({"layers": [64, 1]}, "two classes or more"),
        ({"layers": [100_000, 100_000]}, "parameters"),
        ({"layers": [4, 2], "activation": "gelu"}, "activation"),
        ({"layers": [4, 2], "seed": -1}, "seed"),
        ({}, "layers"),
    ],
    ids=str,
)
def test_a_wrong_config_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(mlp.Config, config)
    assert words in str(caught.value) + str([p.path for p in caught.value.problems])
