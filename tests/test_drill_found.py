"""What drills found in the product, each in its smallest form."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import run, until

from broker.bus import Publication
from broker.connect import connect
from broker.local import LocalBus
from broker.local_hub import Hub
from broker.window import Ack, pack
from nodes.assignment import NodeSpec, OutPort
from nodes.channel import Mark
from nodes.drill import clock
from nodes.journal import Journal
from nodes.outputs import Outputs
from nodes.supervisor import Supervisor
from schemas import topics
from schemas.messages import Event, Message

ROOT = Path(__file__).parent.parent
IDLE = """
topology: idle
nodes:
  meter: {ingest: {source: csv, path: meter.csv, rate: 20/s, batch: 1, loop: true}}
  none: {preprocess: {steps: [{filter: value < 0}]}, from: meter}
  store: {uplink: {sink: jsonl, path: out.jsonl}, from: none}
"""


def test_a_refused_message_stays_in_the_books_of_an_idle_node_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "meter.csv").write_text("value\n1\n2\n")
    (tmp_path / "idle.yaml").write_text(IDLE)

    async def meddle(supervisor: Supervisor) -> None:
        view = supervisor.views["store"]
        await until(lambda: all(view.ready_at for view in supervisor.views.values()))
        async with connect(supervisor.brokers.urls["local"], client_id="stranger") as bus:
            await (await bus.publish([Publication("idle/none/out/x", b"\xff\xff", qos=1)]))
        await until(lambda: view.books is not None and sum(view.books.dead.values()) == 1)
        supervisor.kill("store")
        await until(lambda: view.restarts == 1 and view.state == "ready")
        supervisor.end()

    outcome = run(tmp_path / "idle.yaml", meddle=meddle)
    assert outcome.complete
    assert outcome.findings == []
    assert sum(outcome.ledgers["store"].dead.values()) == 1


def test_what_is_lost_is_sent_again_though_the_clock_was_set_back() -> None:
    """As when a clock is put right: what was sent by the old time would have waited for the hour to pass."""
    asyncio.run(_lose_and_set_back())


async def _lose_and_set_back() -> None:
    hub = Hub()
    async with LocalBus(hub) as bus, LocalBus(hub) as consumer:
        private = await consumer.subscribe([topics.again("line", "store", "warm", "out")])
        port = OutPort(name="out", local=False, remote={"store": False}, publish=True)
        spec = NodeSpec(name="warm", kind="custom", config={}, inputs=[], outputs=[port], host="local", broker="local")
        outputs = Outputs(
            "line",
            spec,
            bus=bus,
            local=None,
            journal=Journal(None),
            epoch=1,
            earlier=[],
            durable=False,
            progress=lambda: None,
        )
        await outputs.start()
        helpers = [asyncio.create_task(outputs.listen()), asyncio.create_task(outputs.resend())]
        hello = Publication(topics.ack("line", "warm", "out", "store"), pack(Ack(1, 0, 0, hello=True)), qos=1)
        await consumer.publish([hello])
        await asyncio.wait_for(outputs.ready(), 10)
        mark = Mark()
        outputs.stage([("out", Message("warm:1", "d", 0, Event(name="x")))], mark)
        await outputs.flush(outputs.take_staged(), mark)
        try:
            clock.move(-3600 * 10**9)
            assert time.time() < time.time_ns() / 1e9 + 1
            async with asyncio.timeout(20):
                while True:
                    deliveries = await private.receive()
                    private.acknowledge(deliveries)
                    answer = pack(Ack(1, 0, 0, answer=True))  # to who asks: nothing has come
                    await consumer.publish([Publication(topics.ack("line", "warm", "out", "store"), answer, qos=1)])
                    if any(b"warm:1" in bytes(delivery.payload) for delivery in deliveries):
                        break
        finally:
            clock.move(0)
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)


@pytest.mark.parametrize("hours", [1, -1])
def test_the_clock_of_a_process_can_be_moved_and_is_put_right_again(hours: int) -> None:
    before = time.time_ns(), time.monotonic()
    try:
        clock.move(hours * 3600 * 10**9)
        moved = [time.time(), time.time_ns() / 1e9, time.clock_gettime(time.CLOCK_REALTIME)]
        assert all(abs(now - before[0] / 1e9 - hours * 3600) < 60 for now in moved)
        assert abs(time.clock_gettime(time.CLOCK_MONOTONIC) - before[1]) < 60
    finally:
        clock.move(0)
    assert abs(time.time_ns() - before[0]) < 60 * 10**9


def test_the_workers_of_a_killed_supervisor_end(tmp_path: Path) -> None:
    """Stopped all at once, a node can wait for the acknowledgement of one that has left."""
    (tmp_path / "meter.csv").write_text("value\n1\n2\n")
    (tmp_path / "idle.yaml").write_text(IDLE.replace("value < 0", "value > 0").replace("20/s", "2000/s"))
    command = [sys.executable, "-m", "nodes.cli.main", "run", str(tmp_path / "idle.yaml")]
    out = tmp_path / "out.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as running:
        _wait(lambda: out.exists() and out.stat().st_size > 100_000)  # much is under way
        orphans = _below(running.pid)
        running.kill()
    brokers = [pid for pid in orphans if "broker.embedded" in _command(pid)]
    try:
        _wait(lambda: not [pid for pid in orphans if pid not in brokers and _command(pid)], within=45)
    finally:
        for pid in orphans:
            if _command(pid):
                os.kill(pid, signal.SIGKILL)


def _wait(condition: Callable[[], bool], within: float = 30) -> None:
    async def wait() -> None:
        await until(condition, within=within)

    asyncio.run(wait())


def _below(pid: int) -> list[int]:
    """All descendants of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in (child, *_below(child))]


def _command(pid: int) -> str:
    """Its command line; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
