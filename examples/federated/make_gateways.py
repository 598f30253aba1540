"""Make the example's data: what three gateways see of handwritten digits, and what none of them sees.

    pip install scikit-learn
    python examples/federated/make_gateways.py

Writes ``gateway-a.npz``, ``gateway-b.npz``, ``gateway-c.npz`` and ``held_out.npz``: images uint8 [n, 8, 8] in 0..255, and their
labels. Every fourth image of the data set is held out. Of the others each gateway sees the digits in :data:`SEEN` only; what two
of them see is shared out in turn, so that no image is there twice.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SEEN = {"gateway-a": (0, 1, 2, 3, 4, 5), "gateway-b": (4, 5, 6, 7, 8), "gateway-c": (7, 8, 9, 0, 1)}


def main() -> None:
    """Write the files."""
    digits = import_module("sklearn.datasets").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    held = np.arange(len(images)) % 4 == 3
    chosen = {"held_out": held}
    for name in SEEN:
        chosen[name] = np.zeros(len(images), bool)
    for digit in range(10):
        who = [name for name, seen in SEEN.items() if digit in seen]
        for turn, index in enumerate(np.flatnonzero((labels == digit) & ~held)):
            chosen[who[turn % len(who)]][index] = True
    for name, which in chosen.items():
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, images=images[which], labels=labels[which])
        print(f"{path}: {int(which.sum())} images, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
