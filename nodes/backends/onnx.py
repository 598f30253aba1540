"""ONNX models (.onnx) by ONNX Runtime: on the CPU, or by a provider such as CUDA, TensorRT (Jetson) or OpenVINO."""

from __future__ import annotations

import mmap
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nodes.backends import _onnx_file
from nodes.backends._backend import Backend, Scaling, Signature, given, items, line, ranked
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import ConfigError, MissingError, RunError
from schemas.messages import Array

EXTRA = "onnx"
SUFFIXES = (".onnx",)
_QUIET = 3
"""Of the runtime's own log: errors only. Warnings about a graph are for who makes it."""


class Config(Options):
    """How ONNX Runtime runs the model."""

    providers: list[str] = Field(
        ["CPU"],
        min_length=1,
        description="What computes, in order of preference, as the runtime calls it without ExecutionProvider: CPU, CUDA, "
        "Tensorrt, OpenVINO, CoreML, …. Operators that the first cannot do fall to the next.",
    )
    provider_options: dict[str, dict[str, str]] = Field({}, description="Options of a provider, by its name.")
    spin: bool = Field(
        False, description="Threads wait for work by spinning: a little faster at full load, a busy core at any."
    )


def inspect(model: Path) -> Signature:
    """Inputs and outputs as the file says."""
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _onnx_file.signature(data)
    except ValueError:  # mmap of an empty file
        raise ConfigError("an empty file") from None


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend for ``model``."""
    return Onnx(config, model, threads)


def find_runtime() -> Any:
    """The module ``onnxruntime``, of whichever distribution.

    :raises MissingError: none is installed.
    """
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "onnxruntime":
            raise MissingError(f"a working onnxruntime ({error})", extra=EXTRA) from error
        raise MissingError("ONNX Runtime (onnxruntime)", extra=EXTRA) from error


class Onnx(Backend):
    """A model in a session of ONNX Runtime."""

    def __init__(self, config: Config, model: Path, threads: int) -> None:
        self._config = config
        self._model = model
        self._threads = threads
        self._session: Any = None
        self._signature: Signature
        self._outputs: list[str] = []
        self._ranks: dict[str, int] = {}

    def open(self) -> Signature:
        """Load, and run once with zeros, which tells the shapes that the file leaves open."""
        runtime = find_runtime()
        signature = inspect(self._model)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = _QUIET
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self._config.spin)))
        providers = self._providers(runtime)
        try:
            self._session = runtime.InferenceSession(str(self._model), options, providers=providers)
        except Exception as error:  # its exceptions have no base of their own
            raise ConfigError(f"ONNX Runtime refuses {self._model.name}: {line(error)}") from error
        if (first := providers[0][0]) not in self._session.get_providers():
            raise ConfigError(f"the provider {first} does not start on this machine")  # the runtime goes on without it
        self._signature = signature
        self._outputs = [spec.name for spec in signature.outputs]
        self._ranks = {value.name: len(value.shape) for value in self._session.get_inputs()}
        zeros = {s.name: np.zeros((signature.batch or 1, *s.shape), s.dtype) for s in signature.inputs}
        answers = self.infer(zeros)
        outputs = tuple(replace(spec, shape=answers[spec.name].shape[1:]) for spec in signature.outputs)
        self._signature = replace(signature, outputs=outputs)
        return self._signature

    def _providers(self, runtime: Any) -> list[tuple[str, dict[str, str]]]:
        """As the runtime takes them.

        :raises ConfigError: this build of the runtime has no such provider.
        """
        there = runtime.get_available_providers()
        known = {name.removesuffix("ExecutionProvider").lower(): name for name in there}
        chosen = []
        for name in self._config.providers:
            if (full := known.get(name.removesuffix("ExecutionProvider").lower())) is None:
                names = ", ".join(name.removesuffix("ExecutionProvider") for name in there)
                raise ConfigError(f"this onnxruntime has no provider {name!r}; it has {names}")
            chosen.append((full, self._config.provider_options.get(name, {})))
        return chosen

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """One run of the session."""
        signature = self._signature
        n = len(inputs[signature.inputs[0].name])
        feed = {s.name: ranked(given(inputs[s.name], s, scaling), self._ranks[s.name]) for s in signature.inputs}
        try:
            made = self._session.run(self._outputs, feed)
        except Exception as error:
            raise RunError(f"ONNX Runtime failed on {self._model.name}: {line(error)}") from error
        return {
            name: items(name, answer, n, self._model.name) for name, answer in zip(self._outputs, made, strict=True)
        }

    def close(self) -> None:
        """Let the session go."""
        self._session = None
