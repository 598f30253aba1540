"""Boxes with classes: SSD's four outputs, or one output in the manner of YOLO, with non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from nodes.backends._backend import Spec
from nodes.decoders._boxes import corners, suppress
from nodes.decoders._decoder import Answer, Decoder, pick
from nodes.options import Options
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.messages import Array

MOST_CANDIDATES = 3000
"""Boxes above the threshold that suppression looks at, best first: a bound on time when a picture is full of them."""
_ROLES = ("boxes", "classes", "scores", "count")


class Config(Options):
    """How outputs become boxes."""

    format: Literal["auto", "ssd", "yolo", "yolo5", "rows"] = Field(
        "auto",
        description="ssd: four outputs (boxes y0 x0 y1 x1, classes, scores, count). yolo: centre, size and the score of each "
        "class (YOLOv8 and later). yolo5: centre, size, objectness and the score of each class. rows: x0 y0 x1 y1, score, "
        "class. auto: told from the outputs' shapes and the number of labels.",
    )
    threshold: float = Field(0.5, description="Lowest score of a box, 0..1.", ge=0, le=1)
    iou: float = Field(
        0.45, description="Overlap (intersection over union) above which the lesser box goes.", ge=0, le=1
    )
    most: int = Field(100, description="Most boxes of one frame.", ge=1, le=10_000)
    across: bool = Field(False, description="Boxes of different classes suppress each other too.")
    coordinates: Literal["unit", "pixels"] = Field(
        "unit", description="What the model's boxes are in: 0..1 of the frame, or pixels of the frame."
    )
    outputs: dict[Literal["boxes", "classes", "scores", "count"], str] | None = Field(
        None, description="For ssd: which output is which, by name; left out: told from shapes and order."
    )
    output: str | None = Field(None, description="For the others: name of the output, where the model has several.")


class Found(NamedTuple):
    """Boxes of one item as the model gave them: [k, 4] xyxy, scores [k], class numbers [k]."""

    boxes: Array
    scores: Array
    classes: Array


def build(config: Config, labels: Sequence[str], top: int) -> Decoder:
    """The decoder; without ``labels`` the classes are named by their numbers. ``top`` says nothing here."""
    del top
    return Detection(config, labels)


class Detection(Decoder):
    """Boxes in pixels of the frame that the model saw, best first."""

    def __init__(self, config: Config, labels: Sequence[str]) -> None:
        self._config = config
        self._labels = list(labels)
        self._format = ""
        self._roles: dict[str, str] = {}
        self._name = ""
        self._turn = False

    def check(self, outputs: Sequence[Spec]) -> None:
        """Tell the format, and which output or axis is which."""
        form = self._config.format
        if form == "ssd" or (form == "auto" and (len(outputs) == 4 or self._config.outputs)):
            self._format = "ssd"
            self._roles = self._ssd_roles(outputs)
            return
        spec = pick(outputs, self._config.output, "detection")
        self._name = spec.name
        if -1 in spec.shape:  # told when the model is open
            return
        if len(spec.shape) != 2:
            raise ConfigError(
                f"detection needs an output of two axes, boxes and numbers of a box; the model gives {spec}"
            )
        self._format, self._turn = self._one_output(spec, form)

    def _one_output(self, spec: Spec, form: str) -> tuple[str, bool]:
        """The format, and whether the axis of boxes is the last one."""
        classes = len(self._labels)
        widths = {"rows": 6, "yolo": 4 + classes, "yolo5": 5 + classes}
        if not classes:
            # The numbers of a box are far fewer than the boxes.
            width = min(spec.shape)
            least = {"rows": 6, "yolo": 5, "yolo5": 6}
            if form == "auto":
                raise ConfigError(f"cannot tell the format of {spec} without labels; say format: yolo, yolo5 or rows")
            if width < least[form] or (form == "rows" and width != 6):
                raise ConfigError(f"{spec} is not of the format {form}")
            return form, spec.shape[1] != width
        shorter = 1 if spec.shape[1] <= spec.shape[0] else 0
        axes = (shorter,) if form == "auto" else (1, 0)
        fits = [(f, axis) for f, w in widths.items() for axis in axes if spec.shape[axis] == w and form in ("auto", f)]
        if len({f for f, _ in fits}) > 1:
            several = ", ".join(dict.fromkeys(f for f, _ in fits))
            raise ConfigError(
                f"{spec} with {classes} labels may be of the formats {several}; say which: format: {fits[0][0]}"
            )
        if not fits:
            wanted = ", ".join(f"{f}: {w}" for f, w in widths.items() if form in ("auto", f))
            raise ConfigError(f"{spec} does not fit {classes} labels (numbers of a box expected: {wanted})")
        return fits[0][0], fits[0][1] == 0

    def _ssd_roles(self, outputs: Sequence[Spec]) -> dict[str, str]:
        names = [spec.name for spec in outputs]
        if self._config.outputs is not None:
            roles = {str(role): name for role, name in self._config.outputs.items()}
            for role, name in roles.items():
                if name not in names:
                    raise ConfigError(
                        Problem(("outputs", role), f"the model has no output {name!r}{did_you_mean(name, names)}")
                    )
            if missing := [role for role in _ROLES if role not in roles and role != "count"]:
                raise ConfigError(Problem(("outputs",), f"it does not say which output has the {missing[0]}"))
            return roles
        if len(outputs) != 4:
            raise ConfigError(f"ssd needs four outputs ({', '.join(_ROLES)}); the model has {len(outputs)}")
        if named := _roles_by_name(names):
            return named
        if any(-1 in spec.shape for spec in outputs):
            return {}  # told when the model is open
        # Converters shuffle outputs; the numbers at the end of their names keep the order that was meant.
        outputs = sorted(outputs, key=lambda spec: _numbered(spec.name))
        boxes = [i for i, spec in enumerate(outputs) if len(spec.shape) == 2 and spec.shape[1] == 4]
        count = [i for i, spec in enumerate(outputs) if spec.shape in {(), (1,)}]
        if len(boxes) != 1 or len(count) != 1:
            raise ConfigError(
                "cannot tell ssd's outputs by their shapes; say outputs: {boxes: …, classes: …, scores: …}"
            )
        # Two orders are in use: boxes, classes, scores, count; and, by signature, count, scores, classes, boxes.
        first, second = (i for i in range(4) if i not in {boxes[0], count[0]})
        classes, scores = (first, second) if boxes[0] < count[0] else (second, first)
        found = {"boxes": boxes[0], "classes": classes, "scores": scores, "count": count[0]}
        return {role: outputs[i].name for role, i in found.items()}

    def decode(self, outputs: dict[str, Array], sizes: Sequence[tuple[int, int]]) -> list[Answer]:
        """Per frame: threshold, suppression, pixels, clipped to the frame."""
        return [self._answer(self._found(outputs, i), size) for i, size in enumerate(sizes)]

    def _found(self, outputs: dict[str, Array], item: int) -> Found:
        if self._format == "ssd":
            roles = self._roles
            boxes, classes = outputs[roles["boxes"]][item], outputs[roles["classes"]][item]
            scores = outputs[roles["scores"]][item]
            n = int(outputs[roles["count"]][item].reshape(-1)[0]) if "count" in roles else len(scores)
            n = max(0, min(n, len(scores)))
            return Found(boxes[:n, [1, 0, 3, 2]], scores[:n], np.rint(classes[:n]).astype(np.int64))
        table = outputs[self._name][item]
        if self._turn:
            table = table.T
        if self._format == "rows":
            return Found(table[:, :4], table[:, 4], np.rint(table[:, 5]).astype(np.int64))
        first = 4 if self._format == "yolo" else 5
        classes = table[:, first:].argmax(axis=1)
        scores = np.take_along_axis(table[:, first:], classes[:, None], axis=1)[:, 0]
        if self._format == "yolo5":
            scores = scores * table[:, 4]
        return Found(corners(table[:, :4]), scores, classes)

    def _answer(self, found: Found, size: tuple[int, int]) -> Answer:
        config = self._config
        chosen = np.flatnonzero(found.scores >= max(config.threshold, np.finfo(np.float32).tiny))
        if len(chosen) > MOST_CANDIDATES:
            chosen = chosen[np.argsort(-found.scores[chosen], kind="stable")[:MOST_CANDIDATES]]
        boxes = found.boxes[chosen].astype(np.float32)
        if config.coordinates == "unit":
            boxes *= np.array(size * 2, np.float32)
        scores, classes = found.scores[chosen].astype(np.float32), found.classes[chosen]
        kept = suppress(boxes, scores, None if config.across else classes, config.iou, config.most)
        boxes = boxes[kept]
        if size != (1, 1):
            np.clip(boxes, 0, np.array(size * 2, np.float32), out=boxes)
        names = [self._label(number) for number in classes[kept].tolist()]
        return Answer(names, np.clip(scores[kept], 0, 1), boxes)

    def _label(self, number: int) -> str:
        return self._labels[number] if 0 <= number < len(self._labels) else str(number)


def _roles_by_name(names: Sequence[str]) -> dict[str, str]:
    """The roles where each has just one output that says so (``detection_boxes``); else empty."""
    words = {"boxes": ("box",), "classes": ("class",), "scores": ("score",), "count": ("num", "count")}
    roles = {role: [n for n in names if any(word in n.lower() for word in hints)] for role, hints in words.items()}
    if any(len(found) != 1 for found in roles.values()) or len({found[0] for found in roles.values()}) != 4:
        return {}
    return {role: found[0] for role, found in roles.items()}


def _numbered(name: str) -> tuple[str, int]:
    """A name's stem and the number at its end (-1: none), to sort by."""
    stem = name.rstrip("0123456789")
    return stem.rstrip(":_"), int(name[len(stem) :] or -1)
