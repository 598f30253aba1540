"""A small network of dense layers in plain numpy: ``{mlp: {layers: [64, 32, 10], seed: 1}}``.

Gradient descent by hand (Rumelhart, Hinton and Williams 1986), float32, with momentum (Polyak's, as torch has it), the proximal
term of FedProx (Li et al. 2020) and the correction of SCAFFOLD (Karimireddy et al. 2020). Needs no runtime: a client is numpy.

The arrays are ``w1`` [inputs, outputs], ``b1`` [outputs], ``w2``, … in this order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from nodes.federated.weights import Shape, Weights, fit, flat, unflat
from nodes.operator import Context
from nodes.options import Options
from nodes.trainers import _data
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from schemas.messages import Array

Activation = Literal["relu", "tanh", "sigmoid"]
Loss = Literal["cross-entropy", "mse"]

_MOST = 100_000_000
"""Parameters."""
_TINY = np.float32(1e-12)


class Config(Options):
    """The network."""

    layers: list[int] = Field(
        description="Numbers of an example, of each hidden layer, and of the answer: [64, 32, 10]. Two: a linear model.",
        min_length=2,
    )
    activation: Activation = Field("relu", description="Of the hidden layers.")
    loss: Loss = Field(
        "cross-entropy",
        description="cross-entropy: a classifier, one answer for each class, by softmax; mse: a regression, mean squared error.",
    )
    seed: int = Field(0, description="Of the initial weights; both sides of a job must have the same.", ge=0)

    @model_validator(mode="after")
    def _sizes(self) -> Config:
        if min(self.layers) < 1:
            raise ValueError(f"layers: {min(self.layers)} is no size of a layer")
        if self.loss == "cross-entropy" and self.layers[-1] < 2:
            raise ValueError("layers: a classifier has two classes or more; for one number take loss: mse")
        if (count := sum((i + 1) * o for i, o in _pairs(self.layers))) > _MOST:
            raise ValueError(f"layers: {count:,} parameters; at most {_MOST:,}")
        return self


def build(config: Config, context: Context) -> Trainer:
    """The trainer."""
    return Mlp(config.layers, config.activation, config.loss, config.seed)


def _pairs(layers: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(layers))


class _Room:
    """Memory for one step of ``rows`` rows, and the views of it that a step needs, so that it allocates nothing.

    Activations stand feature by feature, [features, rows]: then the row of ones that makes the bias part of the weights' matrix
    is at the end, what is before it is contiguous, and the sums of softmax go along memory.
    """

    def __init__(self, layers: list[int], rows: int) -> None:
        self.with_one = [np.ones((size + 1, rows), np.float32) for size in layers[1:-1]]
        self.hidden = [array[:-1] for array in self.with_one]
        self.turned = [array.T for array in self.with_one]
        self.made = [
            np.empty((size, rows), np.float32) for size in layers[1:]
        ]  # before the activation, then the gradient there
        self.made_turned = [array.T for array in self.made]
        self.slope = [np.empty((size, rows), np.float32) for size in layers[1:-1]]
        self.sums = np.empty((1, rows), np.float32)


class Mlp(Trainer):
    """The network; see the module."""

    def __init__(
        self, layers: list[int], activation: Activation = "relu", loss: Loss = "cross-entropy", seed: int = 0
    ) -> None:
        self._layers = list(layers)
        self._activation = activation
        self._classifies = loss == "cross-entropy"
        self._seed = seed
        pairs = _pairs(self._layers)
        self.shapes: tuple[Shape, ...] = tuple(
            shape for n, (i, o) in enumerate(pairs, 1) for shape in (Shape(f"w{n}", (i, o)), Shape(f"b{n}", (o,)))
        )
        # All parameters are one vector in the order of `shapes`; a layer's weights and bias are one block of it, [i + 1, o].
        self._all = np.zeros(sum(shape.size for shape in self.shapes), np.float32)
        self._slopes = np.zeros(self._all.size, np.float32)  # unlike zeros_like no memory until it is used
        self._speed: Array | None = None
        self._blocks, self._grads = _views(self._all, pairs), _views(self._slopes, pairs)
        self._blocks_turned = [block.T for block in self._blocks]
        self._inner = [block[:-1] for block in self._blocks]
        self._rooms: dict[int, _Room] = {}

    def open(self) -> None:
        """Draw the weights: He's scale for relu, Glorot's otherwise; biases are zero."""
        drawn = np.random.default_rng(self._seed)
        gain = 2.0 if self._activation == "relu" else 1.0
        for block in self._blocks:
            inputs = len(block) - 1
            block[:-1] = drawn.standard_normal((inputs, block.shape[1])) * np.sqrt(gain / inputs)
            block[-1] = 0
        self._speed = None

    def weights(self) -> Weights:
        """A copy."""
        return unflat(self._all, self.shapes)

    def load(self, weights: Weights) -> None:
        """Continue from these."""
        fit(weights, self.shapes)
        at = 0
        for shape in self.shapes:
            self._all[at : at + shape.size] = weights[shape.name].ravel()
            at += shape.size
        self._speed = None

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Train in place. What diverges ends in NaN or infinite weights, which the caller sees; nothing is raised for it.

        :raises ConfigError: the examples do not fit the layers, or the plan is none.
        """
        correction = _data.checked(plan, self.shapes)
        _data.alike(examples)
        n, width = len(examples), self._layers[0]
        x = np.ones((n, width + 1), np.float32)
        x[:, :-1] = _data.table(examples.x, width)
        answers = _data.wanted if self._classifies else _data.numbers
        y = answers(examples.y, self._layers[-1])
        start = self._all.copy() if plan.proximal else None
        added = flat(correction, "<f4") if correction else None
        if plan.momentum and self._speed is None:
            self._speed = np.zeros_like(self._all)
        if not plan.momentum:
            self._speed = None
        steps, loss = 0, float("nan")
        mixed_x, mixed_y = np.empty_like(x), np.empty_like(y)
        with np.errstate(all="ignore"):
            for epoch, order in enumerate(_data.orders(plan, n), 1):
                x.take(order, axis=0, out=mixed_x, mode="clip")  # the mode that has no buffer in between
                y.take(order, axis=0, out=mixed_y, mode="clip")
                losses = []
                for at in range(0, n, plan.batch):
                    rows = min(plan.batch, n - at)
                    room = self._room(rows)
                    part, right = mixed_x[at : at + rows], mixed_y[at : at + rows].T
                    self._forward(part.T, room)
                    if epoch == plan.epochs:
                        losses.append(self._loss(room, right))
                    self._backward(part, right, room)
                    self._step(plan, start, added)
                steps += len(range(0, n, plan.batch))
                if losses:
                    loss = float(np.mean(losses))
        return Fitted(steps, loss)

    def _room(self, rows: int) -> _Room:
        room = self._rooms.get(rows)
        if room is None:
            if len(self._rooms) >= 4:  # the batch, the rest of an epoch; both anew where the data grew
                self._rooms.clear()
            room = self._rooms[rows] = _Room(self._layers, rows)
        return room

    def _forward(self, inputs: Array, room: _Room) -> None:
        """Answers (probabilities, of a classifier) into ``room.made[-1]``. ``inputs``: [features + 1, rows]."""
        made = room.made
        for i, block in enumerate(self._blocks_turned):
            np.dot(block, inputs, out=made[i])
            if i < len(room.hidden):
                hidden = room.hidden[i]
                if self._activation == "relu":
                    np.maximum(made[i], 0, out=hidden)
                elif self._activation == "tanh":
                    np.tanh(made[i], out=hidden)
                else:
                    np.multiply(made[i], 0.5, out=hidden)  # 1 / (1 + e^-z) = (1 + tanh(z/2)) / 2: does not overflow
                    np.tanh(hidden, out=hidden)
                    hidden += 1
                    hidden *= 0.5
                inputs = room.with_one[i]
        if self._classifies:
            out, sums = made[-1], room.sums
            np.maximum.reduce(out, axis=0, keepdims=True, out=sums)
            np.subtract(out, sums, out=out)
            np.exp(out, out=out)
            np.add.reduce(out, axis=0, keepdims=True, out=sums)
            np.divide(out, sums, out=out)

    def _loss(self, room: _Room, right: Array) -> float:
        answers = room.made[-1]
        if self._classifies:
            return float(-np.log(np.maximum((answers * right).sum(0), _TINY)).mean())
        return float(np.square(answers - right).mean())

    def _backward(self, inputs: Array, right: Array, room: _Room) -> None:
        """The loss's gradient into ``self._slopes``. ``inputs``: [rows, features + 1]; ``right``: [answers, rows]."""
        there = room.made[-1]
        np.subtract(there, right, out=there)
        there *= np.float32(1 / len(inputs) if self._classifies else 2 / there.size)
        for i in range(len(self._blocks) - 1, -1, -1):
            before = room.with_one[i - 1] if i else inputs.T
            np.dot(before, room.made_turned[i], out=self._grads[i])
            if not i:
                break
            below, hidden, slope = room.made[i - 1], room.hidden[i - 1], room.slope[i - 1]
            np.dot(self._inner[i], room.made[i], out=below)
            if self._activation == "relu":
                np.sign(hidden, out=slope)
            elif self._activation == "tanh":
                np.multiply(hidden, hidden, out=slope)
                np.subtract(1, slope, out=slope)
            else:
                np.subtract(1, hidden, out=slope)
                slope *= hidden
            below *= slope

    def _step(self, plan: Fit, start: Array | None, added: Array | None) -> None:
        slopes = self._slopes
        if start is not None:
            slopes += np.float32(plan.proximal) * (self._all - start)
        if added is not None:
            slopes += added
        if self._speed is not None:
            self._speed *= np.float32(plan.momentum)
            self._speed += slopes
            np.multiply(self._speed, np.float32(plan.rate), out=slopes)
        else:
            slopes *= np.float32(plan.rate)
        self._all -= slopes

    def takes(self) -> tuple[int, ...]:
        """What the first layer takes."""
        return (self._layers[0],)

    def predict(self, x: Array) -> Array:
        """Probabilities, or a regression's numbers."""
        rows = len(x)
        inputs = np.ones((rows, self._layers[0] + 1), np.float32)
        inputs[:, :-1] = _data.table(x, self._layers[0])
        room = _Room(self._layers, rows)
        with np.errstate(all="ignore"):
            self._forward(inputs.T, room)
        return np.ascontiguousarray(room.made[-1].T)


def _views(vector: Array, pairs: list[tuple[int, int]]) -> list[Array]:
    out, at = [], 0
    for inputs, outputs in pairs:
        size = (inputs + 1) * outputs
        out.append(vector[at : at + size].reshape(inputs + 1, outputs))
        at += size
    return out
