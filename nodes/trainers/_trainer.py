"""What a trainer of ``train`` is. A trainer is one file beside this one; its name is the kind's name.

Such a module has, beside the docstring, ``Config(Options)``, ``EXTRA`` where it needs one, and
``def build(config: Config, context: Context) -> Trainer``. The config describes the model; how it is trained in a round comes
from the coordinator (:class:`Fit`). Heavy imports are inside functions. A trainer does no I/O but reading its model file in
``open``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from nodes.federated.weights import Weights
from schemas.messages import Array


@dataclass(frozen=True, slots=True)
class Examples:
    """What is learned from.

    :param x: [n, *shape] inputs, float32.
    :param y: [n] classes, int64; [n, k] probabilities of the classes, float32 (soft labels: not every trainer takes them); or [n]
        or [n, k] numbers, float32, for a regression.
    """

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, slots=True)
class Fit:
    """How one round trains. The names are the wire's and those of ``federate``'s ``fit``.

    :param epochs: times through the data; 0: not at all (the delta is zero).
    :param batch: rows of one step; the last of an epoch may be smaller, or is dropped where the model's batch is static.
    :param rate: learning rate.
    :param momentum: of stochastic gradient descent.
    :param seed: of the order of the rows; with the client's name in it, so that two clients do not draw the same.
    :param proximal: μ of FedProx: μ/2 · |w - w₀|² is added to the loss, w₀ the weights at the begin of ``fit``.
    :param correction: added to every gradient (SCAFFOLD: c - cᵢ); empty: none.
    """

    epochs: int = 1
    batch: int = 32
    rate: float = 0.1
    momentum: float = 0.0
    seed: int = 0
    proximal: float = 0.0
    correction: Weights = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What one ``fit`` did.

    :param steps: gradient steps taken (SCAFFOLD and FedNova divide by it).
    :param loss: mean loss over the steps of the last epoch; NaN where there was none.
    """

    steps: int
    loss: float


class Trainer(ABC):
    """One model that learns. Used by one thread at a time; the same calls with the same numbers give the same numbers."""

    content: ClassVar[bool] = False
    """True: no examples at all are an answer too (nothing was counted)."""

    @abstractmethod
    def open(self) -> None:
        """Make or load the model with its initial weights. Called once, before everything else.

        :raises MissingError: a library is not installed.
        :raises ConfigError: the model's file does not fit.
        """

    @abstractmethod
    def weights(self) -> Weights:
        """A copy of the weights."""

    @abstractmethod
    def load(self, weights: Weights) -> None:
        """Continue from these weights; optimiser state is forgotten.

        :raises UnfitError: they are not of this model (:func:`nodes.federated.weights.fit`).
        """

    @abstractmethod
    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Train in place. The order of the rows is ``numpy.random.default_rng(plan.seed).permutation(n)`` anew for each epoch.

        :raises ConfigError: the plan wants what this trainer cannot do (a correction, a proximal term), in words.
        """

    @abstractmethod
    def predict(self, x: Array) -> Array:
        """[n, classes] probabilities, or [n, k] numbers for a regression, float32."""

    def takes(self) -> tuple[int, ...] | None:
        """Shape of one input, as ``infer`` gives it to :meth:`predict`; None: not known, so ``infer`` cannot serve it."""
        return None

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """``loss`` (mean cross-entropy, or mean squared error) and, of a classifier, ``accuracy`` in [0, 1].

        Without examples the loss is NaN.
        """
        import numpy as np

        if not len(examples):
            return {"loss": float("nan")}
        answers = self.predict(examples.x).astype(np.float64)
        if examples.y.dtype.kind == "f":
            return {"loss": float(np.mean((answers.reshape(examples.y.shape) - examples.y) ** 2))}
        chosen = answers[np.arange(len(answers)), examples.y]
        return {
            "loss": float(-np.mean(np.log(np.maximum(chosen, 1e-12)))),
            "accuracy": float(np.mean(answers.argmax(1) == examples.y)),
        }

    def own(self) -> Weights:
        """Arrays that never leave the device (personal layers). The client keeps them from round to round beside the model."""
        return {}

    def keep(self, own: Weights) -> None:
        """Continue with these arrays of :meth:`own`; empty: with those of :meth:`open`. Called after each :meth:`load`.

        :raises UnfitError: they are not of this model.
        """

    def close(self) -> None:
        """Free the model."""
