"""Sends each matrix as the product of two thin ones and remembers the rest for the next round: ``{low-rank: {rank: 2}}``.

Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
https://arxiv.org/abs/1905.13727, with subspace iterations from a random start in the place of the warm one (Halko et al. 2011,
https://arxiv.org/abs/0909.4061), so that nothing but the rest must be kept. For models with large matrices or convolutions.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from nodes.compressors._compressor import Compressor
from nodes.federated.weights import Shape, UnfitError, Weights
from nodes.options import Options
from schemas.messages import Array

MOST = float(np.finfo(np.float16).max)


class Config(Options):
    """Options of ``low-rank``."""

    rank: int = Field(default=2, ge=1, le=1024, description="columns of the two thin matrices")
    passes: int = Field(
        default=2, ge=1, le=20, description="iterations towards the best such product; more: nearer, slower"
    )


class LowRank(Compressor):
    """Of a tensor ``w`` of [m, …] as a matrix of [m, n]: ``w/m`` [m, rank] and ``w/n`` [n, rank], float16, w = w/m · w/nᵀ.

    Tensors for which that is not smaller (vectors, small ones) travel under their own names, float16 too.
    """

    feeds_back: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.rank = config.rank
        self.passes = config.passes

    def pack(self, delta: Weights, seed: int = 0) -> Weights:
        generator = np.random.default_rng(seed)
        out: Weights = {}
        for name, array in delta.items():
            m, n = _form(array.shape)
            if not self._thin(array.shape):
                out[name] = _halves(array)
                continue
            matrix = array.reshape(m, n).astype(np.float64)
            right = generator.normal(size=(n, self.rank))
            for _ in range(self.passes):
                left, _ = np.linalg.qr(matrix @ right)
                right = matrix.T @ left
            # both of one size: numbers of a late round, 1e-6 and below, would vanish in float16, their roots do not
            size = np.sqrt(np.linalg.norm(right, axis=0))
            out[f"{name}/m"] = _halves(left * size)
            out[f"{name}/n"] = _halves(right / np.where(size > 0, size, 1))
        return out

    def unpack(self, packed: Weights, wanted: tuple[Shape, ...]) -> Weights:
        forms: dict[str, tuple[int, ...]] = {}
        for shape in wanted:
            if self._thin(shape.shape):
                m, n = _form(shape.shape)
                forms |= {f"{shape.name}/m": (m, self.rank), f"{shape.name}/n": (n, self.rank)}
            else:
                forms[shape.name] = shape.shape
        if packed.keys() != forms.keys():
            raise UnfitError(
                "names", f"the packed arrays are {', '.join(packed)[:200]}; expected {', '.join(forms)[:200]}"
            )
        for name, form in forms.items():
            if packed[name].shape != form:
                raise UnfitError("shape", f"{name} is {list(packed[name].shape)}; expected {list(form)}")
            if packed[name].dtype.str != "<f2":
                raise UnfitError("dtype", f"{name} is {packed[name].dtype.str}; expected <f2")
            if not np.isfinite(packed[name]).all():
                raise UnfitError("not-finite", f"{name} has numbers that are infinite or none")
        out: Weights = {}
        for shape in wanted:
            if self._thin(shape.shape):
                left, right = (packed[f"{shape.name}/{side}"].astype(np.float32) for side in "mn")
                out[shape.name] = (left @ right.T).reshape(shape.shape).astype(shape.dtype)
            else:
                out[shape.name] = packed[shape.name].astype(shape.dtype)
        return out

    def _thin(self, shape: tuple[int, ...]) -> bool:
        m, n = _form(shape)
        return (m + n) * self.rank < m * n


def _form(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix that a tensor is taken for: its first axis, and all others."""
    m = shape[0] if shape else 1
    return m, int(np.prod(shape[1:], dtype=np.int64))


def _halves(array: Array) -> Array:
    out: Array = np.clip(array, -MOST, MOST).astype("<f2")
    return out


def build(config: Config) -> Compressor:
    """The compressor."""
    return LowRank(config)
