"""Gives each weight a step of its own size, by the mean square of its last updates.

v = β₂ v + (1 - β₂) d². Reddi et al. 2021, "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295, algorithm 2.
Take it where some weights move seldom, as those of rare words or classes; its rate must be tried out.
"""

from __future__ import annotations

from pydantic import Field

from nodes.strategies._adaptive import Adapting, Adaptive
from nodes.strategies._strategy import Strategy
from schemas.messages import Array


class Config(Adapting):
    """Options of ``fedadam``."""

    memory: float = Field(default=0.99, ge=0, lt=1, description="β₂, how much of the mean square so far is in the next")


class FedAdam(Adaptive):
    """v = β₂ v + (1 - β₂) d²."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.memory = config.memory

    def second(self, moment: Array, square: Array) -> Array:
        return self.memory * moment + (1 - self.memory) * square


def build(config: Config) -> Strategy:
    """The strategy."""
    return FedAdam(config)
