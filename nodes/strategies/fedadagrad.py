"""Gives each weight steps that shrink with all that it has moved so far.

v = v + d². Reddi et al. 2021, "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295, algorithm 2.
Take it for sparse data and long jobs; it comes to rest by itself.
"""

from __future__ import annotations

from pydantic import Field

from nodes.strategies._adaptive import Adapting, Adaptive
from nodes.strategies._strategy import Strategy
from schemas.messages import Array


class Config(Adapting):
    """Options of ``fedadagrad``."""

    momentum: float = Field(
        default=0.0, ge=0, lt=1, description="β₁, how much of the last round's step is in this one's"
    )


class FedAdagrad(Adaptive):
    """v = v + d²."""

    def second(self, moment: Array, square: Array) -> Array:
        return moment + square


def build(config: Config) -> Strategy:
    """The strategy."""
    return FedAdagrad(config)
