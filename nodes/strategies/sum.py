"""Adds the updates up and leaves the model as it is: for counts.

It is what `ask` has for a strategy. The sum goes into the round's row, not into the model: who counted does not hear what the
others did. Each update counts by its samples, which are 1 for each client, and the number of clients for what a site between
has gathered (their mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from nodes.federated.weights import Weights
from nodes.options import Options
from nodes.strategies._strategy import ClientUpdate, Strategy


class Config(Options):
    """Options of ``sum``: none."""


class Sum(Strategy):
    """Σ samplesᵢ · deltaᵢ in float64, in the order of the clients' names; keeps nothing."""

    sums: ClassVar[bool] = True

    def __init__(self) -> None:
        self._answers: dict[str, list[float]] = {}

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        self._answers = {}
        for name in model:
            summed = sum(update.delta[name].astype(np.float64) * update.samples for update in updates)
            self._answers[name] = np.ravel(summed).tolist()
        return {name: array.copy() for name, array in model.items()}

    def task(self) -> dict[str, Any]:
        """Each client's update has the weight 1."""
        return {"alike": True}

    def fault(self, delta: Weights) -> str:
        """Numbers below 0 are no counts."""
        return next((f"{name} has numbers below 0" for name, array in delta.items() if (array < 0).any()), "")

    def answers(self) -> dict[str, list[float]]:
        return self._answers


def build(config: Config) -> Strategy:
    """The strategy."""
    del config
    return Sum()
