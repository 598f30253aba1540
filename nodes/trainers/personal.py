"""Layers that stay on the device: ``{personal: {trainer: {mlp: …}, layers: [w2, b2]}}``.

The device trains the whole model; the layers named here are its own (Arivazhagan et al. 2019, "Federated learning with
personalization layers"): they are neither sent nor replaced by the global model's, and the job exchanges the others only.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nodes import kinds
from nodes.choice import Chosen, choice
from nodes.federated.weights import Weights, fit, shapes
from nodes.operator import Context
from nodes.options import Options
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from schemas.errors import ConfigError, Problem
from schemas.messages import Array


class Config(Options):
    """A model of which a part is shared."""

    trainer: choice("trainer") = Field(description="The whole model: a trainer with its options.")  # type: ignore[valid-type] # made
    layers: list[str] = Field(description="Names of the arrays that stay on the device.", min_length=1)

    def check(self, context: Context) -> None:
        chosen: Chosen = self.trainer
        with chosen.at("trainer"):
            chosen.options.check(context)


def build(config: Config, context: Context) -> Trainer:
    """The trainer."""
    chosen: Chosen = config.trainer
    inner: Any = kinds.module("trainer", chosen.name)
    return Personal(inner.build(chosen.options, context), tuple(config.layers))


class Personal(Trainer):
    """Another trainer, whose ``layers`` are its own."""

    def __init__(self, inner: Trainer, layers: tuple[str, ...]) -> None:
        self._inner = inner
        self._layers = layers
        self._first: Weights = {}

    def open(self) -> None:
        """Open the model.

        :raises ConfigError: it has no such layers, or no others.
        """
        self._inner.open()
        names = list(self._inner.weights())
        for i, name in enumerate(self._layers):
            if name not in names:
                raise ConfigError(Problem(("layers", i), f"the model has no {name!r}; it has {', '.join(names)}"))
        if len(set(self._layers)) == len(names):
            raise ConfigError(Problem(("layers",), "no layer is left that could be shared"))
        self._first = self._part(own=True)

    def _part(self, *, own: bool) -> Weights:
        return {name: array for name, array in self._inner.weights().items() if (name in self._layers) is own}

    def weights(self) -> Weights:
        """The shared part."""
        return self._part(own=False)

    def load(self, weights: Weights) -> None:
        """Take the shared part over."""
        whole = self._inner.weights()
        fit(weights, shapes({name: array for name, array in whole.items() if name not in self._layers}))
        self._inner.load({name: weights.get(name, array) for name, array in whole.items()})

    def own(self) -> Weights:
        """The other part."""
        return self._part(own=True)

    def keep(self, own: Weights) -> None:
        """Take the own part over."""
        own = own or self._first
        fit(own, shapes(self._first))
        self._inner.load({name: own.get(name, array) for name, array in self._inner.weights().items()})

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Train the whole model.

        :raises ConfigError: the plan corrects gradients: those of own layers have no correction.
        """
        if plan.correction:
            raise ConfigError("personal layers cannot be corrected (SCAFFOLD): choose another strategy")
        return self._inner.fit(examples, plan)

    def takes(self) -> tuple[int, ...] | None:
        """As the model."""
        return self._inner.takes()

    def predict(self, x: Array) -> Array:
        """Of the whole model."""
        return self._inner.predict(x)

    def close(self) -> None:
        """Free the model."""
        self._inner.close()
