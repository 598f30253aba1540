"""Turn images clockwise: ``{rotate: 90}``, for a camera that hangs on its side."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._image import pixels, raw
from nodes.steps._step import FRAMES, FrameStep, StepOptions
from schemas.messages import Frame


class Config(StepOptions):
    """Options of ``rotate``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"enum": [90, 180, 270]}

    degrees: Literal[90, 180, 270] = Field(description="how far, clockwise")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"degrees": value}


class Rotate(FrameStep):
    """The turned image."""

    def __init__(self, degrees: int) -> None:
        self.quarters = -degrees // 90

    def frame(self, frame: Frame) -> Frame:
        frame, image = pixels(frame)
        return raw(frame, np.ascontiguousarray(np.rot90(image, self.quarters)))


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Rotate(config.degrees)
