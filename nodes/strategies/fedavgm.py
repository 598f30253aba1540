"""Averages, and goes on in the direction of the rounds before: momentum on the server.

Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
https://arxiv.org/abs/1909.06335. Take it where fedavg swings from round to round because each has other clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from nodes.federated.weights import Weights, plus
from nodes.strategies._average import Averaging, average, keep, kept, like
from nodes.strategies._strategy import ClientUpdate, Strategy


class Config(Averaging):
    """Options of ``fedavgm``."""

    rate: float = Field(default=1.0, gt=0, le=10, description="how far the model goes along the momentum")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="how much of the last round's step is in this one's")


class FedAvgM(Strategy):
    """v = momentum · v + mean; model + rate · v."""

    sums: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.step: Weights = {}

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        before = like(self.step, model)
        self.step = {
            name: self.config.momentum * before[name] + array for name, array in average(updates, self.config).items()
        }
        return plus(model, {name: array * self.config.rate for name, array in self.step.items()})

    def snapshot(self) -> Any:
        return {"step": keep(self.step)}

    def restore(self, state: Any) -> None:
        self.step = kept(state["step"])


def build(config: Config) -> Strategy:
    """The strategy."""
    return FedAvgM(config)
