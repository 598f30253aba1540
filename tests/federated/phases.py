"""A job whose clients are processes that can be killed, frozen or cut off in a phase of a round that is named.

Where a round is, is seen on the bus: the call, a client at the gate before its training (``client_process.py``), the first
chunk of an upload, an answer, a will. Nothing here waits for a time. What is done to a client there is the caller's: ``strike``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import brokers
import numpy as np
from harness import rows, until

from broker.blobs import Chunk
from broker.bus import Bus, Publication
from broker.connect import connect
from nodes.federated import wire
from nodes.federated.store import Store
from nodes.federated.weights import Weights, minus, shapes
from nodes.trainers._trainer import Examples, Fit
from nodes.trainers.mlp import Mlp

DIGITS = brokers.ROOT / "examples" / "federated"
LAYERS = [64, 1024, 10]
"""76,810 numbers, 308 KB: an update is a blob of 76 chunks."""
CHUNK = 4096
PLAN: dict[str, Any] = {"epochs": 1, "batch": 32, "rate": 0.1}
SEED = 3
ROOT = "plant/fed/digits"
WITHIN = 40.0
"""Seconds that anything may take that has to come."""

Strike: TypeAlias = Callable[[str], Coroutine[Any, Any, None]]


def shares(clients: int) -> list[Examples]:
    """The example's digits in so many parts, alike."""
    found = [np.load(path) for path in sorted(DIGITS.glob("gateway-*.npz"))]
    x = np.concatenate([each["images"] for each in found]).reshape(-1, 64).astype(np.float32) / np.float32(255)
    y = np.concatenate([each["labels"] for each in found])
    order = np.random.default_rng(7).permutation(len(y))
    return [Examples(x[part], y[part]) for part in np.array_split(order, clients)]


@dataclass
class Watch:
    """What was heard on the bus."""

    call: wire.Call | None = None
    calls: dict[int, wire.Call] = field(default_factory=dict)
    at_gate: dict[str, int] = field(default_factory=dict)
    """Client → round that it stands before the training of."""
    answers: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    chunks: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    """Chunks of the update of that client for that round."""
    here: dict[str, bool] = field(default_factory=dict)
    _offered: dict[str, wire.Parcel] = field(default_factory=dict)
    _seeds: dict[int, int] = field(default_factory=dict)

    def heard(self, topic: str, payload: bytes) -> None:
        """One message."""
        parts = topic.split("/")
        if parts[0] == "test":
            if parts[2] == "at":
                self.at_gate[parts[1]] = self._round(parts[1], int(payload))
            return
        match parts[3:]:
            case ["round"]:
                self.call = wire.hear(wire.Call, payload)
                self.calls.setdefault(self.call.round, self.call)
            case ["c", client, "offer"]:
                parcel = self._offered[client] = wire.hear(wire.Parcel, payload)
                self.chunks.setdefault((client, parcel.round), set())
            case ["c", client, "blob"]:
                self.chunks[client, self._offered[client].round].add(Chunk.decode(payload).index)
            case ["c", client, "ack"]:
                ack = wire.hear(wire.Ack, payload)
                self.answers.setdefault((client, ack.round), []).append(ack.status)
            case ["c", client, "state"]:
                self.here[client] = wire.hear(wire.Presence, payload).here

    def _round(self, client: str, seed: int) -> int:
        if seed not in self._seeds:
            for number in range(1, (0 if self.call is None else self.call.round) + 50):
                self._seeds[wire.seed_of(0, number, client)] = number
        return self._seeds[seed]

    @property
    def round(self) -> int:
        """The last that was called."""
        return 0 if self.call is None else self.call.round

    @property
    def over(self) -> bool:
        return self.call is not None and self.call.phase == wire.OVER

    def taken(self, client: str, number: int) -> bool:
        """Whether that update is the coordinator's."""
        return wire.TAKEN in self.answers.get((client, number), [])

    def used(self, number: int) -> list[str]:
        """Whose updates were taken for that round."""
        return sorted(client for client, n in self.answers if n == number and self.taken(client, n))


class Job:
    """The clients of a job, and who watches it. The coordinator is the node ``lead`` of a topology (:meth:`topology`)."""

    def __init__(self, folder: Path, url: str, clients: int, *, layers: list[int] = LAYERS) -> None:
        self.folder, self.url, self.layers = folder, url, layers
        self.data = shares(clients)
        self.watch = Watch()
        self.alive: set[str] = set()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._bus: Bus | None = None
        self._watching: asyncio.Task[None] | None = None

    def topology(self, **lead: str) -> Path:
        """The side that leads, and its table."""
        fit = ", ".join(f"{key}: {value}" for key, value in PLAN.items())
        said = ", ".join(f"{key}: {value}" for key, value in lead.items())
        trainer = f"trainer: {{mlp: {{layers: {self.layers}, seed: {SEED}}}}}"
        path = self.folder / "plant.yaml"
        path.write_text(
            f"topology: plant\nbrokers: {{local: {{url: '{self.url}'}}}}\nnodes:\n"
            f"  lead: {{federate: {{job: digits, {trainer}, fit: {{{fit}}}, {said}}}}}\n"
            "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}\n"
        )
        return path

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        bus = self._bus = connect(self.url, client_id="watch")
        await bus.open()
        heard = await bus.subscribe([f"{ROOT}/#", "test/+/at"], qos=1)

        async def listen() -> None:
            while True:
                arrived = await heard.receive()
                for each in arrived:
                    self.watch.heard(each.topic, bytes(each.payload))
                heard.acknowledge(arrived)

        self._watching = asyncio.create_task(listen())
        return self

    async def __aexit__(self, *exc: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._bus is not None:
            await self._bus.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the watch sees; a watch that failed is a failure."""

        def looked() -> bool:
            if self._watching is not None and self._watching.done():
                self._watching.result()
            return condition()

        await until(looked, within=WITHIN)

    def start(self, names: Iterable[str], *, url: str = "") -> None:
        """Begin, or begin again with what is on their disks. Names end in the number of their data."""
        for name in names:
            k = int(name.rpartition("-")[2])
            path = self.folder / f"{name}.npz"
            np.savez(path, x=self.data[k].x, y=self.data[k].y)
            given = {
                "name": name,
                "layers": self.layers,
                "seed": SEED,
                "data": str(path),
                "control": self.url,
                "url": url or self.url,
                "job": "digits",
                "root": ROOT,
                "state": str(self.folder / f"{name}.sqlite"),
                "chunk": CHUNK,
            }
            environment = {**os.environ, "PYTHONPATH": str(brokers.ROOT), "OMP_NUM_THREADS": "1"}
            script = Path(__file__).with_name("client_process.py")
            self._processes[name] = subprocess.Popen([sys.executable, str(script), json.dumps(given)], env=environment)
            self.alive.add(name)

    async def kill(self, name: str) -> None:
        """SIGKILL; returns when its will was heard."""
        process = self._processes[name]
        process.kill()
        await asyncio.to_thread(process.wait)
        self.alive.discard(name)
        self.watch.at_gate.pop(name, None)
        await self.until(lambda: not self.watch.here.get(name, False))

    def freeze(self, name: str) -> None:
        """SIGSTOP: for the others it is there."""
        self._processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGCONT)

    # -- gates ---------------------------------------------------------------------------------------------------

    async def go(self, names: Iterable[str]) -> None:
        """These may train once."""
        assert self._bus is not None
        for name in names:
            self.watch.at_gate.pop(name, None)
            await (await self._bus.publish([Publication(f"test/{name}/do", b"go", 1)]))

    async def gathered(self) -> int:
        """Until all that are alive stand before the training of one round; its number."""
        watch = self.watch

        def all_there() -> bool:
            return watch.round > 0 and all(watch.at_gate.get(name) == watch.round for name in self.alive)

        async def pass_on() -> None:
            while True:
                await asyncio.sleep(0.01)
                call = watch.call
                if call is not None and any(name not in call.cohort for name in self.alive):
                    await self.let_through(call.round)  # some joined later: it takes another round

        passing = asyncio.create_task(pass_on())
        try:
            await self.until(all_there)
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)
        return watch.round

    async def let_through(self, number: int) -> None:
        """Who stands before the training of that round, or of one before, may train."""
        await self.go([name for name, at in list(self.watch.at_gate.items()) if at <= number and name in self.alive])

    async def finish(self, number: int) -> None:
        """Until that round is over."""
        while self.watch.round <= number and not self.watch.over:
            await self.let_through(number)
            await asyncio.sleep(0.01)

    async def run_out(self) -> None:
        """Until the job is over: nobody stands at a gate any more."""
        async with asyncio.timeout(WITHIN):
            while not self.watch.over:
                await self.let_through(self.watch.round)
                await asyncio.sleep(0.01)

    # -- phases --------------------------------------------------------------------------------------------------

    async def announce(self, victims: list[str], strike: Strike) -> int:
        """Struck after the call is out and before they heard it: they answered the round before, and were frozen then."""
        number = await self.gathered()
        await self.go(victims)
        await self.until(lambda: all(self.watch.taken(name, number) for name in victims))
        for name in victims:
            self.freeze(name)
        await self.let_through(number)
        await self.until(lambda: self.watch.round > number)
        assert not any(self.watch.at_gate.get(name) == number + 1 for name in victims)
        for name in victims:
            await strike(name)
        return number + 1

    async def train(self, victims: list[str], strike: Strike) -> int:
        """Struck while all stand in their training."""
        number = await self.gathered()
        for name in victims:
            await strike(name)
        return number

    async def upload(self, victims: list[str], strike: Strike) -> int:
        """Struck when the first chunk of the update was seen, and before the last."""
        number = await self.gathered()
        for name in victims:
            await self.go([name])
            await self.until(lambda name=name: len(self.watch.chunks.get((name, number), ())) > 0)  # type: ignore[misc] # its default
            await strike(name)
            assert not self.watch.taken(name, number)
        return number

    # -- afterwards ----------------------------------------------------------------------------------------------

    def audit(self, state: Path, deadline: float) -> list[tuple[int, str, int]]:
        """Compare the model with a plain loop over exactly those updates that the rows say were used.

        :returns: (round, status, clients) of all rounds.
        """
        names = "round, status, clients, seconds"
        found = rows(self.folder / "rounds.sqlite", f"SELECT {names} FROM store ORDER BY round")  # noqa: S608 - our own
        assert [row[0] for row in found] == list(range(1, len(found) + 1)), "each round is there once"
        assert all(seconds <= deadline + 10 for *_, seconds in found)
        network = Mlp(self.layers, seed=SEED)
        network.open()
        model = network.weights()
        for number, status, clients, _ in found:
            used = self.watch.used(number)
            if status != "committed":
                continue
            assert len(used) == clients
            model = self._next(network, model, number, used)
        store = Store(state / "lead" / "digits.sqlite")
        try:
            made, _ = wire.unpack_model(store.kept()["model"]["data"], shapes(model))
            assert max(float(np.abs(array).max()) for array in minus(model, made).values()) < 1e-6
        finally:
            store.close()
        return [(number, status, clients) for number, status, clients, _ in found]

    def _next(self, network: Mlp, model: Weights, number: int, used: list[str]) -> Weights:
        data = {name: self.data[int(name.rpartition("-")[2])] for name in used}
        total = sum(len(each) for each in data.values())
        added = {name: np.zeros(array.shape) for name, array in model.items()}
        for name in used:
            network.load(model)
            network.fit(data[name], Fit(**PLAN, seed=wire.seed_of(0, number, name)))
            for key, array in minus(network.weights(), model).items():
                added[key] += array.astype(np.float64) * (len(data[name]) / total)
        return {key: (array + added[key]).astype(np.float32) for key, array in model.items()}
