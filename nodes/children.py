"""Child processes of the supervisor: started, listened to line by line, restarted with backoff."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from nodes import log

_BACKOFF = (0.1, 10.0)
"""Seconds before the first restart, and at most."""
_AFTER_WORK = 1.0
"""Seconds at most before the restart of a child that had worked: it fell, it is not broken."""
_STEADY = 10.0
"""Seconds after which a child counts as running well, and the backoff begins anew."""
LONGEST_LINE = 64 * 1024 * 1024


def environment() -> dict[str, str]:
    """The children's environment: ours, our packages importable, numeric libraries with one thread each."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
        "PYTHONUNBUFFERED": "1",
    }


class Child:
    """One process with lines in and out.

    :param name: for the log.
    :param command: program and arguments; ``None`` as program stands for this Python.
    :param on_line: takes each line of its stdout, without the newline.
    :param defaults: environment variables that it gets where we have none of that name.
    """

    def __init__(
        self,
        name: str,
        command: list[str | None],
        on_line: Callable[[bytes], None],
        defaults: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._defaults = defaults or {}
        self.replace(command)
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        self.code: int | None = None

    @property
    def pid(self) -> int:
        """Its process id; 0 when there is none."""
        return self._process.pid if self._process is not None else 0

    def replace(self, command: list[str | None]) -> None:
        """The command of the next start."""
        self._command = [part if part is not None else sys.executable for part in command]

    async def start(self) -> None:
        """Start it; it lives in its own process group, so that Ctrl-C in the terminal reaches only us."""
        self.code = None
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self._defaults, **environment()},
            limit=LONGEST_LINE,
            process_group=0,
        )

    def send(self, line: bytes) -> None:
        """Write one line to it; silently not when it is gone."""
        if self._process is not None and self._process.stdin is not None and self._process.returncode is None:
            with contextlib.suppress(OSError, RuntimeError):
                self._process.stdin.write(line + b"\n")

    async def wait(self) -> int:
        """Listen until it ends; its exit code, negative for a signal."""
        process = self._process
        if process is None or process.stdout is None or process.stderr is None:
            raise RuntimeError(f"{self.name} was not started")
        await asyncio.gather(lines(process.stdout, self._on_line), errors(process.stderr, self.name))
        self.code = await process.wait()
        return self.code

    async def reap(self) -> None:
        """End it if it still runs, and wait until nothing is left of it."""
        process = self._process
        if process is None:
            return
        self.kill()
        if process.stdin is not None:
            process.stdin.close()
        for stream in (process.stdout, process.stderr):
            while stream is not None and await stream.read(65536):
                pass
        await process.wait()

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now (SIGKILL)."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)  # Popen's own way looks for its end first, and takes it from asyncio


async def lines(stream: asyncio.StreamReader, on_line: Callable[[bytes], None]) -> None:
    """Hand on each line until the stream ends."""
    while line := await stream.readline():
        on_line(line.rstrip(b"\n"))


async def errors(stream: asyncio.StreamReader, name: str) -> None:
    """Log what a process writes to stderr: libraries' chatter, which is seldom of use."""
    while line := await stream.readline():
        text = line.decode(errors="replace").rstrip()
        if text:
            log.debug("stderr", process=name, text=text[:500])


class Keepable(Protocol):
    """What :func:`keep` keeps running."""

    name: str
    restarts: int

    async def start(self) -> None:
        """Start it."""

    async def wait(self) -> int:
        """Its exit code, when it has ended."""


async def keep(
    child: Keepable,
    prepare: Callable[[], None],
    done: Callable[[int], bool],
    *,
    started: bool = False,
    worked: Callable[[], bool] = lambda: False,
) -> None:
    """Run a child, and again when it fails, with backoff.

    :param prepare: called after each start (send it what it needs).
    :param done: called with its exit code; True: leave it ended.
    :param started: it was started already.
    :param worked: whether it had got as far as doing its work, in the life that has just ended.
    """
    loop = asyncio.get_running_loop()
    pause, most = _BACKOFF
    while True:
        if not started:
            await child.start()
        started = False
        prepare()
        began = loop.time()
        code = await child.wait()
        if done(code):
            return
        if loop.time() - began > _STEADY:
            pause = _BACKOFF[0]
        elif worked():
            pause = min(pause, _AFTER_WORK)
        child.restarts += 1
        log.warning(
            "process ended, starting it again", process=child.name, ended=describe(code), again_in=f"{pause:.1f}s"
        )
        await asyncio.sleep(pause)
        pause = min(pause * 2, most)


def describe(code: int) -> str:
    """An exit code for people."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
