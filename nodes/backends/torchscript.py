"""TorchScript models (.pt) by PyTorch. The file does not say what it takes: ``{torchscript: {inputs: {image: [8, 8, 1]}}}``.

Install PyTorch itself, in the build that suits the machine: ``pip install torch``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from nodes.backends._backend import Backend, Scaling, Signature, Spec, given, items, line
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import ConfigError, MissingError, RunError
from schemas.messages import Array

SUFFIXES = (".pt",)


class Config(Options):
    """What the model takes, and where it runs."""

    inputs: dict[str, list[int]] = Field(
        min_length=1,
        description="Arguments of the model's forward, in their order: a name of your choice, and the shape of one item.",
    )
    type: Literal["float32", "float16", "float64", "uint8", "int8", "int32", "int64"] = Field(
        "float32", description="Type of the inputs' numbers."
    )
    batch: int | None = Field(None, description="Items that one call takes; any number if left out.", ge=1)
    device: str = Field("cpu", description="Where it runs, as PyTorch calls it: cpu, cuda, cuda:1, mps, ….")


def inspect(model: Path) -> Signature | None:
    """It only says whether it is such a file: a zip archive with code in it."""
    import zipfile

    try:
        with zipfile.ZipFile(model) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return None
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"not a TorchScript model: {line(error)}") from None
    raise ConfigError(
        "a file of PyTorch, but not TorchScript: it has no code, only weights; save it by torch.jit.trace(…).save(…)"
    )


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend for ``model``."""
    return TorchScript(config, model, threads)


class TorchScript(Backend):
    """A model in PyTorch's own interpreter. The number of threads is that of the whole process."""

    def __init__(self, config: Config, model: Path, threads: int) -> None:
        self._config = config
        self._model = model
        self._threads = threads
        self._torch: Any = None
        self._module: Any = None
        self._inputs = tuple(Spec(name, tuple(shape), config.type) for name, shape in config.inputs.items())

    def open(self) -> Signature:
        """Load, and run once with zeros, which tells what comes out."""
        try:
            torch = import_module("torch")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingError("PyTorch (torch)") from error
        self._torch = torch
        torch.set_num_threads(self._threads)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # newer formats are recommended; this is the one deployed
                self._module = torch.jit.load(str(self._model), map_location=self._config.device).eval()
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ConfigError(f"PyTorch refuses {self._model.name}: {line(error)}") from error
        n = self._config.batch or 1
        zeros = {spec.name: np.zeros((n, *spec.shape), spec.dtype) for spec in self._inputs}
        try:
            answers = self.infer(zeros)
        except RunError as error:
            raise ConfigError(f"{error}; are 'inputs' right?") from error
        outputs = tuple(Spec(name, answer.shape[1:], answer.dtype.name) for name, answer in answers.items())
        return Signature(self._inputs, outputs, self._config.batch)

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """One call of the module."""
        torch, device = self._torch, self._config.device
        n = len(inputs[self._inputs[0].name])
        given_ = (np.ascontiguousarray(given(inputs[spec.name], spec, scaling)) for spec in self._inputs)
        try:
            with torch.inference_mode():
                # writable, as PyTorch wants its memory to be; it is not written to
                made = self._module(*(torch.from_numpy(_writable(value)).to(device) for value in given_))
                answers = {name: value.cpu().numpy() for name, value in _outputs(made)}
        except (RuntimeError, AttributeError, TypeError) as error:
            raise RunError(f"PyTorch failed on {self._model.name}: {_last(error)}") from error
        return {name: items(name, answer, n, self._model.name) for name, answer in answers.items()}

    def close(self) -> None:
        """Let the module go."""
        self._module = None


def _writable(value: Array) -> Array:
    return value if value.flags.writeable else value.copy()


def _outputs(made: Any) -> list[tuple[str, Any]]:
    """Tensors by name: a dict's own, otherwise by number."""
    if isinstance(made, Mapping):
        return list(made.items())
    several = made if isinstance(made, (tuple, list)) else (made,)
    return [(f"output_{i}", value) for i, value in enumerate(several)]


def _last(error: BaseException) -> str:
    """The last line: before it there is the interpreter's whole stack."""
    lines = [text for text in str(error).splitlines() if text.strip()]
    return " ".join(lines[-1].split())[:300] if lines else type(error).__name__
