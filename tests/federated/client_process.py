"""``python tests/federated/client_process.py JSON``: one client of a job as a process, with a gate before each training.

All of it is the product's: party, machine, store, trainer; only the trainer stops at the gate. The process says on
``test/<client>/at`` the seed of the training that it stands before, and each message on ``test/<client>/do`` lets one through.
Both over a second connection, which does not go by the link that a test breaks.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from broker.bus import Publication
from broker.connect import connect
from nodes.federated import kinds
from nodes.federated.client import Client
from nodes.federated.line import RECEIVE, SESSION
from nodes.federated.party import Party
from nodes.federated.store import Store
from nodes.trainers._trainer import Examples, Fit, Fitted
from nodes.trainers.mlp import Mlp


class Gated(Mlp):
    """Trains when it may."""

    def __init__(self, layers: list[int], seed: int) -> None:
        super().__init__(layers, seed=seed)
        self.tokens = threading.Semaphore(0)
        self.tell: Any = None

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        self.tell(plan.seed)
        self.tokens.acquire()
        return super().fit(examples, plan)


async def main(given: dict[str, Any]) -> None:
    """Until the job is over."""
    name = given["name"]
    trainer = Gated(given["layers"], given["seed"])
    trainer.open()
    with np.load(given["data"]) as held:
        examples = Examples(held["x"], held["y"])
    control = connect(given["control"], client_id=f"gate-{name}", patience=math.inf)
    await control.open()
    orders = await control.subscribe([f"test/{name}/do"], qos=1)
    loop = asyncio.get_running_loop()
    said: set[asyncio.Task[Any]] = set()

    def tell(seed: int) -> None:
        def now() -> None:
            task = loop.create_task(control.publish([Publication(f"test/{name}/at", str(seed).encode(), 1)]))
            said.add(task)
            task.add_done_callback(said.discard)

        loop.call_soon_threadsafe(now)

    async def obey() -> None:
        while True:
            for order in await orders.receive():
                trainer.tokens.release()
                orders.acknowledge([order])

    trainer.tell = tell
    obeying = asyncio.create_task(obey())
    client = Client(
        given["job"],
        name,
        trainer,
        lambda: examples,
        lambda: len(examples),
        compressors=kinds.compressor,
        chunk=given["chunk"],
    )
    options: dict[str, Any] = {
        "patience": math.inf,
        "receive_maximum": RECEIVE,
        "session_expiry": SESSION,
        "clean_start": True,
    }
    party = Party(
        client,
        Store(Path(given["state"])),
        lambda **more: connect(given["url"], client_id=f"party-{name}", prompt=True, **options, **more),
        given["root"],
        node=name,
    )
    await party.open()
    try:
        await party.run()
    finally:
        obeying.cancel()
        await party.close()
        await control.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
