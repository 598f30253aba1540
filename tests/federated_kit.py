"""What the tests of federated learning share: the digits, a small perceptron in plain numpy, and rounds without a bus.

Written independently of the product's trainers and machines: it is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from nodes.compressors._compressor import Compressor
from nodes.federated.weights import Weights, flat, minus, plus, shapes, unflat
from nodes.strategies._strategy import ClientUpdate, Strategy
from nodes.strategies.scaffold import adopted, change, correction
from schemas.messages import Array


@dataclass(frozen=True)
class Data:
    """Images of digits: x [n, 64] in [0, 1], float32; y [n]."""

    x: Array
    y: Array


@cache
def digits() -> tuple[Data, Data]:
    """1,437 to train with and 360 to test with, the same on every machine."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # has no types

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int64)
    return Data(x[:1437], y[:1437]), Data(x[1437:], y[1437:])


def alike(clients: int) -> list[Data]:
    """As many parts of the training data, each with all classes."""
    train, _ = digits()
    return [Data(train.x[i::clients], train.y[i::clients]) for i in range(clients)]


def two_classes(clients: int = 10) -> list[Data]:
    """Parts of the training data with two classes each: client i has classes i and i + 1, half of each class's rows."""
    train, _ = digits()
    halves = [np.array_split(np.flatnonzero(train.y == label), 2) for label in range(10)]
    parts = [np.concatenate([halves[i % 10][0], halves[(i + 1) % 10][1]]) for i in range(clients)]
    return [Data(train.x[rows], train.y[rows]) for rows in parts]


def perceptron(*layers: int, seed: int = 0) -> Weights:
    """Initial weights of a perceptron; of two layers it is a softmax regression."""
    draw = np.random.default_rng(seed)
    out: Weights = {}
    for i, (rows, columns) in enumerate(pairwise(layers)):
        out[f"w{i}"] = (draw.normal(0, np.sqrt(2 / rows), (rows, columns))).astype(np.float32)
        out[f"b{i}"] = np.zeros(columns, np.float32)
    return out


def forward(model: Weights, x: Array) -> list[Array]:
    """What every layer answers, the input first; the last are the scores."""
    out = [x]
    layers = len(model) // 2
    for i in range(layers):
        z = out[-1] @ model[f"w{i}"] + model[f"b{i}"]
        out.append(z if i == layers - 1 else np.maximum(z, 0))
    return out


def accuracy(model: Weights, data: Data | None = None) -> float:
    data = data or digits()[1]
    return float((forward(model, data.x)[-1].argmax(1) == data.y).mean())


def gradient(model: Weights, x: Array, y: Array) -> Weights:
    """Of the mean cross-entropy."""
    seen = forward(model, x)
    scores = np.exp(seen[-1] - seen[-1].max(1, keepdims=True))
    back = scores / scores.sum(1, keepdims=True)
    back[np.arange(len(y)), y] -= 1
    back /= len(y)
    out: Weights = {}
    for i in reversed(range(len(model) // 2)):
        out[f"w{i}"], out[f"b{i}"] = seen[i].T @ back, back.sum(0)
        if i:
            back = (back @ model[f"w{i}"].T) * (seen[i] > 0)
    return out


@dataclass(frozen=True)
class Plan:
    epochs: int = 1
    batch: int = 32
    rate: float = 0.1
    proximal: float = 0.0
    correction: Weights = field(default_factory=dict)


def train(model: Weights, data: Data, plan: Plan, seed: int) -> tuple[Weights, int]:
    """The model after training, and the steps taken."""
    begin, model, steps = model, {name: array.copy() for name, array in model.items()}, 0
    draw = np.random.default_rng(seed)
    for _ in range(plan.epochs):
        order = draw.permutation(len(data.y))
        for at in range(0, len(order), plan.batch):
            rows = order[at : at + plan.batch]
            for name, slope in gradient(model, data.x[rows], data.y[rows]).items():
                slope = slope + plan.proximal * (model[name] - begin[name]) + plan.correction.get(name, np.float32(0))
                model[name] -= plan.rate * slope
            steps += 1
    return model, steps


Poison: TypeAlias = Callable[[Weights], Weights]
"""What a client that means ill makes of its delta."""


@dataclass
class Federation:
    """Rounds without a bus: each client trains, compresses, and is aggregated, in the order of their numbers."""

    strategy: Strategy
    parts: Sequence[Data]
    model: Weights
    plan: Plan = Plan()
    compressor: Compressor | None = None
    poison: dict[int, Poison] = field(default_factory=dict)
    packed: list[Weights] = field(default_factory=list)
    round: int = 0
    """Draws begin with it."""

    def __post_init__(self) -> None:
        self.residual: dict[int, Weights] = {}
        self.control: dict[int, Weights] = {}

    def run(self, rounds: int, until: float = 2.0) -> list[float]:
        """Accuracy after each round; ends when ``until`` is reached."""
        curve: list[float] = []
        while len(curve) < rounds and (not curve or curve[-1] < until):
            updates = [self._answer(i, data) for i, data in enumerate(self.parts)]
            self.model = self.strategy.aggregate(self.model, updates)
            self.round += 1
            curve.append(accuracy(self.model))
        return curve

    def _answer(self, i: int, data: Data) -> ClientUpdate:
        task, seed = self.strategy.task(), self.round * 1000 + i
        plan = replace(self.plan, proximal=task.get("proximal", 0.0))
        shared, control = self.strategy.shared(), self.control.get(i, {})
        if task.get("control") == "scaffold":
            plan = replace(plan, correction=correction(shared, control, self.model))
        trained, steps = train(self.model, data, plan, seed)
        delta = minus(trained, self.model)
        extra: Weights = {}
        if task.get("control") == "scaffold":
            extra = change(delta, shared, steps, plan.rate)
            self.control[i] = adopted(control, extra)
        if poison := self.poison.get(i):
            delta = poison(delta)
        return ClientUpdate(f"c{i:03}", self._sent(i, delta, seed), len(data.y), extra, {"steps": steps})

    def _sent(self, i: int, delta: Weights, seed: int) -> Weights:
        if self.compressor is None:
            return delta
        wanted = shapes(delta)
        if self.compressor.feeds_back and i in self.residual:
            delta = plus(delta, self.residual[i])
        packed = self.compressor.pack(delta, seed)
        self.packed.append(packed)
        back = self.compressor.unpack(packed, wanted)
        if self.compressor.feeds_back:
            self.residual[i] = minus(delta, back)
        return back


def scaled(factor: float) -> Poison:
    """Sends this many times what it should; -1 turns every sign."""
    return lambda delta: {name: array * np.float32(factor) for name, array in delta.items()}


def noise(size: float, seed: int = 1) -> Poison:
    """Sends what has nothing to do with its data."""

    def made(delta: Weights) -> Weights:
        draw = np.random.default_rng(seed)
        return unflat(draw.normal(0, size, flat(delta).size), shapes(delta))

    return made


def labels_turned(data: Data) -> Data:
    """Every digit is called what 9 lacks to it."""
    return Data(data.x, 9 - data.y)
