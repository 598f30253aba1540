"""The demo's digits model in the formats of other runtimes, from the same weights: every file answers alike.

    pip install ai-edge-litert onnx openvino torch==2.13.0 executorch
    python examples/digits/make_formats.py --out DIR

Each format is written whose library is installed; what is missing is said. The weights are those of ``digits-float.tflite``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEMO = Path(__file__).resolve().parents[2] / "nodes" / "demo"
Floats = NDArray[np.float32]

LAYERS = (
    ("conv1", "sequential_1/conv2d_1/convolution", (24, 3, 3, 1)),
    ("conv2", "sequential_1/conv2d_1_2/convolution", (32, 3, 3, 24)),
    ("conv3", "sequential_1/conv2d_2_1/convolution", (48, 3, 3, 32)),
    ("dense1", "sequential_1/dense_1/MatMul", (64, 192)),
    ("dense2", "sequential_1/dense_1_2/MatMul", (10, 64)),
)
"""Layer, its weights' tensor in the file, and their shape: convolutions [out, height, width, in], dense ones [out, in]."""


def weights(model: Path) -> dict[str, tuple[Floats, Floats]]:
    """Layer → weights and bias, of the demo's float model."""
    runner = import_module("ai_edge_litert.interpreter").Interpreter(str(model))
    runner.allocate_tensors()
    found = {detail["name"]: detail["index"] for detail in runner.get_tensor_details()}
    operators = runner._get_ops_details()
    out = {}
    for layer, name, shape in LAYERS:
        array = runner.get_tensor(found[name])
        if array.shape != shape:
            raise SystemExit(f"{model.name}: {name} is {array.shape}, expected {shape}: another network than expected")
        bias = next(op["inputs"][2] for op in operators if len(op["inputs"]) == 3 and op["inputs"][1] == found[name])
        out[layer] = (array.copy(), runner.get_tensor(bias).copy())
    return out


def onnx_model(layers: dict[str, tuple[Floats, Floats]], batch: int | str = "n") -> Any:
    """``image`` float32 [n, 8, 8, 1] → ``probabilities`` float32 [n, 10]; operators of opset 17."""
    onnx = import_module("onnx")
    make, numpy_helper, real = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    nodes, constants = [make.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2])], []
    at = "x"
    for name in ("conv1", "conv2", "conv3"):
        w, b = layers[name]
        constants += [
            numpy_helper.from_array(w.transpose(0, 3, 1, 2).copy(), f"{name}_w"),
            numpy_helper.from_array(b, f"{name}_b"),
        ]
        pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        nodes += [
            make.make_node("Conv", [at, f"{name}_w", f"{name}_b"], [name], **pads),
            make.make_node("Relu", [name], [f"{name}_relu"]),
        ]
        at = f"{name}_relu"
        if name != "conv1":
            nodes.append(make.make_node("MaxPool", [at], [f"{name}_pool"], kernel_shape=[2, 2], strides=[2, 2]))
            at = f"{name}_pool"
    nodes += [  # the network was trained with the channels last
        make.make_node("Transpose", [at], ["last"], perm=[0, 2, 3, 1]),
        make.make_node("Flatten", ["last"], ["flat"], axis=1),
    ]
    at = "flat"
    for name in ("dense1", "dense2"):
        w, b = layers[name]
        constants += [numpy_helper.from_array(w, f"{name}_w"), numpy_helper.from_array(b, f"{name}_b")]
        nodes.append(make.make_node("Gemm", [at, f"{name}_w", f"{name}_b"], [name], transB=1))
        at = name
        if name == "dense1":
            nodes.append(make.make_node("Relu", [name], [f"{name}_relu"]))
            at = f"{name}_relu"
    nodes.append(make.make_node("Softmax", [at], ["probabilities"], axis=1))
    graph = make.make_graph(
        nodes,
        "digits",
        [make.make_tensor_value_info("image", real, [batch, 8, 8, 1])],
        [make.make_tensor_value_info("probabilities", real, [batch, 10])],
        constants,
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8, producer_name="digits")
    onnx.checker.check_model(model)
    return model


def torch_model(layers: dict[str, tuple[Floats, Floats]]) -> Any:
    """The same as a ``torch.nn.Module``."""
    torch = import_module("torch")
    nn = torch.nn

    class Last(nn.Module):  # type: ignore[misc, name-defined]
        """Channels to the end, and flat."""

        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], 192)

    class First(nn.Module):  # type: ignore[misc, name-defined]
        """Channels from the end."""

        def forward(self, x: Any) -> Any:
            return x.reshape(x.shape[0], 1, 8, 8)  # one channel: the same numbers in the same order

    conv = {name: nn.Conv2d(w.shape[3], w.shape[0], 3, padding=1) for name, (w, _) in layers.items() if w.ndim == 4}
    dense = {name: nn.Linear(w.shape[1], w.shape[0]) for name, (w, _) in layers.items() if w.ndim == 2}
    with torch.no_grad():
        for name, layer in {**conv, **dense}.items():
            w, b = layers[name]
            layer.weight.copy_(torch.from_numpy(w.transpose(0, 3, 1, 2).copy() if w.ndim == 4 else w))
            layer.bias.copy_(torch.from_numpy(b))
    relu = nn.ReLU
    return nn.Sequential(
        First(),
        *(conv["conv1"], relu(), conv["conv2"], relu(), nn.MaxPool2d(2), conv["conv3"], relu(), nn.MaxPool2d(2)),
        *(Last(), dense["dense1"], relu(), dense["dense2"], nn.Softmax(1)),
    ).eval()


def write_onnx(layers: dict[str, tuple[Floats, Floats]], out: Path) -> Path:
    """``digits.onnx``."""
    path = out / "digits.onnx"
    path.write_bytes(onnx_model(layers).SerializeToString())
    return path


def write_openvino(layers: dict[str, tuple[Floats, Floats]], out: Path) -> Path:
    """``digits.xml`` and ``digits.bin``: OpenVINO's intermediate representation."""
    openvino = import_module("openvino")
    core = openvino.Core()
    path = out / "digits.xml"
    openvino.save_model(core.read_model(onnx_model(layers).SerializeToString()), str(path), compress_to_fp16=False)
    return path


def write_torchscript(layers: dict[str, tuple[Floats, Floats]], out: Path) -> Path:
    """``digits.pt``: TorchScript."""
    torch = import_module("torch")
    path = out / "digits.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch recommends newer formats; what is deployed are such files
        torch.jit.trace(torch_model(layers), torch.zeros(2, 8, 8, 1)).save(str(path))
    return path


def write_executorch(layers: dict[str, tuple[Floats, Floats]], out: Path) -> Path:
    """``digits.pte``: ExecuTorch with XNNPACK; one image in a call."""
    path = out / "digits.pte"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says to its own developers
        torch = import_module("torch")
        lower = import_module("executorch.exir").to_edge_transform_and_lower
        xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner
        exported = torch.export.export(torch_model(layers), (torch.zeros(1, 8, 8, 1),))
        path.write_bytes(lower(exported, partitioner=[xnnpack()]).to_executorch().buffer)
    return path


WRITERS: dict[str, Callable[[dict[str, tuple[Floats, Floats]], Path], Path]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torchscript": write_torchscript,
    "executorch": write_executorch,
}


def main() -> None:
    """Write what can be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("formats", nargs="*", help=f"which ones; all of {', '.join(WRITERS)} if left out")
    options = parser.parse_args()
    if unknown := set(options.formats) - set(WRITERS):
        parser.error(f"unknown format {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    layers = weights(DEMO / "digits-float.tflite")
    for name in options.formats or WRITERS:
        try:
            path = WRITERS[name](layers, options.out)
        except ModuleNotFoundError as error:
            print(f"{name}: not written, {error.name} is not installed")
            continue
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
