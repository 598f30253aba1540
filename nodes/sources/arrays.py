"""Frames from one NumPy file: a stack of images or signals, with labels and names where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nodes.operator import Context, Source
from nodes.sources import _files
from nodes.sources._frames import StoredFrames, StoredFramesSource
from schemas.errors import ConfigError, Problem, RunError, did_you_mean
from schemas.messages import Array, Frame, Scalar

LAYOUTS = {1: "T", 2: "HW", 3: "HWC"}


class Config(StoredFrames):
    """Options of the ``arrays`` source."""

    path: str = Field(description="an .npz file, or an .npy file with one stack")
    frames: str = Field(
        "images", description="array of the .npz file that holds the frames, the first axis counting them"
    )
    labels: str | None = Field(
        None, description="array of the .npz file with one label a frame; 'labels' where it has one"
    )
    names: list[str] | None = Field(None, description="names of labels that are numbers: the name of 0, of 1, …")
    layout: str | None = Field(None, description="axes of one frame: T, HW, HWC, CHW, TC; by their number if left out")

    def check(self, context: Context) -> None:
        super().check(context)
        path = context.path(self.path)
        _files.must_exist(path, "path")
        if path.suffix not in (".npz", ".npy"):
            raise ConfigError(Problem(("path",), f"expected an .npz or .npy file, got {path.name}"))
        _stack(self, path)


def _stack(config: Config, path: Path) -> tuple[Array, Array | None]:
    """Frames and labels: an .npy is mapped, the arrays that are named are read from an .npz.

    :raises ConfigError: it is none, or lacks an array that is named.
    """
    try:
        if path.suffix == ".npy":
            if config.labels is not None:
                raise ConfigError(Problem(("labels",), "an .npy file has one array only; labels need an .npz file"))
            # a plain view: each part of a memmap would be one too, which takes ten times as long to make
            return _checked(config, np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)), None)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
            for key in ("frames", "labels"):
                name = getattr(config, key)
                if name is not None and name not in loaded.files:
                    hint = did_you_mean(name, loaded.files)
                    raise ConfigError(Problem((key,), f"{path.name} has no array {name!r}{hint}"))
            name = config.labels or ("labels" if "labels" in loaded.files else None)
            return _checked(config, loaded[config.frames], None if name is None else loaded[name])
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged archives raise zipfile's, zlib's and NumPy's own errors
        raise ConfigError(Problem(("path",), f"cannot read {path.name}: {error}")) from None


def _checked(config: Config, frames: Array, labels: Array | None) -> tuple[Array, Array | None]:
    if frames.ndim - 1 not in LAYOUTS or frames.dtype.kind not in "biuf":
        what = f"{frames.dtype} of shape {list(frames.shape)}"
        raise ConfigError(Problem(("frames",), f"expected a stack of numbers with 2 to 4 axes, got {what}"))
    if config.layout is not None and len(config.layout) != frames.ndim - 1:
        raise ConfigError(Problem(("layout",), f"a frame has {frames.ndim - 1} axes"))
    if labels is not None and (labels.ndim != 1 or len(labels) != len(frames)):
        raise ConfigError(Problem(("labels",), f"{len(frames)} frames, labels of shape {list(labels.shape)}"))
    return frames, labels


def build(config: Config, context: Context) -> Source:
    """An :class:`ArraysSource`."""
    return ArraysSource(config, context)


class ArraysSource(StoredFramesSource):
    """Sends views on the stack; attributes ``index`` and ``label``."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self._config = config
        self._path = context.path(config.path)
        self._frames: Array = np.zeros((0, 1))

    def load(self) -> tuple[str, int]:
        if not self._path.is_file():
            raise _files.missing(self._path)
        try:
            self._frames, labels = _stack(self._config, self._path)
        except ConfigError as error:
            raise RunError(f"{self._path}: {error}") from None
        self._layout = self._config.layout or LAYOUTS[self._frames.ndim - 1]
        self._labels = None if labels is None else [self._named(v) for v in labels.tolist()]
        return _files.digest(self._path), len(self._frames)

    def _named(self, value: Any) -> str:
        names = self._config.names
        if names is not None and isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def read(self, index: int) -> tuple[Frame, int | None]:
        attributes: dict[str, Scalar] = {"index": index}
        if self._labels is not None:
            attributes["label"] = self._labels[index]
        data = np.asarray(self._frames[index])
        return Frame(data=data, layout=self._layout, rate=self._config.rate, attributes=attributes), None

    async def close(self) -> None:
        self._frames = np.zeros((0, 1))
