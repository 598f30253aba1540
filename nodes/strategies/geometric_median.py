"""Takes the point whose distances to all updates are least in sum; right while fewer than half of the clients send nonsense.

Pillutla et al. 2022, "Robust Aggregation for Federated Learning" (RFA), https://arxiv.org/abs/1912.13445: the smoothed
algorithm of Weiszfeld. It treats an update as a whole and leaves nobody out altogether: the farther away, the less it counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from nodes.federated.weights import Weights, plus
from nodes.options import Options
from nodes.strategies._robust import across, products
from nodes.strategies._strategy import ClientUpdate, Strategy
from schemas.messages import Array


class Config(Options):
    """Options of ``geometric-median``."""

    steps: int = Field(default=100, ge=1, le=10_000, description="most steps towards it; they end when they are short")
    smooth: float = Field(
        default=1e-6, gt=0, le=1, description="distances below this, in parts of the median distance, count as this"
    )


class GeometricMedian(Strategy):
    """model + Σ shareᵢ · deltaᵢ. They are found from the inner products alone: a step costs nothing of the model's size."""

    def __init__(self, config: Config) -> None:
        self.steps = config.steps
        self.smooth = config.smooth

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        shares = self.shares(products(updates))
        return plus(model, across(updates, lambda stack: stack @ shares))

    def shares(self, inner: Array) -> Array:
        """What each update counts in the point, adding up to 1.

        :param inner: [n, n] inner products of the updates. (Distances would do, but for one far away they drown the others.)
        """
        own = np.diag(inner)
        apart = np.sqrt(np.maximum(own[:, None] + own[None, :] - 2 * inner, 0))
        # from the mean of that half which is nearest together: from the mean of all, one far away costs many steps
        near = apart[apart.sum(axis=1).argmin()].argsort(kind="stable")[: len(own) // 2 + 1]
        shares = np.zeros(len(own))
        shares[near] = 1 / len(near)
        for _ in range(self.steps):
            towards = inner @ shares
            far = np.sqrt(np.maximum(shares @ towards - 2 * towards + own, 0))
            usual = float(np.median(far)) or float(far.max())  # the former is 0 where half of them are one and the same
            if usual == 0:
                break
            inverse = 1 / np.maximum(far, self.smooth * usual)
            before, shares = shares, inverse / inverse.sum()
            if np.abs(shares - before).max() < 1e-12:
                break
        return shares


def build(config: Config) -> Strategy:
    """The strategy."""
    return GeometricMedian(config)
