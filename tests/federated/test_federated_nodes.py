"""Federated learning as a user runs it: processes, brokers, disks; killed at will; against the plain loop."""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import brokers
import numpy as np
import pytest
from harness import rows, run, until

from nodes.cli import _jobs, main
from nodes.federated import keyring, wire
from nodes.federated.store import Store
from nodes.federated.weights import Weights, minus, norm, shapes
from nodes.privacy.keys import Signer
from nodes.supervisor import Supervisor
from nodes.trainers._trainer import Examples, Fit
from nodes.trainers.mlp import Mlp

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "federated"
TRAINER = "trainer: {mlp: {layers: [64, 32, 10], seed: 3}}"
PLAN = {"epochs": 1, "batch": 32, "rate": 0.1}


def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All images of the example that are not held out, and their labels."""
    found = [np.load(path) for path in sorted(DIGITS.glob("gateway-*.npz"))]
    return np.concatenate([each["images"] for each in found]), np.concatenate([each["labels"] for each in found])


def parts(folder: Path, clients: int, *, iid: bool) -> list[Examples]:
    """Files of so many clients, ``0.npz`` and so on: alike, or each with two classes only; what each learns from."""
    images, labels = digits()
    order = np.random.default_rng(7).permutation(len(labels))
    if not iid:
        order = order[np.argsort(labels[order], kind="stable")]
    shards = np.array_split(order, clients if iid else 2 * clients)
    out = []
    for k in range(clients):
        rows_of = shards[k] if iid else np.concatenate([shards[k], shards[k + clients]])
        np.savez(folder / f"{k}.npz", images=images[rows_of], labels=labels[rows_of])
        out.append(Examples(images[rows_of].astype(np.float32) / np.float32(255), labels[rows_of]))
    with np.load(DIGITS / "held_out.npz") as held:
        np.savez(folder / "held_out.npz", images=held["images"], labels=held["labels"])
    return out


def topology(
    folder: Path, clients: list[int], broker: str = "embedded", *, together: bool = False, **lead: str
) -> Path:
    """Cameras, ``learn-k`` for each of them with so many images, ``lead`` and its table; cameras share a process."""
    options = {
        "rounds": "20",
        "clients": f"{{least: {len(clients)}, quorum: {len(clients)}}}",
        "deadline": "30s",
        **lead,
    }
    said = ", ".join(f"{key}: {value}" for key, value in options.items())
    process = ", process: learn" if together else ""
    lines = ["topology: plant", f"brokers: {{local: {{run: {broker}}}}}", "nodes:"]
    for k, many in enumerate(clients):
        lines += [
            f"  camera-{k}: {{ingest: {{source: arrays, path: {k}.npz}}, process: cameras}}",
            f"  learn-{k}: {{train: {{job: digits, {TRAINER}, scale: 1/255, least: {many}}}, "
            f"from: {{camera-{k}: {{delivery: safe}}}}{process}}}",
        ]
    plan = ", ".join(f"{key}: {value}" for key, value in PLAN.items())
    lines += [
        f"  lead: {{federate: {{job: digits, {TRAINER}, fit: {{{plan}}}, {said}, "
        "evaluate: {path: held_out.npz, scale: 1/255}}}",
        "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}",
    ]
    path = folder / "plant.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def loop(data: list[Examples], rounds: int) -> Weights:
    """FedAvg without a bus."""
    network = Mlp([64, 32, 10], "relu", "cross-entropy", 3)
    network.open()
    model = network.weights()
    total = sum(len(examples) for examples in data)
    names = sorted((f"learn-{k}", k) for k in range(len(data)))
    for number in range(1, rounds + 1):
        added = {name: np.zeros(array.shape) for name, array in model.items()}
        for name, k in names:
            network.load(model)
            network.fit(data[k], Fit(**PLAN, seed=wire.seed_of(0, number, name)))  # type: ignore[arg-type] # one dict of two types
            for key, array in minus(network.weights(), model).items():
                added[key] += array.astype(np.float64) * (len(data[k]) / total)
        model = {key: (array + added[key]).astype(np.float32) for key, array in model.items()}
    return model


def last_model(state: Path, node: str = "lead", job: str = "digits") -> Weights:
    """What the coordinator has on its disk."""
    network = Mlp([64, 32, 10], "relu", "cross-entropy", 3)
    network.open()
    store = Store(state / node / f"{job}.sqlite")
    try:
        weights, _ = wire.unpack_model(store.kept()["model"]["data"], shapes(network.weights()))
        return {name: array.copy() for name, array in weights.items()}
    finally:
        store.close()


def counted(path: Path) -> int:
    """Rounds in the table so far."""
    try:
        return int(rows(path, "SELECT count(*) FROM store")[0][0])
    except sqlite3.Error:
        return 0


@pytest.mark.parametrize("kind", [brokers.param("embedded"), brokers.param("mosquitto")])
def test_three_gateways_learn_together_and_the_curve_is_in_a_table(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = parts(tmp_path, 3, iid=False)
    path = topology(tmp_path, [len(each) for each in data], kind, rounds="20")
    outcome = run(path)
    told = {"--state": str(tmp_path / "state"), "--out": str(tmp_path / "curve.svg")}
    flags = [word for pair in told.items() for word in pair]
    assert [main.run(["fl", word, str(path), *flags]) for word in ("status", "rounds", "clients", "compare")] == [0] * 4
    said = capsys.readouterr().out
    assert "left here: 20 rounds, over (rounds)" in said
    assert sum(line.split()[:2] == [str(n), "committed"] for n in range(1, 21) for line in said.splitlines()) == 20
    ElementTree.fromstring((tmp_path / "curve.svg").read_text())  # noqa: S314 - our own
    assert outcome.complete
    assert outcome.findings == []
    curve = rows(
        tmp_path / "rounds.sqlite", "SELECT round, status, accuracy, clients, samples FROM store ORDER BY round"
    )
    total = sum(map(len, data))
    assert [row[:2] + row[3:] for row in curve] == [(i, "committed", 3, total) for i in range(1, 21)]
    assert curve[-1][2] > 0.7 > 0.5 > curve[0][2], "no client has more than four classes"
    assert norm(minus(last_model(tmp_path / "state"), loop(data, 20))) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("iid", [True, False], ids=["iid", "two-classes"])
def test_ten_client_processes_give_the_weights_of_the_plain_loop(iid: bool, tmp_path: Path) -> None:
    data = parts(tmp_path, 10, iid=iid)
    outcome = run(topology(tmp_path, [len(each) for each in data], rounds="20"))
    assert outcome.complete
    assert outcome.findings == []
    assert norm(minus(last_model(tmp_path / "state"), loop(data, 20))) < 1e-4


@pytest.mark.campaign
@pytest.mark.slow
def test_killed_again_and_again_it_gives_the_same_weights(tmp_path: Path) -> None:
    """The coordinator dies twenty times and clients five times; every round is counted once, and the books balance."""
    data = parts(tmp_path, 3, iid=False)
    drawn = random.Random(11)
    rounds = 150

    async def meddle(supervisor: Supervisor) -> None:
        def over(than: int) -> Callable[[], bool]:
            return lambda: counted(tmp_path / "rounds.sqlite") > than or supervisor.views["lead"].gone

        for death in range(20):
            await until(lambda: supervisor.views["lead"].state == "ready", within=30)
            await until(over(counted(tmp_path / "rounds.sqlite")), within=30)
            await asyncio.sleep(drawn.uniform(0, 0.01))  # somewhere within a round
            if supervisor.views["lead"].gone:
                raise AssertionError(f"it was over after {death} deaths")
            supervisor.kill("lead")
            if death % 4 == 0:
                supervisor.kill(f"learn-{death // 4 % 3}")
            await until(lambda: supervisor.views["lead"].state != "ready", within=30)

    path = topology(tmp_path, [len(each) for each in data], rounds=str(rounds), deadline="5s", retries="100")
    outcome = run(path, meddle=meddle, within=58)
    assert outcome.complete
    assert outcome.findings == []
    found = rows(tmp_path / "rounds.sqlite", "SELECT round, status, version FROM store ORDER BY round")
    assert len({number for number, _, _ in found}) == len(found), "each round is in the table once"
    committed = [version for _, status, version in found if status == "committed"]
    assert committed == list(range(1, rounds + 1))
    weights = last_model(tmp_path / "state")
    assert all(math.isfinite(float(np.abs(array).max())) for array in weights.values())
    if len(found) == rounds:  # no round was aborted, so the numbers of the seeds are those of the loop
        assert norm(minus(weights, loop(data, rounds))) < 1e-4


@pytest.mark.campaign
@pytest.mark.slow
def test_models_larger_than_a_message_survive_the_coordinators_death_too(tmp_path: Path) -> None:
    data = parts(tmp_path, 3, iid=False)
    path = topology(tmp_path, [len(each) for each in data], rounds="60", deadline="5s", retries="50")
    path.write_text(path.read_text().replace("layers: [64, 32, 10]", "layers: [64, 1024, 10]"))  # 308 KB

    async def kill(supervisor: Supervisor) -> None:
        for at in (5, 15, 25, 35):
            await until(lambda at=at: counted(tmp_path / "rounds.sqlite") >= at, within=30)  # type: ignore[misc] # its default
            supervisor.kill("lead")

    outcome = run(path, meddle=kill, within=55)
    assert outcome.complete
    assert outcome.findings == []
    found = rows(tmp_path / "rounds.sqlite", "SELECT version FROM store WHERE status = 'committed' ORDER BY round")
    assert [version for (version,) in found] == list(range(1, 61))
    lead = tmp_path / "state" / "lead"
    assert [path.name for path in (lead / "digits.uploads").iterdir() if path.name != "lock"] == []
    # the model, and those to go back to with the one that there is among them; no update is left
    assert len(list((lead / "digits.large").iterdir())) == 1 + 1 + 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [brokers.param("embedded"), brokers.param("mosquitto")])
def test_the_broker_dies_under_a_job_and_it_goes_on(kind: str, tmp_path: Path) -> None:
    """It forgets everything, also what was retained; the parties say it again."""
    data = parts(tmp_path, 3, iid=False)
    with brokers.started(kind, tmp_path) as broker:
        path = topology(tmp_path, [len(each) for each in data], rounds="120", deadline="5s", retries="50")
        path.write_text(path.read_text().replace("{run: embedded}", f"{{url: '{broker.url}'}}"))

        async def kill(supervisor: Supervisor) -> None:
            for at in (10, 40):
                await until(lambda at=at: counted(tmp_path / "rounds.sqlite") >= at, within=30)  # type: ignore[misc] # its default
                await asyncio.to_thread(broker.stop, kill=True)
                await asyncio.to_thread(broker.start)

        outcome = run(path, meddle=kill, within=55)
    assert outcome.complete
    assert outcome.findings == []
    assert rows(tmp_path / "rounds.sqlite", "SELECT max(version) FROM store") == [(120,)]


def test_a_job_that_runs_tells_who_is_there_and_ends_when_it_is_told(tmp_path: Path) -> None:
    data = parts(tmp_path, 2, iid=True)
    path = topology(tmp_path, [len(each) for each in data], rounds="1000000", together=True)
    heard: list[Any] = []

    async def ask(supervisor: Supervisor) -> None:
        await until(lambda: (book := supervisor.views["store"].books) is not None and book.passed > 3)
        place, (job,) = _jobs.jobs(path, tmp_path / "state", None)
        assert await _jobs.listen(place, job) == ""
        heard.append(job)
        supervisor.end()  # as --duration does: nobody waits for the end of the job

    outcome = run(path, meddle=ask)
    assert outcome.complete
    assert outcome.findings == []
    (job,) = heard
    assert {name: (client.here, client.samples) for name, client in job.clients.items()} == {
        f"learn-{k}": (True, len(data[k])) for k in range(2)
    }
    assert job.call.round > 3
    assert job.model.version >= 3
    assert job.rows


def test_messages_that_do_not_fit_are_dead_letters_and_the_others_are_learned_from(tmp_path: Path) -> None:
    data = parts(tmp_path, 1, iid=True)
    np.savez(tmp_path / "odd.npz", images=np.zeros((3, 5, 5), np.uint8), labels=np.zeros(3, np.int64))
    np.savez(tmp_path / "class.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.full(2, 12))
    path = topology(tmp_path, [len(data[0])], rounds="2")
    text = path.read_text().replace(
        "from: {camera-0: {delivery: safe}}", "from: {camera-0: &safe {delivery: safe}, odd: *safe, class: *safe}"
    )
    path.write_text(
        text
        + "  odd: {ingest: {source: arrays, path: odd.npz}}\n  class: {ingest: {source: arrays, path: class.npz}}\n"
    )
    outcome = run(path)
    assert outcome.complete
    assert outcome.findings == []
    books = outcome.nodes["learn-0"].books
    assert books is not None
    assert (books.passed, books.dead) == (len(data[0]), {"rejected": 5})
    assert rows(tmp_path / "rounds.sqlite", "SELECT samples FROM store") == [(len(data[0]),)] * 2


def test_what_was_stopped_goes_on_and_what_is_over_stays_over(tmp_path: Path) -> None:
    data = parts(tmp_path, 3, iid=False)
    path = topology(tmp_path, [len(each) for each in data], rounds="250", together=True)

    async def stop(supervisor: Supervisor) -> None:
        await until(lambda: counted(tmp_path / "rounds.sqlite") > 5)
        await supervisor.stop()

    outcome = run(path, meddle=stop)
    assert not outcome.complete
    before = rows(tmp_path / "rounds.sqlite", "SELECT count(*) FROM store")[0][0]
    assert 5 < before < 250
    assert run(path).complete
    assert rows(tmp_path / "rounds.sqlite", "SELECT count(*), max(version) FROM store") == [(250, 250)]
    assert norm(minus(last_model(tmp_path / "state"), loop(data, 250))) < 1e-4
    assert run(path).complete, "over is over: it says so again, and ends"
    assert rows(tmp_path / "rounds.sqlite", "SELECT count(*), max(version) FROM store") == [(250, 250)]


def test_the_example_knows_together_what_none_knows_alone(tmp_path: Path) -> None:
    folder = tmp_path / "federated"
    shutil.copytree(DIGITS, folder, ignore=shutil.ignore_patterns(".penstock", "*.sqlite*", "*.svg"))
    assert run(folder / "topology.yaml").complete
    command = [sys.executable, str(DIGITS / "plot.py"), "--folder", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50).stdout
    accuracy = {
        name: float(value.rstrip("%")) for name, _, value in (line.partition(": ") for line in said.splitlines())
    }
    assert accuracy.pop("together") >= 95
    assert max(accuracy.values()) < 65
    ElementTree.fromstring((folder / "accuracy.svg").read_text())  # noqa: S314 - our own


@pytest.mark.slow
def test_secure_sums_survive_kills_and_give_the_weights_of_the_plain_loop(tmp_path: Path) -> None:
    """The coordinator dies ten times, anywhere in a round; the clients, all of them in one process, twice."""
    pytest.importorskip("cryptography", reason="cryptography is not installed: no masks, no secure sums")
    data = parts(tmp_path, 4, iid=True)
    drawn = random.Random(5)
    path = topology(
        tmp_path,
        [len(each) for each in data],
        together=True,
        rounds="60",
        deadline="8s",
        retries="100",
        secure="{least: 4}",
    )

    async def meddle(supervisor: Supervisor) -> None:
        for death in range(10):
            await until(lambda: supervisor.views["lead"].state == "ready", within=30)
            before = counted(tmp_path / "rounds.sqlite")
            await until(
                lambda before=before: counted(tmp_path / "rounds.sqlite") > before or supervisor.views["lead"].gone,  # type: ignore[misc] # its default
                within=30,
            )
            await asyncio.sleep(drawn.uniform(0, 0.05))
            if supervisor.views["lead"].gone:
                raise AssertionError(f"it was over after {death} deaths")
            supervisor.kill("lead")
            if death in {3, 7}:
                supervisor.kill("learn-1")
            await until(lambda: supervisor.views["lead"].state != "ready", within=30)

    outcome = run(path, meddle=meddle, within=58)
    assert outcome.complete
    assert outcome.findings == []
    found = rows(tmp_path / "rounds.sqlite", "SELECT round, status, version, clients FROM store ORDER BY round")
    assert len({number for number, *_ in found}) == len(found), "each round is in the table once"
    committed = [(version, clients) for _, status, version, clients in found if status == "committed"]
    assert committed == [(version, 4) for version in range(1, 61)]
    if len(found) == 60:  # no round was aborted, so the numbers of the seeds are those of the loop
        assert norm(minus(last_model(tmp_path / "state"), loop(data, 60))) < 1e-4


def test_clients_with_keys_agree_on_who_is_in_a_secure_sum(tmp_path: Path) -> None:
    """What the options say reaches both sides of the sum: without the devices' keys they would refuse its terms."""
    pytest.importorskip("cryptography", reason="cryptography is not installed: no masks, no keys")
    data = parts(tmp_path, 3, iid=True)
    private = {name: bytes([number] * 32) for number, name in enumerate(("lead", "learn-0", "learn-1", "learn-2"))}
    public = {name: keyring.text_of(Signer(key).public) for name, key in private.items()}
    for name, key in private.items():
        keyring.write_private(tmp_path / f"{name}.key", key)
    (tmp_path / "devices").write_text("".join(f"learn-{k}: {public[f'learn-{k}']}\n" for k in range(3)))
    sizes = [len(each) for each in data]
    path = topology(tmp_path, sizes, rounds="2", key="lead.key", devices="devices", secure="{agreed: true}")
    text = path.read_text()
    for k in range(3):
        mine = f"key: learn-{k}.key, coordinator: '{public['lead']}', devices: devices, secure: true, "
        text = text.replace(f"learn-{k}: {{train: {{", f"learn-{k}: {{train: {{{mine}")
    path.write_text(text)
    outcome = run(path)
    assert outcome.complete
    found = rows(tmp_path / "rounds.sqlite", "SELECT status, clients FROM store ORDER BY round")
    assert found == [("committed", 3)] * 2
    assert norm(minus(last_model(tmp_path / "state"), loop(data, 2))) < 1e-4
