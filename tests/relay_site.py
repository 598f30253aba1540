"""A line over two brokers with a relay that keeps between them, for tests."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from harness import rows, until

from nodes.supervisor import Outcome, Supervisor
from schemas.messages import Flow, Ledger, Spooled

RELAY = "relay-gateway-cloud"
EDGE = "meter.out"
TOPOLOGY = """
topology: line
brokers:
  site: {site}
  cloud: {cloud}
hosts:
  gateway: {{broker: site, relay: {{{relay}}}}}
  cloud: {{broker: cloud}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1{pace}}}, on: gateway}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: meter, on: cloud}}
"""


def site(folder: Path, total: int, *, below: str, above: str, relay: str, pace: str = "", pad: int = 0) -> Path:
    """The topology's file; ``below`` and ``above`` are the brokers as YAML maps, ``pad`` characters make rows longer."""
    lines = [f"time,device,value{',pad' if pad else ''}"]
    tail = f",{'x' * pad}" if pad else ""
    lines += [f"{1_700_000_000 + i},d{i % 4},{i}{tail}" for i in range(total)]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "line.yaml"
    path.write_text(TOPOLOGY.format(site=below, cloud=above, relay=relay, pace=f", rate: {pace}" if pace else ""))
    return path


def at(port: int) -> str:
    """A broker that is there already."""
    return f'{{url: "mqtt://127.0.0.1:{port}"}}'


def stored(folder: Path) -> list[int]:
    """What the sink has, in the order that it came."""
    try:
        return [int(v) for (v,) in rows(folder / "out.sqlite", "SELECT value FROM rows ORDER BY rowid")]
    except sqlite3.OperationalError:  # no such table yet
        return []


async def taking(run: Supervisor, count: int, total: int) -> None:
    """Wait until the relay has taken so many more, or all that there are."""
    there = min(total, books(run).taken.messages + count)
    await until(lambda: books(run).taken.messages >= there)


async def restarted(run: Supervisor, name: str) -> None:
    """Kill a node and wait until it was started again."""
    restarts = run.views[name].restarts
    run.kill(name)
    await until(lambda: run.views[name].restarts > restarts)


def books(run: Supervisor | Outcome) -> Spooled:
    """The relay's books of the one port."""
    views = run.views if isinstance(run, Supervisor) else run.nodes
    return kept(views[RELAY].books)


def kept(ledger: Ledger | None) -> Spooled:
    """The same from a ledger."""
    if ledger is None or not ledger.spooled:
        return Spooled(readers=[], taken=Flow(), given=Flow())
    return ledger.spooled[EDGE]
