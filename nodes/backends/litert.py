"""TensorFlow Lite models (.tflite) by LiteRT, with XNNPACK; or by tflite-runtime where only that is installed."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nodes.backends import _tflite_file
from nodes.backends._backend import Backend, Scaling, Signature
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import ConfigError, MissingError, Problem, RunError
from schemas.messages import Array

EXTRA = "litert"
SUFFIXES = (".tflite",)
RUNTIMES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
"""Modules with the class ``Interpreter``, best first."""


class Config(Options):
    """How LiteRT runs the model."""

    delegate: str | None = Field(
        None,
        description="Shared library of a delegate (an accelerator), e.g. libedgetpu.so.1: a path, or a name that the system "
        "finds. Left out: the CPU, by XNNPACK.",
    )
    delegate_options: dict[str, str] = Field({}, description="Options that the delegate takes, by name.")

    def check(self, context: Context) -> None:
        """A delegate given as a path is there."""
        if self.delegate is None:
            if self.delegate_options:
                raise ConfigError(Problem(("delegate_options",), "there is no delegate to give them to"))
        elif "/" in self.delegate and not context.path(self.delegate).is_file():
            raise ConfigError(Problem(("delegate",), f"no such file: {context.path(self.delegate)}"))


def inspect(model: Path) -> Signature:
    """Inputs and outputs as the file says."""
    try:
        # A model may be larger than a small computer wants to read twice; the parser touches a few pages of it.
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return _tflite_file.signature(view)
            finally:
                view.release()
    except ValueError:  # mmap of an empty file
        raise ConfigError("an empty file") from None


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend for ``model``."""
    delegate = config.delegate
    if delegate is not None and "/" in delegate:
        delegate = str(context.path(delegate))
    return LiteRT(model, threads, delegate, config.delegate_options)


def find_runtime() -> Any:
    """The module with ``Interpreter`` and ``load_delegate``.

    :raises MissingError: neither is installed.
    """
    for name in RUNTIMES:
        try:
            return import_module(name)
        except ImportError as error:
            # Not installed is one thing; installed and broken (numpy 2 under tflite-runtime) the user should hear of.
            if not isinstance(error, ModuleNotFoundError) or error.name not in {name, name.partition(".")[0]}:
                raise MissingError(f"a working {name.partition('.')[0]} ({error})", extra=EXTRA) from error
    raise MissingError("LiteRT (ai-edge-litert)", extra=EXTRA)


class LiteRT(Backend):
    """A model in LiteRT: one interpreter, resized when the batch size changes.

    Interpreters are not safe for two threads at once; ``infer`` gives each node its own.
    """

    def __init__(self, model: Path, threads: int, delegate: str | None, options: dict[str, str]) -> None:
        self._model = model
        self._threads = threads
        self._delegate = delegate
        self._options = options
        self._interpreter: Any = None
        self._signature: Signature
        self._ins: list[int] = []
        self._outs: list[int] = []
        self._size = 0

    def open(self) -> Signature:
        """Load, allocate, and run once with zeros, which tells the shapes that the file leaves open."""
        runtime = find_runtime()
        self._signature = inspect(self._model)
        delegates = [self._load_delegate(runtime)] if self._delegate is not None else None
        try:
            self._interpreter = runtime.Interpreter(
                str(self._model), num_threads=self._threads, experimental_delegates=delegates
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"LiteRT refuses {self._model.name}: {_line(error)}") from error
        self._ins = [int(detail["index"]) for detail in self._interpreter.get_input_details()]
        self._outs = [int(detail["index"]) for detail in self._interpreter.get_output_details()]
        n = self._signature.batch or 1
        zeros = {spec.name: np.zeros((n, *spec.shape), spec.dtype) for spec in self._signature.inputs}
        answers = self.infer(zeros)
        outputs = tuple(replace(spec, shape=answers[spec.name].shape[1:]) for spec in self._signature.outputs)
        self._signature = replace(self._signature, outputs=outputs)
        return self._signature

    def _load_delegate(self, runtime: Any) -> Any:
        # Looked at first: the runtime's own class fails noisily, and once more in its destructor.
        try:
            library = ctypes.CDLL(self._delegate)
        except OSError as error:
            raise MissingError(f"the delegate {self._delegate} ({_line(error)})") from error
        if not hasattr(library, "tflite_plugin_create_delegate"):
            raise ConfigError(f"{self._delegate} is a library, but no delegate for TensorFlow Lite")
        try:
            return runtime.load_delegate(self._delegate, self._options)
        except ValueError as error:
            raise ConfigError(f"the delegate {self._delegate} does not start: {_line(error)}") from error

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """Set, invoke, copy out."""
        interpreter, signature = self._interpreter, self._signature
        n = len(inputs[signature.inputs[0].name])
        try:
            if signature.batch is None and n != self._size:
                for index, spec in zip(self._ins, signature.inputs, strict=True):
                    interpreter.resize_tensor_input(index, (n, *spec.shape))
                interpreter.allocate_tensors()
                self._size = n
            for index, spec in zip(self._ins, signature.inputs, strict=True):
                target = interpreter.tensor(index)()
                value = inputs[spec.name].reshape(target.shape)
                if scaling is None or value.dtype.kind != "u" or spec.dtype.kind != "f":
                    target[...] = value
                elif spec.dtype == np.float32:
                    scaling.real(value, target)
                else:
                    target[...] = scaling.real(value)
                del target  # a view that is still held would make invoke refuse
            interpreter.invoke()
            answers = {}
            for index, spec in zip(self._outs, signature.outputs, strict=True):
                answer = interpreter.get_tensor(index)
                answers[spec.name] = answer if answer.ndim and len(answer) == n else answer[None]
        except (ValueError, RuntimeError) as error:
            raise RunError(f"LiteRT failed on {self._model.name}: {_line(error)}") from error
        for name, answer in answers.items():
            if len(answer) != n:
                raise RunError(f"{self._model.name}: output {name!r} has {len(answer)} items for a batch of {n}")
        return answers

    def close(self) -> None:
        """Let the interpreter go."""
        self._interpreter = None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
