"""Real values to a model's integers: ``{quantise: {scale: 1/255, zero_point: -128, dtype: int8}}``.

stored = round(value / scale) + zero_point, clipped to the dtype. ``infer`` does this by itself for the models that say how;
the step is for sending a quarter of the bytes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from nodes.operator import Context
from nodes.steps._image import raw, values
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.expressions import Number
from schemas.messages import Array, Frame


class Config(StepOptions):
    """Options of ``quantise``."""

    takes: ClassVar[frozenset[str]] = FRAMES

    scale: Number = Field(gt=0, description="real value of one step of the integers; may be written 1/255")
    zero_point: int = Field(default=0, description="integer that stands for 0.0")
    dtype: Literal["int8", "uint8", "int16", "uint16"] = Field(default="int8", description="integer type that goes on")

    @model_validator(mode="after")
    def _fits(self) -> Config:
        limits = np.iinfo(self.dtype)
        if not limits.min <= self.zero_point <= limits.max:
            raise ValueError(
                f"a zero_point of {self.dtype} is from {limits.min} to {limits.max}, got {self.zero_point}"
            )
        return self


class Quantise(FrameStep):
    """Float to integer."""

    def __init__(self, config: Config) -> None:
        self.factor = np.float32(1 / config.scale)
        self.zero_point = np.float32(config.zero_point)
        self.dtype = np.dtype(config.dtype)
        self.limits = np.iinfo(self.dtype)
        self.moves = config.scale == 1 and config.zero_point == -128 and config.dtype == "int8"
        """A camera's bytes for a model in int8, 0 to 255 as -128 to 127: its highest bit is turned, nothing else."""

    def frame(self, frame: Frame) -> Frame:
        frame, array = values(frame)
        return raw(frame, self._stored(array))

    def stack(self, images: Array, like: Frame) -> tuple[Array, str] | None:
        try:
            return self._stored(images), like.layout
        except RefusedError:  # one of them, or more
            return None

    def _stored(self, array: Array) -> Array:
        if self.moves and array.dtype == np.uint8 and array.flags.c_contiguous:
            return (array ^ np.uint8(128)).view(np.int8)
        out: Any = np.multiply(array, self.factor, dtype=np.float32)
        if array.dtype.kind == "f" and np.isnan(out).any():
            raise RefusedError("missing-value", f"the frame has missing values, which {self.dtype.name} cannot say")
        np.rint(out, out=out)
        out += self.zero_point
        return np.clip(out, self.limits.min, self.limits.max, out=out).astype(self.dtype)  # type: ignore[no-any-return]


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Quantise(config)
