"""Spectra of a signal over time: ``{spectrogram: 256}``, ``{spectrogram: {size: 256, hop: 128, output: db}}``.

Layout ``T`` becomes ``TF``, ``TC`` becomes ``TFC``; the frame's rate becomes spectra per second.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._signal import Output, Taper, signal, spectra
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.messages import Frame


class Config(StepOptions):
    """Options of ``spectrogram``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"type": "integer"}

    size: int = Field(ge=2, le=1 << 20, description="samples of one spectrum")
    hop: int = Field(default=0, ge=0, le=1 << 20, description="samples from one spectrum to the next; 0: half the size")
    output: Output = Field(default="db", description="amplitude (peak), power (mean square) or db (of the power)")
    taper: Taper = Field(default="hann", description="shape that each piece is multiplied with against leakage")
    centre: bool = Field(default=True, description="take each piece's mean off first")
    floor: float = Field(default=-120.0, description="least answer in dB")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"size": value}


class Spectrogram(FrameStep):
    """Samples to spectra."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.hop = config.hop or config.size // 2

    def frame(self, frame: Frame) -> Frame:
        c = self.config
        samples = signal(frame)
        if len(samples) < c.size:
            raise RefusedError("wrong-shape", f"{len(samples)} samples are fewer than one spectrum's {c.size}")
        pieces = np.lib.stride_tricks.sliding_window_view(samples, c.size, axis=0)[:: self.hop]  # [pieces, C, size]
        bins = spectra(pieces, c.taper, c.output, centre=c.centre, floor=c.floor)
        attributes = dict(frame.attributes)
        if frame.rate is not None:
            attributes["resolution"] = frame.rate / c.size
        one = frame.layout == "T"
        return msgspec.structs.replace(
            frame,
            data=bins[:, 0].copy() if one else np.ascontiguousarray(bins.transpose(0, 2, 1)),
            layout="TF" if one else "TFC",
            rate=None if frame.rate is None else frame.rate / self.hop,
            attributes=attributes,
        )


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Spectrogram(config)
