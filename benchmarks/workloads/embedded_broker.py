"""The embedded broker against mosquitto: messages/s that arrive at every subscriber, CPU of the broker, the time of one message.

One core for the broker, one for the load, which is a C program (``benchmarks/peers/broker_load.c``: raw sockets, whole buffers,
a bounded number of messages under way, so that neither broker has a reason to drop any); a run that loses one counts as 0.
Each publisher has 200 topics in turn, and payloads differ in length by up to eight bytes, as readings do. Without a C compiler
there is nothing to measure with, and no figures.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.figures import OURS, Comparison, Figure, in_turns

MOSQUITTO = "mosquitto"
_SOURCE = Path(__file__).parent.parent / "peers" / "broker_load.c"


@dataclass(frozen=True)
class Case:
    """One kind of traffic.

    :param load: options of the load, see there.
    :param bar: how many times mosquitto's rate ours is to reach.
    :param data: the subscriber's session is kept; our broker commits to its folder, mosquitto has ``persistence true``.
    :param cost: show the broker's CPU too.
    """

    name: str
    load: dict[str, int]
    bar: float | None = None
    data: bool = False
    cost: bool = False


_SMALL = {"topics": 200, "vary": 8, "payload": 64, "window": 2000}
_FAN_OUT = {**_SMALL, "subscribers": 10, "window": 1000}
_FAN_IN = {**_SMALL, "publishers": 10, "topics": 20}
CASES = (
    Case("1 → 1, 64 B, QoS 0", {**_SMALL, "count": 80_000}, bar=3, cost=True),
    Case("1 → 1, 64 B, QoS 1", {**_SMALL, "qos": 1, "window": 1000, "count": 40_000}, bar=3, cost=True),
    Case("1 → 1, 64 B, QoS 0, MQTT 3.1.1", {**_SMALL, "version": 4, "count": 80_000}),
    Case("1 → 1, 64 B, QoS 1, MQTT 3.1.1", {**_SMALL, "version": 4, "qos": 1, "window": 1000, "count": 40_000}),
    Case("1 → 1, 1 KB, QoS 0", {**_SMALL, "payload": 1024, "count": 60_000}),
    Case("1 → 1, 1 KB, QoS 1", {**_SMALL, "payload": 1024, "qos": 1, "window": 1000, "count": 40_000}),
    Case("1 → 1, 64 KB, QoS 0", {"payload": 65_536, "window": 50, "count": 6000}, cost=True),
    Case("1 → 1, 64 KB, QoS 1", {"payload": 65_536, "qos": 1, "window": 50, "count": 5000}),
    Case("1 → 10, 64 B, QoS 0", {**_FAN_OUT, "count": 8000}),
    Case("1 → 10, 64 B, QoS 1", {**_FAN_OUT, "qos": 1, "count": 5000}),
    Case("10 → 1, 64 B, QoS 0", {**_FAN_IN, "count": 80_000}),
    Case("10 → 1, 64 B, QoS 1", {**_FAN_IN, "qos": 1, "window": 1000, "count": 40_000}),
    Case("1 → 1, 64 B, QoS 1, kept", {**_SMALL, "qos": 1, "kept": 1, "window": 1000, "count": 40_000}, data=True),
)
ONE_BY_ONE = {"payload": 64, "window": 1, "count": 3000}


@dataclass(frozen=True)
class Seen:
    """What one run gave: messages/s at each subscriber, the broker's CPU in µs a message."""

    rate: float
    cpu: float


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print("embedded_broker: there is no C compiler for the load; left out", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        folder = Path(name)
        load = folder / "load"
        subprocess.run([compiler, "-O2", "-o", load, _SOURCE], check=True)
        brokers = {OURS: stack.enter_context(_ours([])), MOSQUITTO: stack.enter_context(_mosquitto(folder / "m", ""))}
        keeping = {
            OURS: stack.enter_context(_ours(["--data", str(folder / "data")])),
            MOSQUITTO: stack.enter_context(
                _mosquitto(folder / "k", f"persistence true\npersistence_location {name}/k/\n")
            ),
        }
        out: list[Figure | Comparison] = []
        for case in CASES:
            print(f"  {case.name}", file=sys.stderr)
            seen = in_turns(_contestants(load, keeping if case.data else brokers, case.load))
            rates = {who: tuple(each.rate for each in runs) for who, runs in seen.items()}
            bars = {} if case.bar is None else {MOSQUITTO: case.bar}
            out.append(Comparison(f"broker, {case.name}", "messages/s", rates, bars))
            if case.cost:
                cpu = {who: tuple(each.cpu for each in runs) for who, runs in seen.items()}
                out.append(Comparison(f"broker, {case.name}, CPU", "µs", cpu, at_most=True))
        for qos in (0, 1):
            seen = in_turns(_contestants(load, brokers, {**ONE_BY_ONE, "qos": qos}))
            times = {who: tuple(1e6 / each.rate if each.rate else 0.0 for each in runs) for who, runs in seen.items()}
            out.append(Comparison(f"broker, one message at a time, QoS {qos}", "µs", times, at_most=True))
    return out


def _contestants(
    load: Path, brokers: dict[str, tuple[int, int]], options: dict[str, int]
) -> dict[str, Callable[[], Seen]]:
    return {who: partial(_run, load, pid, port, options) for who, (pid, port) in brokers.items()}


def _run(load: Path, pid: int, port: int, options: dict[str, int]) -> Seen:
    before = _cpu(pid)
    command = [str(load), "127.0.0.1", str(port), *(f"{name}={value}" for name, value in options.items())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        print(f"    {ran.stderr.strip()}", file=sys.stderr)
        return Seen(0.0, float("inf"))
    said = json.loads(ran.stdout)
    count = said["published"]
    return Seen(count / said["seconds"], (_cpu(pid) - before) / count * 1e6)


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, all its threads."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


@contextmanager
def _ours(options: list[str]) -> Iterator[tuple[int, int]]:
    command = [sys.executable, "-m", "broker.embedded", "--listen", "127.0.0.1:0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            address = json.loads(process.stdout.readline())["addresses"][0]
            yield process.pid, int(address.rpartition(":")[2])
        finally:
            process.terminate()


@contextmanager
def _mosquitto(folder: Path, more: str) -> Iterator[tuple[int, int]]:
    """mosquitto as one would set it for throughput: room in its queues, and no delay of small packets."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise RuntimeError("mosquitto is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
        f"max_queued_messages 100000\nmax_inflight_messages 1000\n{more}"
    )
    for path in (folder.parent, folder, config):  # started as root it gives its rights away before it reads them
        path.chmod(0o777 if path.is_dir() else 0o644)
    with subprocess.Popen([program, "-c", config], stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.01)
            yield process.pid, port
        finally:
            process.terminate()
