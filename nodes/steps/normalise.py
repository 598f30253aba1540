"""Take off a mean and divide by a deviation: ``{normalise: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}``.

One number for all channels, or one for each. The answer is float32.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field, field_validator

from nodes.operator import Context
from nodes.steps._image import per_channel, raw, values
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.expressions import Number
from schemas.messages import Array, Frame

Numbers = Annotated[list[Number], BeforeValidator(lambda v: v if isinstance(v, (list, tuple)) else [v])]


class Config(StepOptions):
    """Options of ``normalise``."""

    takes: ClassVar[frozenset[str]] = FRAMES

    mean: Numbers = Field(default=[0.0], min_length=1, description="taken off; one number, or one for each channel")
    std: Numbers = Field(default=[1.0], min_length=1, description="divided by; one number, or one for each channel")

    @field_validator("std")
    @classmethod
    def _not_zero(cls, std: list[float]) -> list[float]:
        if any(v == 0 for v in std):
            raise ValueError("nothing can be divided by 0")
        return std


class Normalise(FrameStep):
    """(x - mean) / std."""

    def __init__(self, config: Config) -> None:
        self.mean = config.mean
        self.factor = [1 / v for v in config.std]

    def frame(self, frame: Frame) -> Frame:
        frame, array = values(frame)
        return raw(frame, self._normal(array, frame, array.shape))

    def stack(self, images: Array, like: Frame) -> tuple[Array, str] | None:
        try:
            return self._normal(images, like, images.shape[1:]), like.layout
        except RefusedError:
            return None

    def _normal(self, array: Array, frame: Frame, shape: tuple[int, ...]) -> Array:
        mean, factor = (per_channel(v, frame, shape) for v in (self.mean, self.factor))
        out: Any = np.subtract(array, mean, dtype=np.float32)
        out *= factor
        return np.asarray(out)


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Normalise(config)
