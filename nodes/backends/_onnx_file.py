"""Inputs and outputs as an .onnx file says them: as much of protobuf as that takes, without the runtime.

The message types are those of ``onnx.proto`` (ModelProto, GraphProto, ValueInfoProto, TypeProto, TensorShapeProto); the wire
format is described in "Protocol Buffers: Encoding". Weights are stepped over, so a file of a gigabyte is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap
from typing import Final, NamedTuple, TypeAlias

from nodes.backends import _backend
from nodes.backends._backend import Signature, Tensor
from schemas.errors import ConfigError

_GRAPH: Final = 7
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TENSOR_TYPE, _ELEMENTS, _SHAPE, _DIMENSION, _SIZE = 1, 1, 2, 1, 1
_INITIALIZER_NAME: Final = 8

_TYPES: Final = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
}
"""``TensorProto.DataType`` → numpy's name."""
_MOST_RANK: Final = 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


Data: TypeAlias = bytes | mmap


class _DamagedError(Exception):
    """It ends early, or is no protobuf."""


class _Part(NamedTuple):
    """A message, or a text, within the file: no copy, and no view that would keep the file open."""

    data: Data
    start: int
    stop: int

    def text(self) -> str:
        return bytes(self.data[self.start : self.stop]).decode()


def signature(data: Data) -> Signature:
    """Inputs and outputs of the graph. An output's axis that only a run can tell is -1.

    :raises ConfigError: not an .onnx file, damaged, or with inputs that ``infer`` cannot give.
    """
    try:
        whole = _Part(data, 0, len(data))
        graph = next((part for number, part in _fields(whole) if number == _GRAPH and isinstance(part, _Part)), None)
        if graph is None:
            raise ConfigError("not an ONNX model: it has no graph")
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        weights = set()
        for number, part in _fields(graph):
            if number == _INPUT:
                inputs.append(_value(_within(part)))
            elif number == _OUTPUT:
                outputs.append(_value(_within(part)))
            elif number == _INITIALIZER:
                weights.add(_initializer(_within(part)))
    except (_DamagedError, UnicodeDecodeError):
        raise ConfigError("not an ONNX model, or a damaged one") from None
    inputs = [value for value in inputs if value[0] not in weights]  # files before version 4 name weights there too
    return _backend.signature(inputs, outputs)


def _value(value: _Part) -> Tensor:
    """Name, type and axes (-1: open) of an input or output."""
    name, code, axes = "", 0, list[int]()
    for number, field in _fields(value):
        if number == _VALUE_NAME:
            name = _within(field).text()
        elif number == _VALUE_TYPE:
            tensor = next((f for n, f in _fields(_within(field)) if n == _TENSOR_TYPE), None)
            if tensor is None:
                raise ConfigError(
                    f"the model's {name!r} is no tensor (a map or a sequence): export the model without it"
                )
            for n, inner in _fields(_within(tensor)):
                if n == _ELEMENTS and isinstance(inner, int):
                    code = inner
                elif n == _SHAPE:
                    axes = [_dimension(_within(axis)) for k, axis in _fields(_within(inner)) if k == _DIMENSION]
    if code not in _TYPES:
        raise ConfigError(f"the model's tensor {name!r} has a type ({code}) that infer cannot pass")
    if len(axes) > _MOST_RANK:
        raise _DamagedError
    return name, _TYPES[code], axes


def _dimension(axis: _Part) -> int:
    """Its size; -1 where it has a name or nothing."""
    return next((size for number, size in _fields(axis) if number == _SIZE and isinstance(size, int)), -1)


def _initializer(tensor: _Part) -> str:
    return next((_within(field).text() for number, field in _fields(tensor) if number == _INITIALIZER_NAME), "")


def _within(field: int | _Part) -> _Part:
    if isinstance(field, int):
        raise _DamagedError
    return field


def _fields(message: _Part) -> Iterator[tuple[int, int | _Part]]:
    """The fields of a message with their numbers: whole numbers (signed, of 64 bits), or parts."""
    data, at, end = message
    while at < end:
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise _DamagedError
        if number == 0 or at + size > end:
            raise _DamagedError
        yield number, _Part(data, at, at + size)
        at += size


def _varint(data: Data, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _DamagedError
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise _DamagedError
