"""OpenVINO's models (.xml with its .bin), and .onnx, on Intel's CPUs, graphics and NPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from pydantic import Field

from nodes.backends import _backend, onnx
from nodes.backends._backend import Backend, Scaling, Signature, Tensor, given, items, line, ranked
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import ConfigError, MissingError, RunError
from schemas.messages import Array

EXTRA = "openvino"
SUFFIXES = (".xml",)
_ALSO = ".onnx"
_TYPES = {
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "bool": "bool",
    "boolean": "bool",
    **{f"{sign}{bits}": f"{name}{bits}" for sign, name in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)},
}
"""OpenVINO's name of an element type → numpy's."""


class Config(Options):
    """How OpenVINO runs the model."""

    device: str = Field("CPU", description="What computes: CPU, GPU, NPU, or AUTO:GPU,CPU and the like.", min_length=1)
    precision: str = Field(
        "f32",
        description="Precision that the device may compute in: f32, or f16 or bf16, which are faster on some and less exact.",
        pattern="^(f32|f16|bf16)$",
    )
    options: dict[str, str] = Field({}, description="Properties of the device as OpenVINO calls them, e.g. CACHE_DIR.")


def inspect(model: Path) -> Signature:
    """Inputs and outputs as the file says."""
    if model.suffix == _ALSO:
        return onnx.inspect(model)
    if not model.with_suffix(".bin").is_file():
        raise ConfigError(f"{model.with_suffix('.bin').name} is missing beside it: it has the model's weights")
    try:
        net = ElementTree.parse(model).getroot()  # noqa: S314 - expat refuses entities that grow without bound
        if net.tag != "net":
            raise ConfigError("not a model of OpenVINO: its first element is not <net>")
        layers = {layer.get("id", ""): layer for layer in net.iterfind("layers/layer")}
        sources = {
            e.get("to-layer", ""): (e.get("from-layer", ""), e.get("from-port", "")) for e in net.iterfind("edges/edge")
        }
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        for layer in layers.values():
            match layer.get("type"):
                case "Parameter":
                    inputs.append(_port(layer, layer.find("output/port")))
                case "Result":
                    there, port = sources[layer.get("id", "")]
                    source = layers[there]
                    outputs.append(_port(source, source.find(f"output/port[@id='{int(port)}']")))
    except (ElementTree.ParseError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"not a model of OpenVINO, or a damaged one ({line(error)})") from None
    return _backend.signature(inputs, outputs)


def _port(layer: ElementTree.Element, port: ElementTree.Element | None) -> Tensor:
    """Name, element type and axes (-1: open) of what a layer gives."""
    if port is None:
        raise KeyError(f"layer {layer.get('name')} has no such output")
    names = port.get("names", "")
    kind = port.get("precision", "").lower().replace("fp", "f")
    # names are separated by commas, a comma within one is escaped
    name = names.replace("\\,", "\0").partition(",")[0].replace("\0", ",") or layer.get("name", "")
    if kind not in _TYPES:
        raise ConfigError(f"the model's tensor {name!r} has a type ({kind}) that infer cannot pass")
    return name, _TYPES[kind], [int(axis.text or "") for axis in port.iterfind("dim")]


def parts(model: Path) -> tuple[Path, ...]:
    """The files that make the model."""
    return (model, model.with_suffix(".bin")) if model.suffix in SUFFIXES else (model,)


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend for ``model``."""
    return OpenVino(config, model, threads)


def find_runtime() -> Any:
    """The module ``openvino``.

    :raises MissingError: it is not installed, or does not work.
    """
    try:
        return import_module("openvino")
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "openvino":
            raise MissingError(f"a working openvino ({line(error)})", extra=EXTRA) from error
        raise MissingError("OpenVINO (openvino)", extra=EXTRA) from error


class OpenVino(Backend):
    """A model compiled for one device."""

    def __init__(self, config: Config, model: Path, threads: int) -> None:
        self._config = config
        self._model = model
        self._threads = threads
        self._request: Any = None
        self._signature: Signature
        self._ranks: list[int] = []

    def open(self) -> Signature:
        """Read, compile, and run once with zeros, which tells the shapes that the file leaves open."""
        runtime = find_runtime()
        core, device = runtime.Core(), self._config.device
        wanted = {part.partition(".")[0] for part in device.partition(":")[2].split(",") or [device] if part} or {
            device
        }
        there = {name.partition(".")[0] for name in core.available_devices}
        if missing := wanted - there - {"AUTO", "MULTI", "HETERO", "BATCH"}:
            names = ", ".join(core.available_devices)
            raise ConfigError(f"there is no {min(missing)} here; there is {names}")
        options = {"INFERENCE_PRECISION_HINT": self._config.precision, "PERFORMANCE_HINT": "LATENCY"}
        if device == "CPU":
            options |= {"INFERENCE_NUM_THREADS": str(self._threads), "NUM_STREAMS": "1"}
        try:
            model = core.read_model(str(self._model))
            compiled = core.compile_model(model, device, options | self._config.options)
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise ConfigError(f"OpenVINO refuses {self._model.name}: {line(error)}") from error
        self._signature = signature = inspect(self._model)
        self._ranks = [port.partial_shape.rank.get_length() for port in model.inputs]
        zeros = {s.name: np.zeros((signature.batch or 1, *s.shape), s.dtype) for s in signature.inputs}
        answers = self.infer(zeros)
        outputs = tuple(replace(spec, shape=answers[spec.name].shape[1:]) for spec in signature.outputs)
        self._signature = replace(signature, outputs=outputs)
        return self._signature

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """One request; inputs and outputs go by their order, as names may be missing."""
        n = len(inputs[self._signature.inputs[0].name])
        feed = {i: np.ascontiguousarray(value) for i, value in enumerate(self._feed(inputs, scaling))}
        try:
            made = self._request.infer(feed, share_inputs=True, share_outputs=False)
            answers = [made[i] for i in range(len(self._signature.outputs))]
        except RuntimeError as error:
            raise RunError(f"OpenVINO failed on {self._model.name}: {line(error)}") from error
        specs = zip(self._signature.outputs, answers, strict=True)
        return {spec.name: items(spec.name, answer, n, self._model.name) for spec, answer in specs}

    def _feed(self, inputs: dict[str, Array], scaling: Scaling | None) -> Iterator[Array]:
        for spec, rank in zip(self._signature.inputs, self._ranks, strict=True):
            yield ranked(given(inputs[spec.name], spec, scaling), rank)

    def close(self) -> None:
        """Let the request and its model go."""
        self._request = None
