"""Mirror images: ``{flip: horizontal}`` (left and right change places), ``{flip: vertical}``, ``{flip: both}``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._image import pixels, raw
from nodes.steps._step import FRAMES, FrameStep, StepOptions
from schemas.messages import Frame


class Config(StepOptions):
    """Options of ``flip``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"enum": ["horizontal", "vertical", "both"]}

    direction: Literal["horizontal", "vertical", "both"] = Field(description="which sides change places")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"direction": value}


class Flip(FrameStep):
    """The mirror image."""

    def __init__(self, direction: str) -> None:
        self.axes = {"horizontal": (1,), "vertical": (0,), "both": (0, 1)}[direction]

    def frame(self, frame: Frame) -> Frame:
        frame, image = pixels(frame)
        return raw(frame, np.ascontiguousarray(np.flip(image, self.axes)))


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Flip(config.direction)
