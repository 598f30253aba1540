"""Processes are killed while a topology runs: every reading is in the sink once, and the books balance."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness import advance, rows, run

from nodes.supervisor import Supervisor

TOTAL = 4500

TOPOLOGY = """
topology: kill
brokers: {{local: {{run: {broker}}}}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 1500/s}}}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm}}
"""


def site(folder: Path, broker: str) -> Path:
    lines = ["time,device,value"]
    lines += [f"{1_700_000_000 + i},d{i % 4},{i}" for i in range(TOTAL)]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "kill.yaml"
    path.write_text(TOPOLOGY.format(broker=broker))
    return path


def expected() -> list[int]:
    return [i for i in range(TOTAL) if i % 3]


@pytest.mark.parametrize("broker", ["embedded", pytest.param("mosquitto", marks=pytest.mark.connected)])
def test_every_node_is_killed_and_nothing_is_lost_or_repeated(
    tmp_path: Path, broker: str, request: pytest.FixtureRequest
) -> None:
    if broker == "mosquitto":
        request.getfixturevalue("needs_mosquitto")
    draw = random.Random(7)

    async def kill(supervisor: Supervisor) -> None:
        for victim in ("warm", "store", "meter", "warm", "store", "meter"):
            await advance(tmp_path, 1 + draw.randrange(200))
            supervisor.kill(victim)

    outcome = run(site(tmp_path, broker), meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    assert sum(view.restarts for view in outcome.nodes.values()) >= 3
    assert [int(v) for (v,) in rows(tmp_path / "out.sqlite", "SELECT value FROM rows ORDER BY value")] == expected()


def test_the_nursery_is_killed_and_workers_are_still_restarted(tmp_path: Path) -> None:
    async def kill(supervisor: Supervisor) -> None:
        await advance(tmp_path, 1)
        supervisor.kill_nursery()
        for victim in ("warm", "store"):
            await advance(tmp_path, 100)
            supervisor.kill(victim)

    outcome = run(site(tmp_path, "embedded"), meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    assert [outcome.nodes[name].restarts for name in ("warm", "store")] == [1, 1]
    assert [int(v) for (v,) in rows(tmp_path / "out.sqlite", "SELECT value FROM rows ORDER BY value")] == expected()
