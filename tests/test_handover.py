"""A node with state and its reader in one process: what is committed and not yet taken is handed over again after a kill."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from harness import rows, run, until

from nodes.supervisor import Supervisor

TOTAL = 12_000
START = 1_699_999_980  # a window's beginning
TOPOLOGY = """
topology: handover
nodes:
  meter: {ingest: {source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 2500/s}}
  means: {aggregate: {window: 60s, by: source, fields: {n: count(), sum: sum(value)}}, from: meter, process: one}
  report: {uplink: {sink: sqlite, path: out.sqlite, table: means}, from: means, process: one}
"""


def test_what_a_window_answered_reaches_its_reader_in_the_same_process(tmp_path: Path) -> None:
    lines = ["time,device,value", *(f"{START + i},d{i % 30},{i}" for i in range(TOTAL))]
    (tmp_path / "meter.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "t.yaml"
    path.write_text(TOPOLOGY)
    draw = random.Random(5)

    def taken(supervisor: Supervisor) -> int:
        book = supervisor.views["means"].books
        return book.passed if book is not None else 0

    async def kill(supervisor: Supervisor) -> None:
        for _ in range(8):
            before = taken(supervisor)
            await until(lambda before=before: taken(supervisor) > before)  # type: ignore[misc] # mypy knows no default arguments of lambdas
            await asyncio.sleep(draw.random() * 0.2)
            supervisor.kill("means")

    outcome = run(path, meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    expected: dict[tuple[str, int], list[int]] = {}
    for i in range(TOTAL):
        expected.setdefault((f"d{i % 30}", (START + i) // 60 * 60), []).append(i)
    found = rows(tmp_path / "out.sqlite", "SELECT source, start, n, sum FROM means")
    assert sorted(found) == sorted((s, t * 10**9, len(v), sum(v)) for (s, t), v in expected.items())
