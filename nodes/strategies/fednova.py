"""Averages what each client's steps did on average, so that those who take many steps do not pull the model to themselves.

Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization" (FedNova),
https://arxiv.org/abs/2007.07481, for plain gradient descent. Take it where clients train for different numbers of steps: by their
amounts of data, or because each trains as long as it has time. The clients' ``steps`` come with their metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from nodes.federated.weights import UnfitError, Weights, plus
from nodes.strategies._average import Averaging
from nodes.strategies._strategy import ClientUpdate, Strategy, mean


class Config(Averaging):
    """Options of ``fednova``."""

    most: float = Field(
        default=10.0, ge=1, description="steps above this many times the median are taken for this many"
    )


class FedNova(Strategy):
    """model + τ · Σ pᵢ deltaᵢ / τᵢ with τ = Σ pᵢ τᵢ; pᵢ: shares of the rows; τᵢ: steps of a client."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        told = [update.metrics.get("steps", math.nan) for update in updates]
        if not (known := sorted(number for number in told if math.isfinite(number))):
            raise UnfitError("names", "no client says how many steps it took; fednova needs that")
        median = known[len(known) // 2]
        limit = max(self.config.most * median, 1.0)
        # who does not say it counts as usual: one such client must not end everybody's round
        steps = [min(max(n if math.isfinite(n) else median, 1.0), limit) for n in told]
        weights = [
            (float(u.samples) if self.config.weigh == "samples" else 1.0) * (1.0 + u.staleness) ** -self.config.stale
            for u in updates
        ]
        whole = sum(weights)
        usual = sum(w * n for w, n in zip(weights, steps, strict=True)) / whole
        parts = [w / n for w, n in zip(weights, steps, strict=True)]
        scale = usual * sum(parts) / whole
        return plus(model, {name: array * scale for name, array in mean(updates, parts).items()})


def build(config: Config) -> Strategy:
    """The strategy."""
    return FedNova(config)
