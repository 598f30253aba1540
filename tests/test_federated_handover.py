"""In one topology gateways learn, a leader makes models of it, and ``infer`` answers with them while frames flow."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from federated_kit import digits
from harness import run, until

from nodes.supervisor import Supervisor

NETWORK = "{mlp: {layers: [64, 32, 10], seed: 1}}"
TOPOLOGY = f"""
topology: plant
nodes:
  camera-a: {{ingest: {{source: arrays, path: a.npz}}}}
  camera-b: {{ingest: {{source: arrays, path: b.npz}}}}
  learn-a: {{train: {{job: digits, trainer: {NETWORK}, scale: 1/16}}, from: camera-a}}
  learn-b: {{train: {{job: digits, trainer: {NETWORK}, scale: 1/16}}, from: camera-b}}
  lead:
    federate:
      {{job: digits, trainer: {NETWORK}, rounds: 25, fit: {{epochs: 1, batch: 32, rate: 0.1}}, deadline: 20s,
       clients: {{least: 2, quorum: 2}}, gather: 1s, evaluate: {{path: test.npz, scale: 1/16}}}}
  curve: {{uplink: {{sink: jsonl, path: rounds.jsonl}}, from: lead}}
  test: {{ingest: {{source: arrays, path: test.npz, loop: true, rate: 300}}}}
  seen:
    infer:
      {{model: model.npz, job: digits, backend: {{trained: {{trainer: {NETWORK}}}}}, scale: 1/16}}
    from: {{test: {{delivery: safe}}}}
  out: {{uplink: {{sink: jsonl, path: seen.jsonl}}, from: {{seen: {{delivery: safe}}}}}}
"""

UNTRAINED = -1


def bodies(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["body"] for line in path.read_text().splitlines()]


def test_models_are_taken_over_while_frames_flow(tmp_path: Path) -> None:
    train, test = digits()
    for name, low, high in (("a", 0, 4), ("b", 5, 9)):
        there = (train.y >= low) & (train.y <= high)
        np.savez(tmp_path / f"{name}.npz", images=images(train.x[there]), labels=train.y[there])
    np.savez(tmp_path / "test.npz", images=images(test.x), labels=test.y)
    (tmp_path / "plant.yaml").write_text(TOPOLOGY)

    async def last_model(supervisor: Supervisor) -> None:
        await until(lambda: last_versions(tmp_path / "seen.jsonl") == 25, within=40)
        supervisor.end()

    outcome = run(tmp_path / "plant.yaml", meddle=last_model)
    assert outcome.complete
    assert not outcome.findings
    rounds = [body["columns"]["accuracy"][0] for body in bodies(tmp_path / "rounds.jsonl")]
    assert len(rounds) == 25
    seen = bodies(tmp_path / "seen.jsonl")
    assert len(seen) == outcome.ledgers["test"].emitted["out"].rows  # none is lost, none comes twice
    versions = [version(body) for body in seen]
    assert versions == sorted(versions)
    assert versions[0] == UNTRAINED
    assert versions[-1] == 25
    right: dict[int, list[bool]] = defaultdict(list)
    digests: dict[int, set[str]] = defaultdict(set)
    for body, number in zip(seen, versions, strict=True):
        right[number].append(body["labels"][0] == body["attributes"]["label"])
        digests[number].add(body["model"]["digest"])
    assert all(len(found) == 1 for found in digests.values())
    assert np.mean(right[UNTRAINED]) < 0.4
    assert np.mean(right[25]) >= 0.88
    assert (tmp_path / "model.npz").is_file()


def last_versions(path: Path) -> int:
    """The least of the last 360 answers: the test's images once each."""
    try:
        lines = path.read_text().splitlines()
        return version(json.loads(lines[-360])["body"])
    except (FileNotFoundError, IndexError, ValueError):
        return UNTRAINED


def version(body: dict[str, Any]) -> int:
    """Of the model that answered."""
    text = body["model"]["version"]
    return UNTRAINED if text == "untrained" else int(text)


def images(x: Any) -> Any:
    return (x * 16).astype(np.uint8).reshape(-1, 8, 8, 1)
