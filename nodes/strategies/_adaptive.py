"""What fedadagrad, fedadam and fedyogi share: a step of its own size for each weight, by how much that weight has moved.

Reddi et al. 2021, "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295, algorithm 2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from nodes.federated.weights import Weights, plus
from nodes.strategies._average import Averaging, average, keep, kept, like
from nodes.strategies._strategy import ClientUpdate, Strategy
from schemas.messages import Array


class Adapting(Averaging):
    """Options of every strategy that adapts."""

    rate: float = Field(default=0.03, gt=0, le=100, description="about how far a weight moves in a round")
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="β₁, how much of the last round's step is in this one's"
    )
    floor: float = Field(
        default=0.001,
        gt=0,
        le=1,
        description="τ: weights whose updates are smaller than this move in proportion to them",
    )


class Adaptive(Strategy):
    """d = β₁ d + (1 - β₁) mean; v by the kind, τ² in the beginning; model + rate · d / (√v + τ)."""

    sums: ClassVar[bool] = True

    def __init__(self, config: Adapting) -> None:
        self.config = config
        self.step: Weights = {}
        self.moment: Weights = {}

    @abstractmethod
    def second(self, moment: Array, square: Array) -> Array:
        """The next v of one array.

        :param moment: the last one.
        :param square: d².
        """

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        part, floor = self.config.momentum, self.config.floor
        step, moment = like(self.step, model), like(self.moment, model, floor**2)
        mean = average(updates, self.config)
        self.step = {name: part * step[name] + (1 - part) * array for name, array in mean.items()}
        self.moment = {name: self.second(moment[name], np.square(array)) for name, array in self.step.items()}
        return plus(
            model,
            {
                name: self.config.rate * array / (np.sqrt(self.moment[name]) + floor)
                for name, array in self.step.items()
            },
        )

    def snapshot(self) -> Any:
        return {"step": keep(self.step), "moment": keep(self.moment)}

    def restore(self, state: Any) -> None:
        self.step, self.moment = kept(state["step"]), kept(state["moment"])
