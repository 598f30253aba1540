"""The best classes of one output of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from nodes.backends._backend import Spec
from nodes.decoders._decoder import Answer, Decoder, pick, size
from nodes.options import Options
from schemas.errors import ConfigError
from schemas.messages import Array

_LARGEST = 2.0**126
"""A quarter of the largest float32."""


class Config(Options):
    """How scores become classes."""

    activation: Literal["auto", "softmax", "sigmoid", "none"] = Field(
        "auto",
        description="What makes scores in 0..1 of the output. auto: nothing where a trial run answers within 0..1 already, "
        "else softmax (sigmoid for a single number).",
    )
    output: str | None = Field(None, description="Name of the output, where the model has several.")


def build(config: Config, labels: Sequence[str], top: int) -> Decoder:
    """The decoder; without ``labels`` the classes are named by their numbers."""
    return Classification(config, labels, top)


class Classification(Decoder):
    """Output [n, classes], or [n, 1]: the probability of the second of two classes."""

    def __init__(self, config: Config, labels: Sequence[str], top: int) -> None:
        self._config = config
        self._labels = list(labels)
        self._top = top
        self._activation: str = config.activation
        self._name = ""

    def check(self, outputs: Sequence[Spec]) -> None:
        """There is one output, with as many numbers as there are labels."""
        spec = pick(outputs, self._config.output, "classification")
        self._name = spec.name
        numbers = size(spec)
        if numbers is None:
            return
        if numbers == 0:
            raise ConfigError(f"the model's output {spec} has no classes")
        classes = 2 if numbers == 1 else numbers
        if self._labels and len(self._labels) != classes:
            raise ConfigError(f"{len(self._labels)} labels, but the model tells {classes} classes apart")
        if not self._labels:
            self._labels = [str(i) for i in range(classes)]

    def tune(self, trial: dict[str, Array]) -> None:
        """Find out whether the model ends with an activation."""
        if self._config.activation != "auto":
            return
        values = trial[self._name].reshape(len(trial[self._name]), -1)
        done = bool((values >= 0).all() and (values <= 1).all())
        self._activation = "none" if done else "sigmoid" if values.shape[1] == 1 else "softmax"

    def decode(self, outputs: dict[str, Array], sizes: Sequence[tuple[int, int]]) -> list[Answer]:
        """The ``top`` best classes, best first; of equal ones the lower number first."""
        values = outputs[self._name]
        scores = activated(values.reshape(len(values), -1).astype(np.float32, copy=False), self._activation)
        if scores.shape[1] == 1:
            scores = np.hstack((1 - scores, scores))
        top = min(self._top, scores.shape[1])
        order = scores.argmax(axis=1)[:, None] if top == 1 else np.argsort(-scores, axis=1, kind="stable")[:, :top]
        best = scores[np.arange(len(scores))[:, None], order]
        names = self._labels
        if top == 1:
            return [Answer([names[i]], score) for i, score in zip(order[:, 0].tolist(), best, strict=True)]
        return [Answer([names[i] for i in row], best[k]) for k, row in enumerate(order.tolist())]


def activated(values: Array, activation: str) -> Array:
    """Scores in 0..1 of ``values`` [n, classes]; ``none`` clips, for what quantisation may leave just outside."""
    if activation == "softmax":
        values = np.clip(values, -_LARGEST, _LARGEST)  # infinities have no difference
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]  # numpy: Any / Any
    if activation == "sigmoid":
        # By tanh, which neither overflows nor warns at large magnitudes.
        return 0.5 * (1 + np.tanh(0.5 * values))
    return np.minimum(np.maximum(values, 0), 1)  # np.clip takes five times as long on a few numbers
