"""Takes the update that is most like the others, or the mean of several such: ``{krum: {faulty: 3, choose: 5}}``.

Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", https://arxiv.org/abs/1703.02757;
with ``choose`` above 1 it is Multi-Krum. A round needs 2 · faulty + 3 updates. It leaves out whole clients, so it is for
clients whose data are alike: one with a class that nobody else has is left out too.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from nodes.federated.weights import Weights, plus
from nodes.options import Options
from nodes.strategies._robust import distances, enough, equally, ranked
from nodes.strategies._strategy import ClientUpdate, Strategy


class Config(Options):
    """Options of ``krum``."""

    faulty: int = Field(ge=0, le=10_000, description="how many of a round's clients may send nonsense")
    choose: int = Field(
        default=1,
        ge=1,
        le=20_003,
        description="how many of the best updates are averaged, at most faulty + 3; 1 is plain Krum",
    )

    @model_validator(mode="after")
    def _honest(self) -> Config:
        # of the fewest updates of a round, 2 · faulty + 3, no more than n - faulty can be honest
        if self.choose > self.faulty + 3:
            raise ValueError(
                f"with {self.faulty} faulty clients choose is at most {self.faulty + 3}, got {self.choose}"
            )
        return self


class Krum(Strategy):
    """model + mean of the ``choose`` deltas with the lowest scores."""

    def __init__(self, config: Config) -> None:
        self.faulty = config.faulty
        self.choose = config.choose

    def least(self) -> int:
        return 2 * self.faulty + 3

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        enough(updates, self.least())
        best = ranked(distances(updates), self.faulty)[: self.choose]
        return plus(model, equally([updates[i] for i in sorted(best)]))


def build(config: Config) -> Strategy:
    """The strategy."""
    return Krum(config)
