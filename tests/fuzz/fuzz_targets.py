"""What is fuzzed: one function for each way that foreign bytes come in. Each returns for any input, and raises on a fault.

Used by ``run_fuzz.py`` (coverage-guided) and by ``test_fuzz_corpus.py`` (what that has found, in the test run).
"""

from __future__ import annotations

import asyncio
import base64
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mqtt5
import numpy as np
from bare_link import Wire, feed
from mqtt5 import ConnectPacket, PublishPacket, QoS, SubscribePacket, TopicFilter

from broker.embedded.connection import Connection
from broker.embedded.core import Core
from broker.embedded.limits import Limits
from broker.session import Session
from broker.session_link import BUFFER, Link
from schemas.codec import decode_sequenced, encode
from schemas.errors import BusError, ConfigError, PayloadError
from schemas.expressions import Expression, ExpressionError, parse_call
from schemas.located import YamlError, parse
from schemas.messages import Column
from schemas.topology import _Reader

CORPUS = Path(__file__).parent / "corpus"
_LIMITS = Limits(queue_messages=20, packet_bytes=100_000, out_bytes=20_000, connections=10)


def broker(data: bytes) -> None:
    """The embedded broker: bytes of one client, cut anywhere. Another client is served before and after.

    The first byte says: let in already (1), 3.1.1 (2), and how long the pieces are.
    """
    if not data:
        return
    how, data = data[0], data[1:]
    core = Core(limits=_LIMITS, now=1000.0)
    victim = _open(core, ConnectPacket("victim", will=mqtt5.Will("will", payload=b"w")).write())
    victim.receive(SubscribePacket(1, [TopicFilter("safe", max_qos=QoS(1))]).write(), 1000.0)
    evil = core.accept(1000.0)
    if how & 1:
        hello = b"\x10\x10\x00\x04MQTT\x04\x02\x00\x00\x00\x04evil" if how & 2 else ConnectPacket("evil").write()
        evil.receive(hello, 1000.0)
    step = (how >> 2) + 1 if how >> 2 < 62 else len(data) + 1
    for number, at in enumerate(range(0, len(data), step)):
        evil.receive(data[at : at + step], 1000.0)
        if not number % 7:
            _drain(core, 1000.0)
    _drain(core, 1000.0)
    waiting = sum(map(len, evil._parts))
    assert waiting <= len(data), "more is kept than came"
    assert not victim.closing, "another client was disconnected"
    victim.out.clear()
    victim.receive(PublishPacket("safe", b"still here", qos=QoS(1), packet_id=7).write(), 1000.0)
    assert any(b"still here" in piece for piece in victim.out), "another client is not served"
    core.tick(1000.0 + 3600)
    evil.close(1000.0 + 3600)
    assert core.stats.connected == 1
    assert core.stats.queued >= 0


def _open(core: Core, hello: bytes) -> Connection:
    conn = core.accept(1000.0)
    conn.receive(hello, 1000.0)
    assert conn.session is not None
    return conn


def _drain(core: Core, now: float) -> None:
    for _ in range(3):
        dirty, core.dirty = core.dirty, []
        for conn in dirty:
            conn.dirty = False
            conn.wrote(now)
        resumed, core.resumed = core.resumed, []
        for conn in resumed:
            conn.proceed(now)


_loop: asyncio.AbstractEventLoop | None = None


def session(data: bytes) -> None:
    """The client session's reader: bytes of a broker, after CONNACK where the first byte is odd."""
    global _loop
    if not data:
        return
    if _loop is None or _loop.is_closed():
        _loop = asyncio.new_event_loop()
    _loop.run_until_complete(_session(data[0], data[1:]))


async def _session(how: int, data: bytes) -> None:
    client = Session("mqtt://nowhere")
    limit = 100_000
    link = client._link = client._last = Link(
        client._packets, client._outbox.progress, limit, client._inbox.ways, client._inbox.learn
    )
    wire: Any = Wire()
    link.connection_made(wire)
    tasks: list[asyncio.Task[Any]] = []
    try:
        if how & 1:
            feed(link, mqtt5.ConnAckPacket().write())
            tasks.append(asyncio.create_task(client.subscribe(["a/#"])))
            await asyncio.sleep(0)
        step = (how >> 1) + 1 if how >> 1 < 120 else len(data) + 1
        for at in range(0, len(data), step):
            feed(link, data[at : at + step])
        await asyncio.sleep(0)
        assert len(link._buffer) <= BUFFER + 2 * limit, "the buffer grows without bound"
    finally:
        link.closing = True
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, BusError):
                await task
        for timer in client._timers.values():
            timer.cancel()
        link.answered.cancel()


def message(data: bytes) -> None:
    """``schemas.codec.decode``: a message, or PayloadError; what is decoded can be encoded again, to the same."""
    try:
        found, epoch, seq = decode_sequenced(data)
    except PayloadError:
        return
    again, *numbers = decode_sequenced(encode(found, epoch=epoch, seq=seq))
    assert numbers == [epoch, seq]
    assert (again.id, again.source) == (found.id, found.source)
    assert again.time == found.time or (math.isnan(again.time) and math.isnan(found.time))
    assert type(again.body) is type(found.body)


def topology(data: bytes) -> None:
    """The topology loader: a topology and its problems, or YamlError; every place is in the file."""
    try:
        document, repeated = parse(data)
    except YamlError:
        return
    document.plain()
    with suppress(ConfigError):
        found, problems = _Reader(Path("t.yaml"), document, tuple(repeated), ()).read()
        for problem in problems:
            document.find(problem.path)
        str(found.error(problems))


_COLUMNS: dict[str, Column] = {
    "x": np.array([1.5, -0.0, np.nan]),
    "y": np.array([2**63 - 1, 0, -3]),
    "b": np.array([True, False, True]),
    "t": ["a", None, ""],
}


def expression(data: bytes) -> None:
    """The expression language: what is written compiles or is a ConfigError; what compiles runs or is an ExpressionError."""
    source = data.decode("utf-8", "replace")
    with suppress(ConfigError):
        parse_call(source)
    try:
        made = Expression(source)
    except ConfigError as error:
        for problem in error.problems:
            assert 0 <= problem.offset <= len(source)
        return
    assert Expression(str(made.source)) == made
    with warnings.catch_warnings(), suppress(ExpressionError):
        warnings.simplefilter("error")
        assert len(made(_COLUMNS, 3)) == 3


TARGETS: dict[str, Callable[[bytes], None]] = {
    "broker": broker,
    "session": session,
    "message": message,
    "topology": topology,
    "expression": expression,
}


def read_corpus(name: str) -> list[bytes]:
    """The kept inputs of a target: one to a line, base64; ``#`` begins a comment."""
    path = CORPUS / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [base64.b64decode(line) for line in lines if line and not line.startswith("#")]
