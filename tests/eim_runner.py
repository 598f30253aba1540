"""A program that speaks the protocol of an .eim file, for the tests: the demo's digits model behind a Unix socket.

``write(path)`` makes it an executable file. What it does wrong on purpose, it is told by environment: ``EIM_FAULT``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[1] / "nodes" / "demo" / "digits-float.tflite"


def write(path: Path, kind: str = "digits") -> Path:
    """An .eim file of that kind: ``digits`` (images), ``motion`` (windows of a sensor, with anomalies) or ``boxes``."""
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {kind} "$1"\n')
    path.chmod(0o755)
    return path


PARAMETERS: dict[str, dict[str, Any]] = {
    "digits": {
        "sensor": 3,
        "model_type": "classification",
        "image_input_width": 8,
        "image_input_height": 8,
        "image_channel_count": 1,
        "input_features_count": 64,
        "labels": [str(n) for n in range(10)],
        "label_count": 10,
        "has_anomaly": 0,
    },
    "motion": {
        "sensor": 2,
        "model_type": "classification",
        "input_features_count": 6,
        "labels": ["idle", "moving"],
        "label_count": 2,
        "has_anomaly": 1,
    },
    "boxes": {
        "sensor": 3,
        "model_type": "object_detection",
        "image_input_width": 20,
        "image_input_height": 10,
        "image_channel_count": 3,
        "input_features_count": 200,
        "labels": ["red", "blue"],
        "label_count": 2,
        "has_anomaly": 0,
    },
}


class Digits:
    """The demo's float model."""

    def __init__(self) -> None:
        from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-untyped, unused-ignore]

        self._runner = Interpreter(str(MODEL))
        self._runner.allocate_tensors()

    def classify(self, features: list[int]) -> dict[str, Any]:
        """Grey pixels as 0xRRGGBB."""
        import numpy as np

        grey = np.array([number & 0xFF for number in features], np.float32) / 255
        self._runner.set_tensor(0, grey.reshape(1, 8, 8, 1))
        self._runner.invoke()
        scores = self._runner.get_tensor(self._runner.get_output_details()[0]["index"])[0]
        return {"classification": {str(n): float(score) for n, score in enumerate(scores)}}


def motion(features: list[float]) -> dict[str, Any]:
    """Moving is what changes; an anomaly what is large."""
    moving = min(1.0, max(features) - min(features))
    return {"classification": {"moving": moving, "idle": 1 - moving}, "anomaly": max(map(abs, features))}


def boxes(features: list[int]) -> dict[str, Any]:
    """A box for the first pure red pixel and one for the first pure blue one."""
    found = []
    for label, colour, value in (("red", 0xFF0000, 0.7), ("blue", 0x0000FF, 0.9)):
        if colour in features:
            y, x = divmod(features.index(colour), 20)
            found.append({"label": label, "value": value, "x": x, "y": y, "width": 2, "height": 1})
    return {"bounding_boxes": found}


def main() -> None:
    """Serve until the connection ends."""
    kind, path = sys.argv[1:3]
    fault = os.environ.get("EIM_FAULT", "")
    if fault == "start":
        sys.exit("libgomp.so.1: cannot open shared object file")
    if fault == "mute":
        time.sleep(60)
    kinds: dict[str, Callable[[list[Any]], dict[str, Any]]] = {"motion": motion, "boxes": boxes}
    classify = kinds[kind] if kind in kinds else Digits().classify
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(1)
        link, _ = server.accept()
    asked = 0
    with link, link.makefile("rb") as lines:
        for said in lines:
            question = json.loads(said)
            answer: dict[str, Any] = {"id": question["id"], "success": True}
            if "hello" in question:
                answer |= {"model_parameters": PARAMETERS[kind], "project": {"name": kind, "deploy_version": 3}}
                if fault == "parameters":
                    answer["model_parameters"] = {"sensor": 3}
            elif len(question["classify"]) != PARAMETERS[kind]["input_features_count"]:
                answer = {
                    "id": question["id"],
                    "success": False,
                    "error": "The size of the input buffer does not match",
                }
            else:
                asked += 1
                if fault == "dies" and asked == 2:
                    os._exit(7)
                if fault == "hangs" and asked == 2:
                    time.sleep(60)
                answer |= {"result": classify(question["classify"]), "timing": {"classification": 1}}
            link.sendall(json.dumps(answer).encode() + b"\0")


if __name__ == "__main__":
    main()
