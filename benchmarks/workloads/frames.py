"""Frames of 640 x 480 x 3 bytes from one process to another, which sends on how bright each is: per second, and their cost.

Ours by shared memory and by MQTT alone, hand-written scripts, and the limit of a broker: bare sockets that do nothing with
a frame (``benchmarks/peers/frames_*.py``). Everybody goes as fast as it can; a collector counts the answers.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.figures import OURS, Comparison, Figure, in_turns
from benchmarks.peers import frames_pipe
from benchmarks.peers.frames_common import frames
from broker.memory import ENVIRONMENT
from schemas import codec
from schemas.errors import PayloadError

ROOT = Path(__file__).parent.parent.parent
SECONDS = 3.0
WARM = 1.0
ROUNDS = 5
_TICK = os.sysconf("SC_CLK_TCK")
_TOPOLOGY = """
topology: frames
shared: {shared}
brokers: {{local: {{run: {broker}, listen: "127.0.0.1:{port}"}}}}
nodes:
  camera: {{ingest: {{source: arrays, path: frames.npy, loop: true}}}}
  mean: {{custom: {{path: mean.py, function: mean}}, from: camera, publish: always}}
"""
_MEAN = """
import sys

import numpy as np

sys.path.insert(0, {root!r})

from benchmarks.peers.frames_common import brightness

from schemas.messages import Frame, Readings


def mean(frame: Frame) -> Readings:
    return Readings(n=1, columns={{"mean": np.array([brightness(frame.data)])}})
"""


class Seen(NamedTuple):
    """One round of one contestant: frames per second, processor time of all its processes for each, ms; latency, ms."""

    rate: float
    cpu: float
    latency: float


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def _cpu(processes: list[subprocess.Popen[bytes]]) -> float:
    """Seconds of processor time that these and what they started have used."""
    total = 0
    for process in processes:
        for pid in _descendants(process.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / _TICK


class Answers:
    """A subscriber of few instructions, for it takes its time from the same cores: a socket, MQTT 3.1.1 at QoS 0."""

    def __init__(self, port: int, topic: str) -> None:
        self._socket = frames_pipe.connected("127.0.0.1", port)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 20, 0))
        name = topic.encode()
        self._socket.sendall(struct.pack("!BBHH", 0x82, 5 + len(name), 1, len(name)) + name + b"\0")
        if self._socket.recv(5, socket.MSG_WAITALL) != b"\x90\x03\x00\x01\x00":
            raise RuntimeError("not subscribed")
        self._rest = b""

    def some(self) -> tuple[int, bytes]:
        """Wait for answers; how many there were, and the last one's payload.

        :raises BlockingIOError: none came in 20 s.
        """
        count, payload = 0, b""
        while not count:
            data = self._rest + self._socket.recv(1 << 18)
            at, size = 0, len(data)
            while size - at >= 5:
                length, start = data[at + 1], at + 2
                if length >= 128:
                    length, start = length & 127 | data[start] << 7, start + 1
                if start + length > size:
                    break
                count, last, at = count + 1, start, start + length
            if count:
                payload = data[last + 2 + (data[last] << 8 | data[last + 1]) : at]
            self._rest = data[at:]
        return count, payload

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


def _answers(port: int, topic: str) -> Answers:
    """Subscribed, once the broker is there."""
    until = time.monotonic() + 20
    while True:
        try:
            return Answers(port, topic)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def _collect(port: int, topic: str, processes: list[subprocess.Popen[bytes]]) -> Seen:
    """Count the answers for a while, once they come."""
    with closing(_answers(port, topic)) as answers:
        answers.some()
        until = time.perf_counter() + WARM
        while time.perf_counter() < until:
            answers.some()
        count, latencies = 0, []
        began, used = time.perf_counter(), _cpu(processes)
        while time.perf_counter() < began + SECONDS:
            some, last = answers.some()
            latencies.append((time.time_ns() - _born(last)) / 1e6)
            count += some
        took, used = time.perf_counter() - began, _cpu(processes) - used
    return Seen(count / took, used / count * 1e3, median(latencies))


def _born(payload: bytes) -> int:
    if len(payload) == 16:
        return int(struct.unpack("<q", payload[:8])[0])
    try:
        return codec.decode(payload).born
    except PayloadError:
        raise RuntimeError("an answer that is none") from None


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGINT if process is processes[-1] else signal.SIGTERM)
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ours(broker: str, *, shared: bool) -> Seen:
    """Two node processes and a broker, as ``penstock run`` starts them."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _port()
        np.save(folder / "frames.npy", frames())
        (folder / "mean.py").write_text(_MEAN.format(root=str(ROOT)))
        path = folder / "frames.yaml"
        path.write_text(_TOPOLOGY.format(broker=broker, port=port, shared=str(shared).lower()))
        command = [sys.executable, "-m", "nodes.cli.main", "run", str(path), "--fresh"]
        run = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
        try:
            return _collect(port, "frames/mean/out/#", run)
        finally:
            _end(run)


def _quiet(command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**ENVIRONMENT, **os.environ}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def peer(script: str) -> Seen:
    """A script's two processes, and mosquitto as ``penstock run`` starts it: by itself it takes three times as long."""
    port = _port()
    with tempfile.TemporaryDirectory() as name:
        configuration = Path(name) / "mosquitto.conf"
        configuration.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        running = [_quiet(["mosquitto", "-c", str(configuration)])]
        try:
            _listens(port)
            command = [sys.executable, "-m", f"benchmarks.peers.{script}"]
            running += [_quiet([*command, role, "127.0.0.1", str(port)]) for role in ("mean", "camera")]
            return _collect(port, "frames/mean", running)
        finally:
            _end(running)


def _listens(port: int) -> None:
    until = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def measure() -> list[Figure | Comparison]:
    """All figures of this file; without mosquitto only ours on our own broker."""
    contestants: dict[str, Callable[[], Seen]] = {"embedded": partial(ours, "embedded", shared=True)}
    if shutil.which("mosquitto"):
        contestants |= {
            "mosquitto": partial(ours, "mosquitto", shared=True),
            "mqtt": partial(ours, "mosquitto", shared=False),
            "sockets": partial(peer, "frames_pipe"),
            "aiomqtt": partial(peer, "frames_aiomqtt"),
            "paho": partial(peer, "frames_paho"),
        }
    seen = in_turns(contestants, ROUNDS)
    rates = {who: tuple(each.rate for each in some) for who, some in seen.items()}
    found: list[Figure | Comparison] = [
        Figure("frames by shared memory, embedded broker", "fps", rates["embedded"], 10_000, at_most=False)
    ]
    if "mosquitto" in rates:
        others = {"sockets": "bare sockets, nothing done", "aiomqtt": "aiomqtt, uvloop", "paho": "paho"}
        named = {label: who for who, label in others.items()}

        def against(who: str, value: Callable[[Seen], float]) -> dict[str, tuple[float, ...]]:
            return {label: tuple(value(s) for s in seen[name]) for label, name in {OURS: who, **named}.items()}

        found += [
            Figure("frames by shared memory, mosquitto", "fps", rates["mosquitto"], 10_000, at_most=False),
            Comparison("frames by shared memory", "fps", against("mosquitto", lambda s: s.rate)),
            Comparison(
                "frames by mosquitto alone",
                "fps",
                against("mqtt", lambda s: s.rate),
                {others["sockets"]: 0.95},
            ),
            Comparison(
                "processor time of a frame by shared memory, broker included",
                "ms",
                against("mosquitto", lambda s: s.cpu),
                at_most=True,
            ),
            Comparison(
                "latency at full rate, by shared memory", "ms", against("mosquitto", lambda s: s.latency), at_most=True
            ),
        ]
    return found
