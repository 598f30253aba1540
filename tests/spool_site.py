"""A far end for tests of spools: a web service that is away and comes back, and a topology that sends to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped] # has no types; proves that any msgpack library reads what we send
from harness import until

from nodes.supervisor import Supervisor
from schemas.messages import Ledger


class Far:
    """What the service has been told. It knows repeats by the messages' ids.

    :ivar away: it answers 503, and remembers the ids of what it did not take.
    :ivar taken: message by id, in the order of their first arrival, of ``/in``; ``every`` of ``/all``, which is never away.
    :ivar refuse: ids that it refuses for good.
    :ivar pause: seconds that it takes over each request.
    :ivar batches: ids of each request to ``/in`` that was taken.
    """

    def __init__(self) -> None:
        self.url = ""
        self.away = False
        self.taken: dict[str, dict[str, Any]] = {}
        self.every: dict[str, bytes] = {}
        self.attempted: list[str] = []
        self.batches: list[list[str]] = []
        self.refuse: set[str] = set()
        self.times = 0
        self.pause = 0.0

    def request(self, path: str, body: bytes) -> int:
        messages = msgpack.unpackb(body)
        if path == "/all":
            self.every.update((message["id"], msgpack.packb(message)) for message in messages)
            return 200
        ids = [message["id"] for message in messages]
        if self.away:
            self.attempted += [ident for ident in ids if ident not in self.attempted]
            return 503
        if self.refuse.intersection(ids):
            return 400
        time.sleep(self.pause)
        self.batches.append(ids)
        self.times += len(ids)
        for message in messages:
            self.taken.setdefault(message["id"], message)
        return 200

    def rows(self) -> int:
        return sum(message["body"]["n"] for message in self.taken.values())


@contextmanager
def service() -> Iterator[Far]:
    far = Far()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = far.request(self.path, body)
            self.send_response(status)
            if status == 503:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the base class
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    far.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield far
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


TOPOLOGY = """
topology: away
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: {batch}{rate}}}}}
  store:
    uplink: {{sink: http, url: "{url}/in", format: msgpack, batch: 100, linger: 20ms, spool: {spool}}}
    from: {edge}
"""
ALL = '  all: {{uplink: {{sink: http, url: "{url}/all", format: msgpack, linger: 0}}, from: meter}}\n'


def site(
    folder: Path,
    far: Far,
    spool: str,
    *,
    count: int,
    size: int = 40,
    batch: int = 1,
    rate: str = "",
    edge: str = "meter",
    compare: bool = False,
) -> Path:
    """A topology of ``count`` rows with ``size`` bytes of text each, from four devices.

    :param compare: what is sent also goes to ``/all``.
    """
    lines = ["time,device,number,text"]
    lines += [f"{1_700_000_000 + i},d{i % 4},{i},{'x' * size}" for i in range(count)]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    path = folder / "away.yaml"
    path.write_text(
        TOPOLOGY.format(batch=batch, rate=f", rate: {rate}" if rate else "", url=far.url, spool=spool, edge=edge)
        + (ALL.format(url=far.url) if compare else "")
    )
    return path


def books(supervisor: Supervisor, node: str = "store") -> Ledger:
    """What a node said of itself last."""
    return supervisor.views[node].books or Ledger(node=node)


def received(supervisor: Supervisor, node: str = "store") -> int:
    """Rows that a node has taken in."""
    return sum(flow.rows for flow in books(supervisor, node).received.values())


async def quiet(supervisor: Supervisor, rows: int, within: float = 40.0) -> Ledger:
    """Wait until the node has taken in so many rows, and its books of that are there and balance; gives them."""
    await until(lambda: received(supervisor) >= rows, within=within)
    book = books(supervisor)
    assert rows == book.held + book.passed + sum(book.dropped.values()) + sum(book.dead.values())
    return book
