"""Sends each number in half the precision: half the bytes of float32, and nothing to think about.

Numbers beyond ±65,504 become that; those below 6e-8 vanish.
"""

from __future__ import annotations

import numpy as np

from nodes.compressors._compressor import Compressor
from nodes.compressors._quantised import checked, taken
from nodes.federated.weights import Shape, UnfitError, Weights, flat
from nodes.options import Options

MOST = float(np.finfo(np.float16).max)


class Config(Options):
    """Options of ``fp16``: none."""


class Fp16(Compressor):
    """``halves``: float16, all numbers of all tensors, in order."""

    def pack(self, delta: Weights, seed: int = 0) -> Weights:
        return {"halves": np.clip(flat(delta, "<f4"), -MOST, MOST).astype("<f2")}

    def unpack(self, packed: Weights, wanted: tuple[Shape, ...]) -> Weights:
        (halves,) = taken(packed, {"halves": "f2"})
        if halves.size != (size := sum(shape.size for shape in wanted)):
            raise UnfitError("shape", f"{halves.size} numbers; expected {size}")
        return checked(halves.astype(np.float32), wanted)


def build(config: Config) -> Compressor:
    """The compressor."""
    return Fp16()
