"""What the image steps share: pixels out of a frame, and Pillow only when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import msgspec
import numpy as np

from nodes.steps._step import RefusedError
from schemas.errors import MissingError
from schemas.messages import Array, Frame

MAX_PIXELS = 1 << 26
"""Most pixels of an image that is decoded: a small file can claim to be a huge image."""


def numbers(count: int, meaning: str) -> Callable[[Any], Any]:
    """A check, before pydantic's own, that a value is a list of so many."""

    def check(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise ValueError(f"expected [{meaning}], got {value!r}")
        return value

    return check


def pillow() -> Any:
    """The module ``PIL.Image``.

    :raises MissingError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingError("Pillow", extra="image") from None
    return Image


def decoded(frame: Frame) -> Frame:
    """The frame with raw pixels: uint8 HWC (RGB) or HW (grey), uint16 HW for 16-bit grey; raw frames as they are.

    :raises RefusedError: the bytes are no image, or one that is too large.
    """
    if isinstance(frame.data, np.ndarray):
        return frame
    image_module = pillow()
    try:
        with image_module.open(BytesIO(frame.data), formats=["JPEG", "PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RefusedError("too-big", f"an image of {image.width} × {image.height} pixels")
            if image.mode.startswith("I"):
                pixels: Array = np.asarray(image).astype(np.uint16)
            else:
                pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise RefusedError("bad-image", f"{frame.encoding}: {error}") from None
    return raw(frame, pixels, "HW" if pixels.ndim == 2 else "HWC")


def raw(frame: Frame, data: Array, layout: str | None = None) -> Frame:
    """The same frame with other raw data."""
    return msgspec.structs.replace(frame, data=data, encoding="raw", layout=frame.layout if layout is None else layout)


def pixels(frame: Frame) -> tuple[Frame, Array]:
    """The frame decoded, and its array, HW or HWC.

    :raises RefusedError: it is no image, or of another layout.
    """
    frame = decoded(frame)
    if not isinstance(frame.data, np.ndarray) or frame.layout not in ("HW", "HWC"):
        raise RefusedError("wrong-layout", f"expected an image (HW or HWC), got layout {frame.layout}")
    if 0 in frame.data.shape:
        raise RefusedError("wrong-shape", f"an image of shape {list(frame.data.shape)} has no pixels")
    return frame, frame.data


def values(frame: Frame) -> tuple[Frame, Array]:
    """The frame decoded, and its array of whatever layout."""
    frame = decoded(frame)
    return frame, np.asarray(frame.data)


def per_channel(numbers: list[float], frame: Frame, shape: tuple[int, ...]) -> Array:
    """One number for all, or one for each channel, shaped to spread over the frame; float32.

    :raises RefusedError: the frame has another number of channels.
    """
    if len(numbers) == 1:
        return np.array(numbers[0], np.float32)
    axis = frame.layout.find("C")
    channels = shape[axis] if axis >= 0 else 1
    if channels != len(numbers):
        raise RefusedError("wrong-shape", f"{len(numbers)} values for {channels} channels")
    return np.array(numbers, np.float32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
