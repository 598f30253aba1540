"""Images per second through camera → preprocess → infer → aggregate → uplink, against the backend in a bare loop.

Two models: the demo's digits CNN (64×64 grey frames, made 8×8 and scaled, as ``examples/digits`` does), and a MobileNetV2 of
random weights on 96×96 colour images (:mod:`benchmarks.mobilenet`) in float and int8. The camera is a stack of images in a
file, played in a loop. All edges are ``safe``: every image that the camera sent is in a count at the sink. The bare loop sets,
invokes and gets, with the batch and the threads that were found best, on images that are ready in memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import mobilenet
from benchmarks.figures import OURS, Comparison, Figure, in_turns
from benchmarks.runs import CACHE, run

DEMO = Path(__file__).parent.parent.parent / "nodes" / "demo"
SECONDS = 4.0
ROUNDS = 5
BAR = 0.9
ONE_PROCESS, FIVE_PROCESSES = 30_000, 10_000
"""Images of the demo's CNN a second."""
FRAMES = 256

_TOPOLOGY = """
topology: inference
nodes:
  camera: {{ingest: {{source: arrays, path: {frames}, loop: true, start: "2026-01-01T00:00:00Z", interval: 1ms}}{process}}}
  ready:  {{preprocess: {{steps: {steps}}}, from: {{camera: {{delivery: safe}}}}{process}}}
  seen:
    infer: {{model: {model}, parallel: {threads}, batch: {{max: {batch}, wait: 5ms}}}}
    from: {{ready: {{delivery: safe}}}}
    {more}
  counts: {{aggregate: {{window: 1min, by: label, fields: {{n: count()}}}}, from: seen{process}}}
  store:  {{uplink: {{sink: jsonl, path: counts.jsonl}}, from: counts{process}}}
"""


@dataclass(frozen=True)
class Case:
    """A model and what comes before it.

    :param steps: of ``preprocess``, as YAML.
    """

    name: str
    model: Path
    frames: Path
    steps: str
    batches: tuple[int, ...]

    def best(self) -> tuple[int, int]:
        """Batch and threads with which the bare loop is fastest."""
        found = {(b, t): self.bare(b, t, 0.5) for b in self.batches for t in (1, 2)}
        return max(found, key=lambda key: found[key])

    def bare(self, batch: int, threads: int, seconds: float = SECONDS) -> float:
        """Images a second of the backend in a loop of its own, in a process of its own."""
        command = [sys.executable, "-m", "benchmarks.bare", str(self.model), str(batch), str(threads), str(seconds)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    def ours(self, folder: Path, batch: int, threads: int, *, one: bool, replicas: int = 1, devices: int = 1) -> float:
        """Images a second through five nodes.

        :param one: in one process; otherwise each in its own.
        :raises RuntimeError: an image is not in the counts.
        """
        out = folder / "counts.jsonl"
        out.unlink(missing_ok=True)
        text = topology(self, batch, threads, one=one, replicas=replicas, devices=devices)
        ran = run(folder, text, SECONDS)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        counted: int = sum(line["body"]["values"]["n"] for line in lines)
        sent = sum(ran.emitted(name) for name in ran.outcome.ledgers if name.startswith("camera"))
        if counted != sent:
            raise RuntimeError(f"{sent} images sent, {counted} counted")
        if len({line["body"]["key"] for line in lines}) < 2:
            raise RuntimeError("one answer for all images: the model does not tell them apart")
        return counted / ran.seconds


def topology(case: Case, batch: int, threads: int, *, one: bool, replicas: int = 1, devices: int = 1) -> str:
    """The five nodes as YAML."""
    process = ", process: one" if one else ""
    more = "process: one" if one else f"replicas: {replicas}" if replicas > 1 else ""
    text = _TOPOLOGY.format(
        frames=case.frames, steps=case.steps, model=case.model, threads=threads, batch=batch, process=process, more=more
    )
    if devices == 1:
        return text
    # sources are what replicas share: as many cameras
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  camera:"))
    names = [f"camera-{i}" for i in range(devices)]
    lines[at : at + 1] = [lines[at].replace("camera:", f"{name}:", 1) for name in names]
    reads = "{" + ", ".join(f"{name}: {{delivery: safe}}" for name in names) + "}"
    return "\n".join(lines).replace("{camera: {delivery: safe}}", reads) + "\n"


def demo() -> Case:
    """The demo's CNN in int8, its 450 digits as they look to the demo's camera."""
    path = CACHE / "digits-64.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with np.load(DEMO / "digits.npz") as digits:
            small = digits["images"][..., 0]
        np.save(path, np.kron(small, np.ones((1, 8, 8), np.uint8)))
    steps = "[{resize: [8, 8]}, {scale: 1/255}]"
    return Case("digits CNN", DEMO / "digits-int8.tflite", path, steps, (16, 64, 256))


def large(*, quantised: bool) -> Case:
    """The MobileNetV2, made once."""
    kind = "int8" if quantised else "float"
    model, frames = CACHE / f"mobilenet-v2-96-{kind}.tflite", CACHE / "pictures-96.npy"
    CACHE.mkdir(parents=True, exist_ok=True)
    if not frames.exists():
        np.save(frames, mobilenet.pictures(FRAMES, 96, seed=5))
    if not model.exists():
        model.write_bytes(mobilenet.tflite(mobilenet.build(), quantised=quantised))
    steps = "[{quantise: {scale: 1, zero_point: -128}}]" if quantised else "[{scale: 1/255}]"
    return Case(f"MobileNetV2 96×96 {kind}", model, frames, steps, (1, 4, 8, 16, 32))


def compare(case: Case, folder: Path, bars: dict[str, float]) -> list[Figure | Comparison]:
    """One process, five, and the bare loop in turns.

    :param bars: what ours in one process and in five is to reach of the bare loop; none for a key that is left out.
    """
    batch, threads = case.best()
    print(f"  {case.name}: batch {batch}, {threads} threads", file=sys.stderr, flush=True)
    contestants: dict[str, Callable[[], float]] = {
        "one": partial(case.ours, folder, batch, threads, one=True),
        "bare": partial(case.bare, batch, threads),
        "five": partial(case.ours, folder, batch, threads, one=False),
    }
    seen = {who: tuple(values) for who, values in in_turns(contestants, ROUNDS).items()}
    loop = f"bare loop, batch {batch}, {threads} threads"
    return [
        Comparison(
            f"{case.name}, five nodes in {words}",
            "images/s",
            {OURS: seen[who], loop: seen["bare"]},
            {loop: bars[who]} if who in bars else {},
        )
        for who, words in (("one", "one process"), ("five", "five processes"))
    ]


def replicated(case: Case, folder: Path) -> Comparison:
    """Two replicas of ``infer`` with a thread each, against one with one thread; four cameras."""
    batch = 8
    runs: dict[str, Callable[[], float]] = {
        OURS: partial(case.ours, folder, batch, 1, one=False, replicas=2, devices=4),
        "one replica": partial(case.ours, folder, batch, 1, one=False, replicas=1, devices=4),
    }
    seen = {who: tuple(values) for who, values in in_turns(runs, ROUNDS).items()}
    return Comparison(f"{case.name}, two replicas of infer", "images/s", seen)


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: list[Figure | Comparison] = []
        digits = compare(demo(), folder, {})
        for figure, bar in zip(digits, (ONE_PROCESS, FIVE_PROCESSES), strict=True):
            assert isinstance(figure, Comparison)  # noqa: S101 - compare() makes such
            found += [figure, Figure(f"  {figure.name}", "images/s", figure.seen[OURS], bar, at_most=False)]
        for quantised in (False, True):
            found += compare(large(quantised=quantised), folder, {"one": BAR, "five": BAR})
        found.append(replicated(large(quantised=True), folder))
    return found
