"""A classifier of scikit-learn by its ``partial_fit``: ``{sklearn: {model: mlp, inputs: 64, classes: 10}}``.

``sgd``: SGDClassifier, logistic regression, one class against the others. It makes a step for every row, at the plan's rate, so
the plan's batch means nothing to it; momentum is refused. ``mlp``: MLPClassifier, steps and momentum as in the trainer ``mlp``.
Neither can do a proximal term or a correction. Both have L2 regularisation (``alpha``); the loss of ``mlp`` includes it, that of
``sgd`` is the cross-entropy after the last epoch.

The arrays are ``coef`` and ``intercept``; of ``mlp`` ``coef1``, ``intercept1``, …; float32 outside, whatever is within.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from nodes.federated.weights import Shape, Weights, fit, shapes
from nodes.operator import Context
from nodes.options import Options
from nodes.trainers import _data
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from schemas.errors import MissingError
from schemas.messages import Array

EXTRA = "sklearn"


class Config(Options):
    """The classifier."""

    model: Literal["sgd", "mlp"] = Field(
        "sgd", description="sgd: SGDClassifier (linear); mlp: MLPClassifier (a network)."
    )
    inputs: int = Field(description="Numbers of an example.", ge=1)
    classes: int = Field(description="How many classes there are: 0 to classes - 1.", ge=2)
    hidden: list[int] = Field([], description="Of mlp: sizes of the hidden layers, e.g. [32].")
    activation: Literal["relu", "tanh", "logistic"] = Field("relu", description="Of the hidden layers.")
    alpha: float = Field(0.0001, description="Strength of the L2 regularisation.", ge=0)
    seed: int = Field(0, description="Of the initial weights of mlp; both sides of a job must have the same.", ge=0)

    @model_validator(mode="after")
    def _layers(self) -> Config:
        if self.model == "mlp" and (not self.hidden or min(self.hidden) < 1):
            raise ValueError("hidden: mlp has hidden layers, e.g. [32]")
        if self.model == "sgd" and self.hidden:
            raise ValueError("hidden: sgd has no hidden layers; take model: mlp")
        return self


def build(config: Config, context: Context) -> Trainer:
    """The trainer."""
    return Sklearn(config)


class Sklearn(Trainer):
    """The classifier; see the module."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._model: Any = None
        self.shapes: tuple[Shape, ...] = ()

    def open(self) -> None:
        """Make the classifier: zeros for ``sgd``; Glorot's scale (He's for relu) for ``mlp``."""
        config = self._config
        self._model = self._made(Fit())
        drawn = np.random.default_rng(config.seed)
        gain = 2.0 if config.activation == "relu" else 1.0
        for array in self._arrays().values():
            if config.model == "mlp" and array.ndim == 2:
                array[:] = drawn.standard_normal(array.shape) * np.sqrt(gain / len(array))
            else:
                array[:] = 0
        self.shapes = shapes(self.weights())

    def _made(self, plan: Fit) -> Any:
        """A classifier for one plan. It knows its form only after it saw a row."""
        try:
            linear, network = import_module("sklearn.linear_model"), import_module("sklearn.neural_network")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("sklearn"):
                raise
            raise MissingError("scikit-learn", extra=EXTRA) from error
        config = self._config
        made: Any
        if config.model == "sgd":
            made = linear.SGDClassifier(
                loss="log_loss", alpha=config.alpha, learning_rate="constant", eta0=plan.rate, shuffle=False
            )
        else:
            made = network.MLPClassifier(
                tuple(config.hidden),
                activation=config.activation,
                solver="sgd",
                alpha=config.alpha,
                batch_size=plan.batch,
                learning_rate_init=plan.rate,
                momentum=plan.momentum,
                nesterovs_momentum=False,
                shuffle=False,
                random_state=0,
            )
        if config.model == "mlp":
            made.set_params(batch_size=1)
        made.partial_fit(np.zeros((1, config.inputs), np.float32), [0], classes=np.arange(config.classes))
        made.__dict__.pop("_optimizer", None)  # it remembers that row as its momentum; the next call makes another
        return made

    def _arrays(self) -> Weights:
        """The classifier's own arrays."""
        model = self._model
        if self._config.model == "sgd":
            return {"coef": model.coef_, "intercept": model.intercept_}
        out: Weights = {}
        for n, (coef, intercept) in enumerate(zip(model.coefs_, model.intercepts_, strict=True), 1):
            out[f"coef{n}"], out[f"intercept{n}"] = coef, intercept
        return out

    def weights(self) -> Weights:
        """A copy, float32."""
        return {name: np.array(array, np.float32, order="C") for name, array in self._arrays().items()}

    def load(self, weights: Weights) -> None:
        """Continue from these."""
        fit(weights, self.shapes)
        for name, array in self._arrays().items():
            array[:] = weights[name]

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Train in place; momentum begins anew in every call.

        :raises ConfigError: a proximal term, a correction, or (sgd) a momentum.
        """
        config = self._config
        _data.checked(plan, self.shapes)
        _data.unable(f"sklearn (model: {config.model})", plan, momentum=config.model == "mlp")
        _data.alike(examples)
        x, y = _data.table(examples.x, config.inputs), _data.classes(examples.y, config.classes)
        n, loss = len(x), float("nan")
        if not n or not plan.epochs:
            return Fitted(0, loss)
        before = self._arrays()
        self._model = self._made(plan)
        for name, array in self._arrays().items():
            array[:] = before[name]
        if config.model == "mlp":
            self._model.set_params(batch_size=min(plan.batch, n))
        with np.errstate(all="ignore"):
            for order in _data.orders(plan, n):
                self._model.partial_fit(x[order], y[order])
        if config.model == "mlp":
            return Fitted(plan.epochs * -(-n // plan.batch), float(self._model.loss_))
        return Fitted(plan.epochs * n, self.evaluate(examples)["loss"])

    def takes(self) -> tuple[int, ...]:
        """A row of numbers."""
        return (self._config.inputs,)

    def predict(self, x: Array) -> Array:
        """Probabilities."""
        table = _data.table(x, self._config.inputs)
        if not len(table):
            return np.zeros((0, self._config.classes), np.float32)
        return np.asarray(self._model.predict_proba(table), np.float32)

    def close(self) -> None:
        """Let the classifier go."""
        self._model = None
