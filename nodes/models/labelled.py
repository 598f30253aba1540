"""Examples whose answer is known, as messages: from an .npz file, or from a folder with a folder of images for each class."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from schemas.errors import ConfigError
from schemas.messages import Array, Body, Frame, Message, Tensors

IMAGES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}
"""Ending of an image's file → its encoding."""


class Known(NamedTuple):
    """One example and its right answer."""

    message: Message
    label: str


def examples(path: Path, x: str = "images", y: str = "labels", classes: list[str] | None = None) -> Iterator[Known]:
    """The examples, in an order that is always the same.

    :param x: array of an .npz file with the inputs, the first axis counting them; uint8 with two or three more is images.
    :param y: its array with the labels: names, or numbers of ``classes``.
    :raises ConfigError: there is no such thing, or the labels are not those of ``classes``.
    """
    if path.is_dir():
        return _folder(path, classes)
    if path.suffix == ".npz":
        return _arrays(path, x, y, classes)
    raise ConfigError(f"{path}: expected an .npz file, or a folder with a folder of images for each class")


def _named(label: str, where: str, classes: list[str] | None) -> str:
    if classes is not None and label not in classes:
        raise ConfigError(f"{where}: the label {label!r} is none of the model's ({', '.join(classes[:12])})")
    return label


def _folder(path: Path, classes: list[str] | None) -> Iterator[Known]:
    found = 0
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        for file in sorted(folder.iterdir()):
            if (encoding := IMAGES.get(file.suffix.lower())) is None:
                continue
            label = _named(folder.name, str(folder), classes)
            found += 1
            frame = Frame(data=file.read_bytes(), encoding=encoding, attributes={"label": label})
            yield Known(_message(f"{folder.name}/{file.name}", found, frame), label)
    if not found:
        raise ConfigError(f"{path} has no folder with images ({', '.join(IMAGES)}) in it")


def _arrays(path: Path, x: str, y: str, classes: list[str] | None) -> Iterator[Known]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [name for name in (x, y) if name not in file.files]
            if missing:
                raise ConfigError(f"{path} has no array {missing[0]!r}; it has {', '.join(file.files)}")
            inputs, labels = file[x], file[y]
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: {error}") from None
    if labels.ndim != 1 or len(labels) != len(inputs) or not len(labels):
        raise ConfigError(
            f"{path}: {x} {list(inputs.shape)} and {y} {list(labels.shape)}; expected a label for each input"
        )
    numbers = labels.dtype.kind in "iu"
    if numbers and classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ConfigError(f"{path}: labels from {labels.min()} to {labels.max()} for {len(classes)} classes")
    if labels.dtype.kind not in "iuU":
        raise ConfigError(f"{path}: {y} has numbers of type {labels.dtype}; expected whole numbers or texts")
    for i, (value, known) in enumerate(zip(inputs, labels.tolist(), strict=True)):
        label = classes[known] if numbers and classes is not None else _named(str(known), str(path), classes)
        yield Known(_message(str(i), i, _body(value, label)), label)


def _body(value: Array, label: str) -> Body:
    if value.dtype == np.uint8 and value.ndim in (2, 3):
        return Frame(data=value, attributes={"label": label})
    return Tensors(tensors={"x": np.ascontiguousarray(value)}, attributes={"label": label})


def _message(ident: str, number: int, body: Body) -> Message:
    return Message(f"example:{ident}", "examples", number, body)
