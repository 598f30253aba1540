"""Images per second through camera → preprocess → infer → aggregate → uplink, against the backend in a bare loop.

Two models: the demo's digits CNN (64×64 grey frames, made 8×8), and a MobileNetV2 of random weights in float and int8
(:mod:`benchmarks.mobilenet`), whose 96×96 are the middle of colour images of 100×100. Pixels are scaled at the model. The camera
is a stack of images in a file, played in a loop. All edges are ``safe``: every image that the camera sent is in a count at the
sink. The bare loop sets, invokes and gets, with the batch and the threads that were found best, on images ready in memory.
Ours has two copies of the large int8 model, a float one with two threads, and batches that are large.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import mobilenet
from benchmarks.figures import OURS, Comparison, Figure, in_turns
from benchmarks.runs import CACHE, Ran, run

DEMO = Path(__file__).parent.parent.parent / "nodes" / "demo"
SECONDS = 6.0
ROUNDS = 5
BAR = 0.9
ONE_PROCESS, FIVE_PROCESSES = 30_000, 10_000
"""Images of the demo's CNN a second."""
FRAMES = 256
CAMERAS = 12
SEEN, SIDE = 100, 96
"""Sides of the camera's colour images and of the large model's, pixels."""

_CAMERA = """
  {name}:
    ingest: {{source: arrays, path: {frames}, loop: {loop}, start: "2026-01-01T00:00:00Z", interval: 1ms}}
    {process}
""".strip("\n")
_TOPOLOGY = """
topology: inference
nodes:
{cameras}
  ready:  {{preprocess: {{steps: {steps}}}, from: {{{reads}}}{process}}}
  seen:
    infer: {{model: {model}, scale: 1/255, threads: {threads}, parallel: {copies}, batch: {{max: {batch}, wait: 5ms}}}}
    from: {{ready: {{delivery: safe}}}}
    {more}
  counts: {{aggregate: {{window: 1min, by: label, fields: {{n: count()}}}}, from: seen{process}}}
  store:  {{uplink: {{sink: jsonl, path: counts.jsonl}}, from: counts{process}}}
"""


@dataclass(frozen=True)
class Case:
    """A model and what comes before it.

    :param steps: of ``preprocess``, as YAML.
    :param batches: that the bare loop is tried with.
    :param batch: ours; copies: of the model, each with so many threads, ours.
    """

    name: str
    model: Path
    frames: Path
    steps: str
    batches: tuple[int, ...]
    batch: int
    copies: int = 1
    threads: int = 1

    def best(self) -> tuple[int, int]:
        """Batch and threads with which the bare loop is fastest."""
        found = {(b, t): self.bare(b, t, 0.5) for b in self.batches for t in (1, 2)}
        return max(found, key=lambda key: found[key])

    def bare(self, batch: int, threads: int, seconds: float = SECONDS) -> float:
        """Images a second of the backend in a loop of its own, in a process of its own."""
        command = [sys.executable, "-m", "benchmarks.bare", str(self.model), str(batch), str(threads), str(seconds)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    def ours(self, folder: Path, *, one: bool, copies: int | None = None, replicas: int = 1, cameras: int = 1) -> float:
        """Images a second through five nodes.

        :param one: in one process; otherwise each in its own (but all cameras in one).
        """
        ran, images = self.run(folder, copies=copies, one=one, replicas=replicas, cameras=cameras, seconds=SECONDS)
        return sum(images.values()) / ran.seconds

    def run(
        self,
        folder: Path,
        *,
        one: bool,
        copies: int | None = None,
        replicas: int = 1,
        cameras: int = 1,
        seconds: float | None = None,
    ) -> tuple[Ran, dict[str, int]]:
        """As :meth:`ours`: the run, and how many images got each label.

        :param seconds: the cameras' stacks are played in a loop for so long; None: once.
        :raises RuntimeError: an image is not in the counts, or they are all alike.
        """
        out = folder / "counts.jsonl"
        out.unlink(missing_ok=True)
        text = topology(self, copies=copies, one=one, replicas=replicas, cameras=cameras, loop=seconds is not None)
        ran = run(folder, text, seconds)
        images: Counter[str] = Counter()
        for line in out.read_text().splitlines():
            body = json.loads(line)["body"]
            images[body["key"]] += body["values"]["n"]
        sent = sum(ran.emitted(name) for name in ran.outcome.ledgers if name.startswith("camera"))
        if images.total() != sent:
            raise RuntimeError(f"{sent} images sent, {images.total()} counted")
        if len(images) < 2:
            raise RuntimeError("one answer for all images: the model does not tell them apart")
        return ran, dict(images)


def topology(
    case: Case, *, one: bool, copies: int | None = None, replicas: int = 1, cameras: int = 1, loop: bool = True
) -> str:
    """The five nodes as YAML; several cameras share a process. ``copies``: other than the case's, with a thread each."""
    more = "process: one" if one else f"replicas: {replicas}" if replicas > 1 else ""
    names = ["camera"] if cameras == 1 else [f"camera-{i}" for i in range(cameras)]
    process = ", process: one" if one else ""
    own = "process: one" if one else "process: cameras" if cameras > 1 else ""
    return _TOPOLOGY.format(
        cameras="\n".join(
            _CAMERA.format(name=name, frames=case.frames, loop=str(loop).lower(), process=own) for name in names
        ),
        reads=", ".join(f"{name}: {{delivery: safe}}" for name in names),
        steps=case.steps,
        model=case.model,
        copies=case.copies if copies is None else copies,
        threads=case.threads if copies is None else 1,
        batch=case.batch,
        process=process,
        more=more,
    )


def demo() -> Case:
    """The demo's CNN in int8, its 450 digits as they look to the demo's camera."""
    path = CACHE / "digits-64.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with np.load(DEMO / "digits.npz") as digits:
            small = digits["images"][..., 0]
        np.save(path, np.kron(small, np.ones((1, 8, 8), np.uint8)))
    steps = "[{resize: [8, 8]}]"
    return Case("digits CNN", DEMO / "digits-int8.tflite", path, steps, (16, 64, 256), 256)


def large(*, quantised: bool) -> Case:
    """The MobileNetV2, made once."""
    kind = "int8" if quantised else "float"
    model, frames = CACHE / f"mobilenet-v2-{SIDE}-{kind}.tflite", CACHE / f"pictures-{SEEN}.npy"
    CACHE.mkdir(parents=True, exist_ok=True)
    if not frames.exists():
        np.save(frames, mobilenet.pictures(FRAMES, SEEN, seed=5))
    if not model.exists():
        model.write_bytes(mobilenet.tflite(mobilenet.build(SIDE), quantised=quantised))
    steps = f"[{{crop: {{middle: [{SIDE}, {SIDE}]}}}}]"
    ours = (64, 2, 1) if quantised else (32, 1, 2)  # two copies of 14 MB of weights push each other out of the cache
    return Case(f"MobileNetV2 {SIDE}×{SIDE} {kind}", model, frames, steps, (4, 8, 16, 32, 64), *ours)


def compare(case: Case, folder: Path, bars: dict[str, float]) -> list[Figure | Comparison]:
    """One process, five, and the bare loop in turns.

    :param bars: what ours in one process and in five is to reach of the bare loop; none for a key that is left out.
    """
    batch, threads = case.best()
    print(f"  {case.name}: batch {batch}, {threads} threads", file=sys.stderr, flush=True)
    contestants: dict[str, Callable[[], float]] = {
        "one": partial(case.ours, folder, one=True),
        "bare": partial(case.bare, batch, threads),
        "five": partial(case.ours, folder, one=False),
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
    """Two replicas of ``infer``, with a thread each, against one; twelve cameras, for the work is shared by source.

    :raises RuntimeError: their answers differ.
    """
    runs: dict[str, Callable[[], float]] = {
        OURS: partial(case.ours, folder, copies=1, one=False, replicas=2, cameras=CAMERAS),
        "one replica": partial(case.ours, folder, copies=1, one=False, replicas=1, cameras=CAMERAS),
    }
    answers = [case.run(folder, copies=1, one=False, replicas=n, cameras=CAMERAS)[1] for n in (1, 2)]
    if answers[0] != answers[1]:
        raise RuntimeError(f"one replica counted {answers[0]}, two counted {answers[1]}")
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
