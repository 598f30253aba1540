"""Pixels to JPEG or PNG: ``{encode: jpeg}``, ``{encode: {format: jpeg, quality: 80}}``. Takes uint8; PNG also 16-bit grey."""

from __future__ import annotations

from io import BytesIO
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from pydantic import Field

from nodes.operator import Context
from nodes.steps._image import pillow, pixels
from nodes.steps._step import FRAMES, FrameStep, RefusedError, StepOptions
from schemas.messages import Frame

EXTRA = "image"


class Config(StepOptions):
    """Options of ``encode``."""

    takes: ClassVar[frozenset[str]] = FRAMES
    bare: ClassVar[dict[str, Any] | None] = {"enum": ["jpeg", "png"]}

    format: Literal["jpeg", "png"] = Field(description="jpeg (small, loses detail) or png (exact)")
    quality: int = Field(default=90, ge=1, le=95, description="of jpeg, 1 to 95")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"format": value}


class Encode(FrameStep):
    """Pixels to a file's bytes."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def frame(self, frame: Frame) -> Frame:
        if frame.encoding == self.config.format:
            return frame
        frame, image = pixels(frame)
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        fits = image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2] == 3)
        deep = self.config.format == "png" and image.dtype == np.uint16 and image.ndim == 2
        if not (fits or deep):
            shape = f"{image.dtype.name}{list(image.shape)}"
            raise RefusedError("wrong-dtype", f"expected uint8 of one or three channels, got {shape}")
        out = BytesIO()
        options: dict[str, Any] = {"quality": self.config.quality} if self.config.format == "jpeg" else {}
        try:
            pillow().fromarray(np.ascontiguousarray(image)).save(out, format=self.config.format.upper(), **options)
        except (OSError, ValueError) as error:
            raise RefusedError("bad-image", f"{self.config.format}: {error}") from None
        layout = "HW" if image.ndim == 2 else "HWC"
        return msgspec.structs.replace(frame, data=out.getvalue(), encoding=self.config.format, layout=layout)


def build(config: Config, context: Context) -> FrameStep:
    """The step.

    :raises MissingError: Pillow is not installed.
    """
    pillow()
    return Encode(config)
