"""Put an image's axes in another order: ``{layout: CHW}``, ``{layout: HWC}``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._image import raw, values
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.messages import Frame


class Config(StepOptions):
    """Options of ``layout``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"enum": ["CHW", "HWC", "HW"]}

    to: Literal["CHW", "HWC", "HW"] = Field(description="axes that go on; HW only of an image with one channel")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"to": value}


class Layout(FrameStep):
    """Same values, other axes."""

    def __init__(self, to: str) -> None:
        self.to = to

    def frame(self, frame: Frame) -> Frame:
        frame, array = values(frame)
        if frame.layout not in ("HW", "HWC", "CHW"):
            raise RefusedError("wrong-layout", f"expected an image, got layout {frame.layout}")
        if frame.layout == self.to:
            return frame
        full = (
            array[:, :, None] if frame.layout == "HW" else array.transpose(1, 2, 0) if frame.layout == "CHW" else array
        )
        if self.to == "HW":
            if full.shape[2] != 1:
                raise RefusedError("wrong-shape", f"{full.shape[2]} channels do not fit the layout HW")
            full = full[:, :, 0]
        elif self.to == "CHW":
            full = full.transpose(2, 0, 1)
        return raw(frame, np.ascontiguousarray(full), self.to)


def build(config: Config, context: Context) -> FrameStep:
    """The step."""
    return Layout(config.to)
