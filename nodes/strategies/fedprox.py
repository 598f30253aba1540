"""Averages as fedavg does, and holds the clients near the model that they began with.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", https://arxiv.org/abs/1812.06127: a client adds
proximal/2 · |w - w₀|² to its loss. Take it where clients do very different amounts of work, or their data differ so much that
fedavg swings.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nodes.strategies._strategy import Strategy
from nodes.strategies.fedavg import Config as AveragingConfig
from nodes.strategies.fedavg import FedAvg


class Config(AveragingConfig):
    """Options of ``fedprox``."""

    proximal: float = Field(default=0.01, gt=0, le=1e6, description="μ, the strength of the pull to the round's model")


class FedProx(FedAvg):
    """The average; the rest is the clients' part."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.rate)
        self.proximal = config.proximal

    def task(self) -> dict[str, Any]:
        return {"proximal": self.proximal}


def build(config: Config) -> Strategy:
    """The strategy."""
    return FedProx(config)
