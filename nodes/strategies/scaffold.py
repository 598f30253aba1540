"""Corrects each client's steps by how its gradients differ from everybody's: far fewer rounds where data differ.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", https://arxiv.org/abs/1910.06378,
option II. An update is twice as long, and a client keeps a model's worth of numbers on its disk. It wants plain gradient descent
without momentum.
"""

# The client's part. Its control variate cᵢ is zeros in the beginning, and lies on its disk. In a round with ``control: scaffold``
# in the task, and c (:meth:`Strategy.shared`, or zeros) beside the model, it
#
# 1. trains with ``Fit.correction = correction(c, cᵢ, model)``,
# 2. sends ``change(delta, c, steps, rate)`` as ``extra``, with ``delta`` as it came from training (before it is made small),
#    ``steps`` from :class:`nodes.trainers._trainer.Fitted` and ``rate`` from the round's ``fit``; zeros where no step was taken,
# 3. makes ``adopted(cᵢ, change)`` its cᵢ when it hears that its update was taken, and forgets the change when it was not:
#    c is the mean of all cᵢ, and stays so only if both sides count the same changes.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from nodes.federated.weights import Shape, UnfitError, Weights, plus
from nodes.strategies._average import Averaging, average, keep, kept, like
from nodes.strategies._strategy import ClientUpdate, Strategy
from schemas.messages import Array


class Config(Averaging):
    """Options of ``scaffold``."""

    weigh: Literal["samples", "clients"] = Field(
        default="clients", description="what an update counts by: each client the same, or the rows it was trained on"
    )
    rate: float = Field(
        default=1.0, gt=0, le=10, description="how far the model goes along the mean of the updates; 1: all of it"
    )
    clients: int | None = Field(
        default=None, ge=1, description="how many clients the job has; left out: those that have answered so far"
    )


class Scaffold(Strategy):
    """model + rate · mean(deltaᵢ); c = Σ cᵢ / N. State: the sum of all changes of cᵢ, float64, and whom it has seen."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.total: Weights = {}
        self.seen: set[str] = set()

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        total = {name: array.copy() for name, array in like(self.total, model).items()}
        for update in updates:
            for name, array in update.extra.items():
                total[name] += array
        self.total = total
        self.seen |= {update.client for update in updates}
        return plus(model, {name: array * self.config.rate for name, array in average(updates, self.config).items()})

    def task(self) -> dict[str, Any]:
        return {"control": "scaffold"}

    def extras(self, model: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(Shape(shape.name, shape.shape) for shape in model)

    def shared(self) -> Weights:
        clients = max(self.config.clients or len(self.seen), 1)
        return {name: (array / clients).astype(np.float32) for name, array in self.total.items()}

    def snapshot(self) -> Any:
        return {"total": keep(self.total), "seen": sorted(self.seen)}

    def restore(self, state: Any) -> None:
        self.total, self.seen = kept(state["total"]), set(state["seen"])


def correction(shared: Mapping[str, Array], control: Mapping[str, Array], model: Mapping[str, Array]) -> Weights:
    """c - cᵢ: what is added to every gradient of a client.

    :param shared: c as it came with the round; empty: zeros.
    :param control: the client's cᵢ; empty: zeros.
    :param model: any arrays of the model's form.
    """
    zeros = _zeros(model)
    ours, theirs = _of(control, zeros), _of(shared, zeros)
    return {name: theirs[name] - ours[name] for name in zeros}


def change(delta: Mapping[str, Array], shared: Mapping[str, Array], steps: int, rate: float) -> Weights:
    """What a client's training changes in its cᵢ: cᵢ' - cᵢ = -c - delta / (steps · rate), float32; zeros without a step.

    :param delta: what the training added to the model.
    """
    zeros = _zeros(delta)
    if steps < 1:
        return zeros
    theirs = _of(shared, zeros)
    return {name: (-theirs[name] - array / (steps * rate)).astype(np.float32) for name, array in delta.items()}


def adopted(control: Mapping[str, Array], changed: Mapping[str, Array]) -> Weights:
    """cᵢ', once the coordinator has taken the update that ``changed`` went with."""
    ours = _of(control, changed)
    return {name: ours[name] + array for name, array in changed.items()}


def _zeros(model: Mapping[str, Array]) -> Weights:
    return {name: np.zeros(array.shape, np.float32) for name, array in model.items()}


def _of(arrays: Mapping[str, Array], zeros: Mapping[str, Array]) -> Mapping[str, Array]:
    """The arrays; zeros where there are none yet.

    :raises UnfitError: they are of another model.
    """
    if not arrays:
        return _zeros(zeros)
    if [(n, a.shape) for n, a in arrays.items()] != [(n, a.shape) for n, a in zeros.items()]:
        raise UnfitError("shape", "the control variate is of another model")
    return arrays


def build(config: Config) -> Strategy:
    """The strategy."""
    return Scaffold(config)
