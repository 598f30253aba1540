"""The brokers that tests talk to, as real programs on free ports: mosquitto, RabbitMQ, NATS and the embedded one.

Plain functions, for any test. ``with started("nats", folder) as broker:`` gives a broker of one's own, which may be
killed and started again on its port; ``shared("nats")`` gives one that all tests of this process share and that ends
with it. RabbitMQ takes ten seconds to start, half of which it sleeps: there is only the shared one, which runs again
after a test that killed it. :func:`missing` says why a broker cannot be had here.

On Debian and Ubuntu: ``apt-get install -y --no-install-recommends mosquitto rabbitmq-server nats-server``.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/usr/lib/rabbitmq/bin"
"""Debian keeps servers where users' PATH does not lead."""
STARTS_WITHIN = 50.0
_CONNECT = bytes.fromhex("10140004") + b"MQTT" + bytes.fromhex("0402000a0008") + b"probe-00"


class Broker(ABC):
    """One broker. Its state is in ``folder``, which a second :meth:`start` finds again.

    :ivar port: where it listens for MQTT on 127.0.0.1; stays the same when it is started again.
    """

    name: ClassVar[str]
    program: ClassVar[str]
    package: ClassVar[str]
    """Debian's name for it."""
    versions: ClassVar[tuple[str, ...]]
    """Versions of MQTT that the release in Debian 12 speaks."""
    slow: ClassVar[bool] = False
    """It takes so long to start that nobody gets one of his own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def found(cls) -> str | None:
        """Path of the program, or None."""
        return shutil.which(cls.program, path=PATH)

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def url(self) -> str:
        """For a topology's ``url:``."""
        return f"mqtt://127.0.0.1:{self.port}"

    def url_for(self, version: str) -> str | None:
        """A URL by which our clients speak that version of MQTT; None: there is none."""
        return self.url if version == self.versions[0] else None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Start it and wait until it answers a CONNECT.

        :raises RuntimeError: it ended or did not answer in time; with what it said.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2, 3):  # somebody else may take the free port before it does
            port = self.port or free_port()
            command = self._prepare(port)
            with (self.folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment(), cwd=ROOT
                )
            if self._answers(port):
                self.port = port
                return self
            self.stop(kill=True)
            if self.port or attempt == 3:
                break
        raise RuntimeError(f"{self.name} does not start: {(self.folder / 'log').read_text(errors='replace')[-2000:]}")

    def stop(self, *, kill: bool = False) -> None:
        """End it: asked to, or with SIGKILL."""
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        process.wait(30)

    @abstractmethod
    def _prepare(self, port: int) -> list[str]:
        """Write its configuration; gives the command."""

    def _environment(self) -> dict[str, str] | None:
        return None

    def _answers(self, port: int) -> bool:
        assert self._process is not None
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as sock:
                sock.sendall(_CONNECT)
                if sock.recv(4)[:1] == b"\x20":
                    # with the probe's own process still there: it is not another program on a port that was taken
                    return self._process.poll() is None
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)
        return False


class Embedded(Broker):
    """Penstock's own, as a process."""

    name = program = "embedded"
    package = ""
    versions = ("5", "3.1.1")

    @classmethod
    def found(cls) -> str | None:
        return sys.executable

    def _prepare(self, port: int) -> list[str]:
        return [sys.executable, "-m", "broker.embedded", "--listen", f"127.0.0.1:{port}"]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}


class Mosquitto(Broker):
    """Eclipse Mosquitto, with queues that drop nothing. It listens for WebSockets too, which our clients speak 3.1.1 on."""

    name = program = package = "mosquitto"
    versions = ("5", "3.1.1")
    _web_port = 0
    access: tuple[str, ...] = ("allow_anonymous true",)
    """Lines of its configuration that say who may do what."""

    def url_for(self, version: str) -> str | None:
        return f"ws://127.0.0.1:{self._web_port}" if version == "3.1.1" else super().url_for(version)

    def _prepare(self, port: int) -> list[str]:
        self._web_port = self._web_port if self.port else free_port()
        lines = [
            f"listener {port} 127.0.0.1",
            f"listener {self._web_port} 127.0.0.1",
            "protocol websockets",
            *self.access,
            *(["user root"] if os.geteuid() == 0 else []),  # else it gives its rights away and cannot read our folders
            "set_tcp_nodelay true",
            "max_queued_messages 0",
        ]
        config = self.folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        return [str(self.found()), "-c", str(config)]


class Nats(Broker):
    """NATS with JetStream, in which its MQTT sessions and retained messages are kept."""

    name = "nats"
    program = package = "nats-server"
    versions = ("3.1.1",)

    def _prepare(self, port: int) -> list[str]:
        config = self.folder / "nats.conf"
        config.write_text(
            f'server_name: "penstock-{port}"\nlisten: "127.0.0.1:-1"\njetstream {{ store_dir: "{self.folder}/jetstream" }}\n'
            f'mqtt {{ listen: "127.0.0.1:{port}", ack_wait: "3s", max_ack_pending: 1024 }}\n'
        )
        return [str(self.found()), "-c", str(config)]


class RabbitMQ(Broker):
    """RabbitMQ with its MQTT plugin, and nothing shared with an installed one: name, cookie, port mapper, data.

    Its port mapper (epmd) is a process of ours too: left alone, Erlang would start one that outlives the tests.
    """

    name = "rabbitmq"
    program = package = "rabbitmq-server"
    versions = ("3.1.1",)
    slow = True
    _LIBRARY = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    """Debian's program in sbin is a wrapper that insists on one user and one folder; this is what it calls."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._mapper: subprocess.Popen[bytes] | None = None
        self._mapper_port = 0

    @classmethod
    def found(cls) -> str | None:
        program = cls._LIBRARY if os.access(cls._LIBRARY, os.X_OK) else super().found()
        return program if shutil.which("epmd", path=PATH) else None

    def _prepare(self, port: int) -> list[str]:
        if self._mapper is None:
            self._mapper_port = free_port()
            self._mapper = subprocess.Popen(
                [str(shutil.which("epmd", path=PATH)), "-port", str(self._mapper_port)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                env=self._environment(),
            )
        (self.folder / "plugins").write_text("[rabbitmq_mqtt].\n")
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp = none\nmqtt.listeners.tcp.1 = 127.0.0.1:{port}\nmqtt.allow_anonymous = true\n"
            "mqtt.prefetch = 1024\nlog.console = true\nlog.console.level = warning\nlog.file = false\n"
        )
        return [str(self.found())]

    def _environment(self) -> dict[str, str]:
        here = self.folder
        own = {
            "HOME": here,
            "ERL_EPMD_PORT": self._mapper_port,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "penstock@localhost",
            "RABBITMQ_DIST_PORT": free_port(),
            "RABBITMQ_CONF_ENV_FILE": here / "none",
            "RABBITMQ_CONFIG_FILE": here / "rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": here / "plugins",
            "RABBITMQ_MNESIA_BASE": here / "mnesia",
            "RABBITMQ_LOG_BASE": here,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": here / "pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
            "ERL_CRASH_DUMP": here / "crash",
            "RABBITMQ_ALLOW_INPUT": "1",  # the script then becomes the broker, instead of a parent that SIGKILL leaves behind
        }
        return {**os.environ, "PATH": PATH, **{key: str(value) for key, value in own.items()}}

    def stop(self, *, kill: bool = False) -> None:
        super().stop(kill=kill)
        mapper, self._mapper = self._mapper, None
        if mapper is not None:
            mapper.terminate()
            mapper.wait(10)


KINDS: dict[str, type[Broker]] = {kind.name: kind for kind in (Embedded, Mosquitto, RabbitMQ, Nats)}


def missing(name: str) -> str | None:
    """Why this broker cannot be started here, or None."""
    kind = KINDS[name]
    return None if kind.found() else f"{kind.program} is not installed (Debian package {kind.package})"


def param(name: str, *values: Any, ident: str = "") -> Any:
    """A parameter of a test that needs this broker: skipped, with the reason, where it is not installed."""
    marks = [] if name == "embedded" else [pytest.mark.connected]
    if reason := missing(name):
        marks.append(pytest.mark.skipif(True, reason=reason))
    return pytest.param(name, *values, id=ident or name, marks=marks)


@contextmanager
def started(name: str, folder: Path) -> Iterator[Broker]:
    """A broker that may be killed: of one's own, or the shared one if it is slow; so the names used are to be one's own."""
    if KINDS[name].slow:
        broker = shared(name)
        try:
            yield broker
        finally:
            if not broker.running:
                broker.start()
        return
    broker = KINDS[name](folder / name)
    try:
        yield broker.start()
    finally:
        broker.stop(kill=True)


@functools.cache
def shared(name: str) -> Broker:
    """A broker that the tests of this process share; they use topics and client identifiers of their own."""
    folder = tempfile.TemporaryDirectory(prefix=f"penstock-{name}-")
    broker = KINDS[name](Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(broker.stop, kill=True)  # the last registered comes first
    return broker.start()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
