"""Draw what the gateways know together, from the run's table, and what each would know alone.

    penstock run examples/federated/topology.yaml
    python examples/federated/plot.py

Alone means: the same network with the same first weights, the same steps and as many rounds, on one gateway's images only. The
answer is ``accuracy.svg``, drawn without a plotting library.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # from a checkout, without installing it

from nodes.cli._curves import picture  # noqa: E402 - what stands before makes it importable
from nodes.trainers._trainer import Examples, Fit  # noqa: E402
from nodes.trainers.mlp import Mlp  # noqa: E402

GATEWAYS = ("gateway-a", "gateway-b", "gateway-c")


def images(path: Path) -> Examples:
    """The images of a file, as the topology's ``scale: 1/255`` gives them."""
    with np.load(path) as loaded:
        return Examples(loaded["images"].astype(np.float32) / 255, loaded["labels"])


def alone(folder: Path, gateway: str, rounds: int) -> list[tuple[float, float]]:
    """Accuracy over rounds of a network that learns from one gateway's images."""
    held, own = images(folder / "held_out.npz"), images(folder / f"{gateway}.npz")
    network = Mlp([64, 64, 10], "relu", "cross-entropy", 1)
    network.open()
    curve = []
    for number in range(1, rounds + 1):
        network.fit(own, Fit(epochs=1, batch=32, rate=0.05, momentum=0.9, seed=number))
        curve.append((float(number), network.evaluate(held)["accuracy"]))
    return curve


def together(path: Path) -> list[tuple[float, float]]:
    """Accuracy over rounds of the federated run."""
    db = sqlite3.connect(path)
    try:
        rows = db.execute("SELECT round, accuracy FROM store WHERE status = 'committed' ORDER BY round").fetchall()
    finally:
        db.close()
    return [(float(number), float(accuracy)) for number, accuracy in rows]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the topology and its results are")
    folder: Path = parser.parse_args().folder
    curves = {"together": together(folder / "rounds.sqlite")}
    for gateway in GATEWAYS:
        curves[f"{gateway} alone"] = alone(folder, gateway, len(curves["together"]))
    title = "Digits that no gateway has seen, recognised"
    (folder / "accuracy.svg").write_text(picture(title, curves, x="round", y="accuracy", share=True))
    for name, curve in curves.items():
        print(f"{name}: {curve[-1][1]:.1%}")


if __name__ == "__main__":
    main()
