"""A network of dense layers in plain numpy (.npz): what the trainer ``mlp`` made, served without any runtime.

The file has the arrays ``w1`` [inputs, outputs], ``b1`` [outputs], ``w2``, …; what it says about itself (``activation``,
``loss``, and the ``shape`` of one item, ``8,8``) is written beside them by ``nodes.federated.weights_file``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np

from nodes.backends._backend import Backend, Scaling, Signature, Spec
from nodes.federated.weights import Weights
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import ConfigError
from schemas.messages import Array

SUFFIXES = (".npz",)


class Config(Options):
    """It has no options."""


def inspect(model: Path) -> Signature:
    """Inputs and outputs as the file says."""
    return _read(model)[0]


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend for ``model``."""
    return Mlp(model)


def _read(model: Path) -> tuple[Signature, Weights, dict[str, str], list[int]]:
    from nodes.federated.weights_file import read

    weights, about = read(model.read_bytes())
    layers: list[int] = []
    for n in range(1, len(weights) // 2 + 1):
        w, b = weights.get(f"w{n}"), weights.get(f"b{n}")
        if w is None or b is None or w.ndim != 2 or b.shape != w.shape[1:] or (layers and layers[-1] != len(w)):
            break
        layers += [len(w), w.shape[1]] if not layers else [w.shape[1]]
    if len(weights) != 2 * (len(layers) - 1) or not all(array.dtype == np.float32 for array in weights.values()):
        raise ConfigError(f"its arrays ({', '.join(weights)}) are not those of dense layers, w1, b1, w2, …, in float32")
    if (activation := about.get("activation", "relu")) not in ("relu", "tanh", "sigmoid"):
        raise ConfigError(f"it has an activation {activation!r} that is not known")
    shape: tuple[int, ...] = (layers[0],)
    if "shape" in about:
        try:
            shape = tuple(int(part) for part in about["shape"].split(","))
        except ValueError:
            raise ConfigError(f"the shape {about['shape']!r} is none") from None
        if min(shape) < 1 or math.prod(shape) != layers[0]:
            raise ConfigError(f"items of shape {list(shape)} for a network of {layers[0]} inputs")
    signature = Signature((Spec("x", shape, "float32"),), (Spec("y", (layers[-1],), "float32"),), None)
    return signature, weights, about, layers


class Mlp(Backend):
    """The network; answers are probabilities, or a regression's numbers."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._network: Any = None

    def open(self) -> Signature:
        """Read the file."""
        from nodes.trainers.mlp import Activation
        from nodes.trainers.mlp import Mlp as Network

        signature, weights, about, layers = _read(self._model)
        loss = "mse" if about.get("loss") == "mse" else "cross-entropy"
        self._network = Network(layers, cast("Activation", about.get("activation", "relu")), cast("Any", loss))
        self._network.load({shape.name: weights[shape.name] for shape in self._network.shapes})
        return signature

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """Through all layers."""
        x = inputs["x"]
        if scaling is not None and x.dtype.kind == "u":
            x = scaling.real(x)
        return {"y": self._network.predict(x)}

    def close(self) -> None:
        """Let the network go."""
        self._network = None
