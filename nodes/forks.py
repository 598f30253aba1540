"""The supervisor's end of the :mod:`nodes.nursery`: worker processes as forks of it, with lines in and out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from nodes.children import LONGEST_LINE, environment, errors, lines
from schemas.errors import RunError

_UNKNOWN = -1000
"""In place of an exit code: the nursery died before it could tell. The worker may live on, or may have died with it."""


class Nursery:
    """Starts the nursery process at the first need, and again should it die.

    :param modules: kinds that several workers use, imported once for all of them.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._modules = list(modules)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._gone: list[subprocess.Popen[bytes]] = []
        self._tokens = 0
        self._born: dict[bytes, asyncio.Future[int]] = {}
        self._ends: dict[int, asyncio.Future[int]] = {}

    def start(self) -> None:
        """Start importing now; workers asked for meanwhile wait in the socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = [sys.executable, "-m", "nodes.nursery", str(theirs.fileno()), *self._modules]
        self._process = subprocess.Popen(  # noqa: S603 - ourselves
            command, stdin=subprocess.DEVNULL, env=environment(), pass_fds=[theirs.fileno()], process_group=0
        )
        theirs.close()
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._read)

    async def fork(self, descriptors: Sequence[int]) -> tuple[int, asyncio.Future[int]]:
        """A new worker with these as stdin, stdout, stderr: its pid, and its exit code to come (negative: a signal).

        :raises RunError: the nursery died.
        """
        if self._socket is None:
            self.start()
        loop = asyncio.get_running_loop()
        self._tokens += 1
        token = b"t%d" % self._tokens
        born = self._born[token] = loop.create_future()
        if self._socket is None:
            raise RunError("the nursery did not start")
        try:
            socket.send_fds(self._socket, [token], list(descriptors))
        except OSError as error:
            self._died()
            raise RunError(f"the nursery is gone: {error}") from error
        pid = await born
        return pid, self._ends[pid]

    def kill(self) -> None:
        """End it now (SIGKILL)."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """End it; its workers, if any live, are left alone."""
        self._died()
        for process in self._gone:
            process.kill()
            await asyncio.to_thread(process.wait)
        self._gone.clear()

    def _read(self) -> None:
        if self._socket is None:
            return
        try:
            packet = self._socket.recv(256)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._died()
            return
        first, _, number = packet.partition(b" ")
        if (born := self._born.pop(first, None)) is not None:
            self._ends[int(number)] = asyncio.get_running_loop().create_future()
            if not born.done():
                born.set_result(int(number))
        elif (end := self._ends.pop(int(first), None)) is not None and not end.done():
            end.set_result(int(number))

    def _died(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        if self._process is not None:
            self._gone.append(self._process)
        self._socket = self._process = None
        for born in self._born.values():
            if not born.done():
                born.set_exception(RunError("the nursery died"))
        for end in self._ends.values():
            if not end.done():
                end.set_result(_UNKNOWN)
        self._born.clear()
        self._ends.clear()


class Fork:
    """One worker process; the same in use as :class:`nodes.children.Child`."""

    def __init__(self, name: str, nursery: Nursery, on_line: Callable[[bytes], None]) -> None:
        self.name = name
        self.pid = 0
        self.restarts = 0
        self.code: int | None = None
        self._nursery = nursery
        self._on_line = on_line
        self._end: asyncio.Future[int] | None = None
        self._stdin: asyncio.WriteTransport | None = None
        self._readers: list[asyncio.StreamReader] = []

    async def start(self) -> None:
        """Start it.

        :raises RunError: the nursery died; trying again starts another.
        """
        self.code = None
        pipes = [os.pipe(), os.pipe(), os.pipe()]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
        try:
            self.pid, self._end = await self._nursery.fork(theirs)
        except BaseException:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        loop = asyncio.get_running_loop()
        self._stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(ours[0], "wb", 0))
        self._readers = []
        for descriptor in ours[1:]:
            reader = asyncio.StreamReader(limit=LONGEST_LINE)
            pipe = os.fdopen(descriptor, "rb", 0)
            await loop.connect_read_pipe(lambda reader=reader: asyncio.StreamReaderProtocol(reader), pipe)  # type: ignore[misc] # mypy knows no default arguments of lambdas
            self._readers.append(reader)

    def send(self, line: bytes) -> None:
        """Write one line to it; silently not when it is gone."""
        if self._stdin is not None and not self._stdin.is_closing():
            with contextlib.suppress(OSError, RuntimeError):
                self._stdin.write(line + b"\n")

    async def wait(self) -> int:
        """Listen until it ends; its exit code, negative for a signal."""
        if self._end is None:
            raise RuntimeError(f"{self.name} was not started")
        out, err = self._readers
        await asyncio.gather(lines(out, self._on_line), errors(err, self.name))
        code = await asyncio.shield(self._end)  # a cancelled wait leaves the news for reap
        self.code = -signal.SIGKILL if code == _UNKNOWN else code
        self._close()
        return self.code

    async def reap(self) -> None:
        """End it if it still runs, and wait until nothing is left of it."""
        if self._end is None:
            return
        self.kill()
        self._close()
        for reader in self._readers:
            while await reader.read(65536):
                pass
        await asyncio.shield(self._end)

    def kill(self) -> None:
        """End it now (SIGKILL)."""
        if self._end is not None and self.code is None and (not self._end.done() or self._end.result() == _UNKNOWN):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _close(self) -> None:
        if self._stdin is not None:
            self._stdin.close()
