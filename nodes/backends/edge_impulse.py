"""Edge Impulse's deployments for Linux (.eim): a program of its own, spoken to over a socket. Nothing of theirs is needed.

The program is started with the path of a Unix socket and then asked there: a JSON object a line, answered by a JSON object with
a NUL behind it (docs.edgeimpulse.com, "Linux EIM executable"). It gets the raw features of one item: the pixels of an image, or a
window of a sensor's readings; what the project computes of them before its network is part of the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np
from pydantic import Field

from nodes.backends._backend import Backend, Scaling, Signature, Spec, given, line
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import ConfigError, RunError
from schemas.messages import Array
from schemas.units import Duration

SUFFIXES = (".eim",)
SECOND = 10**9
_LARGEST = 16 * 1024 * 1024
"""Bytes of an answer that nothing meaningful has."""
_MOST_BOXES = 100
_CAMERA = 3
"""``sensor`` of a project that looks at images."""


class Config(Options):
    """How the program is run."""

    start: Duration = Field(10 * SECOND, gt=0, description="for the program to start and to tell what it takes")
    answer: Duration = Field(
        10 * SECOND, gt=0, description="for one answer; then the program counts as hung, and is replaced"
    )


def inspect(model: Path) -> Signature | None:
    """It only says whether it may be run; what it takes, it tells when it runs."""
    if not os.access(model, os.X_OK):
        raise ConfigError(f"it may not be run: chmod +x {model.name}")
    return None


def build(config: Config, context: Context, model: Path, threads: int) -> Backend:
    """The backend for ``model``."""
    return EdgeImpulse(model, config.start / SECOND, config.answer / SECOND)


class EdgeImpulse(Backend):
    """The program and the socket to it. One that has died or hangs is started anew for the next batch."""

    def __init__(self, model: Path, start: float, answer: float) -> None:
        self._model = model
        self._start, self._answer = start, answer
        self._runner: _Runner | None = None
        self._said: dict[str, Any] = {}
        self._labels: list[str] = []
        self._signature: Signature

    def open(self) -> Signature:
        """Start the program and ask it what it is."""
        try:
            self._runner = _Runner(self._model, self._start)
        except RunError as error:
            raise ConfigError(str(error)) from error
        try:
            self._said = self._runner.hello["model_parameters"]
            self._labels = [str(label) for label in self._said["labels"]]
            self._signature = self._describe()
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise ConfigError(f"{self._model.name} does not tell what it takes: {line(error)}") from error
        return self._signature

    def _describe(self) -> Signature:
        said, outputs = self._said, []
        if self._camera:
            shape = (int(said["image_input_height"]), int(said["image_input_width"]), int(said["image_channel_count"]))
            entry = Spec("image", shape, "uint8")
        else:
            entry = Spec("features", (int(said["input_features_count"]),), "float32", flat=True)
        if self._detects:
            many = _MOST_BOXES
            shapes = {"boxes": (many, 4), "classes": (many,), "scores": (many,), "count": ()}
            outputs = [Spec(name, axes, "float32") for name, axes in shapes.items()]
        elif self._labels:
            outputs = [Spec("scores", (len(self._labels),), "float32")]
        if said.get("has_anomaly"):
            outputs.append(Spec("anomaly", (1,), "float32"))
        if not outputs:
            raise ValueError("neither classes nor an anomaly's score")
        return Signature((entry,), tuple(outputs), None)

    @property
    def _camera(self) -> bool:
        return int(self._said.get("sensor", 0)) == _CAMERA

    @property
    def _detects(self) -> bool:
        return str(self._said.get("model_type", "")).endswith("object_detection")

    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """One question for each item."""
        entry = self._signature.inputs[0]
        values = given(inputs[entry.name], entry, scaling)
        if self._runner is None or not self._runner.alive:
            self.close()
            self._runner = _Runner(self._model, self._start)
        runner = self._runner
        answers: dict[str, list[Any]] = {spec.name: [] for spec in self._signature.outputs}
        for value in values:
            features = packed(value) if self._camera else value.reshape(-1).tolist()
            try:
                result = runner.ask({"classify": features}, self._answer)["result"]
                for name, numbers in self._read(result).items():
                    answers[name].append(numbers)
            except RunError:
                self.close()
                raise
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RunError(f"{self._model.name} answered what is no result: {line(error)}") from error
        return {name: np.array(rows, np.float32) for name, rows in answers.items()}

    def _read(self, result: dict[str, Any]) -> dict[str, Any]:
        """One result as the outputs' numbers."""
        out: dict[str, Any] = {}
        if self._detects:
            out |= self._boxes(result.get("bounding_boxes", []))
        elif self._labels:
            scores = result["classification"]
            out["scores"] = [float(scores[label]) for label in self._labels]
        if self._said.get("has_anomaly"):
            out["anomaly"] = [float(result["anomaly"])]
        return out

    def _boxes(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """In SSD's manner: edges in parts of the image, y before x."""
        height, width = self._signature.inputs[0].shape[:2]
        boxes = np.zeros((_MOST_BOXES, 4), np.float32)
        classes, scores = np.zeros(_MOST_BOXES, np.float32), np.zeros(_MOST_BOXES, np.float32)
        best = sorted(found, key=lambda box: -float(box["value"]))[:_MOST_BOXES]
        for i, box in enumerate(best):
            x, y, w, h = (float(box[name]) for name in ("x", "y", "width", "height"))
            boxes[i] = y / height, x / width, (y + h) / height, (x + w) / width
            classes[i], scores[i] = self._labels.index(box["label"]), float(box["value"])
        return {"boxes": boxes, "classes": classes, "scores": scores, "count": float(len(best))}

    def close(self) -> None:
        """Stop the program."""
        if self._runner is not None:
            self._runner.stop()
            self._runner = None


def packed(image: Array) -> list[int]:
    """An image, uint8 [height, width, 1 or 3], as the program takes it: a number 0xRRGGBB for each pixel."""
    channels = image.reshape(-1, image.shape[-1]).astype(np.int64)
    red, green, blue = (channels[:, 0],) * 3 if channels.shape[1] == 1 else channels.T
    numbers: list[int] = ((red << 16) + (green << 8) + blue).tolist()
    return numbers


class _Runner:
    """The program, running.

    :raises RunError: it does not start, or does not answer in time.
    """

    def __init__(self, model: Path, patience: float) -> None:
        self._name = model.name
        self._folder = tempfile.TemporaryDirectory(prefix="eim-")  # a socket's path has to be short
        path = Path(self._folder.name) / "s"
        self._number = 0
        self._left = b""
        self._socket: socket.socket | None = None
        self._words: deque[str] = deque(maxlen=4)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the user's own model is a program
                [str(model.resolve()), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for us; it is stopped when we are done
            )
        except OSError as error:
            self._folder.cleanup()
            raise RunError(f"{self._name} does not start: {error.strerror}") from error
        assert self._process.stdout is not None  # noqa: S101 - for the type checker: it is a pipe
        self._listener = Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()
        try:
            self._connect(path, time.monotonic() + patience)
            self.hello = self.ask({"hello": 1}, patience)
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """It can be asked."""
        return self._socket is not None and self._process.poll() is None

    def _listen(self, stream: IO[str]) -> None:
        """Keep its last words; a pipe that nobody reads would stop it."""
        with contextlib.suppress(ValueError, OSError):
            for text in stream:
                self._words.append(text.strip())

    def _failed(self, what: str) -> RunError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # it may be about to end, and then says why
        code = self._process.poll()
        if code is not None:
            self._listener.join(1)
            what = f"it ended by itself with code {code}"
        words = "; ".join(word for word in self._words if word)[:300]
        return RunError(f"{self._name}: {what}{f' ({words})' if words else ''}")

    def _connect(self, path: Path, until: float) -> None:
        while True:
            link = socket.socket(socket.AF_UNIX)
            try:
                link.connect(str(path))
            except OSError:
                link.close()
                if self._process.poll() is not None or time.monotonic() > until:
                    raise self._failed("it does not open its socket") from None
                time.sleep(0.01)
            else:
                self._socket = link
                return

    def ask(self, question: dict[str, Any], patience: float) -> dict[str, Any]:
        """One question and its answer.

        :raises RunError: the program has died, hangs, or refuses.
        """
        assert self._socket is not None  # noqa: S101 - for the type checker: nobody asks after stop
        self._number += 1
        until = time.monotonic() + patience
        try:
            self._socket.settimeout(patience)
            self._socket.sendall(json.dumps({**question, "id": self._number}).encode() + b"\n")
            while True:
                whole, found, rest = self._left.partition(b"\0")
                if found:
                    self._left = rest
                    answer = json.loads(whole)
                    if answer.get("id") == self._number:
                        break
                    continue
                self._socket.settimeout(max(0.001, until - time.monotonic()))
                more = self._socket.recv(1 << 16)
                if not more or len(self._left) > _LARGEST:
                    raise self._failed("it ended the conversation")
                self._left += more
        except TimeoutError:
            raise self._failed(f"no answer within {patience:g} s") from None
        except (OSError, ValueError, AttributeError) as error:
            raise self._failed(line(error)) from error
        if not answer.get("success"):
            raise RunError(f"{self._name}: {line(Exception(answer.get('error', 'it refuses, and does not say why')))}")
        said: dict[str, Any] = answer
        return said

    def stop(self) -> None:
        """End the program: it is asked, and killed when it does not listen."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._listener.join(1)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()
