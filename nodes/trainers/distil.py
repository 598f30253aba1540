"""Federated distillation: devices exchange what they predict on public examples, not their models, which may all differ.

``{distil: {trainer: {mlp: …}, public: public.npz}}``. The "weights" of the job are the probabilities that a device gives the
classes of each public example; their mean is the consensus. In a round a device first learns the consensus on the public
examples (soft labels), then its own data, and answers with what it predicts now (Jeong et al. 2018; Li and Wang 2019, "FedMD";
Itahara et al. 2021, "DS-FL"). The model itself never leaves the device. The bytes of a round are those of the
predictions, whatever the size of the models.
"""

from __future__ import annotations

from dataclasses import replace
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

_KEY = "predictions"


class Config(Options):
    """A model of the device's own, and the examples that all devices have."""

    trainer: choice("trainer") = Field(description="The device's model, a classifier: a trainer with its options.")  # type: ignore[valid-type] # made
    public: str = Field(description="Path of the public examples, an .npz with their inputs; the same on all devices.")
    inputs: str = Field("x", description="Name of the array in it, [n, …]; labels are not needed.")
    epochs: int = Field(5, description="Times through the public examples in each round.", ge=0)
    batch: int = Field(32, description="Public examples of one step.", ge=1)
    rate: float = Field(0.1, description="Learning rate on the public examples.", gt=0)

    def check(self, context: Context) -> None:
        chosen: Chosen = self.trainer
        with chosen.at("trainer"):
            chosen.options.check(context)
        if not context.path(self.public).is_file():
            raise ConfigError(Problem(("public",), f"no such file: {context.path(self.public)}"))


def build(config: Config, context: Context) -> Trainer:
    """The trainer."""
    chosen: Chosen = config.trainer
    inner: Any = kinds.module("trainer", chosen.name)
    return Distil(inner.build(chosen.options, context), config, context)


class Distil(Trainer):
    """A classifier that learns from what others predict."""

    def __init__(self, inner: Trainer, config: Config, context: Context) -> None:
        self._inner = inner
        self._config = config
        self._path = context.path(config.public)
        self._public: Array
        self._consensus: Array
        self._first: Weights = {}
        self._given: Array

    def open(self) -> None:
        """Open the model and read the public examples.

        :raises ConfigError: the file has no such array, or the model does not take it.
        """
        import numpy as np

        try:
            with np.load(self._path, allow_pickle=False) as held:
                if self._config.inputs not in held:
                    names = ", ".join(held.files)
                    raise ConfigError(
                        Problem(("inputs",), f"{self._path} has no {self._config.inputs!r}; it has {names}")
                    )
                self._public = held[self._config.inputs].astype(np.float32, copy=False)
        except (OSError, ValueError) as error:
            raise ConfigError(Problem(("public",), f"{self._path} cannot be read: {error}")) from None
        if not len(self._public):
            raise ConfigError(Problem(("public",), f"{self._path} has no examples"))
        self._inner.open()
        self._first = self._inner.weights()
        classes = self._inner.predict(self._public[:1]).shape[1]
        self._given = np.full((len(self._public), classes), 1 / classes, np.float32)
        self._consensus = self._given

    def weights(self) -> Weights:
        """``predictions`` [public examples, classes]: those that were loaded until there are some of our own."""
        return {_KEY: self._given.copy()}

    def load(self, weights: Weights) -> None:
        """The consensus."""
        fit(weights, shapes({_KEY: self._given}))
        self._given = self._consensus = weights[_KEY]

    def own(self) -> Weights:
        """The model itself."""
        return self._inner.weights()

    def keep(self, own: Weights) -> None:
        """Continue with this model."""
        self._inner.load(own or self._first)

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Learn the consensus, then the examples.

        :raises ConfigError: the plan corrects gradients.
        """
        import numpy as np

        if plan.correction:
            raise ConfigError("predictions cannot be corrected (SCAFFOLD): choose another strategy")
        if plan.epochs == 0:
            return Fitted(0, float("nan"))
        config = self._config
        soft = np.maximum(self._consensus, 0)
        soft = (soft / np.maximum(soft.sum(1, keepdims=True), 1e-12)).astype(np.float32)
        if soft.std(axis=1).max() > 1e-6:  # at first nobody knows anything
            public = replace(plan, epochs=config.epochs, batch=config.batch, rate=config.rate, proximal=0.0)
            self._inner.fit(Examples(self._public, soft), public)
        done = self._inner.fit(examples, plan)
        self._given = self._inner.predict(self._public)
        return done

    def takes(self) -> tuple[int, ...] | None:
        """As the model."""
        return self._inner.takes()

    def predict(self, x: Array) -> Array:
        """Of the device's model."""
        return self._inner.predict(x)

    def close(self) -> None:
        """Free the model."""
        self._inner.close()
