"""Five nodes in one process: readings per second with nothing lost, and what a node, a device, a longer message cost.

A synthetic source → convert to °F → filter → ten-second means per device → JSON lines, all edges ``safe``, objects handed over
in memory. The rows are counted at the source and at the sink: each is in a mean or was filtered.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Comparison, Figure
from benchmarks.runs import Ran, run

BAR = 5_000_000
ROUNDS = 5
ROWS = 256
SECONDS = 3.0
DEVICES = 8

_SOURCE = "{source: synthetic, signals: {temperature: {kind: ramp, offset: 15, amplitude: 10}}, interval: 100us"
_TOPOLOGY = """
topology: in-process
nodes:
  meter: {{ingest: {source}, batch: {rows}, devices: {devices}}}, process: one}}
  warm:  {{preprocess: {{steps: [{{derive: {{fahrenheit: temperature * 1.8 + 32}}}}]}}, from: meter, process: one}}
  sound: {{preprocess: {{steps: [{{filter: fahrenheit < 76}}]}}, from: warm, process: one}}
  mean:
    aggregate: {{window: 10s, by: source, watermark: {{delay: {delay}ms}}, fields: {{mean: mean(fahrenheit), n: count()}}}}
    from: sound
    process: one
  store: {{uplink: {{sink: jsonl, path: means.jsonl}}, from: mean, process: one}}
"""


def whole(folder: Path, *, rows: int = ROWS, devices: int = DEVICES, seconds: float = SECONDS) -> float:
    """Readings per second through the five nodes.

    :raises RuntimeError: a row is neither in a mean nor filtered.
    """
    (folder / "means.jsonl").unlink(missing_ok=True)
    ran = run(folder, _TOPOLOGY.format(source=_SOURCE, rows=rows, devices=devices, delay=100 + rows // 10), seconds)
    sent, books = ran.emitted("meter"), ran.outcome.ledgers
    found = books["sound"].filtered + books["mean"].passed
    with (folder / "means.jsonl").open() as file:
        lines = sum(1 for _ in file)
    if sent != found or lines != books["store"].passed:
        raise RuntimeError(f"{sent} rows sent, {found} found; {books['store'].passed} means, {lines} lines")
    return sent / ran.seconds


def chain(folder: Path, nodes: int, *, rows: int = ROWS, devices: int = DEVICES, seconds: float = 1.5) -> Ran:
    """A source, ``nodes`` - 2 steps one after the other, and a sink that writes one row in 65,536."""
    lines = [
        f"topology: chain\nnodes:\n  meter: {{ingest: {_SOURCE}, batch: {rows}, devices: {devices}}}, process: one}}"
    ]
    last = "meter"
    for i in range(nodes - 2):
        step = "{derive: {temperature: temperature + 1}}"
        lines.append(f"  step-{i}: {{preprocess: {{steps: [{step}]}}, from: {last}, process: one}}")
        last = f"step-{i}"
    fields = "{n: count()}"
    lines.append(f"  all: {{aggregate: {{window: {{count: 65536}}, fields: {fields}}}, from: {last}, process: one}}")
    lines.append("  store: {uplink: {sink: jsonl, path: counts.jsonl}, from: all, process: one}")
    return run(folder, "\n".join(lines) + "\n", seconds)


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speeds = tuple(whole(folder) for _ in range(ROUNDS))
        found: list[Figure | Comparison] = [
            Figure(f"five nodes in one process, {ROWS} rows a message", "readings/s", speeds, BAR, at_most=False)
        ]
        for rows in (1, 16, 4096, 65536):
            print(f"  {rows} rows a message", file=sys.stderr, flush=True)
            rate = whole(folder, rows=rows, seconds=1.5)
            found.append(Figure(f"  {rows} rows a message", "readings/s", (rate,)))
        for devices in (1, 100, 1000, 10_000):
            print(f"  {devices} devices", file=sys.stderr, flush=True)
            rate = whole(folder, rows=16, devices=devices, seconds=1.5)
            found.append(Figure(f"  {devices} devices, 16 rows a message", "readings/s", (rate,)))
        for nodes in (1, 2, 4, 8):
            print(f"  {nodes} steps", file=sys.stderr, flush=True)
            ran = chain(folder, nodes + 2)
            cost = 1e6 * ran.seconds / ran.outcome.ledgers["meter"].emitted["out"].messages
            found.append(Figure(f"  {nodes + 3} nodes in a row, {ROWS} rows a message", "µs/message", (cost,)))
    return found
