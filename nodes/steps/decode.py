"""JPEG or PNG to pixels: ``decode``. Raw frames pass as they are. The other image steps decode what they need by themselves."""

from __future__ import annotations

from typing import ClassVar

from nodes.operator import Context
from nodes.steps._image import decoded, pillow
from nodes.steps._step import FRAMES, FrameStep, StepOptions
from schemas.messages import Frame

EXTRA = "image"


class Config(StepOptions):
    """Options of ``decode``: none."""

    takes: ClassVar[frozenset[str]] = FRAMES


class Decode(FrameStep):
    """Bytes to uint8 HWC (RGB) or HW (grey)."""

    def frame(self, frame: Frame) -> Frame:
        return decoded(frame)


def build(config: Config, context: Context) -> FrameStep:
    """The step.

    :raises MissingError: Pillow is not installed.
    """
    pillow()
    return Decode()
