"""Reads a .tflite file's inputs and outputs without its runtime, so that ``penstock check`` knows shapes at once.

A .tflite file is a flatbuffer of the schema ``tflite/schema.fbs`` (TensorFlow Lite, version 3). Only the few fields named
here are followed. Every offset is checked against the file's length, so a damaged file is an error and no crash.
"""

from __future__ import annotations

import math
import struct
from typing import Final

from nodes.backends._backend import Quantisation, Signature, Spec
from schemas.errors import ConfigError

MAGIC: Final = b"TFL3"
_TYPES: Final = {
    0: "float32",
    1: "float16",
    2: "int32",
    3: "uint8",
    4: "int64",
    6: "bool",
    7: "int16",
    9: "int8",
    10: "float64",
}
"""TensorType of the schema, as far as numpy has it and a sensor needs it."""

# Field numbers of the schema's tables.
_MODEL_SUBGRAPHS, _MODEL_SIGNATURES = 2, 7
_GRAPH_TENSORS, _GRAPH_INPUTS, _GRAPH_OUTPUTS = 0, 1, 2
_SIGNATURE_INPUTS, _SIGNATURE_OUTPUTS, _SIGNATURE_SUBGRAPH, _PAIR_NAME, _PAIR_TENSOR = 0, 1, 4, 0, 1
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_QUANTISATION, _TENSOR_SHAPE_SIGNATURE = 0, 1, 3, 4, 7
_QUANTISATION_SCALE, _QUANTISATION_ZERO_POINT = 2, 3
_MOST_RANK = 16


class _DamagedError(Exception):
    pass


class _File:
    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data

    def number(self, form: str, at: int) -> int:
        if at < 0 or at + struct.calcsize(form) > len(self.data):
            raise _DamagedError
        return int(struct.unpack_from(form, self.data, at)[0])

    def field(self, table: int, index: int) -> int | None:
        """Where field ``index`` of ``table`` stands; None: it has its default."""
        vtable = table - self.number("<i", table)
        place = 4 + 2 * index
        if place + 2 > self.number("<H", vtable):
            return None
        offset = self.number("<H", vtable + place)
        return table + offset if offset else None

    def follow(self, at: int) -> int:
        return at + self.number("<I", at)

    def vector(self, table: int, index: int, size: int) -> tuple[int, int]:
        """Start and length of a vector of elements of ``size`` bytes; (0, 0) where there is none."""
        at = self.field(table, index)
        if at is None:
            return 0, 0
        start = self.follow(at)
        length = self.number("<I", start)
        if start + 4 + length * size > len(self.data):
            raise _DamagedError
        return start + 4, length

    def integers(self, table: int, index: int, form: str = "<i") -> list[int]:
        size = struct.calcsize(form)
        start, length = self.vector(table, index, size)
        return [self.number(form, start + i * size) for i in range(length)]

    def tables(self, table: int, index: int) -> list[int]:
        start, length = self.vector(table, index, 4)
        return [self.follow(start + 4 * i) for i in range(length)]


def _quantisation(file: _File, tensor: int) -> Quantisation | None:
    at = file.field(tensor, _TENSOR_QUANTISATION)
    if at is None:
        return None
    table = file.follow(at)
    start, length = file.vector(table, _QUANTISATION_SCALE, 4)
    zeros = file.integers(table, _QUANTISATION_ZERO_POINT, "<q")
    if length != 1 or len(zeros) != 1:  # none, or one scale per channel, which inputs and outputs never have
        return None
    scale = float(struct.unpack_from("<f", file.data, start)[0])
    return Quantisation(scale, zeros[0]) if math.isfinite(scale) and scale > 0 else None


def _spec(file: _File, tensor: int, name: str | None, batch: int | None) -> Spec:
    """The tensor as one item of a batch of ``batch`` (None: any): its first axis left out where that is the batch's."""
    _, free = _shape(file, tensor)
    if name is None:
        start, length = file.vector(tensor, _TENSOR_NAME, 1)
        name = bytes(file.data[start : start + length]).decode("utf-8", "replace")
    at = file.field(tensor, _TENSOR_TYPE)
    code = 0 if at is None else file.number("<b", at)
    if code not in _TYPES:
        raise ConfigError(f"the model's tensor {name!r} has a type ({code}) that infer cannot pass")
    has_batch = bool(free) and free[0] in (-1, batch)
    return Spec(name, tuple(free[1:] if has_batch else free), _TYPES[code], _quantisation(file, tensor))


def _shape(file: _File, tensor: int) -> tuple[list[int], list[int]]:
    """The shape as stored, and with -1 for axes that are open."""
    shape = file.integers(tensor, _TENSOR_SHAPE)
    free = file.integers(tensor, _TENSOR_SHAPE_SIGNATURE)
    if len(shape) > _MOST_RANK or any(n < 0 for n in shape):
        raise _DamagedError
    return shape, free if len(free) == len(shape) else shape


def _batch(file: _File, inputs: list[int]) -> int | None:
    """Items that one call takes: one where an input is a plain vector or number of fixed length (sound, often)."""
    fixed = []
    for tensor in inputs:
        _, free = _shape(file, tensor)
        if not free or free[0] >= 0:
            fixed.append(free[0] if len(free) > 1 else 1)
    return fixed[0] if fixed else None


def _names(file: _File, model: int) -> dict[int, str]:
    """Tensor → name in the model's signature, where it has one (``output_0``, not ``StatefulPartitionedCall_1:0``)."""
    for entry in file.tables(model, _MODEL_SIGNATURES):
        at = file.field(entry, _SIGNATURE_SUBGRAPH)
        if at is None or file.number("<I", at) == 0:
            names = {}
            for part in (_SIGNATURE_INPUTS, _SIGNATURE_OUTPUTS):
                for pair in file.tables(entry, part):
                    start, length = file.vector(pair, _PAIR_NAME, 1)
                    index = file.field(pair, _PAIR_TENSOR)
                    number = 0 if index is None else file.number("<I", index)
                    names[number] = bytes(file.data[start : start + length]).decode("utf-8", "replace")
            return names
    return {}


def signature(data: bytes | memoryview) -> Signature:
    """Inputs and outputs of the first subgraph. An output's axis that only a run can tell is -1.

    :raises ConfigError: not a .tflite file, damaged, or with tensors that ``infer`` cannot pass.
    """
    if bytes(data[4:8]) != MAGIC:
        raise ConfigError(f"not a TFLite model: it lacks the mark {MAGIC.decode()} at byte 4")
    file = _File(data)
    try:
        model = file.follow(0)
        graph = file.tables(model, _MODEL_SUBGRAPHS)[0]
        tensors = file.tables(graph, _GRAPH_TENSORS)
        ins, outs = file.integers(graph, _GRAPH_INPUTS), file.integers(graph, _GRAPH_OUTPUTS)
        if not ins or not outs or min(ins) < 0 or min(outs) < 0:
            raise ConfigError("a TFLite model without inputs or outputs")
        names = _names(file, model)
        batch = _batch(file, [tensors[i] for i in ins])
        inputs = tuple(_spec(file, tensors[i], names.get(i), batch) for i in ins)
        outputs = tuple(_spec(file, tensors[i], names.get(i), batch) for i in outs)
    except (_DamagedError, IndexError):
        raise ConfigError("a damaged TFLite model: it ends early or points outside itself") from None
    for spec in inputs:
        if any(n < 0 for n in spec.shape):
            raise ConfigError(f"the model's input {spec}: only the first axis (the batch) may be open")
    return Signature(inputs, outputs, batch)
