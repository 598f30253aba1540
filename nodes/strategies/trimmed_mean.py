"""Averages each number without the largest and the smallest ones: ``{trimmed-mean: {trim: 0.3}}``.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", https://arxiv.org/abs/1803.01498.
Take it where you can say what share of the clients may send nonsense; it wastes less of the honest ones' than median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from nodes.federated.weights import Weights, plus
from nodes.options import Options
from nodes.strategies._robust import across, enough
from nodes.strategies._strategy import ClientUpdate, Strategy
from schemas.messages import Array


class Config(Options):
    """Options of ``trimmed-mean``."""

    trim: float = Field(
        default=0.2,
        ge=0,
        lt=0.5,
        description="share of the updates left out at each end, rounded up; one is always left",
    )


class TrimmedMean(Strategy):
    """model + mean of those deltaᵢ that are left, number by number."""

    def __init__(self, trim: float) -> None:
        self.trim = trim

    def least(self) -> int:
        return 3 if self.trim else 1

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        enough(updates, self.least())
        n = len(updates)
        # 0.29 · 100 is a little more than 29 in floating point: not one more for that
        out = min(math.ceil(self.trim * n - 1e-9), (n - 1) // 2)

        def inner(stack: Array) -> Array:
            stack.sort(axis=1)
            mean: Array = stack[:, out : n - out].mean(axis=1)
            return mean

        return plus(model, across(updates, inner))


def build(config: Config) -> Strategy:
    """The strategy."""
    return TrimmedMean(config.trim)
