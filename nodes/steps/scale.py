"""Multiply every value of a frame: ``{scale: 1/255}``, ``{scale: {factor: 2/255, offset: -1}}``. The answer is float32."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._image import raw, values
from nodes.steps._step import FRAMES, FrameStep, StepOptions
from schemas.expressions import Number
from schemas.messages import Array, Frame


class Config(StepOptions):
    """Options of ``scale``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"type": ["number", "string"]}

    factor: Number = Field(description="every value is multiplied by this; may be written 1/255")
    offset: Number = Field(default=0.0, description="and this is added")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"factor": value}


class Scale(FrameStep):
    """x · factor + offset."""

    def __init__(self, config: Config) -> None:
        self.factor = np.float32(config.factor)
        self.offset = np.float32(config.offset)

    def frame(self, frame: Frame) -> Frame:
        frame, array = values(frame)
        return raw(frame, self._scaled(array))

    def stack(self, images: Array, like: Frame) -> tuple[Array, str]:
        return self._scaled(images), like.layout

    def _scaled(self, array: Array) -> Array:
        out: Any = np.multiply(array, self.factor, dtype=np.float32)
        if self.offset:
            out += self.offset
        return np.asarray(out)


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Scale(config)
