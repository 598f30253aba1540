"""Takes the median of each number: right as long as fewer than half of the clients send nonsense.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", https://arxiv.org/abs/1803.01498.
It knows no option that could be set wrong. Where honest clients' data differ much it learns more slowly than trimmed-mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from nodes.federated.weights import Weights, plus
from nodes.options import Options
from nodes.strategies._robust import across
from nodes.strategies._strategy import ClientUpdate, Strategy
from schemas.messages import Array


class Config(Options):
    """Options of ``median``: none."""


def middle(stack: Array) -> Array:
    """The median of each row; sorts it."""
    stack.sort(axis=1)
    half = stack.shape[1] // 2
    out: Array = stack[:, half] if stack.shape[1] % 2 else (stack[:, half - 1] + stack[:, half]) / 2
    return out


class Median(Strategy):
    """model + median(deltaᵢ), number by number."""

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        return plus(model, across(updates, middle))


def build(config: Config) -> Strategy:
    """The strategy."""
    return Median()
