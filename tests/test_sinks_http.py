"""The http sink against a real server that fails in every way that servers do."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped] # has no types; proves that any msgpack library reads what we send
import numpy as np
import pytest

from nodes import uplink
from nodes.operator import Context, Sink
from nodes.sinks.http import retry_after
from schemas.errors import ConfigError, RejectedError, SinkAwayError
from schemas.messages import Message, Readings


@dataclass
class Service:
    """A server in a thread; ``behave`` answers (status, headers) for a request, or None to hang up without an answer."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    behave: Callable[[bytes], tuple[int, dict[str, str]] | None] = lambda _: (200, {})


@pytest.fixture
def service() -> Iterator[Service]:
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.bodies.append(body)
            state.heads.append(dict(self.headers.items()))
            answer = state.behave(body)
            if answer is None:
                self.close_connection = True
                return
            status, headers = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"why")

        do_PUT = do_POST  # noqa: N815 - the server's own convention

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the base class
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/in"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def make(url: str, **options: Any) -> Sink:
    config = uplink.Config.model_validate({"sink": "http", "url": url, **options})
    context = Context("line", "up", Path(), Path())
    config.check(context)
    return uplink.build(config, context)


def messages(n: int) -> list[Message]:
    return [Message(f"n:1:{i}", "s", i, Readings(n=1, columns={"v": np.array([float(i)])})) for i in range(n)]


def attempt(sink: Sink, *batches: list[Message]) -> list[Exception | None]:
    """What each write raised."""

    async def run() -> list[Exception | None]:
        await sink.open()
        out: list[Exception | None] = []
        for batch in batches:
            try:
                await sink.write(batch)
                out.append(None)
            except (SinkAwayError, RejectedError) as error:
                out.append(error)
        await sink.close()
        return out

    return asyncio.run(run())


def taken(service: Service) -> list[str]:
    return [m["id"] for body in service.bodies for m in json.loads(body)]


def test_batches_in_every_format(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANT_TOKEN", "s3cret")
    secret = {"Authorization": {"env": "PLANT_TOKEN", "prefix": "Bearer "}, "X-Site": "a"}
    assert attempt(make(service.url, headers=secret), messages(3)) == [None]
    assert attempt(make(service.url, format="ndjson", each="row", method="PUT"), messages(3)) == [None]
    assert attempt(make(service.url, format="msgpack", gzip=True), messages(3)) == [None]
    assert [m["id"] for m in json.loads(service.bodies[0])] == ["n:1:0", "n:1:1", "n:1:2"]
    assert service.heads[0]["Authorization"] == "Bearer s3cret"
    assert [json.loads(line)["v"] for line in service.bodies[1].splitlines()] == [0.0, 1.0, 2.0]
    wire = msgpack.unpackb(gzip.decompress(service.bodies[2]))
    assert [m["type"] for m in wire] == ["readings/1"] * 3
    assert len({h["Idempotency-Key"] for h in service.heads}) == 1


def test_requests_keep_within_their_limits(service: Service) -> None:
    attempt(make(service.url, max_bytes=600), messages(30))
    assert max(map(len, service.bodies)) <= 600
    assert taken(service) == [f"n:1:{i}" for i in range(30)]
    (error,) = attempt(make(service.url, max_bytes=20), messages(2))
    assert isinstance(error, RejectedError)
    assert [i for i, _ in error.rejected] == [0, 1]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 401, 403, 404, 301])
def test_a_service_that_is_busy_or_refuses_us_is_away(service: Service, status: int) -> None:
    service.behave = lambda _: (status, {"Retry-After": "7", "Location": "/x"})
    (error,) = attempt(make(service.url), messages(2))
    assert isinstance(error, SinkAwayError)
    assert error.retry_after == 7.0
    assert str(status) in str(error)


def test_poison_is_found_by_halving_and_only_it_is_rejected(service: Service) -> None:
    def behave(body: bytes) -> tuple[int, dict[str, str]]:
        return (422 if b'"n:1:5"' in body or b'"n:1:63"' in body else 200, {})

    service.behave = behave
    (error,) = attempt(make(service.url), messages(100))
    assert isinstance(error, RejectedError)
    assert [i for i, _ in error.rejected] == [5, 63]
    assert "why" in error.rejected[0][1]
    assert len(service.bodies) < 30
    good = [i for body in service.bodies if behave(body)[0] == 200 for i in (m["id"] for m in json.loads(body))]
    assert sorted(good, key=lambda i: int(i[4:])) == [f"n:1:{i}" for i in range(100) if i not in (5, 63)]


def test_what_was_taken_before_the_service_went_away_is_not_sent_again(service: Service) -> None:
    service.behave = lambda _: (503, {}) if len(service.bodies) == 2 else (200, {})
    sink = make(service.url, batch=10)
    first, second = attempt(sink, messages(30), messages(30))
    assert isinstance(first, SinkAwayError)
    assert second is None
    assert sorted(set(taken(service)), key=lambda i: int(i[4:])) == [f"n:1:{i}" for i in range(30)]
    assert [json.loads(b)[0]["id"] for b in service.bodies] == ["n:1:0", "n:1:10", "n:1:10", "n:1:20"]
    assert service.heads[1]["Idempotency-Key"] == service.heads[2]["Idempotency-Key"]


def test_hanging_hanging_up_and_not_there(service: Service) -> None:
    release = threading.Event()

    def hang(body: bytes) -> None:
        del body
        release.wait(20)

    service.behave = hang
    began = time.monotonic()
    (error,) = attempt(make(service.url, timeout="200ms"), messages(1))
    release.set()
    assert isinstance(error, SinkAwayError)
    assert "no answer within 0.2 s" in str(error)
    assert time.monotonic() - began < 5
    service.behave = lambda _: None
    (error,) = attempt(make(service.url), messages(1))
    assert isinstance(error, SinkAwayError)
    (error,) = attempt(make("http://127.0.0.1:1/"), messages(1))
    assert isinstance(error, SinkAwayError)
    assert "127.0.0.1:1" in str(error)


def test_retry_after() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    found = retry_after(soon)
    assert found is not None
    assert 80 < found < 91
    assert [retry_after(v) for v in (None, "5", "-1", "soon", "99999999")] == [None, 5.0, None, None, 3600.0]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"url": "ftp://a/b"}, ("url",)),
        ({"url": "http://"}, ("url",)),
        ({"url": "http://a:99999/"}, ("url",)),
        ({"headers": {"X Y": "z"}}, ("headers", "X Y")),
        ({"format": "msgpack", "each": "row"}, ("each",)),
        ({"headers": {"A": {"env": "PENSTOCK_NOT_SET"}}}, ("headers", "A", "env")),
    ],
)
def test_check(options: dict[str, Any], path: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{"url": "http://a/b", **options})
    assert caught.value.problems[0].path == path
