"""Nodes with replicas: the same results as without, whoever is killed, and a replica whose host is away is stood in for."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from brokers import param, shared
from harness import advance, events, rows, run, stored, until

from nodes.drill.proxy import Link
from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor
from schemas.errors import ConfigError

ROOT = Path(__file__).parent.parent
TOTAL = 6000
START = 1_700_000_000
TOPOLOGY = """
topology: team
brokers: {{site: {broker}}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: {batch}, rate: 2000/s}}}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter{three}}}
  means:
    aggregate:
      window: 60s
      by: source
      watermark: {{delay: {delay}}}
      fields: {{n: count(), top: max(value), sum: sum(value)}}
    from: warm{two}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm}}
  report: {{uplink: {{sink: sqlite, path: out.sqlite, table: means}}, from: means{two}}}
"""
EMBEDDED = "{run: embedded}"


def site(
    folder: Path, *, three: str = "", two: str = "", broker: str = EMBEDDED, batch: int = 1, delay: str = "0s"
) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["time,device,value", *(f"{START + i},d{i % 7},{i}" for i in range(TOTAL))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "team.yaml"
    text = TOPOLOGY.format(three=three, two=f"\n    {two}" if two else "", broker=broker, batch=batch, delay=delay)
    path.write_text(text.replace("from: means\n    ", "from: means, "))
    return path


def check(folder: Path, outcome: Outcome) -> None:
    """Every reading once, each source in its order, and the windows that must come of them."""
    assert outcome.complete
    assert outcome.findings == []
    kept = [i for i in range(TOTAL) if i % 3]
    found = rows(folder / "out.sqlite", "SELECT source, value FROM rows ORDER BY rowid")
    assert sorted(value for _, value in found) == kept
    for device in range(7):
        own = [value for source, value in found if source == f"d{device}"]
        assert own == sorted(own)
    expected: dict[tuple[str, int], list[int]] = {}
    for i in kept:
        expected.setdefault((f"d{i % 7}", (START + i) // 60 * 60), []).append(i)
    means = rows(folder / "out.sqlite", "SELECT source, start, n, top, sum FROM means")
    assert sorted(means) == sorted((s, t * 10**9, len(v), max(v), sum(v)) for (s, t), v in expected.items())
    assert all(not book.dropped for book in outcome.ledgers.values())


@pytest.mark.parametrize("batch", [1, 20])
def test_the_results_are_those_of_one(tmp_path: Path, batch: int) -> None:
    outcome = run(site(tmp_path, three=", replicas: 3", two="replicas: 2", batch=batch))
    check(tmp_path, outcome)
    books = outcome.ledgers
    assert {"warm-1", "warm-2", "warm-3", "means-1", "means-2", "report-1", "report-2"} < set(books)
    parts = [books[f"warm-{i}"].passed for i in (1, 2, 3)]
    assert sum(parts) == TOTAL * 2 // 3
    assert sum(part > 0 for part in parts) > 1


@pytest.mark.parametrize("name", [param("embedded"), param("mosquitto")])
def test_replicas_are_killed(tmp_path: Path, name: str) -> None:
    draw = random.Random(3)
    # a machine that is busy may take so long to start one again that the others take over, and rows come late
    broker = f"{{url: '{shared(name).url}'}}"
    path = site(tmp_path, three=", replicas: 3", two="replicas: 2", broker=broker, delay="1h")

    async def kill(supervisor: Supervisor) -> None:
        for victim in ("warm-1", "means-2", "warm-3", "meter", "report-1", "means-1", "warm-2", "store"):
            await advance(tmp_path, draw.randrange(50, 250))
            supervisor.kill(victim)

    outcome = run(path, meddle=kill)
    check(tmp_path, outcome)
    assert sum(view.restarts for view in outcome.nodes.values()) >= 6


# -- a host that is away -----------------------------------------------------------------------------------------------

TWO_HOSTS = """
topology: {name}
brokers: {{site: {{url: '{url}'}}}}
hosts: {{here: {{broker: site}}, there: {{broker: site}}}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 150/s}}, on: here}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter, on: [here, there]}}
  means:
    aggregate:
      window: 60s
      by: source
      watermark: {{delay: 1h}} # what is taken over comes late, by as much as the takeover took
      fields: {{n: count(), sum: sum(value)}}
    from: warm
    on: here
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm, on: here}}
  report: {{uplink: {{sink: sqlite, path: out.sqlite, table: means}}, from: means, on: here}}
"""


@contextmanager
def supervisor(path: Path, host: str) -> Iterator[subprocess.Popen[bytes]]:
    """``penstock run --host``, in a process group that can be killed as a whole, as by a power cut."""
    command = [sys.executable, "-m", "nodes.cli.main", "run", str(path), "--host", host]
    with (path.parent / f"{host}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def hosts(folder: Path, url: str, name: str) -> Path:
    """The topology of two hosts, with more data than it will read: a test ends the source when it has seen enough."""
    folder.mkdir(exist_ok=True)
    lines = ["time,device,value", *(f"{START + i},d{i % 7},{i}" for i in range(20_000))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "hosts.yaml"
    path.write_text(TWO_HOSTS.format(url=url, name=name))
    return path


def check_hosts(folder: Path, outcome: Outcome) -> None:
    """All that was read is there once, and in the windows."""
    assert outcome.complete
    kept = [i for i in range(outcome.ledgers["meter"].emitted["out"].rows) if i % 3]
    assert [v for (v,) in rows(folder / "out.sqlite", "SELECT value FROM rows ORDER BY value")] == kept
    assert sum(n for (n,) in rows(folder / "out.sqlite", "SELECT n FROM means")) == len(kept)


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_host_that_is_away_is_stood_in_for_and_gets_its_part_back(tmp_path: Path) -> None:
    path = hosts(tmp_path, shared("embedded").url, "hosts")
    came_back: list[subprocess.Popen[bytes]] = []

    async def kill(here: Supervisor) -> None:
        there = stack.enter_context(supervisor(path, "there"))
        await advance(tmp_path, 100)
        os.killpg(there.pid, signal.SIGKILL)
        there.wait(10)
        await until(lambda: "replica is away, others take over" in told(), within=30)
        after = stored(tmp_path)
        sources = {(f"d{i}",) for i in range(7)}
        query = f"SELECT source FROM rows ORDER BY rowid LIMIT -1 OFFSET {after}"  # noqa: S608 - a number
        await until(lambda: set(rows(tmp_path / "out.sqlite", query)) == sources, within=30)
        came_back.append(stack.enter_context(supervisor(path, "there")))
        await until(lambda: "replica is back" in told(), within=30)
        await advance(tmp_path, 100)
        here.end()

    with events() as said, ExitStack() as stack:

        def told() -> list[str]:
            return [event for event, _ in said]

        outcome = run(path, host="here", meddle=kill, within=100)
        assert came_back[0].wait(30) == 0
    check_hosts(tmp_path, outcome)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_replica_that_is_cut_off_alive_begins_anew_and_nothing_comes_twice(tmp_path: Path) -> None:
    """The others have its part meanwhile; what it still holds must not come after what they did."""
    url, folder = shared("embedded").url, tmp_path / "here"

    async def cut(here: Supervisor) -> None:
        await advance(folder, 100)
        proxy.refuse = True
        proxy.cut()
        await until(lambda: "replica is away, others take over" in told(), within=30)
        proxy.refuse = False
        await until(lambda: b"begins anew" in (tmp_path / "there" / "there.log").read_bytes(), within=30)
        await until(lambda: "replica is back" in told(), within=30)
        await advance(folder, 100)
        here.end()

    with link(url) as proxy, events() as said:

        def told() -> list[str]:
            return [event for event, _ in said]

        with supervisor(hosts(tmp_path / "there", proxy.url, "cut"), "there") as other:
            outcome = run(hosts(folder, url, "cut"), host="here", meddle=cut, within=100)
            assert other.wait(30) == 0
    check_hosts(folder, outcome)


@contextmanager
def link(url: str) -> Iterator[Any]:
    """A link to a broker that can be cut, served by a thread; its methods are called in that thread's loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made = Link(url)
    asyncio.run_coroutine_threadsafe(made.__aenter__(), loop).result(10)
    cut = made.cut

    def cut_there() -> None:
        loop.call_soon_threadsafe(cut)

    made.cut = cut_there  # type: ignore[method-assign]  # as the thread wants it
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(made.__aexit__(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


TWO_BROKERS = """
topology: apart
brokers: {{below: {{run: embedded, on: here}}, above: {{run: embedded, on: there}}}}
hosts: {{here: {{broker: below}}, there: {{broker: above}}}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 2000/s}}, on: here}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter, on: [here, there]}}
  means:
    aggregate: {{window: 60s, by: source, fields: {{n: count(), top: max(value), sum: sum(value)}}}}
    from: warm
    on: [there, here]
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm, on: there}}
  report: {{uplink: {{sink: sqlite, path: out.sqlite, table: means}}, from: means, on: here}}
"""


def test_replicas_at_two_brokers_give_the_results_of_one(tmp_path: Path) -> None:
    path = site(tmp_path)
    path.write_text(TWO_BROKERS.format())
    check(tmp_path, run(path))


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            "a: {ingest: {source: synthetic}, replicas: 2, publish: always}",
            "ingest (source synthetic) cannot have replicas: each would read all of it",
        ),
        (
            "a: {ingest: {source: synthetic}}\n"
            "  b: {aggregate: {window: 1s, fields: {n: count()}}, from: a, replicas: 2, publish: always}",
            "aggregate cannot have replicas: its groups hold rows of several sources; group by source",
        ),
        (
            "a: {ingest: {source: synthetic}}\n"
            "  b: {preprocess: {steps: [{filter: value > 0}]}, from: a, replicas: 2}\n"
            "  b-2: {uplink: {sink: stdout}, from: b}",
            "'b-2' is the name of a replica of 'b'",
        ),
        (
            "a: {ingest: {source: synthetic}}\n  b: {uplink: {sink: jsonl, path: x}, from: a, replicas: 2}",
            "uplink (sink jsonl) cannot have replicas: each would write the file",
        ),
        (
            "a: {ingest: {source: synthetic}}\n"
            "  b: {preprocess: {steps: [{filter: value > 0}]}, from: a, replicas: 2, process: x, publish: always}",
            "replicas have processes of their own; leave out 'process'",
        ),
        (
            "a: {ingest: {source: synthetic}}\n"
            "  b: {preprocess: {steps: [{filter: value > 0}]}, from: a, on: [local, local], publish: always}",
            "'local' is there twice; for more replicas than hosts say how many: 'replicas'",
        ),
        (
            "a: {ingest: {source: synthetic}}\n"
            "  b: {preprocess: {steps: [{filter: value > 0}]}, from: a, replicas: 65, publish: always}",
            "64",
        ),
    ],
)
def test_what_replicas_would_do_wrong_is_refused(tmp_path: Path, nodes: str, said: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(f"topology: t\nnodes:\n  {nodes}\n")
    with pytest.raises(ConfigError) as error:
        prepare(path)
    assert said in str(error.value)
    assert f"{path}:" in str(error.value)


def test_a_plan_with_replicas_has_every_pair(tmp_path: Path) -> None:
    plan = prepare(site(tmp_path, three=", replicas: 3", two="replicas: 2"))
    assert [e.consumer for e in plan.edges if e.producer == "meter"] == ["warm-1", "warm-2", "warm-3"]
    assert sorted(e.producer for e in plan.edges if e.consumer == "means-2") == ["warm-1", "warm-2", "warm-3"]
    assert {e.topic for e in plan.edges if e.consumer == "store"} == {"team/warm/out"}
    assert {e.topic for e in plan.edges if e.consumer == "warm-2"} == {"team/warm-2/in/meter/out"}
