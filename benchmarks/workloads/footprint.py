"""What it costs to have Penstock on a small computer: start-up, the first result, memory of a node process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Comparison, Figure

RUNS = 5
_PENSTOCK = [sys.executable, "-m", "nodes.cli.main"]
_TOPOLOGY = """
topology: footprint
nodes:
  meter: {ingest: {source: synthetic, rate: 200/s, count: 400}, process: both}
  store: {uplink: {sink: jsonl, path: out.jsonl}, from: meter, process: both}
"""
_PIPELINE = """
topology: start
nodes:
  meter: {ingest: {source: synthetic, rate: 100/s, count: 300}}
  clean: {preprocess: {steps: [on-change]}, from: meter}
  mean:  {aggregate: {window: 1s, by: source, fields: {mean: mean(value)}}, from: clean}
  store: {uplink: {sink: jsonl, path: mean.jsonl}, from: mean}
  all:   {uplink: {sink: jsonl, path: all.jsonl}, from: clean}
"""


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def _memory(folder: Path) -> tuple[float, float]:
    """Memory of a process with an ingest and an uplink node, in MB: resident, and its share of that (what several processes
    have in common counts a part in each: PSS)."""
    path = folder / "footprint.yaml"
    path.write_text(_TOPOLOGY)
    (folder / "out.jsonl").unlink(missing_ok=True)
    share = 0.0
    command = [*_PENSTOCK, "run", str(path), "--json", "--fresh"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            share = _share(run.pid) or share
            time.sleep(0.1)
        assert run.stdout is not None  # noqa: S101 - it is a pipe
        nodes: dict[str, dict[str, int]] = json.load(run.stdout)["nodes"]
    return max(node["rss"] for node in nodes.values()) / 1e6, share


def _share(run: int) -> float:
    """PSS in MB of the one worker of a run; 0 where there is none (yet, or any more)."""
    for nursery in _children(run):
        for worker in _children(nursery):
            try:
                lines = Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)
    return 0.0


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]
    except OSError:
        return []


def _first_result(folder: Path) -> float:
    """Seconds from the command to the first line in the sink of a five-node topology, a process a node."""
    path, out = folder / "start.yaml", folder / "all.jsonl"
    path.write_text(_PIPELINE)
    out.unlink(missing_ok=True)
    began = time.perf_counter()
    with subprocess.Popen(
        [*_PENSTOCK, "run", str(path), "--fresh"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        while not (out.exists() and out.stat().st_size):
            if run.poll() not in {None, 0}:
                raise RuntimeError("the run failed")
            time.sleep(0.002)
        return time.perf_counter() - began


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "check.yaml"
        path.write_text(_PIPELINE)
        subprocess.run(
            [*_PENSTOCK, "check", str(path)], check=True, capture_output=True
        )  # compiles, where nothing did yet
        bare = tuple(_seconds([sys.executable, "-c", "pass"]) for _ in range(RUNS))
        check = tuple(_seconds([*_PENSTOCK, "check", str(path)]) for _ in range(RUNS))
        first = tuple(_first_result(folder) for _ in range(RUNS))
        memory = [_memory(folder) for _ in range(RUNS)]
    return [
        Figure("python itself", "s", bare),
        Figure("penstock check, five nodes", "s", check, 0.5),
        Figure("first result after penstock run, five processes", "s", first, 2.0),
        Figure("memory of a process with ingest and uplink", "MB", tuple(rss for rss, _ in memory), 45),
        Figure("its share of it (PSS)", "MB", tuple(share for _, share in memory)),
    ]
