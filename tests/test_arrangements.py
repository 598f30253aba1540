"""One topology, arranged in six ways: the results are equal, id for id and value for value."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from harness import rows, run

from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

DEMO = Path(__file__).parent.parent / "nodes" / "demo"

NODES = """
nodes:
  camera:
    ingest: {{source: video, path: digits.mkv, label: digits.csv, colour: grey, fps: max, start: "2026-01-01T00:00:00Z"}}
    {low}
  prepare:
    preprocess: {{steps: [{{resize: {{size: [8, 8], method: nearest}}}}, {{scale: 1/255}}]}}
    from: {{camera: {{delivery: safe}}}}
    {low}
  digits:
    infer: {{model: digits-int8.tflite, labels: labels.txt, batch: {{max: 16, wait: 2ms}}}}
    from: {{prepare: {{delivery: safe}}}}
    {high}
  meter:
    ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 7}}
    {low}
  clean:
    preprocess: {{steps: [{{filter: value % 5 != 0}}, {{derive: {{double: value * 2}}}}]}}
    from: meter
    {high}
  classes:
    aggregate: {{window: 2s, by: label, fields: {{frames: count(), right: count(label == known_label)}}}}
    from: digits
    {high}
  means:
    aggregate: {{window: 30s, by: source, fields: {{mean: mean(double), n: count()}}}}
    from: clean
    {low}
  store:
    uplink: {{sink: sqlite, path: out.sqlite, table: predictions}}
    from: digits
    {high}
  report:
    uplink: {{sink: sqlite, path: out.sqlite, table: aggregates}}
    from: [classes, means]
    {high}
"""

ONE_PROCESS = "topology: same\n" + NODES.format(low="process: all", high="process: all")
COPIES = ONE_PROCESS.replace("{max: 16, wait: 2ms}", "{max: 4, wait: 2ms}, parallel: 3")
EMBEDDED = "topology: same\n" + NODES.format(low="", high="")
GROUPED = "topology: same\n" + NODES.format(low="process: low", high="process: high")
MOSQUITTO = "topology: same\nbrokers: {site: {run: mosquitto}}\n" + NODES.format(low="", high="")
HOSTS = """
topology: same
brokers:
  below: {{run: embedded, on: gateway, listen: "127.0.0.1:{below}"}}
  above: {{run: embedded, on: cloud, listen: "127.0.0.1:{above}"}}
hosts:
  gateway: {{broker: below{relay}}}
  cloud: {{broker: above}}
"""

Results = dict[str, list[tuple[Any, ...]]]


def site(folder: Path, text: str) -> Path:
    for name in ("digits.mkv", "digits.csv", "digits-int8.tflite", "labels.txt"):
        shutil.copy(DEMO / name, folder)
    lines = ["time,device,value", *(f"{1_700_000_000 + i},d{i % 3},{i}" for i in range(500))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "same.yaml"
    path.write_text(text)
    return path


def results(folder: Path) -> Results:
    return {
        table: sorted(rows(folder / "out.sqlite", f"SELECT {columns} FROM {table}"))  # noqa: S608 - our own names
        for table, columns in {
            "predictions": "id, row, time, source, label, score, known_label",
            "aggregates": "id, row, time, key, coalesce(frames, -1), coalesce(right, -1), coalesce(mean, -1), count",
        }.items()
    }


def check(outcome: Outcome) -> None:
    assert outcome.complete
    assert outcome.findings == []
    assert outcome.lost == {}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of one process, and what they must be like whatever else is equal to them."""
    folder = tmp_path_factory.mktemp("one")
    check(run(site(folder, ONE_PROCESS)))
    found = results(folder)
    assert len(found["predictions"]) == 450
    assert len({row[0] for row in found["predictions"]}) == 450
    assert sum(row[4] == row[6] for row in found["predictions"]) / 450 > 0.96
    means = [row for row in found["aggregates"] if row[6] >= 0]
    assert sum(row[7] for row in means) == 400
    return found


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(EMBEDDED, id="a-process-a-node-embedded"),
        pytest.param(GROUPED, id="two-processes-embedded"),
        pytest.param(COPIES, id="one-process-three-copies-of-the-model"),
        pytest.param(MOSQUITTO, id="a-process-a-node-mosquitto", marks=pytest.mark.connected),
    ],
)
def test_processes_and_brokers_make_no_difference(
    tmp_path: Path, expected: Results, text: str, request: pytest.FixtureRequest
) -> None:
    if text is MOSQUITTO:
        request.getfixturevalue("needs_mosquitto")
    check(run(site(tmp_path, text)))
    assert results(tmp_path) == expected


@pytest.mark.parametrize(
    "relay", [pytest.param("", id="relay"), pytest.param(", relay: {spool: 20MB, rate: 2000/s}", id="relay-that-keeps")]
)
def test_two_hosts_with_a_broker_each_make_no_difference(tmp_path: Path, expected: Results, relay: str) -> None:
    hosts = HOSTS.format(below=free_port(), above=free_port(), relay=relay)
    path = site(tmp_path, hosts + NODES.format(low="on: gateway", high="on: cloud"))
    state = tmp_path / "state"

    async def both() -> list[Outcome]:
        hosts = [
            Supervisor(prepare(path, state=state / host), state=state / host, host=host)
            for host in ("gateway", "cloud")
        ]
        async with asyncio.timeout(50):
            return list(await asyncio.gather(*(host.run() for host in hosts)))

    for outcome in asyncio.run(both()):
        check(outcome)
    assert results(tmp_path) == expected


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_more_messages_than_queues_hold_go_through_one_process(tmp_path: Path) -> None:
    """While one node of a process waits for room, the others send on: none waits for itself."""
    lines = ["time,device,value", *(f"{1_700_000_000 + i},d{i % 3},{i}" for i in range(4000))]
    (tmp_path / "meter.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "same.yaml"
    path.write_text("""
topology: same
nodes:
  meter: {ingest: {source: csv, path: meter.csv, device_column: device, time: time, batch: 1}, process: all}
  clean: {preprocess: {steps: [{filter: value >= 0}]}, from: meter, process: all}
  means: {aggregate: {window: 10s, by: source, fields: {n: count()}}, from: clean, process: all}
  store: {uplink: {sink: sqlite, path: out.sqlite, table: n}, from: [means, meter], process: all}
""")
    outcome = run(path)
    assert outcome.complete
    assert outcome.findings == []
    assert rows(tmp_path / "out.sqlite", "SELECT sum(n), count(*) FROM n") == [(4000, 4000 + 1200)]
