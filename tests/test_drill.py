"""A drill, as the program that a user calls: what it strikes, what it says, and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from broker.bus import Publication
from broker.connect import connect
from nodes.cli import main

pytestmark = pytest.mark.campaign

ROOT = Path(__file__).parent.parent

LINE = """
topology: line
nodes:
  meter: {ingest: {source: csv, path: meter.csv, device_column: device, time: time}}
  warm: {preprocess: {steps: [{filter: value % 3 != 0}]}, from: meter}
  means: {aggregate: {window: 5s, by: source, watermark: {delay: 5s}, fields: {n: count(), sum: sum(value)}}, from: warm}
  store: {uplink: {sink: jsonl, path: rows.jsonl}, from: warm}
  report: {uplink: {sink: sqlite, path: means.sqlite}, from: means}
"""
LEAKY = '''
"""A node that forgets: it keeps three messages of four to the end, and keeps them nowhere."""

from nodes.operator import Emit, Operator
from schemas.messages import Message


class Keep(Operator):
    """What it has when it is killed is gone."""

    def __init__(self) -> None:
        self.kept: list[Message] = []
        self.count = 0

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        for message in messages:
            if self.count % 4:
                self.kept.append(message)
            else:
                emit.send(message)
            self.count += 1

    def finish(self, emit: Emit) -> None:
        for message in self.kept:
            emit.send(message)
'''


def site(folder: Path, text: str = LINE, rows: int = 400) -> Path:
    """A topology with data for it."""
    lines = ["time,device,value"] + [f"{1_700_000_000 + i // 4},d{i % 4},{i}" for i in range(rows)]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "line.yaml"
    path.write_text(text)
    return path


def drill(*args: str | Path, timeout: float = 50) -> subprocess.CompletedProcess[str]:
    """The program itself."""
    command = [sys.executable, "-m", "nodes.cli.main", "drill", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)


def outcome(*args: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and what it says to programs."""
    done = drill(*args, "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_what_is_promised_is_kept_and_nothing_of_the_user_is_touched(tmp_path: Path) -> None:
    path = site(tmp_path)
    before = {file.name for file in tmp_path.iterdir()}
    code, said = outcome(
        path, "--fault", "kill-node:warm", "--fault", "kill-broker", "--fault", "bad-payloads", "--for", "9s"
    )
    assert (code, said["kept"], said["broken"]) == (0, True, [])
    assert {(blow["fault"], blow["target"]) for blow in said["blows"]} == {
        ("kill-node", "warm"),
        ("kill-broker", "local"),
        ("bad-payloads", ""),
    }
    assert all(blow["recovery"] is not None and not blow["missed"] for blow in said["blows"])
    assert said["restarts"] == {"warm": 1}
    assert set(said["dead"]) == {"warm", "means", "store", "report"}  # each who reads a topic
    for sink in said["sinks"].values():
        assert sink["compared"]
        assert (sink["lost"], sink["extra"], sink["changed"]) == (0, 0, 0)
        assert sink["messages"] == sink["expected"] > 0
    assert {file.name for file in tmp_path.iterdir()} == before  # no sink was written, no state was left


def test_a_full_disk_under_the_nodes_own_files_costs_no_row(tmp_path: Path) -> None:
    code, said = outcome(site(tmp_path), "--fault", "full-disk", "--for", "7s")
    assert (code, said["kept"], said["broken"]) == (0, True, [])
    assert [blow["fault"] for blow in said["blows"]] == ["full-disk"]
    assert all(blow["recovery"] is not None and not blow["missed"] for blow in said["blows"])
    assert all(sink["messages"] == sink["expected"] > 0 for sink in said["sinks"].values())


def test_a_node_that_loses_rows_without_saying_so_is_found(tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(LEAKY)
    text = LINE.replace(
        "preprocess: {steps: [{filter: value % 3 != 0}]}",
        "custom: {path: leaky.py, function: Keep, emits: readings/1}",
    )
    done = drill(site(tmp_path, text), "--fault", "kill-node:warm", "--for", "6s")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN: store: " in done.stdout
    assert "messages lost" in done.stdout
    assert "NOT KEPT" in done.stdout


def test_what_a_fast_edge_loses_is_named_and_allowed(tmp_path: Path) -> None:
    text = LINE.replace(
        "path: rows.jsonl}, from: warm", "path: rows.jsonl}, from: {warm: {overflow: sample, queue: 1}}"
    )
    code, said = outcome(site(tmp_path, text), "--fault", "kill-node:store=2", "--for", "6s")
    assert code == 0, said
    store = said["sinks"]["store"]
    assert store["may_lose"] == "warm.out → store"
    assert store["lost"] > 0  # what was sent while it was away
    assert store["lost"] + store["messages"] == store["expected"]
    assert any("behind the fast edge warm.out → store" in line for line in said["allowed"])
    assert said["sinks"]["report"]["lost"] == 0  # the other way is safe


def test_ctrl_c_ends_it_and_tells_what_is_known(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nodes.cli.main", "drill", str(site(tmp_path)), "--fault", "kill-node:warm=9"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert running.stdout is not None
    seen = ""
    while "kill-node" not in seen.partition("undisturbed")[2]:  # the first blow is over
        line = running.stdout.readline()
        assert line, running.communicate()
        seen += line
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=40)
    assert running.returncode == 130, seen + out + err
    assert "interrupted after" in out
    assert "kill-node" in out  # the table of what was struck
    assert "Ctrl-C again ends at once" in err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--fault", "kil-node"], "there is no fault 'kil-node'; did you mean 'kill-node'?"),
        (["--fault", "kill-node:wram"], "there is no node 'wram'; did you mean 'warm'?"),
        (["--fault", "kill-broker:locl"], "there is no broker 'locl'; did you mean 'local'?"),
        (["--fault", "kill-node=0"], "expected how many times, 1 to 1000, got '0'"),
        (["--fault", "flood:warm"], "it strikes everything at once and takes no target"),
        (["--fault", "Kill!"], "expected NAME, NAME=TIMES or NAME:TARGET"),
        (["--for", "3s"], "--for 3s is too short for 12 blows"),
        (["--for", "soon"], "--for: expected a duration"),
        (["--host", "elsewhere"], "there is no host 'elsewhere'"),
        (["--source", "meter"], "expected NODE=FILE"),
        (["--source", "metre=x.csv"], "there is no source 'metre'; did you mean 'meter'?"),
        (["--source", "meter=x.csv"], "there is no file x.csv"),
        (["--source", "meter=x.doc"], "no recording that is known by its ending"),
    ],
)
def test_what_is_written_wrong_is_told_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], told: str
) -> None:
    assert main.run(["drill", str(site(tmp_path)), *args]) == 2
    out, err = capsys.readouterr()
    assert told in err
    assert out == ""


def test_a_broker_that_is_there_already_is_not_ours_to_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(site(tmp_path, LINE.replace("nodes:", "brokers: {site: {url: 'mqtts://gateway.invalid'}}\nnodes:", 1)))
    assert main.run(["drill", path, "--fault", "kill-broker"]) == 2
    assert "the broker 'site' is there already and not the drill's to kill; --own-brokers" in capsys.readouterr().err
    assert main.run(["drill", path, "--list", "--json"]) == 0
    why = {entry["fault"]: entry["why_not"] for entry in json.loads(capsys.readouterr().out)}
    assert "not the drill's to kill" in why["kill-broker"]
    assert "TLS" in why["cut-network"]
    assert why["kill-node"] is None
    assert main.run(["drill", path, "--list", "--json", "--own-brokers"]) == 0
    assert all(entry["why_not"] is None for entry in json.loads(capsys.readouterr().out))


def test_the_list_has_every_fault_and_what_it_strikes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["drill", str(site(tmp_path)), "--list"]) == 0
    out = capsys.readouterr().out
    folder = ROOT / "nodes" / "drill" / "faults"
    files = {file.stem.replace("_", "-") for file in folder.glob("*.py") if not file.stem.startswith("_")}
    assert {line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")} == files
    assert "meter, warm, means, store, report" in out


def test_a_broker_that_is_there_is_used_under_another_name_and_left_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = [sys.executable, "-m", "broker.embedded", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as broker:
        assert broker.stdout is not None
        url = json.loads(broker.stdout.readline())["addresses"][0]
        path = site(tmp_path, LINE.replace("nodes:", f"brokers: {{site: {{url: '{url}'}}}}\nnodes:", 1))
        code, said = outcome(path, "--fault", "cut-network", "--for", "4s")
        left = asyncio.run(retained(url))
        broker.terminate()
    assert code == 0, said
    assert [blow["missed"] for blow in said["blows"]] == [""]
    assert left == []
    monkeypatch.setattr("nodes.drill.performance._PATIENCE", 0.5)
    capsys.readouterr()
    assert main.run(["drill", str(path)]) == 4  # it is gone now
    assert "--own-brokers runs without it" in capsys.readouterr().err


async def retained(url: str) -> list[str]:
    """Topics with a retained message; a message of our own comes after them."""
    async with connect(url, client_id="look") as bus:
        found = await bus.subscribe(["#"], qos=1)
        await (await bus.publish([Publication("mark", b"x", qos=1)]))
        topics: list[str] = []
        async with asyncio.timeout(20):
            while "mark" not in topics:
                topics += [delivery.topic for delivery in await found.receive()]
    return [topic for topic in topics if topic != "mark"]
