"""The outputs as ``tensors/1`` for another model: what the head of a model cut in two sends to its tail.

``{infer: {model: head.tflite, decoder: tensors}}`` on the camera, ``{infer: {model: tail.tflite, labels: …}}`` on the gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from nodes.decoders import raw
from nodes.decoders._decoder import Answer, Decoder
from schemas.messages import Array

EMITS = "tensors/1"


class Config(raw.Config):
    """Which outputs, and how they travel."""

    quantised: bool = Field(
        True, description="int8 and uint8 outputs go as stored; false: as the real numbers they stand for."
    )
    half: bool = Field(False, description="Real numbers travel as float16: half the bytes, three digits.")


def build(config: Config, labels: Sequence[str], top: int) -> Decoder:
    """The decoder; ``labels`` and ``top`` say nothing here."""
    del labels, top
    return Tensors(config)


class Tensors(raw.Raw):
    """Every output, one array for each item."""

    passes: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._half = config.half

    def decode(self, outputs: dict[str, Array], sizes: Sequence[tuple[int, int]]) -> list[Answer]:
        """One array for each output and item."""
        if self._half:
            outputs = {name: _halved(array) for name, array in outputs.items()}
        return super().decode(outputs, sizes)


def _halved(array: Array) -> Array:
    """As float16; what is too large for it is its largest number, not infinite."""
    if array.dtype not in (np.float32, np.float64):
        return array
    most = np.finfo(np.float16).max
    return np.clip(array, -most, most).astype(np.float16)
