"""A link that falls silent and is then cut, again and again: every edge moves again soon, and each reading counts once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from brokers import Broker, param, started
from bus_site import Proxy, until
from harness import rows, stored

from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

pytestmark = pytest.mark.campaign

TOTAL = 100_000
CUTS = 6
SOON = 15.0
"""Seconds after the link is back. It takes one or two; a busy machine may need more. A pause between two attempts to connect that
only doubles is longer than this after the fourth cut."""

TOPOLOGY = """
topology: silent
brokers: {{site: {{url: "mqtt://127.0.0.1:{port}"}}}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, time: time, batch: 1, rate: 300/s}}}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm}}
"""


async def run(folder: Path, broker: Broker) -> tuple[Outcome, list[float]]:
    """The whole run; seconds from each end of a cut until rows come again."""
    recoveries: list[float] = []
    async with Proxy(broker.port) as proxy:
        (folder / "silent.yaml").write_text(TOPOLOGY.format(port=proxy.port))
        supervisor = Supervisor(prepare(folder / "silent.yaml", state=folder / "state"), state=folder / "state")
        running = asyncio.create_task(supervisor.run())
        try:
            await until(lambda: stored(folder) > 100, 40)
            for _ in range(CUTS):
                proxy.stall()
                await asyncio.sleep(0.3)  # what is sent in these moments is lost
                proxy.refuse = True
                proxy.cut()
                proxy.go_on()
                await asyncio.sleep(1.0)
                proxy.refuse = False
                there, back = stored(folder), time.monotonic()
                await until(lambda there=there: stored(folder) > there, 60)  # type: ignore[misc] # mypy knows no default arguments of lambdas
                recoveries.append(time.monotonic() - back)
            supervisor.end()  # as if the data ended here
            return await running, recoveries
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [param("embedded"), param("mosquitto")])
def test_every_edge_moves_again_soon_after_each_cut(tmp_path: Path, name: str) -> None:
    lines = ["time,value", *(f"{1_700_000_000 + i},{i}" for i in range(TOTAL))]
    (tmp_path / "meter.csv").write_text("\n".join(lines) + "\n")
    with started(name, tmp_path) as broker:
        outcome, recoveries = asyncio.run(run(tmp_path, broker))
    assert max(recoveries) < SOON, recoveries
    assert outcome.complete
    assert outcome.findings == []
    sent = outcome.ledgers["meter"].emitted["out"].rows
    assert [v for (v,) in rows(tmp_path / "out.sqlite", "SELECT value FROM rows ORDER BY value")] == [
        i for i in range(sent) if i % 3
    ]
