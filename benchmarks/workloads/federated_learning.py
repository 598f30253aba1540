"""What it takes to learn the digits to 95 %: bytes with and without compression, time with clients as 1:20 unlike in speed.

Ten clients over mosquitto. Bytes are those that the clients send to the broker, all of them (updates, presence, acknowledgements,
headers of MQTT), until the model reaches the goal; each has two classes of digits. For the time each has all classes, and is a
process that takes 25 to 500 ms for a training.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.contestants import HERE, CannotError
from benchmarks.figures import Comparison, Figure, wanted
from benchmarks.side import MOSQUITTO, broker
from benchmarks.wire_count import Sent, counted

CLIENTS = 10
GOAL = 0.95
RUNS = 3
LAYERS = [64, 128, 10]
COMPRESSORS = {"int8": ("int8", 1 / 4), "top-1 %": ("{top-k: {fraction: 0.01}}", 1 / 50)}
"""Name → as in a topology, and the share of float32's bytes that they may take."""
PACES = tuple(float(pace) for pace in np.geomspace(0.025, 0.5, CLIENTS))
BUFFER = 5
FASTER = 1 / 3
WITHIN = 85.0
_DIGITS = HERE.parent / "examples" / "federated"
_PENSTOCK = [sys.executable, "-m", "nodes.cli.main"]

Digits: TypeAlias = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Learned:
    """One run.

    :param rounds: until the goal was reached; ``accuracy``: then.
    :param seconds: from the call of the first round on.
    :param sent: what the clients sent.
    """

    rounds: int
    accuracy: float
    seconds: float
    sent: Sent


def parts(alike: bool) -> Digits:
    """Images and labels of each client: all classes, or two."""
    found = [np.load(path) for path in sorted(_DIGITS.glob("gateway-*.npz"))]
    images = np.concatenate([each["images"] for each in found])
    labels = np.concatenate([each["labels"] for each in found])
    order = np.random.default_rng(7).permutation(len(labels))
    if alike:
        shards = np.array_split(order, CLIENTS)
    else:
        halves = np.array_split(order[np.argsort(labels[order], kind="stable")], 2 * CLIENTS)
        shards = [np.concatenate([halves[k], halves[k + CLIENTS]]) for k in range(CLIENTS)]
    return [(images[rows], labels[rows]) for rows in shards]


def _lead(layers: Sequence[int], **options: str) -> list[str]:
    said = "".join(f", {key}: {value}" for key, value in options.items())
    return [
        f"  lead: {{federate: {{job: bench, {_trainer(layers)}, evaluate: {{path: held_out.npz, scale: 1/255}}, "
        f"clients: {{least: {CLIENTS}, quorum: {CLIENTS}}}, deadline: 30s{said}}}}}",
        "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}",
    ]


def _trainer(layers: Sequence[int]) -> str:
    return f"trainer: {{mlp: {{layers: {list(layers)}, seed: 1}}}}"


def _run(folder: Path, lines: list[str], goal: float) -> tuple[int, float, float]:
    """Rounds, accuracy and seconds.

    :raises CannotError: the run failed, took too long, or did not reach the goal.
    """
    held = np.load(_DIGITS / "held_out.npz")
    np.savez(folder / "held_out.npz", images=held["images"], labels=held["labels"])
    path = folder / "bench.yaml"
    path.write_text("\n".join(lines) + "\n")
    try:
        done = subprocess.run(
            [*_PENSTOCK, "run", str(path), "--fresh"], capture_output=True, timeout=WITHIN, check=False, cwd=HERE.parent
        )
    except subprocess.TimeoutExpired:
        raise CannotError(f"the goal was not reached within {WITHIN:.0f} s") from None
    if done.returncode:
        raise CannotError(done.stderr.decode()[-500:])
    db = sqlite3.connect(folder / "rounds.sqlite")
    try:
        found = db.execute("SELECT time, seconds, accuracy FROM store ORDER BY round").fetchall()
    finally:
        db.close()
    if found[-1][2] < goal:
        raise CannotError(f"after {len(found)} rounds it is right on {found[-1][2]:.1%}")
    return len(found), found[-1][2], (found[-1][0] - found[0][0]) / 1e9 + found[0][1]


def compressed(compress: str, goal: float = GOAL, layers: Sequence[int] = LAYERS) -> Learned:
    """Learn with that compressor, or none of it (empty), two classes a client; what was sent is counted at the broker.

    :raises CannotError: it cannot be measured here, or did not reach the goal.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name, broker(MOSQUITTO) as port, counted(port) as count:
        folder = Path(name)
        lines = ["topology: bench", f"brokers: {{local: {{url: 'mqtt://127.0.0.1:{count.port}'}}}}", "nodes:"]
        for k, (images, labels) in enumerate(parts(alike=False)):
            np.savez(folder / f"{k}.npz", images=images, labels=labels)
            lines += [
                f"  camera-{k}: {{ingest: {{source: arrays, path: {k}.npz}}, process: part-{k % 2}}}",
                f"  learn-{k}: {{train: {{job: bench, {_trainer(layers)}, scale: 1/255, least: {len(labels)}}}, "
                f"from: {{camera-{k}: {{delivery: safe}}}}, process: part-{k % 2}}}",
            ]
        more = {"compress": compress} if compress else {}
        fit = "{epochs: 2, rate: 0.1}"
        lines += _lead(layers, rounds="400", until=f"{{accuracy: {goal}}}", fit=fit, **more)
        rounds, accuracy, seconds = _run(folder, lines, goal)
        return Learned(rounds, accuracy, seconds, count.of("-train"))


def paced(buffer: int | None, goal: float = GOAL, paces: Sequence[float] = PACES) -> Learned:
    """Learn with clients of those paces, each a process; synchronously (None), or with a buffer of so many updates.

    :raises CannotError: it cannot be measured here, or did not reach the goal.
    """
    layers = [64, 32, 10]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        count = stack.enter_context(counted(stack.enter_context(broker(MOSQUITTO))))
        url = f"mqtt://127.0.0.1:{count.port}"
        for k, ((images, labels), pace) in enumerate(zip(parts(alike=True), paces, strict=True)):
            np.savez(folder / f"{k}.npz", x=images.reshape(-1, 64).astype(np.float32) / np.float32(255), y=labels)
            given = {
                "name": f"learn-{k}",
                "url": url,
                "job": "bench",
                "root": "bench/fed/bench",
                "layers": layers,
                "seed": 1,
                "data": str(folder / f"{k}.npz"),
                "state": str(folder / f"{k}.sqlite"),
                "pace": pace,
            }
            command = [sys.executable, "-m", "benchmarks.federated_client", json.dumps(given)]
            process = stack.enter_context(subprocess.Popen(command, cwd=HERE.parent))
            stack.callback(process.kill)
        lines = ["topology: bench", f"brokers: {{local: {{url: '{url}'}}}}", "nodes:"]
        more = {} if buffer is None else {"buffer": str(buffer)}
        fit = "{epochs: 2, rate: 0.2}"
        lines += _lead(layers, rounds="1000", until=f"{{accuracy: {goal}}}", fit=fit, **more)
        rounds, accuracy, seconds = _run(folder, lines, goal)
        return Learned(rounds, accuracy, seconds, count.of("-train"))


def breakdown(who: str, learned: Learned) -> list[str]:
    """Where the bytes went, for people."""
    lines = [f"  {who}: {learned.rounds} rounds to {learned.accuracy:.1%}, {learned.sent.total:,} bytes"]
    for kind, size in learned.sent.bytes.most_common():
        count = learned.sent.packets[kind]
        lines.append(f"    {kind:<18} {size:>12,} bytes in {count:>6,} packets, {size / count:,.1f} each")
    return lines


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    return (_bytes() if wanted("bytes") else []) + (_paces() if wanted("paces") else [])


def _bytes() -> list[Figure | Comparison]:
    figures: list[Figure | Comparison] = []
    plain = compressed("")
    print(*breakdown("float32", plain), sep="\n", file=sys.stderr)
    for name, (compress, most) in COMPRESSORS.items():
        seen = compressed(compress)
        print(*breakdown(name, seen), sep="\n", file=sys.stderr)
        whole = seen.sent.total / plain.sent.total
        figures += [
            Figure(f"bytes to 95 %, {name}, of float32's", "×", (whole,), most),
            Figure(f"bytes a round, {name}, of float32's", "×", (whole * plain.rounds / seen.rounds,), most),
        ]
    return figures


def _paces() -> list[Figure | Comparison]:
    turns = [(paced(None), paced(BUFFER)) for _ in range(RUNS)]
    slow, fast = (tuple(each.seconds for each in side) for side in zip(*turns, strict=True))
    shares = tuple(a / b for a, b in zip(fast, slow, strict=True))
    return [
        Figure("seconds to 95 %, paces 1:20, synchronous", "s", slow),
        Figure("seconds to 95 %, paces 1:20, asynchronous", "s", fast),
        Figure("paces 1:20, asynchronous to synchronous", "×", shares, FASTER),
    ]
