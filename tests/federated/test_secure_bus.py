"""A job with secure sums on a real broker: everything that was published, and everything that its coordinator ever had on its
disk, is looked at for one client's update."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import brokers
import msgspec
import numpy as np
import pytest
from harness import until
from job_site import PLAN, Softmax, name, parts
from secure_site import Listened, small_mixtures

from broker.bus import Bus, Subscription
from broker.connect import connect
from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.machine import Machine
from nodes.federated.party import Party
from nodes.federated.rules import Rules, Secure
from nodes.federated.store import Store
from nodes.federated.weights import flat, minus
from nodes.strategies import fedavg
from nodes.trainers._trainer import Examples, Fit
from schemas.errors import RunError
from schemas.messages import Array

pytest.importorskip("cryptography", reason="cryptography is not installed: no masks, no secure sums")

ROOT = "plant/fed/j"
TEN = parts(10)


class Disk(Store):
    """Remembers all that was ever committed; the process dies before it commits a certain step of a secure sum."""

    def __init__(self, path: Path, dies_at: str = "") -> None:
        super().__init__(path)
        self.dies_at = dies_at
        self.history: list[tuple[str, Any]] = []

    def commit(self, values: Mapping[str, Any], rows: Sequence[dict[str, Any]] = (), *, hard: bool = False) -> None:
        step = (values.get("secure") or {}).get("what")
        if self.dies_at and step == self.dies_at:
            raise RunError("killed")
        super().commit(values, rows, hard=hard)
        self.history += values.items()


class Job:
    """The parties of one round, with an ear on everything.

    :param doomed: so many clients die ...
    :param at: ... before they commit that step.
    """

    def __init__(self, url: str, folder: Path, doomed: int, at: str, **rules: Any) -> None:
        self.url = url
        self.rules = Rules(
            "j", rounds=1, least=10, quorum=5, fit=PLAN, deadline=8, grace=1.5, retries=0, secure=Secure(), **rules
        )
        self.lead = Coordinator(self.rules, fedavg.build(fedavg.Config()), Softmax().weights())
        self.stores = [Disk(folder / f"{name(k)}.sqlite", at if k < doomed else "") for k in range(10)]
        self.disk = Disk(folder / "lead.sqlite")
        self.parties = [self._party(self._client(k), self.stores[k], name(k)) for k in range(10)]
        self.parties.append(self._party(self.lead, self.disk, "lead"))
        self.heard: list[tuple[str, bytes]] = []
        self.outcome = ""

    def _client(self, k: int) -> Client:
        examples: Examples = TEN[k]
        return Client("j", name(k), Softmax(), lambda: examples, lambda: len(examples))

    def _party(self, machine: Machine, store: Store, called: str) -> Party:
        def link(**options: Any) -> Bus:
            return connect(self.url, client_id=f"secure-{called}", patience=math.inf, **options)

        return Party(machine, store, link, ROOT, node=called)

    async def run(self) -> None:
        async with connect(self.url, client_id="ear", patience=math.inf) as bus:
            ear = await bus.subscribe(["#"], qos=1, capacity=64)
            listening = asyncio.create_task(self._listen(ear))
            for party in self.parties:
                await party.open()
            running = [asyncio.create_task(self._life(party)) for party in self.parties]
            await asyncio.wait_for(running[-1], 40)
            await until(lambda: any(topic == "round" and _over(payload) for topic, payload in self.heard))
            for task in (*running, listening):
                task.cancel()
            await asyncio.gather(*running, listening, return_exceptions=True)
        self.outcome = self.lead.outcome

    async def _life(self, party: Party) -> None:
        try:
            await party.run()
        except RunError as error:
            if str(error) != "killed":
                raise
        finally:
            await party._lines[-1]._bus.close()

    async def _listen(self, ear: Subscription) -> None:
        while True:
            for delivery in (batch := await ear.receive()):
                assert delivery.topic.startswith(f"{ROOT}/")
                self.heard.append((delivery.topic.removeprefix(f"{ROOT}/"), bytes(delivery.payload)))
            ear.acknowledge(batch)

    def everything(self) -> bytes:
        """All bytes that were on the bus, and that the coordinator committed or has in its files now."""
        kept = [msgspec.msgpack.encode(value) for _, value in self.disk.history]
        files = [path.read_bytes() for path in sorted(self.disk.path.parent.rglob("lead*")) if path.is_file()]  # type: ignore[union-attr]
        return b"|".join([payload for _, payload in self.heard] + kept + files)


def _over(payload: bytes) -> bool:
    return wire.hear(wire.Call, payload).phase == wire.OVER


def updates(chosen: Sequence[int]) -> dict[str, Array]:
    """What each client would have sent in the clear, float32."""
    out = {}
    for k in chosen:
        trainer = Softmax()
        model = trainer.weights()
        trainer.fit(TEN[k], Fit(**PLAN, seed=wire.seed_of(0, 1, name(k))))
        out[name(k)] = flat(minus(trainer.weights(), model)).astype(np.float32)
    return out


def nothing_bare(job: Job, listened: Listened, bare: dict[str, Array]) -> None:
    """No update is there as numbers, as what is masked, or as a vector with one of its masks taken off; and no secret of a
    client, but those that it takes to take the masks off the sum."""
    everything = job.everything()
    (attempt,) = listened.attempts.values()
    fixed = attempt.terms.fixed()
    for k, (client, update) in enumerate(updates(range(10)).items()):
        written = fixed.write(update, len(TEN[k]))[0]
        for wide in (update, update.astype(np.float64)):
            assert wide[:20].tobytes() not in everything
        assert written[:3].tobytes() not in everything
        for vector in (attempt.vectors.get(client), bare.get(client)):
            if vector is not None:
                assert int(np.count_nonzero(vector == written)) <= 2
    for client, store in zip((name(k) for k in range(10)), job.stores, strict=True):
        for key, value in store.history:
            if key == "secure" and (snapshot := (value or {}).get("snapshot")):
                state = msgspec.msgpack.decode(snapshot)
                for secret in ("channel", "mask", "own"):
                    assert state[secret] not in everything, (client, secret)


@pytest.mark.parametrize("kind", [brokers.param("embedded"), brokers.param("mosquitto")])
@pytest.mark.parametrize("at", ["ask", "reveal"])
def test_who_saw_everything_knows_the_sum_and_nothing_more(kind: str, at: str, tmp_path: Path) -> None:
    """Three of ten are killed, when the masks are agreed and they have masked, or when they are asked to unmask."""
    with brokers.started(kind, tmp_path) as broker:
        job = Job(broker.url, tmp_path, 3, at)
        asyncio.run(job.run())
    assert job.outcome == "rounds"
    row = _row(job)
    assert (row["status"], row["clients"]) == ("committed", 7 if at == "ask" else 10)
    assert row["seconds"] < 8.5
    for key, value in job.disk.history:  # what was on the disk only is heard too
        if key.startswith("update/") and value is not None:
            job.heard.append((f"c/{key.rpartition('/')[2]}/up", value))
    listened = Listened(job.heard)
    (attempt,) = listened.attempts.values()
    assert attempt.survivors is not None
    alive = attempt.survivors.alive
    assert alive == [name(k) for k in range(3 if at == "ask" else 0, 10)]
    bare = {client: vector for client, vector in listened.bare(1).items() if client in alive}
    assert set(bare) == set(alive)
    nothing_bare(job, listened, bare)
    assert small_mixtures(bare) == [(1,) * len(alive)], "of all their sums and differences only one is no noise"
    total = np.zeros(attempt.terms.size + 1, np.uint32)
    for vector in bare.values():
        total += vector
    values, samples = attempt.terms.fixed().read(total)
    wanted = updates([k for k in range(10) if name(k) in alive])
    rows = {name(k): len(TEN[k]) for k in range(10)}
    assert samples == sum(rows[client] for client in alive)
    plain = sum(rows[client] * update.astype(np.float64) for client, update in wanted.items())
    fixed = attempt.terms.fixed()
    assert np.abs(values - plain).max() <= len(alive) * 0.5 * fixed.step * fixed.most * 1.001 + 1e-6
    np.testing.assert_allclose(flat(job.lead.model), plain / samples, atol=1e-6)


@pytest.mark.parametrize("at", ["ask", "reveal"])
def test_below_the_threshold_it_stops_and_nothing_can_be_known(at: str, tmp_path: Path) -> None:
    """Four of ten are killed: not even the sum can be had of all that was heard."""
    with brokers.started("mosquitto", tmp_path) as broker:
        job = Job(broker.url, tmp_path, 4, at)
        asyncio.run(job.run())
    assert job.outcome == "aborted"
    row = _row(job)
    assert row["status"] == "aborted"
    did = "sent their masked updates" if at == "ask" else "gave their shares back"
    assert row["why"] == f"too few for a secure sum: 6 of 10 clients {did}, 7 are needed"
    assert row["seconds"] < 8.5
    listened = Listened(job.heard)
    (attempt,) = listened.attempts.values()
    assert len(attempt.vectors) == (6 if at == "ask" else 10)
    assert listened.bare(1) == {}, "not one mask can be taken off"
    assert bool(attempt.reveals) == (at == "reveal")
    nothing_bare(job, listened, {})
    assert small_mixtures({client: attempt.vectors[client] for client in sorted(attempt.vectors)[:8]}) == []
    left = [key for key in job.disk.kept() if key.startswith(("secure/", "update/", "round"))]
    assert left == [], "an aborted round leaves nothing on the coordinator's disk"


def _row(job: Job) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [value for key, value in job.disk.history if key == "row"]
    assert len(rows) == 1
    return rows[0]
