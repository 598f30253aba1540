"""Programs side by side: a broker, a program between its topics, a generator and collector; what the program does and costs.

``python -m benchmarks.side telemetry --who penstock,c --broker mosquitto --rounds 3`` runs some of it by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from threading import Thread

from benchmarks.contestants import HERE, PROGRAMS, CannotError, compiled
from benchmarks.figures import OURS, Comparison, in_turns

ROOT = HERE.parent
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
"""Debian keeps mosquitto where users' PATH does not lead."""
TICK = os.sysconf("SC_CLK_TCK")
ALONE = "generator alone"
MOSQUITTO, EMBEDDED = "mosquitto", "embedded"
_CONNECT = bytes.fromhex("10140004") + b"MQTT" + bytes.fromhex("0402000a0008") + b"probe-00"


@dataclass(frozen=True)
class Load:
    """What the generator does.

    :param window: most readings under way, which is what holds it back at full rate.
    :param rate: readings a second; 0: as fast as the window allows.
    :param hot: every how manieth reading is above the alarm, and so comes back at once.
    :param warm, seconds: how long before, and while, it is measured.
    :param patience: seconds without any answer after which readings are lost.
    """

    window: int = 4000
    rate: float = 0
    hot: int = 64
    warm: float = 1.0
    seconds: float = 3.0
    patience: float = 8.0


@dataclass(frozen=True)
class Outcome:
    """One run.

    :param rate: readings a second that were answered; 0 if any was lost, or was counted twice.
    :param counted: readings that came through, of the whole run.
    :param lost: readings that never came; below 0: that came twice.
    :param p50, p99: seconds from sending a reading to having its answer.
    :param cpu: seconds of CPU a reading, of all of the program's processes.
    :param memory: bytes, of all of its processes, memory that several share divided among them.
    """

    rate: float
    counted: int
    lost: int
    p50: float
    p99: float
    cpu: float
    memory: float


@contextmanager
def broker(name: str) -> Iterator[int]:
    """A broker of one's own, ``mosquitto`` or ``embedded``; gives its port.

    :raises CannotError: it is not installed, or does not start.
    """
    with tempfile.TemporaryDirectory(prefix="bench-broker-") as folder:
        port = _free_port()
        if name == MOSQUITTO:
            program = shutil.which("mosquitto", path=PATH)
            if program is None:
                raise CannotError("mosquitto is not installed (Debian package mosquitto)")
            lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "set_tcp_nodelay true", "log_type error"]
            lines += ["max_queued_messages 0", "max_inflight_messages 1000"]  # it drops nothing, and is not held back
            lines += ["user root"] if os.geteuid() == 0 else []
            (Path(folder) / "mosquitto.conf").write_text("\n".join(lines) + "\n")
            command = [program, "-c", f"{folder}/mosquitto.conf"]
        else:
            command = [sys.executable, "-m", "nodes.cli.main", "broker", "--listen", f"127.0.0.1:{port}"]
        with _process(command, Path(folder)) as process:
            until = time.monotonic() + 30
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise CannotError(f"{name} does not start: {(Path(folder) / 'log').read_text()[-500:]}")
                time.sleep(0.02)
            yield port


@contextmanager
def program(who: str, work: str, qos: int, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes] | None]:
    """A contestant doing ``work`` at the broker on ``port``; gives the process, None for the generator alone.

    :raises CannotError: it is not to be had here.
    """
    if who == ALONE:
        yield None
        return
    command, environment = PROGRAMS[who](work, qos, port, folder)
    with _process(command, folder, environment) as process:
        yield process


def load_command() -> list[str]:
    """The generator and collector: the C program, or where there is no compiler the Python one."""
    try:
        return [str(compiled(HERE / "load.c"))]
    except CannotError as why:
        print(f"  {why}: the generator is the Python one", file=sys.stderr)
        return [sys.executable, str(HERE / "load_without_c.py")]


def run(who: str, at: str, work: str, qos: int, load: Load) -> Outcome:
    """One contestant at one broker.

    :raises CannotError: it, the broker or a compiler is not to be had.
    :raises RuntimeError: it does not do the work.
    """
    generator = load_command()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, broker(at) as port:
        folder = Path(scratch)
        with program(who, work, qos, port, folder) as process:
            mode = "direct" if who == ALONE else work
            given = {"port": port, "mode": mode, "qos": qos, **asdict(load)}
            command = [*generator, *(f"{name}={value}" for name, value in given.items())]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as loading:
                if process is not None:
                    Thread(target=_end_with, args=(process, loading), daemon=True).start()
                try:
                    pid = None if process is None else process.pid
                    return _follow(loading.stdout or (), pid, f"{who}, {work}, QoS {qos}, {at}", folder)
                finally:
                    loading.kill()


def _end_with(process: subprocess.Popen[bytes], loading: subprocess.Popen[str]) -> None:
    """Nobody waits for the answers of a program that has ended."""
    process.wait()
    loading.terminate()


def _follow(lines: Iterable[str], pid: int | None, what: str, folder: Path) -> Outcome:
    used, memory = 0.0, 0.0
    for line in lines:
        match line.strip():
            case "begin":
                used = -_cpu(pid)
            case "end":
                used += _cpu(pid)
                memory = _memory(pid)
            case text if text.startswith("{"):
                result = json.loads(text)
                lost = result["expected"] - result["counted"]
                if result["off"] > 1e-9:
                    raise RuntimeError(f"{what}: wrong values, off by {result['off']}")
                if lost:
                    print(f"  {what}: {lost} readings lost of {result['expected']}", file=sys.stderr)
                answers = max(1, result["answers"])
                rate = 0.0 if lost else result["rate"]
                return Outcome(rate, result["counted"], lost, result["p50"], result["p99"], used / answers, memory)
    log = folder / "log"
    raise RuntimeError(f"{what}: no result; {log.read_text()[-1000:] if log.exists() else ''}")


def _family(pid: int | None) -> list[int]:
    """A process and all below it."""
    out = [] if pid is None else [pid]
    for each in out:
        with suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                out += [int(child) for child in (task / "children").read_text().split()]
    return out


def _cpu(pid: int | None) -> float:
    """Seconds of CPU that it and all below it have used."""
    total = 0
    for each in _family(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICK


def _memory(pid: int | None) -> float:
    """Bytes; what processes share is divided among them."""
    total = 0
    for each in _family(pid):
        with suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return float(total)


@contextmanager
def _process(
    command: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(_CONNECT)
        return sock.recv(4)[:1] == b"\x20"
    return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def contestants(work: str, qos: int, load: Load, at: str, whom: Sequence[str]) -> dict[str, Callable[[], Outcome]]:
    """Those of ``whom`` who are to be had here, for :func:`~benchmarks.figures.in_turns`; the others are named on stderr.

    :raises CannotError: we ourselves cannot be measured: there is no such broker.
    """
    out: dict[str, Callable[[], Outcome]] = {}
    with broker(at), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for who in whom:
            try:
                if who != ALONE:
                    PROGRAMS[who](work, qos, 0, Path(folder))
            except CannotError as why:
                print(f"  without {who}: {why}", file=sys.stderr)
                continue
            out[who] = partial(run, who, at, work, qos, load)
    return out


def compare(
    name: str,
    unit: str,
    seen: Mapping[str, Sequence[Outcome]],
    what: Callable[[Outcome], float],
    bars: Mapping[str, float],
    *,
    at_most: bool = False,
) -> Comparison:
    """One row for each of ``seen``; bars against those who are not there are left out."""
    values = {who: tuple(what(outcome) for outcome in each) for who, each in seen.items()}
    return Comparison(name, unit, values, {who: bar for who, bar in bars.items() if who in seen}, at_most)


def main() -> None:
    """Some contestants, by hand."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side", description=__doc__)
    parser.add_argument("work", choices=["telemetry", "relay", "gathered"])
    parser.add_argument("--who", default=f"{OURS},c", help=f"of {', '.join([*PROGRAMS, ALONE])}, with commas between")
    parser.add_argument("--broker", choices=[MOSQUITTO, EMBEDDED], default=MOSQUITTO)
    parser.add_argument("--qos", type=int, choices=[0, 1], default=0)
    parser.add_argument("--rate", type=float, default=0, help="readings a second; as fast as it can if left out")
    parser.add_argument("--window", type=int, help="most readings under way")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    load = Load(
        window=given.window or (500 if given.work == "relay" else 4000),
        rate=given.rate,
        hot=1 if given.rate else 64,
        seconds=given.seconds,
    )
    names = given.who.split(",")
    contestants = {who: lambda who=who: run(who, given.broker, given.work, given.qos, load) for who in names}
    for who, seen in in_turns(contestants, given.rounds).items():
        rates = ", ".join(f"{each.rate:,.0f}" for each in seen)
        mid = {name: median(getattr(each, name) for each in seen) for name in ("rate", "p50", "p99", "cpu", "memory")}
        print(
            f"{who:<16} {mid['rate']:>9,.0f} /s  cpu {mid['cpu'] * 1e6:6.2f} µs  p50 {mid['p50'] * 1e3:7.3f} ms"
            f"  p99 {mid['p99'] * 1e3:7.3f} ms  {mid['memory'] / 1e6:6.1f} MB   [{rates}]"
        )


if __name__ == "__main__":
    main()
