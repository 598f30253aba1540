"""A running topology among others: foreign subscribers, garbage on its topics, its broker killed, drained and continued."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has neither stubs nor py.typed
import paho.mqtt.client as mqtt
import pytest
from harness import advance, passed, rows, run, until
from paho.mqtt.enums import CallbackAPIVersion

from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

ROOT = Path(__file__).parent.parent
TOTAL = 3000
TOPOLOGY = """
topology: live
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: {rate}}}}}
  half: {{preprocess: {{steps: [{{filter: value % 2 == 0}}]}}, from: meter}}
  means: {{aggregate: {{window: 100s, by: source, fields: {{n: count(), mean: mean(value)}}}}, from: half}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: half}}
  report: {{uplink: {{sink: sqlite, path: out.sqlite, table: means}}, from: means}}
"""


def site(folder: Path, rate: str = "1500/s") -> Path:
    lines = ["time,device,value", *(f"{1_700_000_000 + i},d{i % 4},{i}" for i in range(TOTAL))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "live.yaml"
    path.write_text(TOPOLOGY.format(rate=rate))
    return path


def check(folder: Path, outcome: Outcome) -> None:
    assert outcome.complete
    assert outcome.findings == []
    assert [v for (v,) in rows(folder / "out.sqlite", "SELECT value FROM rows ORDER BY value")] == list(
        range(0, TOTAL, 2)
    )
    means = rows(folder / "out.sqlite", "SELECT source, start, n, mean FROM means ORDER BY start, source")
    assert [n for _, _, n, _ in means] == [25] * len(means)
    assert sum(n for _, _, n, _ in means) == TOTAL / 2
    for source, start, _, mean in means:
        first = start // 10**9 - 1_700_000_000
        values = [v for v in range(max(first, 0), first + 100) if v % 2 == 0 and f"d{v % 4}" == source]
        assert mean == pytest.approx(sum(values) / len(values))


class Foreign:
    """Somebody else's MQTT client: paho, with plain msgpack."""

    def __init__(self, supervisor: Supervisor, *filters: str) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self._ready = threading.Event()
        self._filters = filters
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self.client.on_connect = self._connected
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_message = lambda _client, _data, m: self.messages.append((m.topic, bytes(m.payload)))
        _, _, port = supervisor.brokers.urls["local"].rpartition(":")
        self.client.connect("127.0.0.1", int(port))
        self.client.loop_start()
        assert self._ready.wait(10)

    def _connected(self, *_: object) -> None:
        self.client.subscribe([(pattern, 1) for pattern in self._filters])

    def bodies(self, kind: str) -> list[dict[str, Any]]:
        maps = [msgpack.unpackb(payload) for topic, payload in self.messages]
        return [m for m in maps if m["type"] == kind]

    def close(self) -> None:
        self.client.loop_stop()
        self.client.disconnect()


def test_a_foreign_client_reads_the_results_with_plain_msgpack(tmp_path: Path) -> None:
    seen: list[Foreign] = []

    async def listen(supervisor: Supervisor) -> None:
        await until(lambda: "local" in supervisor.brokers.urls)
        foreign = await asyncio.to_thread(Foreign, supervisor, "live/half/out/#", "live/+/state", "live/+/ledger")
        seen.append(foreign)
        await until(lambda: len(foreign.bodies("readings/1")) >= 100)

    check(tmp_path, run(site(tmp_path), meddle=listen))
    foreign = seen[0]
    foreign.close()
    readings = foreign.bodies("readings/1")
    assert len({m["id"] for m in readings}) == len(readings)  # what is sent again is not seen by foreigners
    first = readings[0]
    assert first["body"]["n"] == 1
    tensor = first["body"]["columns"]["value"]
    assert int.from_bytes(tensor["data"], "little") % 2 == 0
    assert {m["body"]["status"] for m in foreign.bodies("state/1")} >= {"ready"}
    assert any(m["body"]["node"] == "half" for m in foreign.bodies("ledger/1"))


def test_garbage_on_a_topic_ends_in_the_dead_letters_and_the_node_lives(tmp_path: Path) -> None:
    garbage = {
        b"": "not-msgpack",
        b"\xc1\xc1": "not-msgpack",
        b'{"value": 3}': "not-msgpack",
        b"\x91" * 5000: "not-msgpack",
        msgpack.packb({"type": "nonsense/9", "id": "x", "source": "x", "time": 1, "body": {}}): "unknown-type",
        msgpack.packb(
            {"type": "readings/1", "id": "x", "source": "x", "time": 1, "body": {"n": -1, "columns": {}}}
        ): "bad-body",
        msgpack.packb(
            {
                "type": "readings/1",
                "id": "x",
                "source": "x",
                "time": 1,
                "body": {"n": 1, "columns": {"value": {"dtype": "<f8", "shape": [2**40], "data": b"abc"}}},
            }
        ): "bad-tensor",
        b"\xc1" + bytes(3_000_000): "not-msgpack",
    }
    letters: list[dict[str, Any]] = []

    async def throw(supervisor: Supervisor) -> None:
        await advance(tmp_path, 1)
        foreign = await asyncio.to_thread(Foreign, supervisor, "live/half/dead")
        for payload in garbage:
            if payload:
                foreign.client.publish("live/meter/out/intruder", payload, 1)
        await until(lambda: len(foreign.messages) >= len(garbage) - 1)
        letters.extend(foreign.bodies("dead/1"))
        foreign.close()

    outcome = run(site(tmp_path, "1000/s"), meddle=throw)
    check(tmp_path, outcome)
    assert outcome.nodes["half"].restarts == 0
    by_payload = {letter["body"]["payload"]: letter["body"]["reason"] for letter in letters}
    assert by_payload == {payload: reason for payload, reason in garbage.items() if payload}
    assert sum(outcome.ledgers["half"].dead.values()) == len(garbage) - 1


def test_the_broker_is_killed_and_all_goes_on(tmp_path: Path) -> None:
    async def kill(supervisor: Supervisor) -> None:
        for _ in range(3):
            await advance(tmp_path, 100)
            supervisor.brokers.children["local"].kill()

    outcome = run(site(tmp_path), meddle=kill)
    check(tmp_path, outcome)


def test_a_broker_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = site(tmp_path)
    path.write_text(f"brokers: {{late: {{url: 'mqtt://127.0.0.1:{port}'}}}}\n{path.read_text()}")
    started: list[subprocess.Popen[bytes]] = []

    async def come(supervisor: Supervisor) -> None:
        await until(lambda: all(view.state == "starting" for view in supervisor.views.values()))
        command = [sys.executable, "-m", "broker.embedded", "--listen", f"127.0.0.1:{port}"]
        started.append(await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.DEVNULL, cwd=ROOT))

    try:
        check(tmp_path, run(path, meddle=come))
    finally:
        for broker in started:
            broker.terminate()
            broker.wait()


def test_a_window_is_killed_and_its_state_goes_on(tmp_path: Path) -> None:
    async def kill(supervisor: Supervisor) -> None:
        for victim in ("means", "report", "means", "half", "means"):
            await advance(tmp_path, 200)
            supervisor.kill(victim)

    outcome = run(site(tmp_path, "1000/s"), meddle=kill)
    check(tmp_path, outcome)
    assert outcome.nodes["means"].restarts > 0


def test_a_drained_run_continues_where_it_stood(tmp_path: Path) -> None:
    path, state = site(tmp_path), tmp_path / "state"
    stops: list[asyncio.Task[None]] = []

    async def drain(supervisor: Supervisor) -> None:
        await advance(tmp_path, 201)
        stops.append(asyncio.create_task(supervisor.stop()))
        await asyncio.Event().wait()

    first = run(path, state=state, meddle=drain)
    assert not first.complete
    part = rows(tmp_path / "out.sqlite", "SELECT count(*) FROM rows")[0][0]
    assert 200 < part < TOTAL / 2
    check(tmp_path, run(path, state=state))
    assert not list(state.glob("*.journal"))  # a complete run leaves nothing to continue


def test_two_runs_of_one_topology_do_not_meet(tmp_path: Path) -> None:
    path, state = site(tmp_path), tmp_path / "state"

    async def second(supervisor: Supervisor) -> None:
        await until(lambda: passed(supervisor, "store") > 0)
        with pytest.raises(Exception, match=r"live is running already \(process \d+\)"):
            await Supervisor(prepare(path, state=state), state=state).run()
        met.append(True)

    met: list[bool] = []
    check(tmp_path, run(path, state=state, meddle=second))
    assert met
