"""A far end that stops reading: memory stays within what the windows allow, the source waits, nothing is lost.

And where the source cannot wait (real time, a ``fast`` edge): what is dropped is what the policy says, and is counted to the row.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has neither stubs nor py.typed
import pytest
from harness import rows, run, until

from broker.session import Session
from nodes.supervisor import Outcome, Supervisor
from schemas import codec
from schemas.messages import End

WINDOW = 1024
"""Messages that an edge keeps until they are done (``SendWindow``); every hop before it waits for the same ones."""
AHEAD = 256
"""Messages that a source may have drawn when its window fills."""
SIDE = 110
FRAME = SIDE * SIDE + 400
"""Bytes of a frame on the wire, at most."""
FRAMES = 12_000
BOUND = 2 * (WINDOW + AHEAD) * FRAME + 32_000_000
"""Bytes by which any process may grow. It may have the window of its input and that of its output, each once, and
a packet's worth of buffers. All frames together are 150 MB."""
QUEUE = 16


class Far:
    """A web service that can be told to stop reading: it takes connections, and neither reads nor answers.

    :ivar requests: of each request, the ids of its messages, in order of arrival.
    """

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()
        self.stuck = threading.Event()
        far = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if not far.go.is_set():
                    far.stuck.set()
                    far.go.wait()
                body = self.rfile.read(int(self.headers["Content-Length"]))
                far.requests.append([message["id"] for message in msgpack.unpackb(body)])
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def keys(self) -> list[int]:
        """The source's own number of each message, in order of arrival."""
        return [int(ident.rpartition(":")[2]) for request in self.requests for ident in request]

    def close(self) -> None:
        """End it, whoever waits."""
        self.go.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def far() -> Iterator[Far]:
    there = Far()
    yield there
    there.close()


class Listener:
    """Counts what a node publishes, as any foreign subscriber may."""

    def __init__(self) -> None:
        self.messages = 0
        self.ended = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, supervisor: Supervisor, topic: str) -> None:
        await until(lambda: "local" in supervisor.brokers.urls)
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._listen(supervisor.brokers.urls["local"], topic, ready))
        await ready.wait()

    async def _listen(self, url: str, topic: str, ready: asyncio.Event) -> None:
        async with Session(url) as bus:
            subscription = await bus.subscribe([topic], qos=0, capacity=1_000_000)
            ready.set()
            while True:
                for delivery in await subscription.receive():
                    ended = isinstance(codec.decode(delivery.payload).body, End)
                    self.ended = self.ended or ended
                    self.messages += not ended

    async def stands_still(self, seconds: float) -> None:
        """Wait until nothing has come for so long."""
        loop = asyncio.get_running_loop()
        seen, since = self.messages, loop.time()
        while loop.time() - since < seconds:
            await asyncio.sleep(0.05)
            if self.messages != seen:
                seen, since = self.messages, loop.time()

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()


def memory(pid: int, key: str) -> int:
    """Of a process in bytes: ``VmRSS``, now, or ``VmHWM``, the most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(key)


def processes(supervisor: Supervisor) -> dict[str, int]:
    """Process ids by name; the broker's too."""
    found = {name: view.pid for name, view in supervisor.views.items()}
    return {**found, "broker": supervisor.brokers.children["local"].pid}


async def stall(
    supervisor: Supervisor, begun: Callable[[], bool], stop: Callable[[], None], stuck: Callable[[], bool]
) -> tuple[int, dict[str, int]]:
    """Let it run until the far end has something, stop that, wait until the source stands still.

    :returns: messages published in all, and by process the bytes that it grew at most.
    """
    listener = Listener()
    await listener.start(supervisor, "stalled/meter/out/#")
    try:
        await until(lambda: listener.messages > 500 and begun())
        base = {name: memory(pid, "VmRSS") for name, pid in processes(supervisor).items()}
        stop()
        await until(stuck)
        await listener.stands_still(3.0)
        grown = {name: memory(pid, "VmHWM") - base[name] for name, pid in processes(supervisor).items()}
        return listener.messages, grown
    finally:
        listener.stop()


STALLED = """
topology: stalled
nodes:
  meter: {{ingest: {source}, publish: always}}
  half: {{preprocess: {{steps: [{step}]}}, from: {{meter: {{delivery: safe}}}}}}
  store: {{uplink: {sink}, from: {{half: {{delivery: safe}}}}}}
"""


def site(folder: Path, **parts: str) -> Path:
    path = folder / "stalled.yaml"
    path.write_text(STALLED.format(**parts))
    return path


def check(outcome: Outcome, seen: dict[str, Any], done_before: int) -> None:
    assert outcome.complete
    assert outcome.findings == []
    assert seen["published"] - done_before <= WINDOW + AHEAD, "the source did not wait"
    assert all(grown <= BOUND for grown in seen["grown"].values()), seen


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_web_service_that_stops_reading_stops_the_source_and_costs_no_message(tmp_path: Path, far: Far) -> None:
    source = f"{{source: synthetic, frames: {{width: {SIDE}, height: {SIDE}, colour: false}}, count: {FRAMES}}}"
    sink = f"{{sink: http, url: '{far.url}', format: msgpack, timeout: 10min}}"
    seen: dict[str, Any] = {}

    async def meddle(supervisor: Supervisor) -> None:
        seen["published"], seen["grown"] = await stall(
            supervisor, lambda: bool(far.keys), far.go.clear, far.stuck.is_set
        )
        seen["done"] = len(far.keys)
        far.go.set()

    outcome = run(site(tmp_path, source=source, step="flip: horizontal", sink=sink), meddle=meddle, within=150)
    check(outcome, seen, seen["done"])
    assert sorted(far.keys) == list(range(FRAMES))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_locked_database_stops_the_source_and_costs_no_row(tmp_path: Path) -> None:
    total = 20_000
    seen: dict[str, Any] = {}
    path = tmp_path / "out.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as lock:

        async def meddle(supervisor: Supervisor) -> None:
            try:
                seen["published"], seen["grown"] = await stall(
                    supervisor, lambda: rows_in(lock) > 0, lambda: hold(lock), lambda: lock.in_transaction
                )
                seen["done"] = rows_in(lock)
            finally:
                if lock.in_transaction:
                    lock.execute("COMMIT")

        source = f"{{source: synthetic, signals: {{value: {{kind: ramp}}}}, batch: 1, count: {total}}}"
        sink = f"{{sink: sqlite, path: {path}, table: rows, wait: 1}}"
        outcome = run(
            site(tmp_path, source=source, step="derive: {twice: value * 2}", sink=sink), meddle=meddle, within=150
        )
    check(outcome, seen, seen["done"])
    assert rows(path, "SELECT count(*), count(DISTINCT time) FROM rows") == [(total, total)]


def hold(lock: sqlite3.Connection) -> None:
    lock.execute("PRAGMA busy_timeout = 20000")
    lock.execute("BEGIN IMMEDIATE")


def rows_in(db: sqlite3.Connection) -> int:
    try:
        return int(db.execute("SELECT count(*) FROM rows").fetchone()[0])
    except sqlite3.OperationalError:  # no such table yet, or locked while it is made
        return 0


REAL_TIME = """
topology: stalled
nodes:
  meter: {{ingest: {{source: synthetic, rate: {rate}/s, count: {count}, batch: {batch}}}, publish: always{process}}}
  store:
    uplink: {{sink: http, url: '{url}', format: msgpack, timeout: 10min}}
    from: {{meter: {{delivery: fast, queue: {queue}, overflow: {overflow}}}}}{process_line}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("carrier", "batch"), [("mqtt", 1), ("mqtt", 3), ("local", 3)])
@pytest.mark.parametrize("overflow", ["latest", "sample"])
def test_what_a_full_queue_drops_is_what_its_policy_says_and_is_counted_to_the_row(
    tmp_path: Path, far: Far, overflow: str, batch: int, carrier: str
) -> None:
    messages = 2400
    count = messages * batch
    together = carrier == "local"
    path = tmp_path / "stalled.yaml"
    path.write_text(
        REAL_TIME.format(
            count=count,
            rate=900 * batch,
            batch=batch,
            url=far.url,
            queue=QUEUE,
            overflow=overflow,
            process=", process: one" if together else "",
            process_line="\n    process: one" if together else "",
        )
    )
    before: list[int] = []

    async def meddle(supervisor: Supervisor) -> None:
        listener = Listener()
        await listener.start(supervisor, "stalled/meter/out/#")
        try:
            await until(lambda: len(far.keys) > 50)
            far.go.clear()
            await until(far.stuck.is_set)
            before.extend(far.keys)
            await until(lambda: listener.ended, within=40)  # all is published, and the far end reads nothing
            await asyncio.sleep(
                0.5
            )  # the sink's node has it too; if not yet, it is there later, and as much is dropped
            far.go.set()
        finally:
            listener.stop()

    outcome = run(path, meddle=meddle)
    assert outcome.complete
    assert outcome.findings == []
    store = outcome.ledgers["store"]
    got = [key // batch for key in far.keys]
    assert len(got) == len(set(got))
    missing = messages - len(got)
    assert store.dropped == {"queue-full": missing * batch}
    assert outcome.lost == {}
    assert store.received["meter.out"].rows == count == store.passed + missing * batch
    # what was answered before the far end stopped, then the request that it did not read; the rest had waited in the queue
    queued = got[len(before) + len(far.requests[requests_before(far, len(before))]) :]
    assert queued == list(range(queued[0], queued[0] + len(queued)))
    if overflow == "latest":
        assert queued[-1] == messages - 1, "not the newest"
    else:
        assert queued[-1] < messages - 300, "not the oldest"
    # by MQTT the end of the stream takes a place of the newest's
    assert QUEUE - (overflow == "latest" and carrier == "mqtt") <= len(queued) <= QUEUE


@pytest.mark.slow
def test_what_a_fast_edge_has_queued_is_still_written_when_the_run_is_stopped(tmp_path: Path, far: Far) -> None:
    path = tmp_path / "stalled.yaml"
    text = REAL_TIME.format(
        count=100_000, rate=900, batch=1, url=far.url, queue=QUEUE, overflow="sample", process="", process_line=""
    )
    path.write_text(text)
    before: list[int] = []
    stops: list[asyncio.Task[None]] = []

    async def meddle(supervisor: Supervisor) -> None:
        listener = Listener()
        await listener.start(supervisor, "stalled/meter/out/#")
        try:
            await until(lambda: len(far.keys) > 50)
            far.go.clear()
            await until(far.stuck.is_set)
            before.extend(far.keys)
            published = listener.messages
            await until(lambda: listener.messages > published + 10 * QUEUE)
        finally:
            listener.stop()
        stops.append(asyncio.create_task(supervisor.stop()))
        await until(lambda: supervisor.views["meter"].gone)
        far.go.set()
        await asyncio.Event().wait()

    outcome = run(path, meddle=meddle)
    assert not outcome.complete
    assert outcome.nodes["store"].restarts == 0
    got = far.keys
    queued = got[len(before) + len(far.requests[requests_before(far, len(before))]) :]
    assert len(queued) == QUEUE
    assert outcome.ledgers["store"].dropped["queue-full"] > 0


def requests_before(far: Far, messages: int) -> int:
    """Index of the request that follows the first so many messages."""
    index = total = 0
    while total < messages:
        total += len(far.requests[index])
        index += 1
    return index
