"""Make a MobileNetV2 with random weights as a .tflite file, in float or int8, without TensorFlow.

    python -m benchmarks.mobilenet FILE [--int8] [--width 1.0] [--size 96]

The blocks are those of Sandler et al., *MobileNetV2: Inverted Residuals and Linear Bottlenecks* (CVPR 2018), table 2. Random
weights alone make a graph whose answers are all alike: each layer is therefore normalised on sample images, as batch
normalisation does, by a forward pass in numpy. The same pass gives the ranges for int8, and what a runtime's
answers are compared with (``tests/test_benchmark_models.py``).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repeats and stride of the first, as in the paper."""
CLASSES = 1000
SAMPLES = 32
SEED = 11

_VERSIONS = {"conv": 3, "depthwise": 3, "add": 2, "mean": 2, "dense": 4, "softmax": 2}
"""The versions of the operators that take int8."""

Floats = NDArray[np.float32]
Kind = Literal["conv", "depthwise", "add", "mean", "dense", "softmax"]


@dataclass
class Layer:
    """One operator: tensors by number, 0 is the input.

    :param weights: conv and dense [out, h, w, in] or [out, in]; depthwise [1, h, w, channels]. None: it has none.
    :param relu: whether it ends with ReLU6.
    """

    kind: Kind
    inputs: list[int]
    output: int
    weights: Floats | None = None
    bias: Floats | None = None
    stride: int = 1
    relu: bool = False


@dataclass
class Network:
    """Layers in order; ``samples`` are what they were normalised on, ``ranges`` what each tensor holds of them."""

    size: int
    layers: list[Layer] = field(default_factory=list)
    samples: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    ranges: dict[int, tuple[float, float]] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)


def pictures(n: int, size: int, seed: int = SEED) -> NDArray[np.uint8]:
    """n images uint8 [n, size, size, 3] of soft blobs and noise, each different."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (n, 6, 6, 3))
    smooth = coarse.repeat(-(-size // 6), axis=1).repeat(-(-size // 6), axis=2)[:, :size, :size]
    return np.clip(smooth + draw.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def build(size: int = 96, width: float = 1.0, seed: int = SEED) -> Network:
    """The network, its layers normalised; takes a second or two."""
    draw = np.random.default_rng(seed)
    network = Network(size, samples=pictures(SAMPLES, size, seed).astype(np.float32) / np.float32(255))
    numbers = count(1)
    values: dict[int, Floats] = {0: network.samples}

    def add(kind: Kind, inputs: list[int], weights: Floats | None = None, **options: Any) -> int:
        layer = Layer(kind, inputs, next(numbers), weights, **options)
        if weights is not None:
            outputs = weights.shape[3] if kind == "depthwise" else weights.shape[0]
            layer.bias = np.zeros(outputs, np.float32)
            _normalise(layer, values)
        network.layers.append(layer)
        values[layer.output] = forward(layer, values)
        return layer.output

    def conv(at: int, out: int, kernel: int = 1, **options: Any) -> int:
        shape = (out, kernel, kernel, values[at].shape[-1])
        return add("conv", [at], draw.normal(size=shape).astype(np.float32), **options)

    at = conv(0, _channels(32 * width), 3, stride=2, relu=True)
    for expansion, channels, repeats, stride in BLOCKS:
        for i in range(repeats):
            begin, out = at, _channels(channels * width)
            inner = values[begin].shape[-1] * expansion
            at = conv(begin, inner, relu=True) if expansion > 1 else begin
            taps = draw.normal(size=(1, 3, 3, inner)).astype(np.float32)
            at = add("depthwise", [at], taps, stride=stride if i == 0 else 1, relu=True)
            at = conv(at, out)
            if i:
                at = add("add", [begin, at])
    at = conv(at, _channels(1280 * max(width, 1.0)), relu=True)
    at = add("mean", [at])
    at = add("dense", [at], draw.normal(size=(CLASSES, values[at].shape[-1])).astype(np.float32))
    add("softmax", [at])
    network.ranges = {n: (float(v.min()), float(v.max())) for n, v in values.items()}
    network.shapes = {n: v.shape[1:] for n, v in values.items()}
    return network


def _channels(wanted: float) -> int:
    """The paper's rounding: to a multiple of eight, not more than a tenth below."""
    made = max(8, int(wanted + 4) // 8 * 8)
    return made + 8 if made < 0.9 * wanted else made


def _normalise(layer: Layer, values: dict[int, Floats]) -> None:
    """Scale a layer so that each of its outputs has mean 0 and deviation 1 (dense: 3, that classes stand out)."""
    assert layer.weights is not None  # noqa: S101 - only such are given
    relu, layer.relu = layer.relu, False
    raw = forward(layer, values)
    layer.relu = relu
    axes = tuple(range(raw.ndim - 1))
    factor = (3.0 if layer.kind == "dense" else 1.0) / (raw.std(axis=axes) + 1e-3)
    layer.bias = (-raw.mean(axis=axes) * factor).astype(np.float32)
    each = factor if layer.kind == "depthwise" else factor.reshape(-1, *(1,) * (layer.weights.ndim - 1))
    layer.weights = (layer.weights * each).astype(np.float32)


def run(network: Network, images: Floats) -> Floats:
    """Probabilities float32 [n, classes] of float images [n, size, size, 3] in 0..1; the reference, slow."""
    values: dict[int, Floats] = {0: images}
    for layer in network.layers:
        values[layer.output] = forward(layer, values)
    return values[network.layers[-1].output]


def forward(layer: Layer, values: dict[int, Floats]) -> Floats:
    """One layer in numpy, TFLite's padding ``SAME``."""
    x = values[layer.inputs[0]]
    out: Any
    match layer.kind:
        case "add":
            return x + values[layer.inputs[1]]
        case "mean":
            return np.asarray(x.mean(axis=(1, 2)), np.float32)
        case "softmax":
            powers = np.exp(x - x.max(axis=1, keepdims=True))
            return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)
    assert layer.weights is not None  # noqa: S101 - all others have some
    if layer.kind == "dense":
        out = x @ layer.weights.T
    else:
        kernel, stride = layer.weights.shape[1], layer.stride
        side = -(-x.shape[1] // stride)
        total = max((side - 1) * stride + kernel - x.shape[1], 0)
        x = np.pad(x, ((0, 0), (total // 2, total - total // 2), (total // 2, total - total // 2), (0, 0)))
        out = 0
        for i in range(kernel):
            for j in range(kernel):
                part = x[:, i : i + (side - 1) * stride + 1 : stride, j : j + (side - 1) * stride + 1 : stride]
                taps = layer.weights[:, i, j]
                out = out + (part * taps[0] if layer.kind == "depthwise" else part @ taps.T)
    out = out + layer.bias
    return np.asarray(np.clip(out, 0, 6) if layer.relu else out, np.float32)


class _Writer:
    """A network as a flatbuffer, by the classes that LiteRT generates from its schema."""

    def __init__(self, network: Network, quantised: bool) -> None:
        self.tfl: Any = import_module("ai_edge_litert.schema_py_generated")
        self.network = network
        self.quantised = quantised
        self.buffers: list[Any] = [self.tfl.BufferT()]
        self.codes: list[Any] = []
        self.tensors: list[Any] = []
        self.at: dict[int, int] = {}

    def write(self) -> bytes:
        """The file."""
        tfl, network = self.tfl, self.network
        graph = tfl.SubGraphT()
        for number in range(len(network.layers) + 1):
            self.at[number] = self._activation(number)
        graph.operators = [self._operator(layer) for layer in network.layers]
        graph.tensors = self.tensors
        graph.inputs, graph.outputs = [self.at[0]], [self.at[network.layers[-1].output]]
        model = tfl.ModelT()
        model.version, model.description = 3, "MobileNetV2 with random weights"
        model.subgraphs, model.buffers, model.operatorCodes = [graph], self.buffers, self.codes
        builder = import_module("flatbuffers").Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _tensor(self, name: str, shape: tuple[int, ...], kind: str, data: Any = None, signature: Any = None) -> int:
        tensor = self.tfl.TensorT()
        tensor.name, tensor.shape, tensor.type = name, list(shape), getattr(self.tfl.TensorType, kind)
        tensor.shapeSignature = signature
        if data is not None:
            buffer = self.tfl.BufferT()
            buffer.data = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _scaled(self, tensor: int, scale: Any, zero: Any, axis: int = 0) -> None:
        made = self.tfl.QuantizationParametersT()
        made.scale = np.atleast_1d(np.asarray(scale, np.float32))
        made.zeroPoint = np.atleast_1d(np.asarray(zero, np.int64))
        made.quantizedDimension = axis
        self.tensors[tensor].quantization = made

    def _scale(self, number: int) -> tuple[float, int]:
        """Scale and zero point of an activation."""
        if number == 0:
            return 1 / 255, -128
        layer = self.network.layers[number - 1]
        if layer.kind == "softmax":  # TFLite wants these
            return 1 / 256, -128
        low, high = self.network.ranges[number]
        low, high = min(low, 0.0), max(high, 1e-3)
        scale = (high - low) / 255
        return scale, int(np.clip(round(-128 - low / scale), -128, 127))

    def _activation(self, number: int) -> int:
        shape = self.network.shapes[number]
        made = self._tensor(f"t{number}", (1, *shape), "INT8" if self.quantised else "FLOAT32", None, [-1, *shape])
        if self.quantised:
            self._scaled(made, *self._scale(number))
        return made

    def _weights(self, layer: Layer) -> list[int]:
        """Tensors of weights and bias."""
        weights, bias = layer.weights, layer.bias
        assert weights is not None  # noqa: S101 - the caller looked
        assert bias is not None  # noqa: S101 - weights have one
        name = f"t{layer.output}"
        if not self.quantised:
            return [
                self._tensor(f"{name}/weights", weights.shape, "FLOAT32", weights),
                self._tensor(f"{name}/bias", bias.shape, "FLOAT32", bias),
            ]
        axis = 3 if layer.kind == "depthwise" else 0
        others = tuple(i for i in range(weights.ndim) if i != axis)
        scales = np.maximum(np.abs(weights).max(axis=others), 1e-9) / 127
        if layer.kind == "dense":  # one scale for all
            scales = scales.max(keepdims=True)
        spread = scales if axis == 3 else scales.reshape(-1, *(1,) * (weights.ndim - 1))
        stored = self._tensor(f"{name}/weights", weights.shape, "INT8", np.rint(weights / spread).astype(np.int8))
        self._scaled(stored, scales, np.zeros(len(scales)), axis)
        steps = self._scale(layer.inputs[0])[0] * scales
        added = self._tensor(f"{name}/bias", bias.shape, "INT32", np.rint(bias / steps).astype(np.int32))
        self._scaled(added, steps, np.zeros(len(steps)))
        return [stored, added]

    def _operator(self, layer: Layer) -> Any:
        tfl = self.tfl
        relu = tfl.ActivationFunctionType.RELU6 if layer.relu else tfl.ActivationFunctionType.NONE
        names = {"conv": "CONV_2D", "depthwise": "DEPTHWISE_CONV_2D", "dense": "FULLY_CONNECTED"}
        kind = names.get(layer.kind, layer.kind.upper())
        kinds = {"conv": "Conv2D", "depthwise": "DepthwiseConv2D", "dense": "FullyConnected", "mean": "Reducer"}
        options = kinds.get(layer.kind, layer.kind.capitalize()) + "Options"
        made = getattr(tfl, f"{options}T")()
        inputs = [self.at[n] for n in layer.inputs]
        match layer.kind:
            case "conv" | "depthwise":
                made.padding, made.fusedActivationFunction = tfl.Padding.SAME, relu
                made.strideW = made.strideH = layer.stride
                made.dilationWFactor = made.dilationHFactor = 1
                if layer.kind == "depthwise":
                    made.depthMultiplier = 1
            case "mean":
                made.keepDims = False
                inputs.append(self._tensor(f"t{layer.output}/axes", (2,), "INT32", np.array([1, 2], np.int32)))
            case "softmax":
                made.beta = 1.0
        if layer.weights is not None:
            inputs += self._weights(layer)
        operator = tfl.OperatorT()
        operator.opcodeIndex = self._code(getattr(tfl.BuiltinOperator, kind), _VERSIONS[layer.kind])
        operator.inputs, operator.outputs = inputs, [self.at[layer.output]]
        operator.builtinOptionsType = getattr(tfl.BuiltinOptions, options)
        operator.builtinOptions = made
        return operator

    def _code(self, builtin: int, version: int) -> int:
        for i, code in enumerate(self.codes):
            if code.builtinCode == builtin:
                return i
        code = self.tfl.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        code.version = version
        self.codes.append(code)
        return len(self.codes) - 1


def tflite(network: Network, *, quantised: bool) -> bytes:
    """The network as a .tflite file with a free batch: float32 in 0..1, or int8 (value · 255 - 128) in and out.

    :raises ImportError: LiteRT is not installed.
    """
    return _Writer(network, quantised).write()


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--int8", action="store_true", help="quantised, inputs and outputs too")
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of all channels")
    parser.add_argument("--size", type=int, default=96, help="height and width of an image")
    options = parser.parse_args()
    content = tflite(build(options.size, options.width), quantised=options.int8)
    options.path.write_bytes(content)
    print(f"{options.path}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
