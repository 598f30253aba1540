"""A round of federated learning with ten clients, each a process of its own, that train nothing: what the exchange itself costs.

From one round's row to the next: the model goes to all clients, each answers with an update of its size, they are checked, kept
on the disk, averaged, and the next round is called. The model is a network of dense layers; its numbers travel as float32.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.contestants import CannotError
from benchmarks.figures import OURS, Comparison, Figure, wanted

RUNS = 3
CLIENTS = 10
MODELS = {"19 KB": [64, 64, 10], "0.8 MB": [784, 200, 200, 10], "4.8 MB": [784, 1216, 200, 10]}
ROUNDS = {"19 KB": 60, "0.8 MB": 30, "4.8 MB": 12}
MILLISECONDS = {"19 KB": 30.0, "0.8 MB": 200.0, "4.8 MB": 1000.0}
MEMORY_OF_CLIENT = 70.0
MEMORY_OF_COORDINATOR = 100.0
"""Megabytes, and three models more."""
WARM = 3
"""Rounds that do not count."""
WITHIN = 100.0
_PENSTOCK = [sys.executable, "-m", "nodes.cli.main"]


def _topology(folder: Path, layers: list[int], rounds: int, broker: str, secure: str) -> Path:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (8, layers[0]), dtype=np.uint8)
    np.savez(folder / "camera.npz", images=images, labels=np.arange(8))
    trainer = f"trainer: {{mlp: {{layers: {layers}}}}}"
    lines = ["topology: bench", f"brokers: {{local: {{run: {broker}}}}}", "nodes:"]
    for k in range(CLIENTS):
        lines += [
            f"  camera-{k}: {{ingest: {{source: arrays, path: camera.npz}}, process: cameras}}",
            f"  learn-{k}: {{train: {{job: bench, {trainer}, least: 8}}, from: {{camera-{k}: {{delivery: safe}}}}}}",
        ]
    lines += [
        f"  lead: {{federate: {{job: bench, {trainer}, rounds: {rounds}, fit: {{epochs: 0}}, "
        f"clients: {{least: {CLIENTS}, quorum: {CLIENTS}}}, deadline: 30s, secure: {secure}}}}}",
        "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}",
    ]
    path = folder / "bench.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def one(
    layers: list[int], rounds: int, broker: str = "mosquitto", *, secure: bool = False
) -> tuple[float, float, float]:
    """Milliseconds a round at the median; MB of the largest client, and of the coordinator, resident.

    :param secure: the coordinator sees the sum only.
    :raises CannotError: the run failed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="bench-federated-") as name:
        folder = Path(name)
        path = _topology(folder, layers, rounds, broker, json.dumps(secure))
        command = [*_PENSTOCK, "run", str(path), "--json", "--fresh"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=WITHIN, check=False)
        except subprocess.TimeoutExpired:
            raise CannotError(f"{rounds} rounds took more than {WITHIN:.0f} s") from None
        if done.returncode:
            raise CannotError(done.stderr.decode()[-500:])
        nodes: dict[str, dict[str, int]] = json.loads(done.stdout)["nodes"]
        db = sqlite3.connect(folder / "rounds.sqlite")
        times = [row[0] for row in db.execute("SELECT time FROM store WHERE status = 'committed' ORDER BY round")]
        db.close()
    if len(times) != rounds:
        raise CannotError(f"{len(times)} of {rounds} rounds")
    seconds = [(after - before) / 1e6 for before, after in pairwise(times[WARM:])]
    client = max(node["rss"] for name, node in nodes.items() if name.startswith("learn"))
    return median(seconds), client / 1e6, nodes["lead"]["rss"] / 1e6


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    figures: list[Figure | Comparison] = []
    for name, layers in MODELS.items():
        if not wanted(name):
            continue
        both = [[one(layers, ROUNDS[name], secure=secure) for secure in (False, True)] for _ in range(RUNS)]
        times, clients, leads = zip(*(plain for plain, _ in both), strict=True)
        masked = tuple(secure[0] for _, secure in both)
        own = [one(layers, ROUNDS[name], "embedded")[0] for _ in range(RUNS)]
        size = sum((before + 1) * after for before, after in pairwise(layers)) * 4 / 1e6
        figures += [
            Figure(f"round of {CLIENTS} clients, {name}, mosquitto", "ms", times, MILLISECONDS[name]),
            Figure(f"round of {CLIENTS} clients, {name}, embedded broker", "ms", tuple(own)),
            Comparison(f"with secure sums, {name}, mosquitto", "ms", {OURS: masked, "in the clear": times}),
            Figure(f"memory of a client, {name}", "MB", clients, MEMORY_OF_CLIENT),
            Figure(f"memory of the coordinator, {name}", "MB", leads, MEMORY_OF_COORDINATOR + 3 * size),
        ]
    return figures
