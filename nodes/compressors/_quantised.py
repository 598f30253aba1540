"""Whole numbers instead of real ones, with a scale for each tensor or block; shared by ``int8`` and ``int4``.

number = code · scale; scale = largest magnitude of its block / most. Rounded up or down by chance, so that the mean over many
clients and rounds is right (QSGD: Alistarh et al. 2017, https://arxiv.org/abs/1610.02132). The codes of all tensors follow one
another and are deflated (RFC 1950), which wins a tenth for what is normally distributed, and more where weights do not move.
"""

from __future__ import annotations

import zlib

import numpy as np
from pydantic import Field

from nodes.compressors._compressor import Compressor
from nodes.federated.weights import Shape, UnfitError, Weights, unflat
from nodes.options import Options
from schemas.messages import Array


class Quantising(Options):
    """Options of every compressor that quantises."""

    block: int = Field(
        default=0, ge=0, le=1 << 24, description="numbers that share one scale; 0: all of a tensor, which sends least"
    )
    stochastic: bool = Field(
        default=True, description="round up or down by chance, right on average; false: to the nearest"
    )


class Quantised(Compressor):
    """``codes``: uint8, the deflated codes; ``scales``: float32, one for each block, those of a tensor after those of another."""

    def __init__(self, config: Quantising, bits: int) -> None:
        self.block = config.block
        self.stochastic = config.stochastic
        self.bits = bits
        self.most = 2 ** (bits - 1) - 1

    def pack(self, delta: Weights, seed: int = 0) -> Weights:
        generator = np.random.default_rng(seed)
        scales, codes = [], []
        for array in delta.values():
            values = array.ravel().astype(np.float32, copy=False)
            starts = _starts(values.size, self.block)
            if not starts.size:
                continue
            scale = np.maximum.reduceat(np.abs(values), starts) / np.float32(self.most)
            scales.append(scale)
            # a scale that underflowed to 0 stands for zeros; 1 is there only not to divide by it
            steps = values / _spread(np.where(scale > 0, scale, np.float32(1)), values.size, self.block)
            steps = np.floor(steps + generator.random(steps.size, np.float32)) if self.stochastic else np.rint(steps)
            codes.append(np.clip(steps, -self.most, self.most, out=steps).astype(np.int8))
        whole = np.concatenate(codes) if codes else np.zeros(0, np.int8)
        deflater = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 8, zlib.Z_RLE)
        data = deflater.compress(_narrow(whole, self.bits).tobytes()) + deflater.flush()
        return {
            "codes": np.frombuffer(data, np.uint8),
            "scales": np.concatenate(scales) if scales else np.zeros(0, np.float32),
        }

    def unpack(self, packed: Weights, wanted: tuple[Shape, ...]) -> Weights:
        codes, scales = taken(packed, {"codes": "u1", "scales": "f4"})
        size = sum(shape.size for shape in wanted)
        blocks = [_starts(shape.size, self.block).size for shape in wanted]
        if scales.size != sum(blocks):
            raise UnfitError("shape", f"{scales.size} scales; expected {sum(blocks)}")
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise UnfitError("not-finite", "a scale is infinite, none or negative")
        values = _wide(_inflated(codes, -(-size * self.bits // 8)), size, self.bits)
        at = 0
        for shape, count in zip(wanted, blocks, strict=True):
            if count:
                with np.errstate(over="ignore"):  # told below
                    values[at : at + shape.size] *= _spread(scales[:count], shape.size, self.block)
            at, scales = at + shape.size, scales[count:]
        return checked(values, wanted)


def taken(packed: Weights, wanted: dict[str, str]) -> list[Array]:
    """The arrays of these names and dtypes (``u1``, or several: ``u1 u2``), of one dimension each, and no others.

    :raises UnfitError: they are not those.
    """
    if packed.keys() != wanted.keys():
        raise UnfitError("names", f"the packed arrays are {', '.join(packed)[:200]}; expected {', '.join(wanted)}")
    for name, dtypes in wanted.items():
        array = packed[name]
        if array.ndim != 1:
            raise UnfitError("shape", f"{name} has {array.ndim} dimensions; expected 1")
        if array.dtype.str[1:] not in dtypes.split():
            raise UnfitError("dtype", f"{name} is {array.dtype.str}; expected {dtypes}")
    return [packed[name] for name in wanted]


def checked(values: Array, wanted: tuple[Shape, ...]) -> Weights:
    """The arrays from a vector of all numbers.

    :raises UnfitError: some are not finite.
    """
    if not np.isfinite(values).all():
        raise UnfitError("not-finite", "the numbers unpacked are infinite or none")
    return unflat(values, wanted)


def _starts(size: int, block: int) -> Array:
    return np.arange(0, size, block or max(size, 1))


def _spread(scales: Array, size: int, block: int) -> Array:
    """A scale for each number."""
    return scales if len(scales) == 1 else np.repeat(scales, block)[:size]


def _narrow(codes: Array, bits: int) -> Array:
    """Codes as bytes; those of 4 bits two in one, the first in the lower half."""
    if bits == 8:
        return codes.view(np.uint8)
    nibbles = (codes & 15).astype(np.uint8)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return nibbles[::2] | (nibbles[1::2] << 4)


def _wide(data: bytes, size: int, bits: int) -> Array:
    """Codes from bytes, float32."""
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        return raw.view(np.int8).astype(np.float32)
    both = np.stack([raw & 15, raw >> 4], 1).ravel()[:size].astype(np.int8)
    return ((both ^ 8) - 8).astype(np.float32)  # the sign of 4 bits


def _inflated(data: Array, size: int) -> bytes:
    """Inflates to ``size`` bytes and never to more, whatever it says it is.

    :raises UnfitError: it is something else.
    """
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(data.tobytes(), size + 1)
    except zlib.error as error:
        raise UnfitError("packed", f"the codes cannot be inflated: {error}") from None
    if len(out) != size:
        raise UnfitError("shape", f"the codes do not inflate to {size} bytes")
    if not inflater.eof or inflater.unused_data:
        raise UnfitError("packed", "the codes end too early, or something follows them")
    return out
