"""Two ``penstock run --host`` with a relay that keeps between them: processes killed from outside, books asked for meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from brokers import KINDS, Broker, free_port, started
from harness import advance, run, until
from relay_site import EDGE, RELAY, at, books, kept, site, stored

from broker.connect import connect
from nodes import relay_books
from nodes.cli import main
from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor
from schemas import codec, topics
from schemas.messages import State

sys.path.append(str(Path(__file__).parent / "broker"))
from bus_site import Mosquitto

ROOT = Path(__file__).parent.parent


def host(path: Path, name: str) -> subprocess.Popen[bytes]:
    """``penstock run --host NAME --json``."""
    command = [sys.executable, "-m", "nodes.cli.main", "run", str(path), "--host", name, "--json"]
    command += ["--state", str(path.parent / f"state-{name}")]
    with (path.parent / f"{name}.out").open("w") as out, (path.parent / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=out, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})


def family(pid: int) -> list[int]:
    """A process and everything that it started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    out = [pid]
    for each in out:
        out += [child for child, parent in parents.items() if parent == each]
    return out


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a supervisor and everything that it started: as if the machine had lost its power."""
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


async def pid_of_relay(broker: Broker, other_than: int = 0) -> int:
    """As its state on the bus says."""
    async with connect(broker.url, client_id="watch-state") as bus:
        subscription = await bus.subscribe([topics.state("line", RELAY)], qos=1)
        async with asyncio.timeout(20):
            while True:
                for delivery in (batch := await subscription.receive()):
                    body = codec.decode(delivery.payload).body
                    assert isinstance(body, State)
                    if body.status == "ready" and body.pid != other_than:
                        return body.pid
                subscription.acknowledge(batch)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_relay_and_then_its_whole_host_are_killed(tmp_path: Path) -> None:
    total = 5000

    async def go() -> None:
        gateway, cloud = host(path, "gateway"), host(path, "cloud")
        try:
            await advance(tmp_path, 200)
            pid = await pid_of_relay(below)
            os.kill(pid, signal.SIGKILL)
            await pid_of_relay(below, pid)
            await advance(tmp_path, 300)
            kill_all(gateway)
            cloud_was = stored(tmp_path)
            gateway = host(path, "gateway")
            await advance(tmp_path, 300)
            kill_all(cloud)
            cloud = host(path, "cloud")
            await until(lambda: gateway.poll() is not None and cloud.poll() is not None, within=40)
            assert stored(tmp_path)[: len(cloud_was)] == cloud_was
        finally:
            for process in (gateway, cloud):
                kill_all(process)

    with started("embedded", tmp_path / "below") as below, started("embedded", tmp_path / "above") as above:
        path = site(tmp_path, total, below=at(below.port), above=at(above.port), relay="spool: 20MB", pace="1000/s")
        asyncio.run(go())
    outcomes = [json.loads((tmp_path / f"{name}.out").read_text()) for name in ("gateway", "cloud")]
    assert stored(tmp_path) == list(range(total))
    assert [(o["complete"], o["findings"]) for o in outcomes] == [(True, []), (True, [])]
    low, high = outcomes
    assert set(low["nodes"]) == {"meter", RELAY}
    assert set(high["nodes"]) == {"store"}
    port = low["nodes"][RELAY]["ledger"]["spooled"][EDGE]
    assert port["taken"]["messages"] == port["given"]["messages"] == total
    assert low["nodes"]["meter"]["ledger"]["emitted"]["out"]["messages"] == total
    assert high["nodes"]["store"]["ledger"]["received"][EDGE]["messages"] == total


def test_the_ledger_shows_what_a_relay_keeps_while_it_runs_and_as_it_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 3000
    away = KINDS["embedded"](tmp_path / "cloud")
    away.port = free_port()
    told: dict[str, tuple[int, str]] = {}

    def penstock(*args: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "nodes.cli.main", "ledger", *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=40)
        return done.returncode, done.stdout + done.stderr

    async def look(supervisor: Supervisor) -> None:
        await until(lambda: books(supervisor).taken.messages == total)
        broker = f"mqtt://127.0.0.1:{below.port}"
        told["live"] = await asyncio.to_thread(
            penstock, str(path), "--broker", broker, "--state", str(tmp_path / "state")
        )
        told["bus"] = await asyncio.to_thread(penstock, "--broker", broker, "--json")
        await supervisor.stop()

    with started("embedded", tmp_path / "below") as below:
        relay = "spool: 131072, overflow: drop-oldest"
        path = site(tmp_path, total, below=at(below.port), above=at(away.port), relay=relay)
        outcome = run(path, meddle=look)
    port = books(outcome)
    dropped, held = port.dropped["spool-full"].messages, port.held.messages
    assert (dropped + held, port.given.messages) == (total, 0)
    code, text = told["live"]
    assert code == 0
    row = next(line for line in text.splitlines() if line.startswith("meter.out → store") and RELAY in line)
    assert f"{total}" in row
    assert f"{dropped} spool-full" in row
    assert str(held) in row
    code, text = told["bus"]
    assert code == 0
    [of_relay] = [node for name, node in json.loads(text)["nodes"].items() if name == RELAY]
    assert of_relay["ledger"]["spooled"][EDGE]["taken"]["messages"] == total
    assert of_relay["ledger"]["dropped"] == {"spool-full": dropped}
    # stopped: as it was left, from its files; the brokers are gone
    monkeypatch.setattr("nodes.cli._collect._PATIENCE", 0.5)
    assert main.run(["ledger", str(path), "--state", str(tmp_path / "state")]) in {0, 4}
    capsys.readouterr()
    left = path.with_name("left.yaml")
    left.write_text(path.read_text().replace(at(below.port), "{run: embedded, on: gateway}"))
    left.write_text(left.read_text().replace(at(away.port), "{run: embedded, on: cloud}"))
    assert main.run(["ledger", str(left), "--state", str(tmp_path / "state"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"][RELAY]["ledger"]["spooled"][EDGE]["held"]["messages"] == held


@pytest.mark.parametrize("overflow", ["block", "drop-oldest"])
def test_the_gateways_disk_is_full(tmp_path: Path, overflow: str) -> None:
    """Smaller than the spool may get: the producer waits then, and nothing is dropped, whatever the policy."""
    total = 6000
    disk = tmp_path / "state-gateway"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "x", disk], check=False).returncode:
        pytest.skip("may not mount a file system")
    away = KINDS["embedded"](tmp_path / "cloud")
    away.port = free_port()

    async def go() -> list[Outcome]:
        states = {name: tmp_path / f"state-{name}" for name in ("gateway", "cloud")}
        hosts = {name: Supervisor(prepare(path, state=state), state=state, host=name) for name, state in states.items()}
        runs = [asyncio.create_task(supervisor.run()) for supervisor in hosts.values()]
        await until(lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize < 600_000)
        taken = -1
        while books(hosts["gateway"]).taken.messages > taken:
            taken = books(hosts["gateway"]).taken.messages
            await asyncio.sleep(2)
        assert taken < total
        await asyncio.to_thread(away.start)
        async with asyncio.timeout(40):
            return list(await asyncio.gather(*runs))

    try:
        with started("embedded", tmp_path / "below") as below:
            relay = f"spool: 20MB, overflow: {overflow}"
            path = site(tmp_path, total, below=at(below.port), above=at(away.port), relay=relay, pad=850)
            outcomes = asyncio.run(go())
    finally:
        away.stop(kill=True)
        subprocess.run(["umount", "-l", disk], check=True)
    assert [(o.complete, o.findings) for o in outcomes] == [(True, []), (True, [])]
    assert books(outcomes[0]).dropped == {}
    assert stored(tmp_path) == list(range(total))


def test_a_run_that_goes_on_does_not_begin_the_ended_nodes_anew(tmp_path: Path) -> None:
    """A source and the node after it have ended, and a relay keeps what they sent; then the run is stopped."""
    total = 2000
    away = KINDS["embedded"](tmp_path / "cloud")
    away.port = free_port()

    async def stop(supervisor: Supervisor) -> None:
        await until(lambda: {supervisor.views[n].state for n in ("meter", "warm")} == {"ended"})
        await supervisor.stop()

    async def start(supervisor: Supervisor) -> None:
        await asyncio.to_thread(away.start)

    with started("embedded", tmp_path / "below") as below:
        path = site(tmp_path, total, below=at(below.port), above=at(away.port), relay="spool: 20MB")
        text = path.read_text().replace("from: meter, on: cloud", "from: warm, on: cloud")
        path.write_text(text + "  warm: {preprocess: {steps: [{filter: value % 2 == 0}]}, from: meter, on: gateway}\n")
        try:
            assert not run(path, meddle=stop).complete
            outcome = run(path, meddle=start)
        finally:
            away.stop(kill=True)
    assert outcome.complete
    assert outcome.findings == []
    assert {name for name, view in outcome.nodes.items() if view.books is None} == {"meter", "warm"}
    assert stored(tmp_path) == list(range(0, total, 2))


def test_forwarding_relays_of_two_sites_dial_out_to_one_broker(tmp_path: Path) -> None:
    """Their names at the common broker differ, or each would end the other's connection."""
    with (
        started("embedded", tmp_path / "east") as east,
        started("embedded", tmp_path / "west") as west,
        started("embedded", tmp_path / "above") as above,
    ):
        names = {"east": east, "west": west, "cloud": above}
        lines = ["topology: two", "brokers:", *(f"  {name}: {at(broker.port)}" for name, broker in names.items())]
        lines += ["hosts:", *(f"  {name}: {{broker: {name}}}" for name in names), "nodes:"]
        for name in ("east", "west"):
            (tmp_path / f"{name}.csv").write_text("value\n" + "".join(f"{i}\n" for i in range(500)))
            lines.append(f"  {name}-in: {{ingest: {{source: csv, path: {name}.csv, batch: 1}}, on: {name}}}")
        lines.append(
            "  store: {uplink: {sink: sqlite, path: out.sqlite, table: rows}, from: [east-in, west-in], on: cloud}"
        )
        path = tmp_path / "two.yaml"
        path.write_text("\n".join(lines) + "\n")
        outcome = run(path)
    assert outcome.complete
    assert outcome.findings == []
    assert sorted(stored(tmp_path)) == sorted([*range(500), *range(500)])


@pytest.mark.campaign
def test_workers_whose_supervisor_was_killed_leave_though_they_cannot_finish(tmp_path: Path) -> None:
    """The source waits for the relay, whose spool is full; the next run's relay needs the spool, and the source its file."""

    async def go() -> None:
        gateway = host(path, "gateway")
        try:
            pid = await pid_of_relay(below)
            folder = tmp_path / "state-gateway" / RELAY
            await until(lambda: kept(relay_books.left(folder, RELAY)).disk > 100_000)
            workers = family(gateway.pid)[1:]
            assert pid in workers
            gateway.kill()
            gateway.wait()
            await until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), within=40)
        finally:
            kill_all(gateway)

    with started("embedded", tmp_path / "below") as below:
        path = site(tmp_path, 5000, below=at(below.port), above=at(free_port()), relay="spool: 131072")
        asyncio.run(go())


@pytest.mark.parametrize("relay", ["", ", relay: {spool: 20MB}"], ids=["forwards", "keeps"])
def test_a_relay_logs_in_where_the_broker_wants_it(
    tmp_path: Path, needs_mosquitto: str, relay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which("mosquitto_passwd")
    if program is None:
        pytest.skip("mosquitto_passwd is not installed")
    secrets = tmp_path / "passwords"
    subprocess.run([program, "-c", "-b", str(secrets), "line", "s3cret"], check=True, capture_output=True)
    monkeypatch.setenv("LINE_PASSWORD", "s3cret")
    above = Mosquitto(tmp_path / "above", "allow_anonymous false", f"password_file {secrets}").start()
    try:
        with started("embedded", tmp_path / "below") as below:
            there = f'{{url: "mqtt://127.0.0.1:{above.port}", user: line, password: {{env: LINE_PASSWORD}}}}'
            path = site(tmp_path, 200, below=at(below.port), above=there, relay="spool: 20MB")
            path.write_text(path.read_text().replace(", relay: {spool: 20MB}", relay))
            outcome = run(path)
    finally:
        above.stop()
    assert outcome.complete
    assert outcome.findings == []
    assert stored(tmp_path) == list(range(200))
