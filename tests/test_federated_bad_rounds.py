"""A round that made the model worse is thrown away, and no gateway ever answers with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import brokers
import numpy as np
import pytest
from federated_kit import digits
from harness import rows, run, until
from test_federated_handover import UNTRAINED, bodies, images, version

from broker.connect import connect
from nodes.federated.client import Client
from nodes.federated.party import Party
from nodes.federated.store import Store
from nodes.supervisor import Supervisor
from nodes.trainers._trainer import Examples, Fit, Fitted
from nodes.trainers.mlp import Mlp

NETWORK = "{mlp: {layers: [64, 32, 10], seed: 1}}"
ROUNDS = 30


class Turncoat(Mlp):
    """Learns like others while it is honest; then that every digit is another one, and shouts."""

    honest = True

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        if self.honest:
            return super().fit(examples, plan)
        before = self.weights()
        done = super().fit(Examples(examples.x, 9 - examples.y), plan)
        self.load({name: before[name] + 8 * (array - before[name]) for name, array in self.weights().items()})
        return done


def topology(folder: Path, url: str, rounds: int = ROUNDS, **lead: str) -> Path:
    options = "".join(f", {key}: {value}" for key, value in lead.items())
    path = folder / "plant.yaml"
    path.write_text(f"""
topology: plant
brokers: {{local: {{url: '{url}'}}}}
nodes:
  camera-a: {{ingest: {{source: arrays, path: a.npz}}}}
  camera-b: {{ingest: {{source: arrays, path: b.npz}}}}
  learn-a: {{train: {{job: digits, trainer: {NETWORK}, scale: 1/16}}, from: camera-a}}
  learn-b: {{train: {{job: digits, trainer: {NETWORK}, scale: 1/16}}, from: camera-b}}
  lead:
    federate:
      {{job: digits, trainer: {NETWORK}, rounds: {rounds}, fit: {{epochs: 1, batch: 32, rate: 0.1}}, deadline: 20s,
       clients: {{least: 3, quorum: 3}}, every: 100ms, retries: 100, evaluate: {{path: test.npz, scale: 1/16}}{options}}}
  curve: {{uplink: {{sink: sqlite, path: rounds.sqlite}}, from: {{lead: {{delivery: safe}}}}}}
  test: {{ingest: {{source: arrays, path: test.npz, loop: true, rate: 300}}}}
  seen:
    infer: {{model: model.npz, job: digits, backend: {{trained: {{trainer: {NETWORK}}}}}, scale: 1/16}}
    from: {{test: {{delivery: safe}}}}
  out: {{uplink: {{sink: jsonl, path: seen.jsonl}}, from: {{seen: {{delivery: safe}}}}}}
""")
    train, test = digits()
    for k, name in enumerate("ab"):
        np.savez(folder / f"{name}.npz", images=images(train.x[k::3]), labels=train.y[k::3])
    np.savez(folder / "test.npz", images=images(test.x), labels=test.y)
    return path


@contextlib.asynccontextmanager
async def third_client(url: str, trainer: Mlp) -> Any:
    """A device of somebody's own, at the job's topics like the others."""
    train, _ = digits()
    examples = Examples(train.x[2::3], train.y[2::3])
    client = Client("digits", "third", trainer, lambda: examples, lambda: len(examples))
    party = Party(client, Store(None), partial(connect, url, client_id="third"), "plant/fed/digits")
    await party.open()
    running = asyncio.create_task(party.run())
    try:
        yield client
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await party.close()


def table(folder: Path, what: str) -> list[tuple[Any, ...]]:
    try:
        return rows(folder / "rounds.sqlite", f"SELECT {what} FROM curve ORDER BY round")  # noqa: S608 - our own
    except sqlite3.Error:
        return []


def statuses(folder: Path) -> list[str]:
    return [status for (status,) in table(folder, "status")]


@pytest.mark.campaign
@pytest.mark.skipif(bool(brokers.missing("mosquitto")), reason="mosquitto is not installed")
def test_a_client_that_poisons_spoils_rounds_and_no_answer(tmp_path: Path) -> None:
    with brokers.started("mosquitto", tmp_path) as broker:
        path = topology(tmp_path, broker.url, tolerance="0.1")

        async def meddle(supervisor: Supervisor) -> None:
            trainer = Turncoat([64, 32, 10], "relu", "cross-entropy", 1)
            trainer.open()
            async with third_client(broker.url, trainer):
                await until(lambda: statuses(tmp_path).count("committed") >= 15, within=30)
                trainer.honest = False
                await until(lambda: statuses(tmp_path).count("rejected") >= 3, within=20)
                trainer.honest = True
                await until(lambda: last_version(tmp_path) == ROUNDS, within=30)
            supervisor.end()

        outcome = run(path, meddle=meddle, within=58)
    assert outcome.complete
    assert not outcome.findings
    made = table(tmp_path, "status, accuracy, version")
    bad = [accuracy for status, accuracy, _ in made if status == "rejected"]
    good = [accuracy for status, accuracy, _ in made if status == "committed"]
    assert len(bad) >= 3
    assert len(good) == ROUNDS
    assert all(accuracy < max(good[:10]) - 0.1 for accuracy in bad)
    assert [number for status, _, number in made if status == "committed"] == list(range(1, ROUNDS + 1))
    seen = bodies(tmp_path / "seen.jsonl")
    assert len(seen) == outcome.ledgers["test"].emitted["out"].rows, "none is lost, none comes twice"
    versions = [version(body) for body in seen]
    assert versions == sorted(versions)
    digests: dict[int, set[str]] = defaultdict(set)
    right: dict[int, list[bool]] = defaultdict(list)
    for body, number in zip(seen, versions, strict=True):
        digests[number].add(body["model"]["digest"])
        right[number].append(body["labels"][0] == body["attributes"]["label"])
    assert all(len(found) == 1 for found in digests.values()), "a mixture has no version"
    early = [one for number, many in right.items() if UNTRAINED < number <= 5 for one in many]
    late = [one for number, many in right.items() if number > 20 for one in many]
    assert np.mean(right[UNTRAINED]) < 0.4
    assert np.mean(right[UNTRAINED]) < np.mean(early) < np.mean(late)
    assert np.mean(late) >= 0.85
    during = [many for number, many in right.items() if number >= 15]
    assert np.mean([one for many in during for one in many]) > max(bad) + 0.05, "no answer is of a bad round's model"


@pytest.mark.skipif(bool(brokers.missing("mosquitto")), reason="mosquitto is not installed")
def test_an_operator_goes_back_and_the_gateways_do(tmp_path: Path) -> None:
    """Nobody watches (no tolerance): bad rounds are models. Told to go back, the job does, also if it is killed then."""
    good = 10
    with brokers.started("mosquitto", tmp_path) as broker:
        path = topology(tmp_path, broker.url, rounds=100_000, keep="1000")
        command = [sys.executable, "-m", "nodes.cli.main", "fl", "rollback", str(path)]
        command += ["--state", str(tmp_path / "state"), "--to"]
        said: list[subprocess.CompletedProcess[str]] = []

        async def tell(to: int) -> None:
            done = await asyncio.to_thread(subprocess.run, [*command, str(to)], capture_output=True, text=True)
            said.append(done)

        async def meddle(supervisor: Supervisor) -> None:
            trainer = Turncoat([64, 32, 10], "relu", "cross-entropy", 1)
            trainer.open()
            async with third_client(broker.url, trainer):
                await until(lambda: last_version(tmp_path) >= good, within=30)
                trainer.honest = False
                await until(lambda: any(is_bad(*each) for each in table(tmp_path, "version, accuracy")), within=20)
                await until(lambda: last_version(tmp_path) >= good + 3, within=20)
                await tell(1000)
                trainer.honest = True
                await tell(good)
                supervisor.kill("lead")
                await until(lambda: bool(backs()) and last_version(tmp_path) >= backs()[0] + 10, within=30)
            supervisor.end()

        def backs() -> list[int]:
            return [number for number, why in table(tmp_path, "version, why") if "back to" in why]

        def is_bad(number: int, accuracy: float) -> bool:
            return number > good and accuracy < 0.6

        outcome = run(path, meddle=meddle, within=58)
    assert outcome.complete
    assert not outcome.findings
    wrong, done = said
    assert wrong.returncode != 0
    assert "version 1000 is not kept; older ones that are: 0, 1, 2" in wrong.stderr
    assert (done.returncode, done.stderr) == (0, "")
    made = table(tmp_path, "status, version, accuracy, why")
    assert [number for status, number, _, _ in made if status == "committed"] == list(
        range(1, 1 + max(number for _, number, _, _ in made))
    )
    ((back, why),) = [(number, why) for status, number, _, why in made if "back to" in why]
    assert why == f"gone back to version {good}"
    assert done.stdout == f"job digits: version {back} is the model of version {good} again\n"
    seen = bodies(tmp_path / "seen.jsonl")
    assert len(seen) == outcome.ledgers["test"].emitted["out"].rows
    digests = {version(body): body["model"]["digest"] for body in seen}
    assert [version(body) for body in seen] == sorted(version(body) for body in seen)
    if back in digests and good in digests:  # a model that was replaced at once may have answered nothing
        assert digests[back] == digests[good]
    curve = {number: accuracy for status, number, accuracy, _ in made if status == "committed"}
    assert curve[back] == curve[good]
    assert curve[back + 10] > 0.8 > min(curve[number] for number in range(good + 1, back))


def last_version(folder: Path) -> int:
    """Of the model that answered last."""
    try:
        with (folder / "seen.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            return version(json.loads(file.read().splitlines()[-2])["body"])
    except (FileNotFoundError, IndexError, ValueError):
        return UNTRAINED
