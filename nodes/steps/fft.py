"""The spectrum of a signal window: ``fft``, ``{fft: {output: db}}``; layout ``T`` becomes ``F``, ``TC`` becomes ``FC``.

Bin k is at k × ``resolution`` Hz, an attribute of the frame where its rate is known.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._signal import Output, Taper, signal, spectra
from nodes.steps._step import FRAMES, FrameStep, StepOptions
from schemas.messages import Frame


class Config(StepOptions):
    """Options of ``fft``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"type": "string"}

    output: Output = Field(
        default="amplitude", description="amplitude (peak), power (mean square) or db (of the power)"
    )
    taper: Taper = Field(default="hann", description="shape that the window is multiplied with against leakage")
    centre: bool = Field(default=True, description="take the mean off first")
    floor: float = Field(default=-120.0, description="least answer in dB")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"output": value}


class Fft(FrameStep):
    """Samples to bins."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def frame(self, frame: Frame) -> Frame:
        c = self.config
        samples = signal(frame)
        bins = spectra(samples.T, c.taper, c.output, centre=c.centre, floor=c.floor)
        attributes = dict(frame.attributes)
        if frame.rate is not None:
            attributes["resolution"] = frame.rate / len(samples)
        one = frame.layout == "T"
        data = bins[0] if one else np.ascontiguousarray(bins.T)
        return msgspec.structs.replace(frame, data=data, layout="F" if one else "FC", attributes=attributes)


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Fft(config)
