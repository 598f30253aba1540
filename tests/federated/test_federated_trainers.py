"""Each trainer in a topology of processes over mosquitto learns the digits; that of LiteRT where there is no TensorFlow."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import brokers
import numpy as np
import pytest
from harness import rows, run

DIGITS = brokers.ROOT / "examples" / "federated"
CLIENTS = 3
NETWORK = """
import torch

def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
"""
TRAINERS = {
    "mlp": ("numpy", "{mlp: {layers: [64, 32, 10]}}"),
    "litert": ("ai_edge_litert", "{litert: {model: digits-train.tflite}}"),
    "sklearn": ("sklearn", "{sklearn: {model: mlp, inputs: 64, classes: 10, hidden: [32]}}"),
    "torch": ("torch", "{torch: {path: network.py, function: network}}"),
}


def topology(folder: Path, trainer: str) -> Path:
    """Three gateways, each a process, with a third of the digits each."""
    found = [np.load(path) for path in sorted(DIGITS.glob("gateway-*.npz"))]
    images = np.concatenate([each["images"] for each in found])
    labels = np.concatenate([each["labels"] for each in found])
    order = np.random.default_rng(7).permutation(len(labels))
    lines = ["topology: plant", "brokers: {local: {run: mosquitto}}", "nodes:"]
    for k, part in enumerate(np.array_split(order, CLIENTS)):
        np.savez(folder / f"{k}.npz", images=images[part], labels=labels[part])
        lines += [
            f"  camera-{k}: {{ingest: {{source: arrays, path: {k}.npz}}, process: cameras}}",
            f"  learn-{k}: {{train: {{job: digits, trainer: {trainer}, scale: 1/255, least: {len(part)}}}, "
            f"from: {{camera-{k}: {{delivery: safe}}}}}}",
        ]
    lines += [
        f"  lead: {{federate: {{job: digits, trainer: {trainer}, fit: {{epochs: 5, batch: 32, rate: 0.2}}, rounds: 40, "
        f"clients: {{least: {CLIENTS}, quorum: {CLIENTS}}}, deadline: 30s, until: {{accuracy: 0.95}}, "
        "evaluate: {path: held_out.npz, scale: 1/255}}}",
        "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}",
    ]
    shutil.copy(DIGITS / "held_out.npz", folder)
    shutil.copy(DIGITS / "digits-train.tflite", folder)
    (folder / "network.py").write_text(NETWORK)
    path = folder / "plant.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", [brokers.param("mosquitto")])
@pytest.mark.parametrize("name", TRAINERS)
def test_it_learns_the_digits_together_with_others(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del kind  # the topology runs it
    module, trainer = TRAINERS[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if name == "litert":  # whoever imports TensorFlow finds this, and says so
        without = tmp_path / "without"
        for absent in ("tensorflow", "keras", "jax"):
            (without / absent).mkdir(parents=True)
            text = f"open({str(tmp_path / 'asked')!r}, 'w').close()\nraise ImportError('not in this environment')\n"
            (without / absent / "__init__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{without}{os.pathsep}{brokers.ROOT}")
    outcome = run(topology(tmp_path, trainer), within=55)
    assert outcome.complete
    assert outcome.findings == []
    curve = rows(tmp_path / "rounds.sqlite", "SELECT accuracy, clients, status FROM store ORDER BY round")
    assert curve[-1][0] >= 0.95, curve
    assert {row[1:] for row in curve} == {(CLIENTS, "committed")}
    assert not (tmp_path / "asked").exists()
