"""Each fault of a drill really does what it says: on a link, on a process, on a running topology."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from harness import run, until

from broker.connect import connect
from nodes.drill.behind import Behind
from nodes.drill.disguise import Choices, Disguise
from nodes.drill.fault import Blow, Ground, Stage, module, names
from nodes.drill.faults import bad_payloads, full_disk
from nodes.drill.feed import Feed
from nodes.drill.proxy import Link
from nodes.drill.schedule import Wanted, all_blows, schedule
from nodes.operator import Context
from nodes.plan import prepare
from nodes.sinks.probe import Config, ProbeSink
from nodes.sources.mqtt import Config as MqttConfig
from nodes.supervisor import Supervisor
from schemas import codec
from schemas.errors import PayloadError
from schemas.messages import Aggregate, Message, Readings, Window

SITE = """
topology: site
nodes:
  meter: {ingest: {source: csv, path: meter.csv, rate: 50/s, batch: 1, loop: true}}
  warm: {preprocess: {steps: [{filter: value >= 0}]}, from: meter}
  store: {uplink: {sink: jsonl, path: out.jsonl}, from: warm}
"""


# -- links -----------------------------------------------------------------------------------------------------------


def echoing(scenario: Callable[[Link], Awaitable[None]]) -> None:
    """Run a scenario with a link before a server that sends back what it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Link(f"mqtt://127.0.0.1:{port}", seed=1) as link:
            await asyncio.wait_for(scenario(link), 30)

    asyncio.run(go())


async def there_and_back(link: Link, data: bytes = b"x") -> float:
    """Seconds that some bytes take through a link and back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    began = time.monotonic()
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    took = time.monotonic() - began
    writer.close()
    return took


def test_a_slow_link_is_slow_both_ways_and_calm_again() -> None:
    async def scenario(link: Link) -> None:
        link.delay = 0.1
        assert await there_and_back(link) >= 0.2
        link.calm()
        link.bandwidth = 100_000
        assert await there_and_back(link, b"x" * 20_000) >= 0.4
        link.calm()
        link.loss = 1.0  # every chunk has to be sent again
        assert await there_and_back(link) >= 0.4
        link.calm()
        assert (link.delay, link.jitter, link.loss, link.bandwidth) == (0, 0, 0, 0)
        await there_and_back(link, b"y" * 3_000_000)

    echoing(scenario)


def test_a_cut_link_drops_and_refuses_and_a_silent_one_says_nothing() -> None:
    async def scenario(link: Link) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        link.stall()
        writer.write(b"b")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        link.go_on()
        assert await reader.read(1) == b"b"
        link.refuse = True
        link.cut()
        with contextlib.suppress(ConnectionError):
            assert await reader.read(1) == b""
        writer.close()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await there_and_back(link)
        link.calm()
        await there_and_back(link)

    echoing(scenario)


# -- processes and disks ---------------------------------------------------------------------------------------------


_WRITER = """
import sys
for _ in sys.stdin:
    try:
        with open(sys.argv[1], "ab", 0) as file:
            file.write(b"x")
        print("ok", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


def test_a_process_that_may_write_nothing_is_told_so_and_can_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        asked, answered = child.stdin, child.stdout
        assert asked is not None
        assert answered is not None

        def ask() -> str:
            asked.write("\n")
            asked.flush()
            return answered.readline().strip()

        assert ask() == "ok"
        before = full_disk.limit(child.pid, 0)
        assert before == resource.getrlimit(resource.RLIMIT_FSIZE)
        assert ask() == "27"  # EFBIG
        full_disk.limit(child.pid, before[0])
        assert ask() == "ok"
        asked.close()
    assert full_disk.limit(child.pid, 0) is None


@pytest.mark.skipif(not full_disk.can_mount(), reason="may not mount a tmpfs")
def test_a_full_tmpfs_takes_no_byte_and_is_seen_by_nobody_else(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom nodes.drill.faults import full_disk as f\np = pathlib.Path(sys.argv[1])\n"
        "assert f.mount(p)\n(p / 'a').write_bytes(b'x' * 4096)\nf.fill(p / 'filler')\n"
        "try:\n (p / 'b').write_bytes(b'x' * 4096)\nexcept OSError as e: print(e.errno)\n"
        "(p / 'filler').unlink()\n(p / 'b').write_bytes(b'x' * 4096)\nprint('room')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["28", "room"], done.stderr  # ENOSPC
    assert list(tmp_path.iterdir()) == []  # the mount was the process's own


# -- a running topology ----------------------------------------------------------------------------------------------


def strike(folder: Path, fault: str, target: str, seconds: float, look: Callable[[Stage], None]) -> str:
    """Strike a running site once; ``look`` is called every 10 ms during the blow."""
    (folder / "meter.csv").write_text("value\n1\n2\n3\n")
    (folder / "site.yaml").write_text(SITE)
    told: list[str] = []

    async def meddle(supervisor: Supervisor) -> None:
        await until(lambda: all(view.ready_at for view in supervisor.views.values()))
        plan = prepare(folder / "site.yaml")
        ground = Ground(plan, frozenset(["local"]), frozenset(), list(plan.nodes))
        brokers = supervisor.brokers
        assert isinstance(brokers, Behind)
        stage = Stage(ground, supervisor, brokers, folder / "state", random.Random(1))
        blow = asyncio.create_task(module(fault).strike(stage, Blow(fault, target, seconds)))
        while not blow.done():
            look(stage)
            await asyncio.sleep(0.01)
        told.append(blow.result())
        look(stage)
        await stage.close()
        supervisor.end()

    original = Supervisor.__init__

    def behind(self: Supervisor, *args: object, **options: object) -> None:
        original(self, *args, **options)  # type: ignore[arg-type] # handed through as it is
        self.brokers = Behind(self._plan, self._state, None)

    Supervisor.__init__ = behind  # type: ignore[method-assign] # the harness makes its own
    try:
        outcome = run(folder / "site.yaml", meddle=meddle)
    finally:
        Supervisor.__init__ = original  # type: ignore[method-assign]
    assert outcome.complete
    assert outcome.findings == []
    return told[0]


def test_the_processes_live_in_another_hour_during_a_jump(tmp_path: Path) -> None:
    strike(tmp_path, "clock-jump", "", 3.0, lambda stage: None)
    born = [line.split('"time":"')[1][:16] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    hours = sorted({int(moment[:4] + moment[5:7] + moment[8:10] + moment[11:13]) for moment in born})
    assert len(hours) >= 3  # one ahead, one behind, and the true one


def test_every_bad_payload_is_refused_and_nothing_else_happens(tmp_path: Path) -> None:
    dead: dict[str, int] = {}

    def look(stage: Stage) -> None:
        for name, view in stage.supervisor.views.items():
            dead[name] = sum(view.books.dead.values()) if view.books is not None else 0

    told = strike(tmp_path, "bad-payloads", "", 1.0, look)
    count = len(bad_payloads.payloads())
    assert told == f"{count} each on 4 topics"
    assert dead["meter"] == 0


@pytest.mark.parametrize("name", sorted(bad_payloads.payloads()))
def test_no_bad_payload_is_a_message(name: str) -> None:
    with pytest.raises(PayloadError):
        codec.decode(bad_payloads.payloads()[name])


def test_a_flood_is_recognised_as_repeats(tmp_path: Path) -> None:
    repeated = 0

    def look(stage: Stage) -> None:
        nonlocal repeated
        books = stage.supervisor.views["warm"].books
        repeated = max(repeated, sum(books.repeated.values()) if books is not None else 0)

    told = strike(tmp_path, "flood", "", 3.0, look)
    assert "messages again on" in told
    assert repeated > 100
    idents = [line.split('"id":"')[1].split('"')[0] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(set(idents)) == len(idents)


def test_a_killed_broker_is_another_process_after_it(tmp_path: Path) -> None:
    pids: set[int] = set()
    strike(tmp_path, "kill-broker", "local", 1.0, lambda stage: pids.add(stage.brokers.children["local"].pid))
    assert len(pids - {0}) == 2


# -- before and after ------------------------------------------------------------------------------------------------


def test_a_seed_stands_for_one_schedule(tmp_path: Path) -> None:
    (tmp_path / "meter.csv").write_text("value\n1\n")
    (tmp_path / "site.yaml").write_text(SITE)
    plan = prepare(tmp_path / "site.yaml")
    ground = Ground(plan, frozenset(["local"]), frozenset(), list(plan.nodes))
    blows = all_blows([Wanted(name, rounds=2) for name in names()], ground)
    one = schedule(blows, 3, 120)
    assert one == schedule(blows, 3, 120)
    assert one != schedule(blows, 4, 120)
    assert sorted(map(str, blows)) == sorted(str(blow) for _, blow in one)
    assert [at for at, _ in one] == sorted(at for at, _ in one)
    assert one[-1][0] < 0.75 * 120


def test_the_disguise_leaves_no_sink_no_port_and_no_end_out_of_hand(tmp_path: Path) -> None:
    (tmp_path / "meter.csv").write_text("value\n" + "1\n" * 100)
    text = SITE.replace("nodes:", 'brokers: {own: {run: embedded, listen: "127.0.0.1:18777"}}\nnodes:', 1)
    (tmp_path / "site.yaml").write_text(text)
    disguise = Disguise(prepare(tmp_path / "site.yaml"), Choices(seconds=10), tmp_path / "scratch", "abc")
    made = disguise.topology(tmp_path / "scratch", {"meter": 100})
    assert made.name == "site-drill-abc"
    assert made.brokers["own"].listen == "127.0.0.1:0"
    assert made.nodes["store"].config["sink"] == "probe"
    meter = made.nodes["meter"].config
    assert (meter["rate"], "loop" in meter, meter["start"]) == (10.0, False, "2026-01-01T00:00:00Z")
    kept = disguise.topology(tmp_path / "scratch", {"meter": 100}, real_sinks=True)
    assert kept.nodes["store"].config["sink"] == "jsonl"
    assert kept.nodes["store-probe"].config["sink"] == "probe"


def test_the_probe_holds_each_message_once_and_counts_deliveries(tmp_path: Path) -> None:
    context = Context(topology="t", node="store", base=tmp_path, state=tmp_path)

    def reading(ident: str, value: float) -> Message:
        return Message(ident, "d", 5, Readings(n=1, columns={"value": np.array([value])}))

    def aggregate(revision: int) -> Message:
        body = Aggregate(window=Window(start=0, end=1), key="", values={"n": revision}, count=1, revision=revision)
        return Message("w", "d", 0, body)

    async def go() -> None:
        sink = ProbeSink(Config(path="p.sqlite"), context)
        await sink.open()
        await sink.write([reading("a", 1.0), reading("b", 1.0), reading("a", 1.0), aggregate(0)])
        await sink.close()
        again = ProbeSink(Config(path="p.sqlite"), context)  # as after a kill
        await again.open()
        await again.write([reading("a", 1.0), reading("c", 2.0), aggregate(1)])
        await again.close()

    asyncio.run(go())
    db = sqlite3.connect(tmp_path / "p.sqlite")
    found = db.execute("SELECT id, revision, deliveries, digest FROM arrivals ORDER BY id, revision").fetchall()
    db.close()
    assert [row[:3] for row in found] == [("a", 0, 3), ("b", 0, 1), ("c", 0, 1), ("w", 0, 1), ("w", 1, 1)]
    assert found[0][3] == found[1][3] != found[2][3]  # by content, not by identity


def test_the_feed_says_what_the_devices_would() -> None:
    def feed(**options: object) -> Feed:
        return Feed("climate", MqttConfig.model_validate({"topics": ["zigbee/+/state"], **options}))

    nested = feed(fields={"temp": "$.a.b[1]", "on": "$.on"}, types={"on": "bool"}, device="topic[1]")
    assert nested.payload(4) == b'{"a":{"b":[0,4]},"on":true}'
    assert feed(format="number").payload(7) == b"7"
    assert feed(rows="$.all", fields={"x": "$.x"}).payload(1) == b'{"all":[{"x":1}]}'


def test_links_stand_before_brokers_and_work(tmp_path: Path) -> None:
    (tmp_path / "meter.csv").write_text("value\n1\n")
    (tmp_path / "site.yaml").write_text(SITE)

    async def go() -> None:
        brokers = Behind(prepare(tmp_path / "site.yaml"), tmp_path / "state", None)
        await brokers.start()
        try:
            assert brokers.urls["local"] != brokers.direct["local"]
            async with connect(brokers.urls["local"], client_id="c"):
                assert brokers.links["local"].seen == 1
        finally:
            await brokers.stop()

    asyncio.run(go())
