"""Sends each number in four bits, with a scale for every 64 of them: an eighth of float32 or less.

``int4``, ``{int4: {block: 16}}``. Coarse: a round learns a little less, as if by noise; smaller blocks make it finer.
"""

from __future__ import annotations

from pydantic import Field

from nodes.compressors._compressor import Compressor
from nodes.compressors._quantised import Quantised, Quantising


class Config(Quantising):
    """Options of ``int4``."""

    block: int = Field(
        default=64, ge=0, le=1 << 24, description="numbers that share one scale; 0: all of a tensor, which sends least"
    )


def build(config: Config) -> Compressor:
    """The compressor."""
    return Quantised(config, 4)
