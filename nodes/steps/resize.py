"""Make images another size: ``{resize: [96, 96]}`` (width, height), ``{resize: {size: [96, 96], method: bilinear}}``.

``area`` averages (best for making smaller), ``nearest`` takes single pixels, ``bilinear`` weighs neighbours. ``nearest``, and
``area`` by whole factors, need no extra; the rest uses Pillow.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from nodes.operator import Context
from nodes.steps._image import numbers, pillow, pixels, raw
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.errors import MissingError
from schemas.messages import Array, Frame

EXTRA = "image"
_EXACT = 2**24 // 255
"""Pixels of uint8 whose sum float32 holds exactly."""

Side = Annotated[int, Field(ge=1, le=16384)]


class Config(StepOptions):
    """Options of ``resize``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"type": ["array", "integer"], "items": {"type": "integer"}}

    size: Annotated[tuple[Side, Side], BeforeValidator(numbers(2, "width, height"))] = Field(
        description="width and height, pixels"
    )
    method: Literal["area", "nearest", "bilinear"] = Field(default="area", description="how new pixels are found")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return value
        return {"size": [value, value] if isinstance(value, int) else value}


def nearest(image: Array, width: int, height: int) -> Array:
    """The pixel under each new pixel's centre."""
    h, w = image.shape[:2]
    rows = ((2 * np.arange(height) + 1) * h) // (2 * height)
    columns = ((2 * np.arange(width) + 1) * w) // (2 * width)
    return np.asarray(image[rows[:, None], columns])


def area(image: Array, width: int, height: int) -> Array:
    """The mean of the block under each new pixel; the sides must divide."""
    h, w = image.shape[:2]
    blocks = image.reshape(height, h // height, width, w // width, *image.shape[2:])
    mean = blocks.mean(axis=(1, 3), dtype=np.float64 if image.dtype == np.float64 else np.float32)
    return np.asarray(mean if image.dtype.kind == "f" else np.rint(mean), image.dtype)


def filtered(image: Array, width: int, height: int, method: str) -> Array:
    """By Pillow; uint8 as a whole, other dtypes channel by channel in float32."""
    module = pillow()
    how = {"area": module.Resampling.BOX, "bilinear": module.Resampling.BILINEAR}[method]
    if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2] == 3):
        return np.asarray(module.fromarray(image).resize((width, height), how))
    planes = image[:, :, None] if image.ndim == 2 else image
    made = [
        np.asarray(module.fromarray(np.ascontiguousarray(planes[:, :, c], np.float32)).resize((width, height), how))
        for c in range(planes.shape[2])
    ]
    out: Array = made[0] if image.ndim == 2 else np.stack(made, axis=2)
    if image.dtype.kind == "f":
        return out.astype(image.dtype)
    limits = np.iinfo(image.dtype)
    return np.clip(np.rint(out.astype(np.float64)), limits.min, limits.max).astype(image.dtype)


def areas(images: Array, width: int, height: int) -> Array:
    """:func:`area` of many uint8 images [n, h, w] or [n, h, w, c], in whole numbers: their means are exact either way."""
    n, h, w = images.shape[:3]
    channels = images.shape[3:]
    high, wide = h // height, w // width
    rows = images.reshape(n, height, high, w, *channels)
    sums: Any = rows[:, :, 0].astype(np.uint32 if high > 257 else np.uint16)
    for i in range(1, high):
        sums += rows[:, :, i]
    columns = sums.reshape(n, height, width, wide, *channels)
    total: Any = columns[:, :, :, 0].astype(np.uint32)
    for i in range(1, wide):
        total += columns[:, :, :, i]
    return np.asarray(np.rint(total.astype(np.float32) / np.float32(high * wide)), np.uint8)


class Resize(FrameStep):
    """Width and height."""

    def __init__(self, config: Config) -> None:
        self.width, self.height = config.size
        self.method = config.method

    def frame(self, frame: Frame) -> Frame:
        frame, image = pixels(frame)
        h, w = image.shape[:2]
        if (w, h) == (self.width, self.height):
            return frame
        if image.dtype == np.bool_ and self.method != "nearest":
            image = image.astype(np.uint8)
        if self.method == "nearest":
            return raw(frame, nearest(image, self.width, self.height))
        if self.method == "area" and h % self.height == 0 and w % self.width == 0:
            return raw(frame, area(image, self.width, self.height))
        try:
            return raw(frame, filtered(image, self.width, self.height, self.method))
        except MissingError as error:
            raise RefusedError("missing-library", f"{error}; without it only whole factors can be averaged") from None

    def stack(self, images: Array, like: Frame) -> tuple[Array, str] | None:
        if like.layout not in ("HW", "HWC") or images.ndim != 1 + len(like.layout) or images.dtype != np.uint8:
            return None
        h, w = images.shape[1:3]
        if (w, h) == (self.width, self.height):
            return images, like.layout
        whole = h % self.height == 0 and w % self.width == 0
        if self.method == "area" and whole and h // self.height * (w // self.width) <= _EXACT:
            return areas(images, self.width, self.height), like.layout
        return None


def build(config: Config, context: Context) -> FrameStep:
    """The step.

    :raises MissingError: the method always needs Pillow, and it is not installed.
    """
    if config.method == "bilinear":
        pillow()
    return Resize(config)
