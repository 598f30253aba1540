"""Cut out a part of each image: ``{crop: [x, y, width, height]}`` in pixels, or the middle: ``{crop: {middle: [w, h]}}``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from nodes.operator import Context
from nodes.steps._image import numbers, pixels, raw
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.messages import Array, Frame

Corner = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1)]
Box = Annotated[tuple[Corner, Corner, Side, Side], BeforeValidator(numbers(4, "left, top, width, height"))]
Size = Annotated[tuple[Side, Side], BeforeValidator(numbers(2, "width, height"))]


class Config(StepOptions):
    """Options of ``crop``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"type": "array", "items": {"type": "integer"}}

    box: Box | None = Field(default=None, description="left, top, width, height of what is kept, pixels")
    middle: Size | None = Field(default=None, description="width and height of the middle, pixels")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"box": value}

    @model_validator(mode="after")
    def _one(self) -> Config:
        if (self.box is None) == (self.middle is None):
            raise ValueError("expected either a box or, under 'middle', a width and height")
        return self


class Crop(FrameStep):
    """Fewer pixels."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def frame(self, frame: Frame) -> Frame:
        frame, image = pixels(frame)
        rows, columns = self._part(*image.shape[:2])
        return raw(frame, np.ascontiguousarray(image[rows, columns]))

    def stack(self, images: Array, like: Frame) -> tuple[Array, str] | None:
        if like.layout not in ("HW", "HWC") or images.ndim != 1 + len(like.layout):
            return None
        try:
            rows, columns = self._part(*images.shape[1:3])
        except RefusedError:
            return None
        return np.ascontiguousarray(images[:, rows, columns]), like.layout

    def _part(self, high: int, wide: int) -> tuple[slice, slice]:
        """Rows and columns that are kept.

        :raises RefusedError: the image is too small.
        """
        if self.config.box is not None:
            x, y, w, h = self.config.box
        else:
            w, h = self.config.middle or (wide, high)
            x, y = (wide - w) // 2, (high - h) // 2
        if x < 0 or y < 0 or x + w > wide or y + h > high:
            raise RefusedError("wrong-shape", f"the part is not inside the image of {wide} × {high} pixels")
        return slice(y, y + h), slice(x, x + w)


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Crop(config)
