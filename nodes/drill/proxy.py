"""A TCP link with faults: cut, refused, silent, slow. A drill puts one before each broker.

It works on bytes, above TCP. A packet that is lost shows there as what TCP makes of it: everything behind it waits until it
was sent again.
"""

from __future__ import annotations

import asyncio
import random
from typing import Self
from urllib.parse import urlsplit

_CHUNK = 1 << 16
_AHEAD = 64
"""Chunks of one direction that may be under way, so that a slow link is slow for the sender too."""
_SENT_AGAIN = (0.2, 1.0)
"""Seconds that TCP takes to send a lost packet again: at least its least timeout on Linux."""
_PORTS = {"mqtt": 1883, "mqtt3": 1883, "ws": 80}


class Link:
    """Listens on a free port of this machine and passes everything on to ``url``.

    Used as ``async with``; the faults are attributes and calls of the one who holds it.

    :param url: of the broker: ``mqtt://``, ``ws://`` or ``unix://``; TLS names the far end, so it cannot be passed on.
    :ivar refuse: new connections are closed at once.
    :ivar delay: seconds that each chunk is under way, in each direction; ``jitter``: at most so many more or less.
    :ivar loss: share of chunks that have to be sent again.
    :ivar bandwidth: bytes per second in each direction of a connection; 0: no limit.
    :ivar seen: connections so far.
    """

    def __init__(self, url: str, seed: int = 0) -> None:
        self.port = 0
        self.seen = 0
        self.refuse = False
        self.delay = self.jitter = self.loss = 0.0
        self.bandwidth = 0
        self._to = urlsplit(url)
        self._draw = random.Random(seed)  # noqa: S311 - faults, not secrets
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flow = asyncio.Event()
        self._flow.set()

    @property
    def served(self) -> int:
        """Connections that stand: each has two ends."""
        return len(self._writers) // 2

    @property
    def url(self) -> str:
        """Where it listens, as the URL that goes in place of the broker's."""
        scheme = "mqtt" if self._to.scheme == "unix" else self._to.scheme
        path = self._to.path if scheme == "ws" else ""
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
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
        """The end of :meth:`stall`."""
        self._flow.set()

    def calm(self) -> None:
        """No fault any more; connections that were cut stay so."""
        self.refuse = False
        self.delay = self.jitter = self.loss = 0.0
        self.bandwidth = 0
        self.go_on()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        to = self._to
        if to.scheme == "unix":
            return await asyncio.open_unix_connection(to.path, limit=1 << 20)
        return await asyncio.open_connection(to.hostname, to.port or _PORTS.get(to.scheme, 1883), limit=1 << 20)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._tasks.add(task)
        self._writers.add(writer)
        self.seen += 1
        there: asyncio.StreamWriter | None = None
        try:
            if self.refuse:
                return
            back, there = await self._dial()
            self._writers.add(there)
            ends = [(reader, there), (back, writer)]
            ways: list[asyncio.Queue[tuple[float, bytes]]] = [asyncio.Queue(_AHEAD) for _ in ends]
            tasks = [asyncio.create_task(self._read(end, way)) for (end, _), way in zip(ends, ways, strict=True)]
            tasks += [asyncio.create_task(self._write(way, end)) for (_, end), way in zip(ends, ways, strict=True)]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in tasks:
                    one.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the connection is over; its ends are closed below, and the task ends by itself
        finally:
            for each in (writer, there):
                if each is not None:
                    self._writers.discard(each)
                    each.close()
            self._tasks.discard(task)

    async def _read(self, reader: asyncio.StreamReader, way: asyncio.Queue[tuple[float, bytes]]) -> None:
        """One direction's first half; ends only with an error: what was read last is still to be written."""
        loop = asyncio.get_running_loop()
        last = 0.0
        while data := await reader.read(_CHUNK):
            last = self._due(loop.time(), last, len(data))
            await way.put((last, data))
        await way.put((last, b""))
        await asyncio.Event().wait()

    def _due(self, now: float, last: float, size: int) -> float:
        """When a chunk that came now arrives: never before the one before it."""
        due = now
        if self.delay or self.jitter:
            due += max(0.0, self.delay + self._draw.uniform(-self.jitter, self.jitter))
        if self.loss and self._draw.random() < self.loss:
            due += self._draw.uniform(*_SENT_AGAIN)
        due = max(due, last)
        return due + size / self.bandwidth if self.bandwidth else due

    async def _write(self, way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        """One direction's second half: each chunk when it is due, until the other side has said its last."""
        loop = asyncio.get_running_loop()
        while True:
            due, data = await way.get()
            if (pause := due - loop.time()) > 0:
                await asyncio.sleep(pause)
            await self._flow.wait()
            if not data:
                return
            writer.write(data)
            await writer.drain()
