"""Adapts as fedadam does, and lets the step grow again only slowly after large updates.

v = v - (1 - β₂) d² sign(v - d²). Reddi et al. 2021, "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295,
algorithm 2. Take it where fedadam is restless.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from nodes.strategies._adaptive import Adapting, Adaptive
from nodes.strategies._strategy import Strategy
from schemas.messages import Array


class Config(Adapting):
    """Options of ``fedyogi``."""

    memory: float = Field(default=0.99, ge=0, lt=1, description="β₂, how much of the mean square so far is in the next")


class FedYogi(Adaptive):
    """v = v - (1 - β₂) d² sign(v - d²)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.memory = config.memory

    def second(self, moment: Array, square: Array) -> Array:
        away: Array = np.sign(moment - square)
        return moment - (1 - self.memory) * square * away


def build(config: Config) -> Strategy:
    """The strategy."""
    return FedYogi(config)
