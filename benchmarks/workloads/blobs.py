"""Blobs through a broker, in MB/s of their content, beside a plain publish of the same chunks, which is the ceiling.

Every side is a process of its own. The time is from when the first sender begins (its digest included) to when the last receiver
has verified all. *plain* publishes the same messages at QoS 0 and counts them: no digest, no acknowledgement, nothing sent again.
*10 → 1* is ten senders to one receiver, the last step of a federated round; *1 → 10* is one blob to ten receivers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks.contestants import CannotError
from benchmarks.figures import OURS, Comparison, Figure, in_turns, wanted
from benchmarks.side import EMBEDDED, MOSQUITTO, broker

PLAIN = "plain publish"
ROUND = 4_800_000
"""Bytes of a model: 1.2 million numbers of 32 bits."""
WITHIN = 0.4
"""Seconds for ten of them to one coordinator."""
LARGE = 500_000_000


@dataclass(frozen=True)
class Seen:
    """One transfer.

    :param sent: chunks that the senders sent, for each chunk of the blob.
    :param memory: megabytes, as the receiver says.
    """

    seconds: float
    sent: float
    memory: float


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    out: list[Figure | Comparison] = []
    for at in (MOSQUITTO, EMBEDDED):
        with ExitStack() as stack:
            try:
                url = f"mqtt://127.0.0.1:{stack.enter_context(broker(at))}"
            except CannotError as why:
                print(f"  {at}: not measured: {why}", file=sys.stderr)
                continue
            for name, givers, takers, size in (
                ("1 → 1, 48 MB", 1, 1, 10 * ROUND),
                ("10 → 1, 4.8 MB each", 10, 1, ROUND),
                ("1 → 10, 4.8 MB", 1, 10, ROUND),
            ):
                if not wanted(f"blobs, {name}, {at}"):
                    continue
                many = takers > 1
                whom: dict[str, Callable[[], Seen]] = {
                    OURS: partial(
                        _run, url, "serve" if many else "give", givers, "get" if many else "take", takers, size
                    ),
                    PLAIN: partial(_run, url, "plain-give", givers, "plain-take", takers, size),
                }
                seen = in_turns(whom)
                moved = givers * takers * size / 1e6
                rates = {who: tuple(moved / one.seconds for one in runs) for who, runs in seen.items()}
                out.append(Comparison(f"blobs, {name}, {at}", "MB/s", rates))
                if givers > 1:
                    times = tuple(one.seconds for one in seen[OURS])
                    out.append(Figure(f"blobs, {name}, {at}, time", "s", times, limit=WITHIN))
                out.append(Figure(f"blobs, {name}, {at}, sent", "× the blob", tuple(one.sent for one in seen[OURS])))
            name = f"blobs, 500 MB from file to file, {at}"
            if not wanted(name):
                continue
            large = _run(url, "disk-give", 1, "disk-take", 1, LARGE)
            out.append(Figure(name, "MB/s", (LARGE / 1e6 / large.seconds,)))
            out.append(Figure(f"{name}, receiver's memory grows by", "MB", (large.memory,), limit=20))
    return out


def _run(url: str, give: str, givers: int, take: str, takers: int, size: int) -> Seen:
    """One transfer, in processes of its own.

    :raises RuntimeError: one of them ended early.
    """
    with ExitStack() as stack:

        def start(role: str, count: int) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "benchmarks.blob_side", role, url, str(size), str(count)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        taking = [start(take, givers) for _ in range(takers)]
        giving = [start(give, number) for number in range(givers)]
        for process in (*taking, *giving):
            _line(process)
        for process in giving:
            _go(process)
        ends = [_line(process) for process in taking]
        begins = [_line(process) for process in giving]
        if take == "get":
            for process in giving:
                _go(process)
            sent = [_line(process)["sent"] for process in giving]
        else:
            sent = [each["sent"] for each in begins]
        seconds = max(each["ended"] for each in ends) - min(each["began"] for each in begins)
        return Seen(seconds, sum(sent) / len(sent), max(each["memory"] for each in ends))


def _line(process: subprocess.Popen[str]) -> dict[str, float]:
    if process.stdout is None or not (line := process.stdout.readline()):
        raise RuntimeError("a side ended before it had said all")
    said: dict[str, float] = json.loads(line)
    return said


def _go(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        process.stdin.write("\n")
        process.stdin.flush()
