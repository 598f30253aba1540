"""Cut an ONNX model in two. Needs ``onnx``, whose own extractor makes the parts."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from nodes.models.cuts import Cut, crossing
from schemas.errors import ConfigError, MissingError

SUFFIX = ".onnx"


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return import_module("onnx")
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise MissingError("onnx", extra="models") from error


def _load(path: Path) -> Any:
    """The model with the shapes of its tensors, as far as they follow from each other."""
    onnx = _library()
    try:
        return onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    except Exception as error:  # noqa: BLE001 - protobuf's and the library's own have no base in common
        raise ConfigError(f"{path.name} is no ONNX model: {' '.join(str(error).split())[:200]}") from None


def cuts(path: Path) -> list[Cut]:
    """Every place where one tensor crosses.

    :raises ConfigError: it is no model.
    :raises MissingError: ``onnx`` is not installed.
    """
    return _cuts(_load(path))


def _cuts(model: Any) -> list[Cut]:
    onnx = _library()
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    operators = []
    for node in graph.node:
        if all(not name or name in constant for name in node.input):  # a constant, or computed of constants alone
            constant.update(node.output)
        else:
            operators.append(node)
    known = {value.name: value.type.tensor_type for value in [*graph.value_info, *graph.input, *graph.output]}
    inputs = [[name for name in node.input if name and name not in constant] for node in operators]
    outputs = [list(node.output) for node in operators]
    found: list[Cut] = []
    for before, name in crossing(inputs, outputs, [value.name for value in graph.output]):
        tensor = known.get(str(name))
        if tensor is None:
            continue  # of a type that cannot travel, or unknown
        axes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        found.append(Cut(len(found) + 1, str(name), tuple(axes[1:]), kind, before, len(operators) - before))
    return found


def split(path: Path, cut: Cut, head: Path, tail: Path) -> None:
    """Write the two parts.

    :raises ConfigError: they do not hold together.
    """
    onnx = _library()
    model = _load(path)
    extractor = onnx.utils.Extractor(model)
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    ins = [value.name for value in graph.input if value.name not in constant]
    outs = [value.name for value in graph.output]
    try:
        for part, given, asked in ((head, ins, [cut.tensor]), (tail, [cut.tensor], outs)):
            made = extractor.extract_model(given, asked)
            onnx.checker.check_model(made)
            onnx.save(made, str(part))
    except (ValueError, onnx.checker.ValidationError) as error:
        raise ConfigError(
            f"{path.name} does not come apart at {cut.tensor!r}: {' '.join(str(error).split())[:200]}"
        ) from None
