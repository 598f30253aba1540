"""Change what the channels are: ``{colour: grey}``, ``{colour: bgr}``, ``{colour: {from: bgr, to: rgb}}``.

Grey is the luma of ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._image import pixels, raw
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.messages import Array, Frame


class Config(StepOptions):
    """Options of ``colour``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"enum": ["rgb", "bgr", "grey"]}

    start: Literal["rgb", "bgr"] = Field(
        default="rgb", alias="from", description="order of the three channels that come in; one channel is grey"
    )
    to: Literal["rgb", "bgr", "grey"] = Field(description="channels that go on")
    channel: bool = Field(default=False, description="grey keeps a channel axis of one (HWC) instead of HW")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"to": value}


def grey(image: Array, order: str) -> Array:
    """HWC of three channels → HW of the same dtype."""
    weights = np.array([0.299, 0.587, 0.114] if order == "rgb" else [0.114, 0.587, 0.299], np.float32)
    luma = image.astype(np.float32) @ weights
    return luma.astype(image.dtype) if image.dtype.kind == "f" else np.rint(luma).astype(image.dtype)


class Colour(FrameStep):
    """Other channels."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def frame(self, frame: Frame) -> Frame:
        frame, image = pixels(frame)
        c = self.config
        channels = 1 if image.ndim == 2 else image.shape[2]
        if channels not in (1, 3, 4):
            raise RefusedError("wrong-shape", f"an image of {channels} channels has no known colours")
        if channels == 4:
            image = image[:, :, :3]
        if c.to == "grey":
            plane = grey(image, c.start) if channels > 1 else image.reshape(image.shape[:2])
            return raw(frame, plane[:, :, None], "HWC") if c.channel else raw(frame, plane, "HW")
        if channels == 1:
            return raw(frame, np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2), "HWC")
        return raw(frame, np.ascontiguousarray(image if c.to == c.start else image[:, :, ::-1]), "HWC")


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Colour(config)
