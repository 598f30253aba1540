"""Sends only the largest numbers and remembers the others for the next round: ``{top-k: {fraction: 0.01}}``.

Error feedback: Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Stich et al. 2018, "Sparsified SGD with Memory",
https://arxiv.org/abs/1809.07599. A client that answers seldom carries what it did not send for long; where most rounds have other
clients, take int8 or int4.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from nodes.compressors._compressor import Compressor
from nodes.compressors._quantised import checked, taken
from nodes.federated.weights import Shape, UnfitError, Weights, flat
from nodes.options import Options
from schemas.messages import Array

MOST = float(np.finfo(np.float16).max)
HIGHEST = 121
"""Exponent with which 127 is still a float32."""


class Config(Options):
    """Options of ``top-k``."""

    fraction: float = Field(
        default=0.01, gt=0, le=1, description="share of all numbers that is sent, over all tensors; one at least"
    )
    values: Literal["int8", "fp16", "fp32"] = Field(
        default="int8", description="how a number is sent; what rounding takes away is sent in later rounds too"
    )


class TopK(Compressor):
    """``gaps``: where the numbers are; ``values``: the numbers, in order of their places. With int8 the first of ``values`` is no
    number but the exponent e of their scale: number = code · 2^e; an array of its own would be longer than many an update.

    A gap is how many numbers lie between one that is sent and the one before (or the beginning), over all tensors in order. It is
    as many times the largest number of the dtype (255 of uint8, 65,535 of uint16) as fit, each of which means "so many, and on",
    and then what is left. So places only ever increase, and 1 of 100 takes a little more than a byte.
    """

    feeds_back: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.fraction = config.fraction
        self.values = config.values

    def pack(self, delta: Weights, seed: int = 0) -> Weights:
        whole = flat(delta, "<f4")
        count = min(max(math.ceil(self.fraction * whole.size), 1), whole.size)
        if count < whole.size:
            places = np.sort(np.argpartition(np.abs(whole), whole.size - count)[whole.size - count :])
        else:
            places = np.arange(whole.size)
        gaps = np.diff(places, prepend=-1) - 1
        narrow, wide = _said(gaps, np.uint8), _said(gaps, np.uint16)
        out = {"gaps": narrow if narrow.nbytes <= wide.nbytes else wide}
        chosen = whole[places]
        if self.values == "int8":
            _, exponent = np.frexp(np.abs(chosen).max(initial=0) / 127)
            exponent = min(max(int(exponent), -128), HIGHEST)
            codes = np.clip(np.rint(np.ldexp(chosen, -exponent)), -127, 127)
            return {**out, "values": np.insert(codes, 0, exponent).astype(np.int8)}
        if self.values == "fp16":
            chosen = np.clip(chosen, -MOST, MOST).astype("<f2")
        return {**out, "values": chosen}

    def unpack(self, packed: Weights, wanted: tuple[Shape, ...]) -> Weights:
        size = sum(shape.size for shape in wanted)
        forms = {"gaps": "u1 u2", "values": {"int8": "i1", "fp16": "f2", "fp32": "f4"}[self.values]}
        gaps, values = taken(packed, forms)
        if self.values == "int8":
            if not values.size:
                raise UnfitError("shape", "the values have no scale")
            with np.errstate(over="ignore"):  # told below
                values = np.ldexp(values[1:].astype(np.float32), int(values[0]))
        places = _places(gaps)
        if places.size != values.size or places.size > size:
            raise UnfitError("shape", f"{places.size} places and {values.size} values, of {size} numbers")
        if places.size and places[-1] >= size:
            raise UnfitError("shape", f"a number at place {places[-1]}, of {size} numbers")
        whole = np.zeros(size, np.float32)
        whole[places] = values
        return checked(whole, wanted)


def _said(gaps: Array, dtype: type[np.unsignedinteger]) -> Array:
    most = int(np.iinfo(dtype).max)
    ends = np.cumsum(gaps // most + 1) - 1
    out = np.full(int(ends[-1]) + 1 if ends.size else 0, most, dtype)
    out[ends] = gaps % most
    return out


def _places(gaps: Array) -> Array:
    """Where the numbers are, increasing; a last gap that does not end is none."""
    ends = gaps != np.iinfo(gaps.dtype).max
    sums = np.cumsum(gaps, dtype=np.int64)[ends]
    places: Array = sums + np.arange(sums.size)
    return places


def build(config: Config) -> Compressor:
    """The compressor."""
    return TopK(config)
