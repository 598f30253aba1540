"""Counts rows instead of learning from them.

What `answer` and `ask` have for a model. The "weights" of the job are zeros, one for each count; what a client adds to them in
a round are its counts. Its examples are places, [rows, questions] (:func:`nodes.federated.analytics.places`), and the numbers
of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from nodes.federated.analytics import gathered
from nodes.federated.questions import Questions
from nodes.federated.weights import Weights, fit, shapes
from nodes.operator import Context
from nodes.trainers._data import unable
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from schemas.errors import ConfigError
from schemas.messages import Array

_UPTO = "upto"


class Config(Questions):
    """What is counted."""


def build(config: Config, context: Context) -> Trainer:
    """The trainer."""
    del context
    return Count(config)


class Count(Trainer):
    """Counts.

    :ivar once: each row counts once, in the next answer; False: in every answer while it is there (a window).
    :ivar settled: called with the number up to which rows have been counted for good; in the trainer's thread.
    """

    content: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self._questions = config.all()
        self.once = True
        self._base: Weights = {}
        self._weights: Weights = {}
        self._upto = 0
        self.settled: Callable[[int], None] = lambda upto: None

    def open(self) -> None:
        """Zeros."""
        self._base = {name: np.zeros(question.size) for name, question in self._questions.items()}
        self._weights = self._base

    def weights(self) -> Weights:
        """By question, float64 [counts]."""
        return {name: array.copy() for name, array in self._weights.items()}

    def load(self, weights: Weights) -> None:
        """What there is to be added to."""
        fit(weights, shapes(self._base))
        self._weights = weights

    def own(self) -> Weights:
        """The number of the last row that was counted: it moves on only with answers that were used."""
        return {_UPTO: np.array([self._upto], np.int64)} if self.once else {}

    def keep(self, own: Weights) -> None:
        """Continue after that row."""
        self._upto = int(own[_UPTO][0]) if own else 0
        if own:
            self.settled(self._upto)

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Count the rows that were not counted before, or all."""
        unable("count", plan)
        if examples.x.ndim != 2 or examples.x.shape[1] != len(self._questions):
            raise ConfigError("there are no rows of these questions; counting is done by the node 'answer'")
        fresh = examples.x[examples.y > self._upto] if self.once else examples.x
        self._weights = {
            name: self._weights[name] + gathered(question, fresh[:, i])
            for i, (name, question) in enumerate(self._questions.items())
        }
        if len(examples):
            self._upto = max(self._upto, int(examples.y.max()))
        return Fitted(0, float("nan"))

    def predict(self, x: Array) -> Array:
        """It does not.

        :raises ConfigError: always.
        """
        raise ConfigError("it counts, and predicts nothing; rows are counted by the node 'answer'")
