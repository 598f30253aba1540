"""A client of a federated job with a pace of its own: ``python -m benchmarks.federated_client JSON``, a process.

All of it is what the node ``train`` carries, but that each training takes as long as it is told.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from broker.connect import connect
from nodes.federated import kinds
from nodes.federated.client import Client
from nodes.federated.line import RECEIVE, SESSION
from nodes.federated.party import Party
from nodes.federated.store import Store
from nodes.trainers._trainer import Examples, Fit, Fitted
from nodes.trainers.mlp import Mlp


class Paced(Mlp):
    """Takes ``pace`` seconds for each training."""

    pace = 0.0

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        """Train, and wait until the time is over."""
        ends = time.monotonic() + self.pace
        done = super().fit(examples, plan)
        time.sleep(max(0.0, ends - time.monotonic()))
        return done


async def main(given: dict[str, Any]) -> None:
    """Until the job is over. Keys: name, url, job, root, layers, seed, data (an .npz with x and y), state (a file), pace."""
    name = given["name"]
    trainer = Paced(given["layers"], seed=given["seed"])
    trainer.pace = given["pace"]
    trainer.open()
    with np.load(given["data"]) as held:
        examples = Examples(held["x"], held["y"])
    client = Client(given["job"], name, trainer, lambda: examples, lambda: len(examples), compressors=kinds.compressor)
    options: dict[str, Any] = {"receive_maximum": RECEIVE, "session_expiry": SESSION, "clean_start": True}
    party = Party(
        client,
        Store(Path(given["state"])),
        lambda **more: connect(
            given["url"], client_id=f"{name}-train", prompt=True, patience=math.inf, **options, **more
        ),
        given["root"],
        node=name,
    )
    await party.open()
    try:
        await party.run()
    finally:
        await party.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
