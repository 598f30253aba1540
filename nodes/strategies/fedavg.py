"""Averages the updates, weighted by the rows that each was trained on.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", https://arxiv.org/abs/1602.05629.
Two levels of it (gateway, site, cloud) give what one gives. Take it first; what else there is answers to something that it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from nodes.federated.weights import Weights, plus
from nodes.strategies._average import Averaging, average
from nodes.strategies._strategy import ClientUpdate, Strategy


class Config(Averaging):
    """Options of ``fedavg``."""

    rate: float = Field(
        default=1.0, gt=0, le=10, description="how far the model goes along the mean of the updates; 1: all of it"
    )


class FedAvg(Strategy):
    """model + rate · Σ nᵢ deltaᵢ / Σ nᵢ; keeps nothing."""

    sums: ClassVar[bool] = True

    def __init__(self, config: Averaging, rate: float = 1.0) -> None:
        self.config = config
        self.rate = rate

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        step = average(updates, self.config)
        return plus(model, step if self.rate == 1 else {name: array * self.rate for name, array in step.items()})


def build(config: Config) -> Strategy:
    """The strategy."""
    return FedAvg(config, config.rate)
