"""Images from a folder: PNG, JPEG and .npy files, in natural order, with labels from their names or folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from nodes.operator import Context, Source
from nodes.sources import _files
from nodes.sources._frames import StoredFrames, StoredFramesSource
from schemas.errors import ConfigError, MissingError, Problem
from schemas.messages import Frame, Scalar

EXTRA = "image"
ENCODINGS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".npy": "raw"}
MAX_PIXELS = 100_000_000
_SAMPLE = 64 * 1024  # bytes of a broken file that go to the dead letters


class Config(StoredFrames):
    """Options of the ``images`` source."""

    path: str = Field(description="the folder")
    pattern: str = Field("**/*", description="which files, e.g. 'belt-*.png'; ** are all folders below")
    label: str | None = Field(
        None, description="'folder', a .csv file (name, label), or a regular expression in the file's name"
    )
    decode: bool = Field(True, description="send arrays of pixels; otherwise the files' bytes")
    colour: Literal["keep", "rgb", "grey"] = Field("keep", description="colours of decoded images; keep is grey or RGB")
    time: Literal["modified"] | None = Field(None, description="event time: when the file was modified last")

    def check(self, context: Context) -> None:
        super().check(context)
        path = context.path(self.path)
        _files.must_exist(path, "path", folder=True)
        _files.labeller(self.label, context.path)
        if not self.decode and self.colour != "keep":
            raise ConfigError(Problem(("colour",), "colours change only when images are decoded"))
        if self.time is not None and self.start is not None:
            raise ConfigError(Problem(("start",), "the event time is the file's ('time')"))
        try:
            if next(_matching(path, self.pattern), None) is None:
                raise ConfigError(
                    Problem(("pattern",), f"no PNG, JPEG or .npy file in {path} matches {self.pattern!r}")
                )
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(Problem(("pattern",), f"not a pattern: {error}")) from None


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    return (p for p in folder.glob(pattern) if p.suffix.lower() in ENCODINGS and p.is_file())


def build(config: Config, context: Context) -> Source:
    """An :class:`ImagesSource`.

    :raises MissingError: images are to be decoded and Pillow is not installed.
    """
    if config.decode:
        try:
            import PIL.Image  # noqa: F401 - found out now, not at the first frame
        except ImportError:
            raise MissingError("Pillow", extra=EXTRA) from None
    return ImagesSource(config, context)


class ImagesSource(StoredFramesSource):
    """Reads and decodes in a thread. A file that is no image goes to the dead letters."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self._config = config
        self._folder = context.path(config.path)
        self._label = _files.labeller(config.label, context.path)
        self._files: list[Path] = []

    def load(self) -> tuple[str, int]:
        if not self._folder.is_dir():
            raise _files.missing(self._folder)
        self._files = sorted(_matching(self._folder, self._config.pattern), key=_files.natural)
        return _files.digest_listing(self._files, self._folder), len(self._files)

    def read(self, index: int) -> tuple[Frame, int | None] | tuple[bytes, str, str, str]:
        path = self._files[index]
        relative = path.relative_to(self._folder)
        attributes: dict[str, Scalar] = {"path": relative.as_posix()}
        if (label := self._label(relative)) is not None:
            attributes["label"] = label
        payload = b""
        try:
            time = path.stat().st_mtime_ns if self._config.time else None
            encoding = ENCODINGS[path.suffix.lower()]
            if encoding == "raw":
                data = np.load(path, allow_pickle=False)
                if data.ndim not in (1, 2, 3) or data.dtype.kind not in "biuf":
                    raise ValueError(f"{data.dtype} of shape {list(data.shape)} is no frame")
                layout = {1: "T", 2: "HW", 3: "HWC"}[data.ndim]
                frame = Frame(data=data, layout=layout, rate=self._config.rate, attributes=attributes)
            elif self._config.decode:
                data = self._decode(path)
                layout = "HW" if data.ndim == 2 else "HWC"
                frame = Frame(data=data, layout=layout, rate=self._config.rate, attributes=attributes)
            else:
                payload = path.read_bytes()
                _same(payload, encoding)
                frame = Frame(data=payload, encoding=encoding, rate=self._config.rate, attributes=attributes)
        except Exception as error:  # noqa: BLE001 - image and array readers raise anything on damaged files
            try:
                with path.open("rb") as file:
                    payload = file.read(_SAMPLE)
            except OSError:
                payload = b""
            return payload, "bad-image", f"{type(error).__name__}: {error}", relative.as_posix()
        return frame, time

    def _decode(self, path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Pixels as uint8 [h, w] (grey) or [h, w, 3] (RGB), turned upright as its EXIF data say."""
        from PIL import Image, ImageOps

        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} × {opened.height} pixels, at most {MAX_PIXELS}")
            image = ImageOps.exif_transpose(opened)
        colour = self._config.colour
        grey = colour == "grey" or (colour == "keep" and image.mode in ("1", "L", "LA", "I;16", "I"))
        if grey and image.mode.startswith("I"):  # 16 bits a pixel: the upper eight
            return (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        mode = "L" if grey else "RGB"
        return np.asarray(image if image.mode == mode else image.convert(mode))


def _same(payload: bytes, encoding: str) -> None:
    """:raises ValueError: the bytes do not begin like a file of this encoding."""
    signature = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}[encoding]
    if not payload.startswith(signature):
        raise ValueError(f"not a {encoding.upper()} file")
