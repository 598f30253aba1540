"""Places where the behaviour suite of the bus runs: a broker, a link to it that can be cut, and clients of one kind."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Self

from broker.bus import Bus, Delivery, Subscription
from broker.legacy import Legacy
from broker.local import LocalBus
from broker.local_hub import Hub
from broker.session import Session
from broker.session_options import Options

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 # conditions here have no event of their own
            await asyncio.sleep(0.002)


async def collect(subscription: Subscription, count: int, *, seconds: float = 10.0, ack: bool = True) -> list[Delivery]:
    """``count`` deliveries or more."""
    got: list[Delivery] = []
    async with asyncio.timeout(seconds):
        while len(got) < count:
            batch = await subscription.receive()
            if ack:
                subscription.acknowledge(batch)
            got.extend(batch)
    return got


async def nothing(subscription: Subscription, seconds: float = 0.1) -> None:
    """Nothing more comes for a while."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            raise AssertionError(f"unexpected: {await subscription.receive()}")


class Mosquitto:
    """A mosquitto of our own on a free port.

    :param folder: for its configuration and database.
    :param lines: more configuration, after the listener's.
    """

    def __init__(self, folder: Path, *lines: str, listener: str | None = None) -> None:
        self.port = free_port()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = [
            listener or f"listener {self.port} 127.0.0.1",
            *([] if any(line.startswith("allow_anonymous") for line in lines) else ["allow_anonymous true"]),
            *(["user root"] if os.geteuid() == 0 else []),  # else it could not read what is in our folders
            "max_queued_messages 1000000",  # with 0, for no limit, 2.0.11 ends the connection of who publishes without right
            f"persistence_location {folder}/",
            *lines,
        ]
        self.config = folder / "mosquitto.conf"
        self.config.write_text("\n".join(config) + "\n")
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0

    def start(self) -> Self:
        if MOSQUITTO is None:
            raise RuntimeError("mosquitto is not installed")
        log_file = self.folder / "log"
        self._starts = log_file.read_text().count(" running") if log_file.exists() else 0
        with log_file.open("ab") as log:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self.config)], stdout=log, stderr=log)
        for _ in range(500):
            if self._process.poll() is not None:
                raise RuntimeError(f"mosquitto ended: {(self.folder / 'log').read_text()}")
            if self._says_running():
                return self
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.01)
        raise RuntimeError("mosquitto does not listen")

    def _says_running(self) -> bool:
        """By its own word: somebody else's broker may have taken the port before ours did."""
        return (self.folder / "log").read_text().count(" running") > self._starts

    def stop(self, *, kill: bool = False) -> None:
        process, self._process = self._process, None
        if process is not None:
            if kill:
                process.kill()
            else:
                process.terminate()
            process.wait(10)


class Proxy:
    """A TCP link that can be cut and stalled.

    :param inspect: sees what a client sends first; its answer goes back and the connection ends, None passes on.
    """

    def __init__(self, port: int, inspect: Callable[[bytes], bytes | None] | None = None) -> None:
        self.port = 0
        self.seen = 0  # connections so far
        self.refuse = False  # close new connections at once
        self._to = port
        self._inspect = inspect
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flow = asyncio.Event()
        self._flow.set()

    @property
    def links(self) -> int:
        """Connections that stand."""
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cut()
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Drop all connections, without a word."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def stall(self) -> None:
        """Pass nothing on, in either direction."""
        self._flow.clear()

    def go_on(self) -> None:
        self._flow.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.seen += 1
        self._writers.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            if self.refuse:
                return
            first = await reader.read(65536)
            answer = self._inspect(first) if self._inspect is not None else None
            if answer is not None:
                writer.write(answer)
                await writer.drain()
                return
            back, there = await asyncio.open_connection("127.0.0.1", self._to, limit=1 << 20)
            self._writers.add(there)
            there.write(first)
            await asyncio.gather(self._pump(reader, there), self._pump(back, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, there):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort() if answer_sent(each) else each.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 18):
                await self._flow.wait()
                writer.write(data)
                await writer.drain()
            await self._flow.wait()  # a silent link does not tell that the far end has closed either
        finally:
            writer.close()


def answer_sent(writer: asyncio.StreamWriter) -> bool:
    """Whether nothing is left to be written."""
    return writer.transport.get_write_buffer_size() == 0 and writer.transport.is_closing()


class Site(ABC):
    """One arrangement. Used as ``async with``, one test long."""

    name = ""
    encoded = True
    networked = True
    v5 = True

    def __init__(self) -> None:
        self.root = f"t/{uuid.uuid4().hex[:12]}"
        self._stack = AsyncExitStack()

    def topic(self, rest: str) -> str:
        """A topic that no other test uses."""
        return f"{self.root}/{rest}"

    def payload(self, data: Any) -> Any:
        return str(data).encode() if self.encoded else data

    @abstractmethod
    def bus(self, **options: Any) -> Bus:
        """A client, not opened."""

    async def open(self, **options: Any) -> Bus:
        """A client, closed when the test ends."""
        return await self._stack.enter_async_context(self.bus(**options))

    async def enter(self) -> None:
        """Start what is needed."""

    @abstractmethod
    def vanish(self, bus: Bus) -> None:
        """As if the client had lost its power."""

    async def __aenter__(self) -> Self:
        await self.enter()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()


class LocalSite(Site):
    name = "local"
    encoded = False
    networked = False

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub()

    def bus(self, **options: Any) -> Bus:
        return LocalBus(self.hub, Options(**options))

    def vanish(self, bus: Bus) -> None:
        assert isinstance(bus, LocalBus)
        self.hub.vanish(bus.client_id)


class NetworkSite(Site):
    """Clients reach the broker through a proxy."""

    def __init__(self, kind: type[Session | Legacy], start: Callable[[AsyncExitStack], Awaitable[int]]) -> None:
        super().__init__()
        self.kind = kind
        self.v5 = kind is Session
        self._start = start
        self._proxies: dict[int, Proxy] = {}
        self.broker_port = 0
        self.proxy: Proxy

    async def enter(self) -> None:
        self.broker_port = await self._start(self._stack)
        self.proxy = await self._stack.enter_async_context(Proxy(self.broker_port))

    def bus(self, **options: Any) -> Bus:
        options.setdefault("backoff", 0.02)
        options.setdefault("patience", 5.0)
        return self.kind(f"mqtt://127.0.0.1:{self.proxy.port}", Options(**options))

    def vanish(self, bus: Bus) -> None:
        """Cut it and keep it from coming back."""
        assert isinstance(bus, (Session, Legacy))
        if bus._keeper is not None:
            bus._keeper.cancel()
        if isinstance(bus, Session):
            assert bus._link is not None
            bus._link.abort("test")
        else:
            assert bus._pipe is not None
            bus._pipe.lose("test")


def sequence(deliveries: Sequence[Delivery]) -> list[int]:
    """The numbers that were sent as payloads."""
    return [int(d.payload) for d in deliveries]


Run = Callable[[Callable[[Site], Awaitable[None]]], None]
"""What the ``run`` fixture gives: runs a scenario in one arrangement."""
