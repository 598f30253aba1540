"""One line on every broker that we know, by ``url:``: its processes or the broker are killed, each reading counts once."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from brokers import KINDS, Broker, param, shared, started
from harness import advance, rows, run

from nodes.supervisor import Outcome, Supervisor

pytestmark = pytest.mark.campaign

TOTAL = 3000
START = 1_700_000_000

TOPOLOGY = """
topology: {name}-{broker}-{mqtt}
brokers: {{site: {{url: "{url}"}}}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 1500/s}}}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter}}
  means: {{aggregate: {{window: 60s, by: source, fields: {{n: count(), top: max(value), sum: sum(value)}}}}, from: warm}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm}}
  report: {{uplink: {{sink: sqlite, path: out.sqlite, table: means}}, from: means}}
"""


def site(folder: Path, broker: Broker, mqtt: str, name: str = "line") -> Path:
    url = broker.url_for(mqtt)
    assert url is not None
    lines = ["time,device,value", *(f"{START + i},d{i % 4},{i}" for i in range(TOTAL))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "line.yaml"
    path.write_text(TOPOLOGY.format(name=name, broker=broker.name, mqtt=mqtt.replace(".", "-"), url=url))
    return path


def check(folder: Path, outcome: Outcome) -> None:
    assert outcome.complete
    assert outcome.findings == []
    kept = [i for i in range(TOTAL) if i % 3]
    assert [v for (v,) in rows(folder / "out.sqlite", "SELECT value FROM rows ORDER BY value")] == kept
    expected: dict[tuple[str, int], list[int]] = {}
    for i in kept:
        expected.setdefault((f"d{i % 4}", (START + i) // 60 * 60), []).append(i)
    found = rows(folder / "out.sqlite", "SELECT source, start, n, top, sum FROM means ORDER BY start, source")
    assert sorted(found) == sorted((s, t * 10**9, len(v), max(v), sum(v)) for (s, t), v in expected.items())


def lines() -> list[Any]:
    """Each broker in each version that a topology's URL can ask for."""
    return [
        param(name, mqtt, ident=f"{name}-{mqtt}")
        for name, kind in KINDS.items()
        for mqtt in kind.versions
        if kind(Path()).url_for(mqtt)
    ]


@pytest.mark.parametrize(("name", "mqtt"), lines())
def test_nodes_are_killed_on_every_broker(tmp_path: Path, name: str, mqtt: str) -> None:
    broker = shared(name)
    draw = random.Random(11)

    async def kill(supervisor: Supervisor) -> None:
        for victim in ("warm", "means", "meter", "store", "report", "means", "meter"):
            await advance(tmp_path, draw.randrange(30, 150))
            supervisor.kill(victim)

    outcome = run(site(tmp_path, broker, mqtt), meddle=kill)
    check(tmp_path, outcome)
    assert sum(view.restarts for view in outcome.nodes.values()) >= 5


@pytest.mark.parametrize("name", [param(name) for name in KINDS])
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_broker_is_killed_and_comes_back(tmp_path: Path, name: str) -> None:
    with started(name, tmp_path) as broker:

        async def kill(supervisor: Supervisor) -> None:
            for _ in range(1 if name == "rabbitmq" else 3):  # which takes ten seconds to start
                await advance(tmp_path, 300)
                await asyncio.to_thread(broker.stop, kill=True)
                await asyncio.to_thread(broker.start)
            killed.append(True)

        killed: list[bool] = []
        outcome = run(site(tmp_path, broker, broker.versions[0], "fallen"), meddle=kill, within=60)
        check(tmp_path, outcome)
        assert killed
