"""A model's numbers as they are trained, exchanged and averaged: named arrays in a fixed order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TypeAlias

import msgspec
import numpy as np

from schemas.errors import PenstockError
from schemas.messages import Array

Weights: TypeAlias = dict[str, Array]
"""Name → array, float32 unless a model needs otherwise, C order, in the order in which the model defines them. A difference of
two models (a delta) has the same form."""


class UnfitError(PenstockError):
    """These weights are not of that model, or hold what no model may: ``reason`` is a short stable word.

    :param reason: ``names``, ``shape``, ``dtype``, ``not-finite``, or ``packed`` (a compressor cannot read it at all).
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Shape(msgspec.Struct, frozen=True):
    """What is known of one array without its numbers. ``dtype`` as in numpy's ``str``: ``<f4``."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "<f4"

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


def shapes(weights: Mapping[str, Array]) -> tuple[Shape, ...]:
    """The form of a model, in its order."""
    return tuple(Shape(name, array.shape, array.dtype.str) for name, array in weights.items())


def fit(weights: Mapping[str, Array], wanted: tuple[Shape, ...]) -> None:
    """Look whether ``weights`` are of the form ``wanted`` and finite.

    :raises UnfitError: they are not.
    """
    if (names := tuple(weights)) != (expected := tuple(shape.name for shape in wanted)):
        raise UnfitError("names", f"the arrays are {', '.join(names)}; expected {', '.join(expected)}")
    for shape in wanted:
        array = weights[shape.name]
        if array.shape != shape.shape:
            raise UnfitError("shape", f"{shape.name} is {list(array.shape)}; expected {list(shape.shape)}")
        if array.dtype.str != shape.dtype:
            raise UnfitError("dtype", f"{shape.name} is {array.dtype.str}; expected {shape.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UnfitError("not-finite", f"{shape.name} has numbers that are infinite or none")


def flat(weights: Mapping[str, Array], dtype: str = "<f8") -> Array:
    """All numbers as one vector, in order."""
    parts = [array.ravel().astype(dtype, copy=False) for array in weights.values()]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def unflat(vector: Array, wanted: tuple[Shape, ...]) -> Weights:
    """The arrays of that form from one vector of all their numbers, each in its own dtype."""
    out: Weights = {}
    at = 0
    for shape in wanted:
        out[shape.name] = vector[at : at + shape.size].reshape(shape.shape).astype(shape.dtype)
        at += shape.size
    return out


def norm(weights: Mapping[str, Array]) -> float:
    """The Euclidean norm over all numbers."""
    return math.sqrt(sum(float(np.vdot(a64, a64)) for a64 in (a.astype(np.float64) for a in weights.values())))


def minus(one: Mapping[str, Array], other: Mapping[str, Array]) -> Weights:
    """one - other, array by array, in the dtype of ``one``."""
    return {name: array - other[name] for name, array in one.items()}


def taken_from(own: Weights, other: Mapping[str, Array]) -> Weights:
    """:func:`minus`, in the memory of ``own`` where it can be."""
    for name, array in own.items():
        if array.flags.writeable and array.dtype == other[name].dtype:
            np.subtract(array, other[name], out=array)
        else:
            own[name] = array - other[name]
    return own


def plus(one: Mapping[str, Array], other: Mapping[str, Array]) -> Weights:
    """one + other, array by array, in the dtype of ``one``; ``other`` may be finer (float64)."""
    return {name: (array + other[name]).astype(array.dtype, copy=False) for name, array in one.items()}


def digest(weights: Mapping[str, Array]) -> str:
    """The sha256 (hex) of names, forms and numbers: equal models have equal digests on every machine."""
    sha = hashlib.sha256()
    for name, array in weights.items():
        sha.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
