"""ExecuTorch models (.pte), the successor of PyTorch Mobile, by its runtime for Python.

The runtime's distribution brings PyTorch; where that is too much, export the model to ONNX or TFLite.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nodes.backends._backend import Backend, Scaling, Signature, Spec, given, items, line
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import ConfigError, MissingError, RunError
from schemas.messages import Array

EXTRA = "executorch"
SUFFIXES = (".pte",)
_MARK = b"ET"
"""At byte 4, with two digits of a version: flatbuffers' file identifier."""
_TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
"""``ScalarType`` → numpy's name."""


class Config(Options):
    """How ExecuTorch runs the model. The accelerator was chosen when the file was made."""

    method: str = Field("forward", description="Which of the program's methods.", min_length=1)


def inspect(model: Path) -> Signature | None:
    """It only says whether it is such a file."""
    with model.open("rb") as file:
        head = file.read(8)
    if head[4:6] != _MARK:
        raise ConfigError("not a program of ExecuTorch: it lacks the mark ET at byte 4")
    return None


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend for ``model``."""
    return ExecuTorch(config, model)


class ExecuTorch(Backend):
    """A program's method. Shapes are fixed in the file; the runtime has its own threads, and holds Python's lock."""

    def __init__(self, config: Config, model: Path) -> None:
        self._config = config
        self._model = model
        self._torch: Any = None
        self._method: Any = None
        self._shapes: list[tuple[int, ...]] = []
        self._signature: Signature

    def open(self) -> Signature:
        """Load the method."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it says to its own developers while it is imported
                torch, runtime = import_module("torch"), import_module("executorch.runtime")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in {"executorch", "torch"}:
                raise
            raise MissingError("ExecuTorch (executorch)", extra=EXTRA) from error
        self._torch = torch
        try:
            program = runtime.Runtime.get().load_program(str(self._model))
            if self._config.method not in program.method_names:
                raise ConfigError(
                    f"{self._model.name} has no method {self._config.method!r}; it has {', '.join(program.method_names)}"
                )
            self._method = program.load_method(self._config.method)
        except RuntimeError as error:
            raise ConfigError(f"ExecuTorch refuses {self._model.name}: {line(error)}") from error
        meta = self._method.metadata
        inputs = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        outputs = [meta.output_tensor_meta(i) for i in range(meta.num_outputs())]
        self._shapes = [tuple(info.sizes()) for info in inputs]
        batch = self._shapes[0][0] if len(self._shapes[0]) > 1 else 1
        self._signature = Signature(
            tuple(_spec(f"input_{i}", info, batch) for i, info in enumerate(inputs)),
            tuple(_spec(f"output_{i}", info, batch) for i, info in enumerate(outputs)),
            batch,
        )
        return self._signature

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """One call of the method."""
        n = len(inputs[self._signature.inputs[0].name])
        tensors = []
        for spec, shape in zip(self._signature.inputs, self._shapes, strict=True):
            # Flat first, and a copy: strides of axes of length 1 are then those that the runtime insists on, the memory is ours.
            value = np.array(given(inputs[spec.name], spec, scaling)).reshape(-1)
            tensors.append(self._torch.from_numpy(value).view(shape))
        try:
            made = self._method.execute(tensors)
            answers = [value.clone().numpy() for value in made]
        except RuntimeError as error:
            raise RunError(f"ExecuTorch failed on {self._model.name}: {line(error)}") from error
        specs = zip(self._signature.outputs, answers, strict=True)
        return {spec.name: items(spec.name, answer, n, self._model.name) for spec, answer in specs}

    def close(self) -> None:
        """Let the method go."""
        self._method = None


def _spec(name: str, info: Any, batch: int) -> Spec:
    shape, code = tuple(info.sizes()), int(info.dtype())
    if code not in _TYPES:
        raise ConfigError(f"the model's tensor {name!r} has a type ({code}) that infer cannot pass")
    return Spec(name, shape[1:] if len(shape) > 1 and shape[0] == batch else shape, _TYPES[code])
