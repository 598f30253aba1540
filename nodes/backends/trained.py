"""Weights that ``train`` and ``federate`` make (.npz), run by the trainer that they are of.

``{infer: {model: digits.npz, backend: {trained: {trainer: {mlp: {layers: [64, 32, 10]}}}}}}``. With ``job`` beside ``model`` the
file need not be there yet: until the job has made a model, the trainer's initial one answers.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nodes import kinds
from nodes.backends._backend import Backend, Scaling, Signature, Spec
from nodes.choice import Chosen, choice
from nodes.operator import Context
from nodes.options import Options
from nodes.trainers._trainer import Trainer
from schemas.errors import ConfigError, Problem
from schemas.messages import Array

SUFFIXES: tuple[str, ...] = ()
"""It is to be named: whose weights they are, no ending tells."""
FOLLOWS = True
"""``infer`` may have a ``job`` with it."""


class Config(Options):
    """Whose weights they are."""

    trainer: choice("trainer") = Field(description="The trainer with its options, as the job has it.")  # type: ignore[valid-type] # made

    def check(self, context: Context) -> None:
        chosen: Chosen = self.trainer
        with chosen.at("trainer"):
            chosen.options.check(context)


def inspect(model: Path) -> Signature | None:
    """The file says nothing of inputs and outputs; only whether it is such a file is looked at."""
    if not zipfile.is_zipfile(model):
        raise ConfigError("no .npz file")
    return None


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend; ``threads`` is for trainers whose library counts them itself, which is all of them."""
    del threads
    chosen: Chosen = config.trainer
    module: Any = kinds.module("trainer", chosen.name)
    return Trained(module.build(chosen.options, context), chosen.name, model)


class Trained(Backend):
    """A trainer that only predicts."""

    def __init__(self, trainer: Trainer, name: str, path: Path) -> None:
        self._trainer = trainer
        self._name = name
        self._path = path

    def open(self) -> Signature:
        """Load the weights.

        :raises ConfigError: the file is none, or is another model's.
        """
        from nodes.federated import file
        from nodes.federated.weights import UnfitError

        self._trainer.open()
        shape = self._trainer.takes()
        if shape is None:
            raise ConfigError(Problem(("backend",), f"the trainer {self._name} does not say what it takes"))
        if self._path.exists():
            try:
                self._trainer.load(file.read(self._path))
            except UnfitError as error:
                raise ConfigError(f"{self._path.name} is another model's: {error}") from None
        answers = self._trainer.predict(np.zeros((1, *shape), np.float32))
        return Signature(
            (Spec("x", shape, "float32", flat=len(shape) == 1),), (Spec("y", answers.shape[1:], "float32"),), None
        )

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """Predict."""
        x = inputs["x"]
        return {"y": self._trainer.predict(x if scaling is None or x.dtype.kind == "f" else scaling.real(x))}

    def close(self) -> None:
        """Free the model."""
        self._trainer.close()
