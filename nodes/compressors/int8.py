"""Sends each number as one byte, with a scale for each tensor: a quarter of float32 or less.

``int8``, ``{int8: {block: 256}}``. It needs no error feedback: rounding is right on average.
"""

from __future__ import annotations

from nodes.compressors._compressor import Compressor
from nodes.compressors._quantised import Quantised, Quantising


class Config(Quantising):
    """Options of ``int8``."""


def build(config: Config) -> Compressor:
    """The compressor."""
    return Quantised(config, 8)
