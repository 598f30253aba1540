"""Chooses updates as krum does, then averages, number by number, those nearest to the median: ``{bulyan: {faulty: 2}}``.

El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", https://arxiv.org/abs/1802.07927. It
withstands those who hide one bad number in an update that looks good as a whole, and needs 4 · faulty + 3 updates a round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from nodes.federated.weights import Weights, plus
from nodes.options import Options
from nodes.strategies._robust import across, distances, enough, ranked
from nodes.strategies._strategy import ClientUpdate, Strategy
from nodes.strategies.median import middle
from schemas.messages import Array


class Config(Options):
    """Options of ``bulyan``."""

    faulty: int = Field(ge=0, le=10_000, description="how many of a round's clients may send nonsense")


class Bulyan(Strategy):
    """n - 2 · faulty updates chosen by Krum one after another; of their numbers the n - 4 · faulty nearest to the median."""

    def __init__(self, faulty: int) -> None:
        self.faulty = faulty

    def least(self) -> int:
        return 4 * self.faulty + 3

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        enough(updates, self.least())
        squares, left = distances(updates), list(range(len(updates)))
        chosen: list[int] = []
        while len(chosen) < len(updates) - 2 * self.faulty:
            chosen.append(left.pop(ranked(squares[np.ix_(left, left)], self.faulty)[0]))
        near = len(chosen) - 2 * self.faulty

        def inner(stack: Array) -> Array:
            centre = middle(stack)[:, None]  # the rows are sorted now, so the nearest stand side by side
            best, mean = np.full(len(stack), np.inf), np.empty(len(stack))
            for at in range(stack.shape[1] - near + 1):
                window = stack[:, at : at + near]
                far = np.maximum(centre[:, 0] - window[:, 0], window[:, -1] - centre[:, 0])
                better = far < best
                best[better] = far[better]
                mean[better] = window[better].mean(axis=1)
            return mean

        return plus(model, across([updates[i] for i in sorted(chosen)], inner))


def build(config: Config) -> Strategy:
    """The strategy."""
    return Bulyan(config.faulty)
