"""A model in threads, its calls overlapping with everything else: every image is answered once, in order, whoever is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import passed, rows, run, until

from nodes.supervisor import Supervisor

pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")

DEMO = Path(__file__).parent.parent / "nodes" / "demo"
TOTAL = 4000

TOPOLOGY = """
topology: overlap
nodes:
  camera:
    ingest: {{source: arrays, path: frames.npy, rate: {rate}, start: "2026-01-01T00:00:00Z"}}
  ready: {{preprocess: {{steps: [{{layout: HWC}}]}}, from: {{camera: {{delivery: safe}}}}}}
  seen:
    infer: {{model: {model}, scale: 1/255, parallel: 3, batch: {{max: 4, wait: 1ms}}}}
    from: {{ready: {{delivery: safe}}}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: seen}}, from: seen}}
"""


def site(folder: Path, frames: np.ndarray[tuple[int, ...], np.dtype[np.generic]], rate: str) -> Path:
    np.save(folder / "frames.npy", frames)
    path = folder / "overlap.yaml"
    path.write_text(TOPOLOGY.format(model=DEMO / "digits-int8.tflite", rate=rate))
    return path


def frames() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with np.load(DEMO / "digits.npz") as digits:
        return np.asarray(np.resize(digits["images"][..., 0], (TOTAL, 8, 8)), np.uint8)


def test_every_image_is_answered_once_and_in_order_though_nodes_are_killed(tmp_path: Path) -> None:
    async def kill(supervisor: Supervisor) -> None:
        for victim in ("seen", "camera", "seen", "store"):
            before = passed(supervisor, "store")
            await until(lambda before=before: passed(supervisor, "store") > before + 50)  # type: ignore[misc] # mypy knows no default arguments of lambdas
            supervisor.kill(victim)

    outcome = run(site(tmp_path, frames(), "1000/s"), meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    assert sum(view.restarts for view in outcome.nodes.values()) >= 3
    found = rows(tmp_path / "out.sqlite", "SELECT id, label FROM seen ORDER BY rowid")
    assert len(found) == TOTAL
    labels = {int(ident.rsplit(":", 1)[1]): label for ident, label in found}
    assert sorted(labels) == list(range(TOTAL))
    assert all(labels[i] == labels[i % 450] for i in range(TOTAL)), "the same image, the same answer"
    assert len(set(labels.values())) == 10


def test_answers_go_out_in_the_order_of_the_images(tmp_path: Path) -> None:
    outcome = run(site(tmp_path, frames(), "100000/s"))
    assert outcome.complete
    assert outcome.findings == []
    found = rows(tmp_path / "out.sqlite", "SELECT id FROM seen ORDER BY rowid")
    assert [int(ident.rsplit(":", 1)[1]) for (ident,) in found] == list(range(TOTAL))


def test_what_does_not_fit_is_a_dead_letter_and_the_rest_goes_on(tmp_path: Path) -> None:
    wrong = np.zeros((TOTAL, 8, 8), np.float64)
    wrong[::7] = np.nan
    outcome = run(site(tmp_path, wrong, "100000/s"))
    assert outcome.complete
    assert outcome.findings == []
    assert outcome.ledgers["seen"].dead == {"nan-input": len(range(0, TOTAL, 7))}
    assert rows(tmp_path / "out.sqlite", "SELECT count(*) FROM seen") == [(TOTAL - len(range(0, TOTAL, 7)),)]


SLOW = """
import time

from nodes.operator import Emit, Operator
from schemas.messages import Message


class Slow(Operator):
    overlaps = True
    max_batch = 3

    def __init__(self) -> None:
        self.calls = 3

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        for message in messages:
            value = int(message.body.columns["value"][0])
            time.sleep(0.002 if value % 2 else 0.0001)  # the later call is over first
            if value % 50 == 13:
                raise ValueError(f"not {value}")
            emit.send(message)
"""
CUSTOM = """
topology: slow
nodes:
  meter: {ingest: {source: csv, path: meter.csv, time: time, batch: 1}}
  slow: {custom: {path: slow.py, function: Slow, emits: readings/1, blocking: true}, from: meter}
  store: {uplink: {sink: sqlite, path: out.sqlite, table: rows}, from: slow}
"""


def test_a_call_that_fails_costs_its_message_only_and_no_order(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    lines = ["time,value", *(f"{1_700_000_000 + i},{i}" for i in range(500))]
    (tmp_path / "meter.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "slow.yaml"
    path.write_text(CUSTOM)
    outcome = run(path)
    assert outcome.complete
    assert outcome.findings == []
    assert outcome.ledgers["slow"].dead == {"failed": 10}
    found = [int(value) for (value,) in rows(tmp_path / "out.sqlite", "SELECT value FROM rows ORDER BY rowid")]
    assert found == [i for i in range(500) if i % 50 != 13]
