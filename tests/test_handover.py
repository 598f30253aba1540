"""A node with state and its reader in one process: what is committed and not yet taken is handed over again after a kill."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from harness import advance, rows, run

from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

TOTAL = 6_000
START = 1_699_999_980  # a window's beginning
TOPOLOGY = """
topology: handover
nodes:
  meter: {ingest: {source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 2500/s}}
  means: {aggregate: {window: 60s, by: source, fields: {n: count(), sum: sum(value)}}, from: meter, process: one}
  report: {uplink: {sink: sqlite, path: out.sqlite, table: means}, from: means, process: one}
"""


def site(folder: Path) -> Path:
    """The topology with its data."""
    lines = ["time,device,value", *(f"{START + i},d{i % 30},{i}" for i in range(TOTAL))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "t.yaml"
    path.write_text(TOPOLOGY)
    return path


def test_what_a_window_answered_reaches_its_reader_in_the_same_process(tmp_path: Path) -> None:
    path = site(tmp_path)
    draw = random.Random(5)

    async def kill(supervisor: Supervisor) -> None:
        for _ in range(8):
            await advance(tmp_path, 1, "means")
            await asyncio.sleep(draw.random() * 0.2)
            supervisor.kill("means")

    check(tmp_path, run(path, meddle=kill))


def test_of_two_nodes_of_a_process_that_is_killed_one_that_had_ended_is_not_begun_anew(tmp_path: Path) -> None:
    """What it waited for would not come again."""
    state = tmp_path / "state"
    supervisor = Supervisor(prepare(site(tmp_path), state=state), state=state)
    views, key = supervisor.views, ("local", "one")
    (state).mkdir()
    for name in ("means", "report"):
        (state / f"{name}.journal").write_bytes(b"")
        views[name].state = "ready"
    views["report"].state = "ended"
    assert not supervisor._ended(key, -9)
    assert [(views[n].state, views[n].restarts) for n in ("means", "report")] == [("restarting", 1), ("ended", 0)]
    assert [spec.name for spec in supervisor._assignment(key).nodes] == ["means"]
    assert [file.name for file in state.iterdir()] == ["means.journal"]


def check(folder: Path, outcome: Outcome) -> None:
    """Every window once, with all of its rows."""
    assert outcome.complete
    assert outcome.findings == []
    expected: dict[tuple[str, int], list[int]] = {}
    for i in range(TOTAL):
        expected.setdefault((f"d{i % 30}", (START + i) // 60 * 60), []).append(i)
    found = rows(folder / "out.sqlite", "SELECT source, start, n, sum FROM means")
    assert sorted(found) == sorted((s, t * 10**9, len(v), sum(v)) for (s, t), v in expected.items())
