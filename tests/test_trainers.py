"""The trainers ``litert``, ``torch`` and ``sklearn``: the steps of ``mlp`` where it is the same, and digits learned together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes import kinds
from nodes.federated.weights import UnfitError, Weights, digest, fit, flat, minus, shapes, unflat
from nodes.operator import Context
from nodes.trainers._trainer import Examples, Fit, Trainer
from nodes.trainers.mlp import Mlp
from schemas.errors import ConfigError, MissingError, RunError
from schemas.messages import Array
from schemas.problems import validated

ROOT = Path(__file__).resolve().parents[1]
KEEPS = ROOT / "examples" / "federated" / "digits-train.tflite"
STATELESS = ROOT / "tests" / "models" / "training" / "digits-stateless.tflite"
NETWORK = """
import torch

def network(width=32, drop=0.0):
    return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Dropout(drop), torch.nn.Linear(width, 10))

def with_norm():
    return torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 10))

def line():
    return torch.nn.Linear(2, 1)

def text():
    return "no module"

def fails():
    return [][1]

class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))
    def forward(self, x):
        raise ValueError("never works")
"""


def trainer(name: str, folder: Path, **options: Any) -> Trainer:
    """Made as ``train`` makes it, and opened."""
    module = kinds.module("trainer", name)
    context = Context("t", "n", folder, folder)
    config = validated(module.Config, options)
    config.check(context)
    made: Trainer = module.build(config, context)
    made.open()
    return made


def needs(name: str) -> None:
    modules = {"litert": "ai_edge_litert.interpreter", "torch": "torch", "sklearn": "sklearn"}
    pytest.importorskip(
        modules[name], reason=f"{modules[name].split('.')[0]} is not installed: the trainer {name} is not tried"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"layers": [64, 32, 10], "seed": 1}),
    "litert": ("litert", {"model": str(KEEPS)}),
    "litert-stateless": ("litert", {"model": str(STATELESS)}),
    "torch": ("torch", {"path": "net.py", "function": "network", "seed": 1}),
    "sklearn-sgd": ("sklearn", {"model": "sgd", "inputs": 64, "classes": 10}),
    "sklearn-mlp": ("sklearn", {"model": "mlp", "inputs": 64, "classes": 10, "hidden": [32], "seed": 1}),
}
EVERY = pytest.mark.parametrize("which", OPTIONS)
CAN_ALL = ("mlp", "litert", "litert-stateless", "torch")


def opened(which: str, folder: Path) -> Trainer:
    name, options = OPTIONS[which]
    if name != "mlp":
        needs(name)
    return trainer(name, folder, **options)


def drawn(n: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return Examples(rng.random((n, 64), np.float32), rng.integers(0, 10, n))


def digits() -> tuple[Array, Array]:
    """All 1,797 (450 of them are in the demo; scikit-learn has the others), mixed."""
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn is not installed: its digits are not learned"
    )
    data = datasets.load_digits()
    mixed = np.random.default_rng(0).permutation(len(data.data))
    return (data.data[mixed] / 16).astype(np.float32), data.target[mixed].astype(np.int64)


@EVERY
def test_weights_go_out_and_in_unchanged(which: str, folder: Path) -> None:
    made = opened(which, folder)
    rng = np.random.default_rng(1)
    given = unflat(rng.standard_normal(len(flat(made.weights()))), shapes(made.weights()))
    made.load(given)
    back = made.weights()
    assert digest(back) == digest(given)
    for array in back.values():
        array += 1
    assert digest(made.weights()) == digest(given)
    for reason, wrong in {
        "names": {"x": given[next(iter(given))]},
        "not-finite": {name: array * np.float32("inf") for name, array in given.items()},
    }.items():
        with pytest.raises(UnfitError) as caught:
            made.load(wrong)
        assert caught.value.reason == reason
    made.close()


@EVERY
def test_the_same_calls_give_the_same_numbers(which: str, folder: Path) -> None:
    def run() -> str:
        made = opened(which, folder)
        made.fit(drawn(100), Fit(epochs=2, seed=3))
        made.load(made.weights())
        made.fit(drawn(70, 1), Fit(seed=4))
        return digest(made.weights())

    first = run()
    assert first == run()
    made = opened(which, folder)
    before = digest(made.weights())
    assert before != first
    assert made.fit(drawn(64), Fit(epochs=0)).steps == 0
    assert made.fit(drawn(0), Fit()).steps == 0
    assert digest(made.weights()) == before


@EVERY
def test_answers_are_probabilities(which: str, folder: Path) -> None:
    made = opened(which, folder)
    for n in (1, 31, 33):
        answers = made.predict(drawn(n).x)
        assert answers.shape == (n, 10)
        assert answers.dtype == np.float32
        np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)
    whole = made.predict(drawn(40).x)
    np.testing.assert_allclose(
        np.concatenate([made.predict(drawn(40).x[:7]), made.predict(drawn(40).x[7:])]), whole, atol=1e-6
    )


@EVERY
def test_wrong_labels_and_plans_are_refused(which: str, folder: Path) -> None:
    made = opened(which, folder)
    before = digest(made.weights())
    good = drawn(64)
    for examples, plan in (
        (Examples(good.x, good.y[:3]), Fit()),
        (Examples(good.x, np.where(good.y == 1, -1, good.y)), Fit()),
        (Examples(good.x, good.x[:, 0].copy()), Fit()),
        (good, Fit(rate=0)),
    ):
        with pytest.raises(ConfigError):
            made.fit(examples, plan)
    for examples in (Examples(good.x[:, :5].copy(), good.y), Examples(good.x, good.y + 5)):
        with pytest.raises((ConfigError, RunError)):
            made.fit(examples, Fit())
    assert digest(made.weights()) == before


def _as_mlp(weights: Weights) -> Weights:
    """Weights of any of these networks under the names, and in the layout, of ``mlp``."""
    out: Weights = {}
    matrices = sorted((array for array in weights.values() if array.ndim == 2), key=np.size)[::-1]
    vectors = sorted((array for array in weights.values() if array.ndim == 1), key=np.size)[::-1]
    for n, (matrix, vector) in enumerate(zip(matrices, vectors, strict=True), 1):
        out[f"w{n}"] = matrix if len(matrix) > matrix.shape[1] else matrix.T.copy()
        out[f"b{n}"] = vector
    return out


PLANS = {
    "plain": Fit(epochs=2, seed=5),
    "momentum": Fit(epochs=2, seed=5, momentum=0.8),
    "proximal": Fit(epochs=2, seed=5, proximal=0.7),
    "both": Fit(epochs=2, seed=5, momentum=0.5, proximal=0.7),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("which", [*CAN_ALL[1:], "sklearn-mlp"])
def test_steps_are_those_of_the_plain_network(which: str, plan: str, folder: Path) -> None:
    if which == "sklearn-mlp":
        needs("sklearn")
        made = trainer("sklearn", folder, model="mlp", inputs=64, classes=10, hidden=[32], alpha=0)
        if PLANS[plan].proximal:
            with pytest.raises(ConfigError, match=r"sklearn \(model: mlp\) cannot do a proximal term"):
                made.fit(drawn(96), PLANS[plan])
            return
    else:
        made = opened(which, folder)
    plain = Mlp([64, 32, 10])
    plain.load(_as_mlp(made.weights()))
    examples = drawn(96)
    one, other = made.fit(examples, PLANS[plan]), plain.fit(examples, PLANS[plan])
    assert one.steps == other.steps == 6
    assert one.loss == pytest.approx(other.loss, rel=1e-4)
    ours = _as_mlp(made.weights())
    for name, array in plain.weights().items():
        np.testing.assert_allclose(ours[name], array, atol=3e-6, err_msg=name)
    np.testing.assert_allclose(made.predict(examples.x), plain.predict(examples.x), atol=1e-5)
    # and again, so that what momentum left behind is the same too
    if which != "sklearn-mlp":
        made.fit(examples, PLANS[plan])
        plain.fit(examples, PLANS[plan])
        np.testing.assert_allclose(_as_mlp(made.weights())["w1"], plain.weights()["w1"], atol=1e-5)


@pytest.mark.parametrize("which", CAN_ALL)
def test_a_correction_is_added_to_every_gradient(which: str, folder: Path) -> None:
    def went(**plan: Any) -> Weights:
        made = opened(which, folder)
        before = made.weights()
        made.fit(drawn(32), Fit(rate=0.25, **plan))
        return minus(made.weights(), before)

    form = shapes(opened(which, folder).weights())
    rng = np.random.default_rng(2)
    correction = unflat(rng.standard_normal(sum(s.size for s in form)), form)
    moved = flat(minus(went(correction=correction), went()))
    np.testing.assert_allclose(moved, -0.25 * flat(correction), atol=1e-5)


def test_what_cannot_be_done_is_refused(folder: Path) -> None:
    needs("sklearn")
    linear = opened("sklearn-sgd", folder)
    for plan, words in (
        (Fit(momentum=0.5), "momentum"),
        (Fit(proximal=0.5), "proximal"),
        (Fit(correction=linear.weights()), "SCAFFOLD"),
    ):
        with pytest.raises(ConfigError, match=words):
            linear.fit(drawn(32), plan)


def together(make: Callable[[], Trainer], rounds: int, plan: dict[str, Any]) -> float:
    """Accuracy after federated averaging in a plain loop: ten clients with mixed data, one epoch a round."""
    x, y = digits()
    held = Examples(x[1347:], y[1347:])
    parts = [Examples(x[i:1347:10], y[i:1347:10]) for i in range(10)]
    worker = make()
    model = worker.weights()
    for turn in range(rounds):
        total = np.zeros(len(flat(model)))
        for client, part in enumerate(parts):
            worker.load(model)
            worker.fit(part, Fit(seed=turn * 10 + client, **plan))
            total += len(part) * (flat(worker.weights()) - flat(model))
        model = unflat(flat(model) + total / 1347, shapes(model))
        fit(model, shapes(worker.weights()))
    worker.load(model)
    return worker.evaluate(held)["accuracy"]


@pytest.mark.parametrize(
    ("which", "plan"),
    [
        ("litert", {"rate": 0.3, "epochs": 2}),
        ("litert-stateless", {"rate": 0.3, "epochs": 2}),
        ("torch", {"rate": 0.3, "epochs": 2}),
        ("mlp", {"rate": 0.3, "epochs": 2}),
        ("sklearn-mlp", {"rate": 0.3, "epochs": 2}),
        ("sklearn-sgd", {"rate": 0.3, "epochs": 1}),
    ],
)
def test_ten_clients_learn_the_digits_together(which: str, plan: dict[str, Any], folder: Path) -> None:
    assert together(lambda: opened(which, folder), 30, plan) >= 0.95
    assert "tensorflow" not in sys.modules


class TestLiteRT:
    """What is this trainer's own."""

    def test_the_batch_is_the_models(self, folder: Path) -> None:
        made = opened("litert", folder)
        with pytest.raises(ConfigError, match=r"fit\.batch is 16; digits-train\.tflite takes 32 rows"):
            made.fit(drawn(64), Fit(batch=16))
        assert made.fit(drawn(70), Fit()).steps == 2
        assert made.fit(drawn(7), Fit()).steps == 1  # fewer than a batch: rows are taken again, and it learns

    def test_a_model_that_does_not_learn_is_refused(self, folder: Path) -> None:
        needs("litert")
        with pytest.raises(ConfigError, match="does not learn: it has no signature 'train'"):
            trainer("litert", folder, model=str(ROOT / "nodes" / "demo" / "digits-float.tflite"))
        (folder / "damaged.tflite").write_bytes(KEEPS.read_bytes()[:1000])
        with pytest.raises(ConfigError, match="refuses"):
            trainer("litert", folder, model="damaged.tflite")
        with pytest.raises(ConfigError, match="no such file"):
            trainer("litert", folder, model="none.tflite")

    def test_the_files_are_small(self) -> None:
        assert KEEPS.stat().st_size < 250_000
        assert STATELESS.stat().st_size < 250_000

    def test_without_the_runtime_it_says_what_to_install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("ai_edge_litert", "tflite_runtime"):
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, f"{name}.interpreter", raising=False)
        with pytest.raises(MissingError, match=r"penstock\[litert\]"):
            trainer("litert", folder, model=str(KEEPS))


class TestTorch:
    """What is this trainer's own."""

    def test_statistics_travel_too(self, folder: Path) -> None:
        needs("torch")
        made = trainer("torch", folder, path="net.py", function="with_norm")
        names = list(made.weights())
        assert "1.running_mean" in names
        assert not any("num_batches" in name for name in names)
        before = made.weights()
        made.fit(drawn(64), Fit())
        assert not np.array_equal(before["1.running_mean"], made.weights()["1.running_mean"])

    def test_dropout_draws_from_the_plans_seed_and_disturbs_nobody(self, folder: Path) -> None:
        needs("torch")
        torch = pytest.importorskip("torch")

        def run(seed: int) -> str:
            made = trainer("torch", folder, path="net.py", function="network", options={"drop": 0.5})
            made.fit(Examples(drawn(8).x, drawn(8).y), Fit(seed=seed))  # one batch: its order does not matter
            return digest(made.weights())

        torch.manual_seed(1)
        wanted = torch.rand(3).tolist()
        torch.manual_seed(1)
        first = run(1)
        assert torch.rand(3).tolist() == wanted
        assert first == run(1) != run(2)

    def test_a_regression(self, folder: Path) -> None:
        needs("torch")
        made = trainer("torch", folder, path="net.py", function="line", loss="mse")
        x = np.random.default_rng(0).standard_normal((200, 2)).astype(np.float32)
        made.fit(Examples(x, 3 * x[:, 0] - x[:, 1]), Fit(epochs=30))
        np.testing.assert_allclose(made.weights()["weight"].ravel(), [3, -1], atol=1e-3)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"path": "net.py", "function": "text"}, "gave a str, no torch"),
            ({"path": "net.py", "function": "fails"}, "net.py:1[0-9]: IndexError"),
            ({"path": "net.py", "function": "other"}, "has no 'other'"),
            ({"path": "gone.py", "function": "x"}, "there is no file"),
            ({"path": "net.py"}, "go together"),
            ({"call": "torch.nn"}, "expected package.module:name"),
            ({"call": "torch.nn:Linear", "options": {"wide": 2}}, "TypeError"),
            ({}, "either path"),
        ],
    )
    def test_the_users_mistakes_are_told_in_his_file(self, options: dict[str, Any], words: str, folder: Path) -> None:
        needs("torch")
        with pytest.raises(ConfigError, match=words):
            trainer("torch", folder, **options)

    def test_a_failing_module_says_where(self, folder: Path) -> None:
        needs("torch")
        made = trainer("torch", folder, path="net.py", function="Odd")
        for act in (lambda: made.fit(drawn(8), Fit()), lambda: made.predict(drawn(8).x)):
            with pytest.raises(RunError, match=r"net\.py:2\d: ValueError: never works"):
                act()

    def test_an_installed_module(self, folder: Path) -> None:
        needs("torch")
        made = trainer("torch", folder, call="torch.nn:Linear", options={"in_features": 64, "out_features": 10})
        assert made.fit(drawn(64), Fit()).steps == 2

    def test_without_torch_it_says_what_to_install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(MissingError, match="PyTorch"):
            trainer("torch", folder, path="net.py", function="network")

    def test_soft_labels_are_learned_as_the_plain_network_learns_them(self, folder: Path) -> None:
        made = opened("torch", folder)
        plain = Mlp([64, 32, 10])
        plain.load(_as_mlp(made.weights()))
        soft = np.random.default_rng(0).dirichlet(np.ones(10), 64).astype(np.float32)
        for each in (made, plain):
            each.fit(Examples(drawn(64).x, soft), Fit(epochs=2))
            with pytest.raises(ConfigError, match="no probabilities"):
                each.fit(Examples(drawn(64).x, soft * 2), Fit())
        np.testing.assert_allclose(_as_mlp(made.weights())["w1"], plain.weights()["w1"], atol=3e-6)

    def test_examples_are_given_in_the_shape_that_is_told(self, folder: Path) -> None:
        needs("torch")
        conv = {"in_channels": 1, "out_channels": 10, "kernel_size": 8}
        made = trainer("torch", folder, call="torch.nn:Conv2d", options=conv, shape=[1, 8, 8])
        assert made.takes() == (1, 8, 8)
        assert made.predict(drawn(3).x).shape == (3, 10)
        with pytest.raises(ConfigError, match="the model takes 64"):
            made.predict(drawn(3).x[:, :5])


@EVERY
def test_what_it_takes_is_what_it_predicts_on(which: str, folder: Path) -> None:
    made = opened(which, folder)
    assert made.takes() == (None if which == "torch" else (64,))
    assert made.predict(np.zeros((2, 64), np.float32)).shape == (2, 10)


class TestSklearn:
    """What is this trainer's own."""

    def test_two_classes_have_one_row(self, folder: Path) -> None:
        needs("sklearn")
        for options in ({"model": "sgd"}, {"model": "mlp", "hidden": [4]}):
            made = trainer("sklearn", folder, inputs=3, classes=2, **options)
            x = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
            made.fit(Examples(x, (x[:, 0] > 0).astype(np.int64)), Fit(epochs=20))
            assert made.predict(x).shape == (200, 2)
            assert made.evaluate(Examples(x, (x[:, 0] > 0).astype(np.int64)))["accuracy"] > 0.95

    @pytest.mark.parametrize(
        "options", [{"model": "mlp"}, {"model": "sgd", "hidden": [3]}, {"model": "svm"}, {"alpha": -1}]
    )
    def test_a_wrong_config_is_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            validated(kinds.module("trainer", "sklearn").Config, {"inputs": 3, "classes": 2, **options})

    def test_without_it_it_says_what_to_install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        for name in ("sklearn.linear_model", "sklearn.neural_network"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(MissingError, match=r"penstock\[sklearn\]"):
            trainer("sklearn", folder, inputs=3, classes=2)
