"""``penstock ledger``: of a topology that runs, that was stopped, that has ended; and where a run says that it can be found."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import passed, run, until

from broker.bus import Publication
from broker.connect import connect
from nodes import running
from nodes.cli import main
from nodes.cli._books import table
from nodes.supervisor import Supervisor
from schemas import topics
from schemas.codec import encode
from schemas.messages import Flow, Ledger, Message, State

ROOT = Path(__file__).parent.parent
TOTAL = 20_000
TOPOLOGY = """
topology: books
{brokers}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 300/s}}}}
  half: {{preprocess: {{steps: [{{filter: value % 2 == 0}}]}}, from: meter}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: half}}
"""


def site(folder: Path, brokers: str = "") -> Path:
    lines = ["time,device,value", *(f"{1_700_000_000 + i},d{i % 4},{i}" for i in range(TOTAL))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "books.yaml"
    path.write_text(TOPOLOGY.format(brokers=brokers))
    return path


def _penstock(*args: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli.main", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        text=True,
        check=False,
        timeout=30,
    )
    return done.returncode, done.stdout


async def penstock(*args: str) -> tuple[int, str]:
    """A ``penstock`` process beside a run: exit code, and output with errors."""
    return await asyncio.to_thread(_penstock, *args)


@pytest.fixture
def url() -> Iterator[str]:
    """A running ``penstock broker``."""
    command = [sys.executable, "-m", "nodes.cli.main", "broker", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("listening on ").strip()
        process.terminate()


def test_the_books_of_a_run_on_any_free_port_and_as_it_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = site(tmp_path), tmp_path / "state"
    where = [str(path), "--state", str(state)]
    told: dict[str, tuple[int, str]] = {}
    stops: list[asyncio.Task[None]] = []

    async def look(supervisor: Supervisor) -> None:
        await until(lambda: passed(supervisor, "store") > 50)
        mode = (state / "run.json").stat().st_mode & 0o777
        told["mode"] = (mode, "")
        told["json"], told["text"], told["tap"], told["watch"] = await asyncio.gather(
            penstock("ledger", *where, "--json"),
            penstock("ledger", *where),
            penstock("tap", *where[:1], "store", *where[1:], "--count", "1", "--json"),
            penstock("ledger", "--broker", supervisor.brokers.urls["local"]),
        )
        stops.append(asyncio.create_task(supervisor.stop()))
        await asyncio.Event().wait()

    outcome = run(path, state=state, meddle=look)
    assert told["mode"] == (0o600, "")
    assert not (state / "run.json").exists()
    code, text = told["json"]
    plain = json.loads(text)
    assert code == 0
    assert (plain["topology"], plain["ended"], plain["balanced"]) == ("books", False, None)
    assert plain["findings"] == plain["silent"] == []
    assert {name: node["state"] for name, node in plain["nodes"].items()} == dict.fromkeys(
        ("meter", "half", "store"), "ready"
    )
    assert [edge["edge"] for edge in plain["edges"]] == ["meter.out → half", "half.out → store"]
    assert all(edge["delivery"] == "safe" and edge["lost"] == 0 for edge in plain["edges"])
    half = plain["nodes"]["half"]["ledger"]
    assert half["received"]["meter.out"]["rows"] == half["passed"] + half["filtered"] + half.get("held", 0)
    for code, text in (told["text"], told["watch"]):
        assert code == 0
        assert re.search(r"^half +ready +\d+ +\d+ +\d+", text, re.MULTILINE)
        assert re.search(r"^half\.out → store +(safe +)?\d+ +\d+", text, re.MULTILINE)
        assert re.search(r"^under way: \d+ messages on edges, \d+ rows in nodes$", text, re.MULTILINE)
    code, text = told["tap"]
    assert code == 0
    assert '"topic": "books/store/' in text

    assert not outcome.complete
    capsys.readouterr()
    assert main.run(["ledger", *where, "--json"]) == 0
    left = json.loads(capsys.readouterr().out)
    assert {node["state"] for node in left["nodes"].values()} == {"stopped"}
    books = outcome.ledgers
    assert left["nodes"]["store"]["ledger"]["passed"] == books["store"].passed > 0
    assert main.run(["ledger", *where]) == 0
    assert "left under way by a stopped run: 0 messages on edges, 0 rows in nodes" in capsys.readouterr().out


def test_watching_until_the_end(tmp_path: Path, url: str) -> None:
    path, state = site(tmp_path, f"brokers: {{site: {{url: '{url}'}}}}"), tmp_path / "state"
    command = ["-m", "nodes.cli.main", "ledger", str(path), "--state", str(state), "--watch", "--json"]

    async def look(supervisor: Supervisor) -> tuple[int | None, list[bytes]]:
        await until(lambda: passed(supervisor, "store") > 20)
        watch = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stdout=subprocess.PIPE)
        assert watch.stdout is not None
        first = await watch.stdout.readline()  # it has seen the run before we end it
        supervisor.end()
        rest = await watch.stdout.read()
        return await watch.wait(), [first, *rest.splitlines()]

    async def both() -> None:
        from nodes.plan import prepare

        supervisor = Supervisor(prepare(path, state=state), state=state)
        looking = asyncio.create_task(look(supervisor))
        outcome = await supervisor.run()
        code, lines = await looking
        pictures = [json.loads(line) for line in lines]
        assert code == 0
        assert len(pictures) >= 2
        assert not pictures[0]["ended"]
        assert pictures[-1]["balanced"] is True
        assert pictures[-1]["nodes"]["store"]["ledger"]["passed"] == outcome.ledgers["store"].passed
        assert all(edge["under_way"] == 0 for edge in pictures[-1]["edges"])
        code, text = await penstock("ledger", str(path), "--state", str(state))
        assert code == 0
        assert text.endswith("ended; the ledger balances (nodes count rows, edges messages)\n")

    asyncio.run(both())


def publish(url: str, *messages: tuple[str, Message]) -> None:
    async def send() -> None:
        async with connect(url, client_id="forger", patience=5) as bus:
            await (await bus.publish([Publication(t, encode(m), qos=1, retain=True) for t, m in messages]))

    asyncio.run(send())


def told_by(url: str, book: Ledger, status: str = "ended", topology: str = "books") -> None:
    name = book.node
    publish(
        url,
        (topics.ledger(topology, name), Message(f"{name}:ledger", name, 1, book)),
        (topics.state(topology, name), Message(f"{name}:state", name, 1, State(node=name, status=status))),
    )


def test_what_does_not_balance_is_named(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(site(tmp_path, f"brokers: {{site: {{url: '{url}'}}}}"))
    state = ["--state", str(tmp_path / "state")]
    told_by(url, Ledger(node="meter", emitted={"out": Flow(messages=10, rows=10)}))
    told_by(
        url,
        Ledger(
            node="half",
            received={"meter.out": Flow(messages=9, rows=9)},
            emitted={"out": Flow(messages=4, rows=4)},
            passed=4,
            filtered=3,
            dead={"exception": 1},
        ),
    )
    assert main.run(["ledger", path, *state]) == 0
    out = capsys.readouterr().out
    assert "store: nothing is heard of it" in out
    assert "does not balance: half: 9 rows received, but 4 passed + 3 filtered + 0 dropped + 1 dead + 0 held = 8" in out
    told_by(url, Ledger(node="store", received={"half.out": Flow(messages=4, rows=4)}, passed=4), status="offline")
    assert main.run(["ledger", path, *state]) == 0
    out = capsys.readouterr().out
    assert "store: nothing is heard of it" in out
    assert "meter.out → half: 10" not in out
    told_by(url, Ledger(node="store", received={"half.out": Flow(messages=4, rows=4)}, passed=4))
    assert main.run(["ledger", path, *state]) == 5
    out = capsys.readouterr().out
    assert "does not balance: meter.out → half: 10 messages (10 rows) sent, 9 (9 rows) received" in out
    assert "half: 1 rows dead: exception" in out
    assert main.run(["ledger", path, "--json", *state]) == 5
    assert json.loads(capsys.readouterr().out)["balanced"] is False
    told_by(url, Ledger(node="meter", emitted={"out": Flow(messages=1, rows=1)}), topology="other")
    assert main.run(["ledger", url]) == 5
    out = capsys.readouterr().out
    assert re.search(r"^other/meter +ended", out, re.MULTILINE)
    assert re.search(r"^books/meter\.out → half +10 +9", out, re.MULTILINE)


def test_nobody_to_ask(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = site(tmp_path), tmp_path / "state"
    assert main.run(["ledger"]) == 2
    assert "say a topology's file or --broker URL" in capsys.readouterr().err
    assert main.run(["ledger", str(path), "--state", str(state)]) == 1
    assert "does not run here, and nothing is left of an earlier run" in capsys.readouterr().err
    state.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    running.announce(
        state, running.Running(topology="books", host="", pid=gone.pid, brokers={"local": "mqtt://127.0.0.1:9"})
    )
    assert main.run(["ledger", str(path), "--state", str(state)]) == 1  # a killed supervisor's
    capsys.readouterr()
    assert main.run(["ledger", url]) == 1
    assert "tells its books" in capsys.readouterr().err
    monkeypatch.setattr("nodes.cli._collect._PATIENCE", 0.5)
    assert main.run(["ledger", "mqtt://127.0.0.1:9"]) == 4


def test_runs_of_several_hosts_are_found_by_one_folder(tmp_path: Path) -> None:
    for host in ("gateway", "cloud"):
        running.announce(
            tmp_path, running.Running(topology="t", host=host, pid=os.getpid(), brokers={host: f"mqtt://{host}"})
        )
    (tmp_path / "x.run.json").write_text("{")
    assert [run.host for run in running.find(tmp_path)] == ["cloud", "gateway"]
    running.withdraw(tmp_path, "cloud")
    running.withdraw(tmp_path, "cloud")
    assert [run.brokers for run in running.find(tmp_path)] == [{"gateway": "mqtt://gateway"}]


def test_tables_line_up() -> None:
    assert table([("name", "state", "n", "empty"), ("a", "ready", "7", ""), ("bcdef", "x", "123", "")]) == [
        "name   state    n",
        "-----  -----  ---",
        "a      ready    7",
        "bcdef  x      123",
    ]
