"""``python -m benchmarks.soak [--seconds N]``: five processes at half of what they can, watched for whatever grows.

First the same topology runs without a rate, which gives the maximum. Then it runs at half of it; memory, open files,
threads, files on disk and latencies of every process are noted each second. Ends with code 1 if anything grows in the
second half beyond its noise, a row is missing or a process was restarted. Writes all samples as JSON lines, and curves to
look at.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any

from benchmarks.__main__ import machine
from benchmarks.plot import Panel, picture
from benchmarks.soak_verdict import growing, say, trend, windows
from nodes import log
from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

SECONDS = 600.0
WINDOW = 30.0
"""Seconds of one point of a curve."""
DEVICES, BATCH = 4, 20
TOPOLOGY = """
topology: soak
brokers: {{site: {{run: {broker}}}}}
nodes:
  meter: {{ingest: {{source: synthetic, devices: {devices}, batch: {batch}, interval: 20ms{rate}}}}}
  clean: {{preprocess: {{steps: [{{derive: {{fahrenheit: value * 1.8 + 32}}}}, {{filter: value > -0.9}}]}}, from: meter}}
  means:
    aggregate: {{window: 10s, by: source, watermark: {{delay: 5s}}, fields: {{n: count(), mean: mean(value)}}}}
    from: clean
  store: {{uplink: {{sink: jsonl, path: rows.jsonl, rotate_size: 20MB, keep: 2}}, from: clean}}
  report: {{uplink: {{sink: sqlite, path: means.sqlite}}, from: means}}
"""
Series = dict[tuple[str, str], list[tuple[float, float]]]
"""(process, metric) → (seconds since the start, value)."""


async def run(
    folder: Path, broker: str, rate: float | None, watch: Callable[[Supervisor], Coroutine[Any, Any, None]]
) -> Outcome:
    """The topology, until ``watch`` returns; then its sources are ended and the rest drains."""
    text = TOPOLOGY.format(
        broker=broker, devices=DEVICES, batch=BATCH, rate="" if rate is None else f", rate: {rate / DEVICES:.0f}/s"
    )
    (folder / "soak.yaml").write_text(text)
    state = folder / "state"
    supervisor = Supervisor(prepare(folder / "soak.yaml", state=state), state=state, level="error")
    running = asyncio.create_task(supervisor.run())
    watching = asyncio.create_task(_watch(supervisor, watch))
    try:
        await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
            supervisor.end()
        return await running
    finally:
        for task in (watching, running):
            task.cancel()
        await asyncio.gather(watching, running, return_exceptions=True)


async def _watch(supervisor: Supervisor, watch: Callable[[Supervisor], Coroutine[Any, Any, None]]) -> None:
    while not all(view.ready_at for view in supervisor.views.values()):  # noqa: ASYNC110 - rare
        await asyncio.sleep(0.05)
    await watch(supervisor)


def stored(supervisor: Supervisor) -> int:
    """Rows that reached the sink."""
    book = supervisor.views["store"].books
    return 0 if book is None else book.passed


async def fastest(folder: Path, broker: str, seconds: float) -> float:
    """Rows a second when nothing holds the source back but its window."""
    rates: list[float] = []

    async def watch(supervisor: Supervisor) -> None:
        await asyncio.sleep(3)  # the first seconds are not like the others
        began, before = time.monotonic(), stored(supervisor)
        await asyncio.sleep(seconds)
        rates.append((stored(supervisor) - before) / (time.monotonic() - began))

    await run(folder, broker, None, watch)
    return rates[0]


def footprint(pid: int) -> dict[str, float]:
    """Resident memory in bytes, open files and threads of a process; nothing when it is gone."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "rss": resident,
            "fds": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task")),
        }
    except OSError:
        return {}


def kept(state: Path, node: str) -> int:
    """Bytes of a node's files: journal with its log, dead letters, and its own folder (a spool)."""
    files = [*state.glob(f"{node}.*"), *(state / node).rglob("*")]
    total = 0
    for file in files:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # gone meanwhile
            continue
    return total


def look(supervisor: Supervisor, state: Path) -> dict[str, dict[str, float]]:
    """One sample: process → metric → value."""
    found = {"supervisor": footprint(os.getpid())}
    for name, child in supervisor.brokers.children.items():
        found[f"broker {name}"] = footprint(child.pid)
    for name, view in supervisor.views.items():
        found[name] = {**footprint(view.pid), "files": kept(state, name)}
        if view.books is not None and (age := view.books.latency.get("since-source")) is not None:
            found[name] |= {key: age[key] / 1e9 for key in ("p50", "p99")}
    return found


async def soak(folder: Path, broker: str, rate: float, seconds: float, file: IO[str]) -> Outcome:
    """Run at ``rate`` rows a second, and note everything each second: in ``file`` only, so that we do not grow ourselves."""

    async def watch(supervisor: Supervisor) -> None:
        began = time.monotonic()
        while (at := time.monotonic() - began) < seconds:
            sample = look(supervisor, folder / "state")
            file.write(json.dumps({"at": round(at, 2), "rows": stored(supervisor), "processes": sample}) + "\n")
            await asyncio.sleep(1.0)

    return await run(folder, broker, rate, watch)


def read(path: Path) -> Series:
    """The samples of a soak's file."""
    series: Series = defaultdict(list)
    with path.open() as file:
        for sample in map(json.loads, file):
            for process, values in sample.get("processes", {}).items():
                for metric, value in values.items():
                    series[process, metric].append((sample["at"], value))
    return series


def table(curves: Series) -> list[str]:
    """Lines for people: by process, each metric in the first and the last window."""
    rows = [("process", "memory", "open files", "threads", "on disk", "p50", "p99")]
    for process in dict.fromkeys(process for process, _ in curves):
        cells = [process]
        for metric in ("rss", "fds", "threads", "files", "p50", "p99"):
            points = curves.get((process, metric), [])
            cells.append(f"{say(metric, points[0][1])} → {say(metric, points[-1][1])}" if points else "")
        rows.append(tuple(cells))  # type: ignore[arg-type] # as many as in the head
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def curves_of(series: Series, window: float) -> Series:
    """Medians over windows."""
    return {key: windows(samples, window) for key, samples in series.items()}


def panels(curves: Series) -> list[Panel]:
    """What the picture shows."""
    shown: list[tuple[str, str, float]] = [
        ("rss", "memory, MB", 1e-6),
        ("p50", "latency since the source, median, ms", 1e3),
        ("p99", "latency since the source, 99th percentile, ms", 1e3),
        ("files", "files on disk, MB", 1e-6),
        ("fds", "open files", 1.0),
        ("threads", "threads", 1.0),
    ]
    return [
        Panel(title, {p: [(t, v * unit) for t, v in points] for (p, m), points in curves.items() if m == metric})
        for metric, title, unit in shown
    ]


def faults_of(outcome: Outcome, curves: Series) -> list[str]:
    """Everything that should not be."""
    faults = growing(curves) + [f"ledger: {finding}" for finding in outcome.findings]
    faults += [f"{name} was restarted {view.restarts} times" for name, view in outcome.nodes.items() if view.restarts]
    if not outcome.complete:
        faults.append("the run did not complete")
    if not any(trend(points) for points in curves.values()):
        faults.append("too short to say whether anything grows")
    return faults


def main() -> int:
    """Read the command line, run, tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long it runs at half of the maximum")
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds of one point of a curve")
    parser.add_argument("--broker", choices=["embedded", "mosquitto"], default="embedded")
    parser.add_argument("--maximum", type=float, help="rows a second; measured if left out")
    parser.add_argument("--output", type=Path, default=Path("soak.jsonl"), help="file for the samples")
    parser.add_argument("--picture", type=Path, default=Path("soak.svg"), help="file for the curves")
    given = parser.parse_args()
    if given.seconds <= 0 or given.window <= 0 or (given.maximum is not None and given.maximum <= 0):
        parser.error("--seconds, --window and --maximum must be greater than 0")
    for file in (given.output, given.picture):
        try:
            file.touch()  # said now, not after ten minutes
        except OSError as error:
            parser.error(f"{file}: {error.strerror}")
    log.send_to(log.structured("error"))
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, Python {where['python']}; broker {given.broker}")
    with tempfile.TemporaryDirectory(prefix="soak-") as name, given.output.open("w") as file:
        (first := Path(name) / "maximum").mkdir()
        (second := Path(name) / "soak").mkdir()
        most = given.maximum or asyncio.run(fastest(first, given.broker, 15.0))
        if most < 2 * DEVICES:
            print("error: nothing reached the sink while the maximum was measured", file=sys.stderr)
            return 1
        print(f"maximum {most:,.0f} rows/s; now {most / 2:,.0f} rows/s for {given.seconds:,.0f} s", flush=True)
        file.write(json.dumps({"time": time.time(), **where, "broker": given.broker, "maximum": round(most)}) + "\n")
        outcome = asyncio.run(soak(second, given.broker, most / 2, given.seconds, file))
        file.flush()
        curves = curves_of(read(given.output), given.window)
        faults = faults_of(outcome, curves)
        rows = outcome.ledgers["store"].passed
        file.write(json.dumps({"rows": rows, "seconds": round(outcome.seconds, 1), "faults": faults}) + "\n")
    given.picture.write_text(picture(panels(curves), given.seconds))
    print("\n".join(table(curves)))
    print(f"{rows:,} rows in {outcome.seconds:.0f} s, {rows / outcome.seconds:,.0f} rows/s")
    print(f"samples in {given.output}, curves in {given.picture}")
    for fault in faults:
        print(f"FAULT  {fault}")
    print("FAILED" if faults else "passed: nothing grows, no row is missing")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
