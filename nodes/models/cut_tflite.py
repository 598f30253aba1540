"""Cut a TFLite model in two, by its flatbuffer: the operators before a tensor, and those behind it.

The schema's classes are those that come with LiteRT; TensorFlow is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nodes.backends import _tflite_file
from nodes.models.cuts import Cut, crossing
from schemas.errors import ConfigError, MissingError

SUFFIX = ".tflite"
_TYPES = {0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8"}
"""``TensorType`` → numpy's name, of those that can travel."""


def _schema() -> Any:
    try:
        return import_module("ai_edge_litert.schema_py_generated")
    except ModuleNotFoundError as error:
        raise MissingError("LiteRT (ai-edge-litert)", extra="litert") from error


def _load(path: Path) -> Any:
    """:raises ConfigError: it is no model, or one with more than one graph."""
    data = path.read_bytes()
    _tflite_file.signature(data)  # says in words what is wrong with it
    model = _schema().ModelT.InitFromPackedBuf(data, 0)
    if len(model.subgraphs) != 1:
        raise ConfigError(f"{path.name} has {len(model.subgraphs)} graphs (branches or loops): it cannot be cut")
    (graph,) = model.subgraphs
    if any(tensor.isVariable for tensor in graph.tensors):
        raise ConfigError(f"{path.name} has a state of its own (variables): it cannot be cut")
    if any(buffer.offset > 1 for buffer in model.buffers):
        raise ConfigError(f"{path.name} has its weights behind its end (more than 2 GB): it cannot be cut")
    return model


def cuts(path: Path) -> list[Cut]:
    """Every place where one tensor crosses.

    :raises ConfigError: it is no model, or cannot be cut at all.
    :raises MissingError: LiteRT is not installed.
    """
    return _cuts(_load(path))


def _given(model: Any, numbers: Sequence[int]) -> list[int]:
    """Those tensors that are no constants and not left out."""
    tensors = model.subgraphs[0].tensors
    return [int(i) for i in numbers if i >= 0 and not _length(model.buffers[tensors[i].buffer].data)]


def _length(data: Any) -> int:
    return 0 if data is None else len(data)


def _cuts(model: Any) -> list[Cut]:
    graph = model.subgraphs[0]
    operators = graph.operators
    inputs = [_given(model, operator.inputs) for operator in operators]
    outputs = [[int(i) for i in operator.outputs] for operator in operators]
    found: list[Cut] = []
    for before, number in crossing(inputs, outputs, [int(i) for i in graph.outputs]):
        tensor = graph.tensors[int(number)]
        if (kind := _TYPES.get(tensor.type)) is not None and tensor.shape is not None:
            axes = tuple(int(n) for n in tensor.shape[1:])
            found.append(Cut(len(found) + 1, tensor.name.decode(), axes, kind, before, len(operators) - before))
    return found


def split(path: Path, cut: Cut, head: Path, tail: Path) -> None:
    """Write the two parts."""
    for part, first in ((head, True), (tail, False)):
        model = _load(path)
        graph = model.subgraphs[0]
        names = _names(model)
        crossed = next(i for i, tensor in enumerate(graph.tensors) if tensor.name.decode() == cut.tensor)
        if first:
            graph.operators, graph.outputs = graph.operators[: cut.head], [crossed]
        else:
            _open(graph, crossed)
            graph.operators, graph.inputs = graph.operators[cut.head :], [crossed]
        _prune(model, names)
        part.write_bytes(_pack(model))


def _open(graph: Any, crossed: int) -> None:
    """The tensor takes any batch, where the model does."""
    entry = graph.tensors[int(graph.inputs[0])]
    if entry.shapeSignature is not None and len(entry.shapeSignature) and entry.shapeSignature[0] == -1:
        tensor = graph.tensors[crossed]
        tensor.shapeSignature = [-1, *(int(n) for n in tensor.shape[1:])]


def _names(model: Any) -> dict[int, bytes]:
    """Tensor → its name as an input or output; what has none there is called as the tensor itself is."""
    names = {i: tensor.name for i, tensor in enumerate(model.subgraphs[0].tensors)}
    for signature in model.signatureDefs or ():
        for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
            names[int(entry.tensorIndex)] = entry.name
    return names


def _signature(graph: Any, names: dict[int, bytes]) -> Any:
    """What a part takes and gives, by name. Tensors by their old numbers are ``names``'s."""
    schema = _schema()

    def entries(numbers: Sequence[int]) -> list[Any]:
        made = []
        for number in numbers:
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = names[int(number)], int(number)
            made.append(entry)
        return made

    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    signature.inputs, signature.outputs = entries(graph.inputs), entries(graph.outputs)
    return signature


def _prune(model: Any, names: dict[int, bytes]) -> None:
    """Leave out tensors, weights and operator codes that nobody needs now; what names them is numbered anew."""
    graph = model.subgraphs[0]
    used = sorted(
        {int(i) for i in (*graph.inputs, *graph.outputs)}
        | {
            int(i)
            for o in graph.operators
            for part in (o.inputs, o.outputs, o.intermediates)
            for i in _some(part)
            if i >= 0
        }
    )
    place = {old: new for new, old in enumerate(used)}
    graph.tensors = [graph.tensors[i] for i in used]
    graph.inputs, graph.outputs = ([place[int(i)] for i in part] for part in (graph.inputs, graph.outputs))
    for operator in graph.operators:
        for name in ("inputs", "outputs", "intermediates"):
            if (part := getattr(operator, name)) is not None:
                setattr(operator, name, [place.get(int(i), -1) for i in part])
    buffers = sorted({0, *(tensor.buffer for tensor in graph.tensors)})  # the first is always the empty one
    where = {old: new for new, old in enumerate(buffers)}
    model.buffers = [model.buffers[i] for i in buffers]
    for tensor in graph.tensors:
        tensor.buffer = where[tensor.buffer]
    codes = sorted({operator.opcodeIndex for operator in graph.operators})
    model.operatorCodes = [model.operatorCodes[i] for i in codes]
    for operator in graph.operators:
        operator.opcodeIndex = codes.index(operator.opcodeIndex)
    model.signatureDefs = [_signature(graph, {place[old]: name for old, name in names.items() if old in place})]
    model.metadata = model.metadataBuffer = None  # notes that lie in buffers which are gone


def _some(part: Any) -> Any:
    return () if part is None else part


def _pack(model: Any) -> bytes:
    flatbuffers = import_module("flatbuffers")
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), _tflite_file.MAGIC)
    return bytes(builder.Output())
