"""Rights at the broker: with the file that ``penstock fl rights`` prints, a real mosquitto keeps the parties of a job apart, and
the job runs through."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import brokers
import numpy as np
import pytest
from harness import until

from broker.bus import Bus, Publication
from broker.connect import connect
from nodes import kinds
from nodes.cli import main
from nodes.federated import rights, wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.follower import Follower
from nodes.federated.rules import Rules
from nodes.federated.virtual import World
from nodes.infer import build
from nodes.inference import Infer
from nodes.operator import Context
from nodes.strategies.fedavg import Config, FedAvg
from nodes.trainers._trainer import Examples
from nodes.trainers.mlp import Mlp
from schemas.errors import DeniedError, PublishFailedError
from schemas.topics import matches

TRAINER = "trainer: {mlp: {layers: [4, 3], seed: 3}}"
ROOT = "plant/fed/belt"
PARTIES = ("lead", "learn-a", "learn-b", "seen")
NEEDS_MOSQUITTO = [brokers.param("mosquitto")]


def everything(folder: Path) -> Path:
    """All parties in one file: what an administrator gives to ``penstock fl rights``."""
    path = folder / "plant.yaml"
    path.write_text(
        f"""topology: plant
nodes:
  camera: {{ingest: {{source: arrays, path: a.npz}}}}
  learn-a: {{train: {{job: belt, {TRAINER}}}, from: {{camera: {{delivery: safe}}}}}}
  learn-b: {{train: {{job: belt, {TRAINER}}}, from: {{camera: {{delivery: safe}}}}}}
  lead: {{federate: {{job: belt, {TRAINER}}}}}
  seen: {{infer: {{model: belt.npz, job: belt, backend: {{trained: {{{TRAINER}}}}}}}, from: camera}}
  out: {{uplink: {{sink: jsonl, path: out.jsonl}}, from: [seen, lead]}}
"""
    )
    return path


def data(folder: Path, name: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, 40)
    images = (draw.random((40, 2, 2, 1)) * 40 + 60 * np.eye(4)[labels].reshape(-1, 2, 2, 1)).astype(np.uint8)
    np.savez(folder / f"{name}.npz", images=images, labels=labels)


@contextmanager
def guarded(folder: Path, acl: str) -> Iterator[brokers.Broker]:
    """A mosquitto that asks for passwords; each user's is its name reversed. ``root`` may do everything."""
    (folder / "acl").write_text(acl + "\nuser root\ntopic readwrite #\n")
    for n, user in enumerate([*PARTIES, "anna", "root"]):
        command = ["mosquitto_passwd", "-b", *(["-c"] if n == 0 else []), str(folder / "users"), user, user[::-1]]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": brokers.PATH})
    for name in ("acl", "users"):
        (folder / name).chmod(0o600)
    broker = brokers.Mosquitto(folder / "mosquitto")
    broker.access = ("allow_anonymous false", f"acl_file {folder / 'acl'}", f"password_file {folder / 'users'}")
    try:
        yield broker.start()
    finally:
        broker.stop(kill=True)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main.run(["fl", "rights", *words]) == 0
    return capsys.readouterr().out


async def entered(url: str, user: str) -> Bus:
    bus = connect(url, client_id=f"as-{user}", user=user, password=user[::-1], patience=20)
    await bus.open()
    return bus


TOPICS = [
    f"{ROOT}/{topic}"
    for topic in (
        "round", "model", "blob/0123", "r/7/roster",
        *(f"c/{client}/{what}" for client in ("learn-a", "learn-b", "seen-model", "lead", "x")
          for what in ("state", "up", "offer", "blob", "need", "ask", "ack", "have", "keys", "part", "inbox")),
    )
] + ["plant/fed/other/c/learn-a/up", "plant/lead/out/lead", "other/fed/belt/round"]  # fmt: skip
FILTERS = [
    *TOPICS,
    "#",
    "+/fed/#",
    f"{ROOT}/#",
    f"{ROOT}/c/+/up",
    f"{ROOT}/c/+/blob",
    f"{ROOT}/c/learn-a/#",
    f"{ROOT}/blob/+",
]


async def heard_by(url: str, user: str) -> set[str]:
    """The topics of which that user gets anything, whatever he subscribes to."""
    root = await entered(url, "root")
    bus = await entered(url, user)
    subscriptions = []
    for pattern in FILTERS:
        with suppress(DeniedError):  # as it may be; what counts is what is delivered
            subscriptions.append(await bus.subscribe([pattern], qos=1))
    got: set[str] = set()
    ends: set[str] = set()

    async def listen(subscription: Any) -> None:
        while True:
            for delivery in await subscription.receive():
                (ends if bytes(delivery.payload) == b"end" else got).add(delivery.topic)

    tasks = [asyncio.create_task(listen(each)) for each in subscriptions]
    await (await root.publish([Publication(topic, b"secret", 1) for topic in TOPICS]))
    await (await root.publish([Publication(f"{ROOT}/{topic}", b"end", 1) for topic in ("round", "model")]))
    await until(lambda: bool(ends))  # from one publisher, in order: what came before is there
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await bus.close()
    await root.close()
    return got


async def said_by(url: str, user: str) -> set[str]:
    """The topics on which something that user says is delivered."""
    root = await entered(url, "root")
    subscription = await root.subscribe(["#"], qos=1)
    for topic in TOPICS:  # each on a connection of its own: this broker ends that of who says what he may not
        bus = await entered(url, user)
        with suppress(PublishFailedError):
            await (await bus.publish([Publication(topic, user.encode(), 1)]))
        await bus.close()
    await (await root.publish([Publication("end", b"end", 1)]))
    got: set[str] = set()
    async with asyncio.timeout(20):
        while "end" not in got:
            got |= {d.topic for d in await subscription.receive() if bytes(d.payload) in {b"end", user.encode()}}
    await root.close()
    return got - {"end"}


@pytest.mark.parametrize("broker", NEEDS_MOSQUITTO)
def test_nobody_hears_or_says_more_than_he_may(broker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del broker
    data(tmp_path, "a", 1)
    path = str(everything(tmp_path))
    acl = printed(capsys, path, "--mosquitto", "--reader", "anna")
    said = {each["user"]: each for each in json.loads(printed(capsys, path, "--json", "--reader", "anna"))}
    assert {user: each["role"] for user, each in said.items()} == {
        "lead": "coordinator", "learn-a": "client", "learn-b": "client", "seen": "follower", "anna": "reader",
    }  # fmt: skip

    async def scenario(url: str) -> dict[str, tuple[set[str], set[str]]]:
        return {user: (await heard_by(url, user), await said_by(url, user)) for user in said}

    with guarded(tmp_path, acl) as there:
        seen = asyncio.run(scenario(there.url))
    for user, (heard, says) in seen.items():
        for found, right in ((heard, "subscribe"), (says, "publish")):
            assert found == {t for t in TOPICS if any(matches(f, t) for f in said[user][right])}, (user, right)
    for user in ("learn-a", "seen", "anna"):  # in words, should the table itself be wrong
        assert not {t for t in seen[user][0] if "/c/learn-b/" in t and not t.endswith("/state")}
        assert not {t for t in seen[user][1] if not t.startswith((f"{ROOT}/c/{user}/", f"{ROOT}/c/seen-model/"))}
    assert f"{ROOT}/c/learn-b/state" not in seen["learn-a"][0]
    assert {f"{ROOT}/c/learn-a/up", f"{ROOT}/c/learn-b/up"} <= seen["lead"][0]


# -- and the job runs -----------------------------------------------------------------------------------------------


def site(folder: Path, url: str, user: str, nodes: str) -> Path:
    """A party's own file, in a folder of its own: its edges on a broker of its own, the job at the guarded one."""
    here = folder / user
    here.mkdir()
    (here / "password").write_text(user[::-1])
    text = f"""topology: plant
brokers:
  local: {{run: embedded}}
  site: {{url: "{url}", user: {user}, password: {{file: password}}}}
hosts: {{here: {{broker: local}}}}
nodes:
{nodes}"""
    path = here / "plant.yaml"
    path.write_text(text)
    return path


def begun(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as told:
        return subprocess.Popen(command, stdout=told, stderr=told)


@pytest.mark.parametrize("broker", NEEDS_MOSQUITTO)
def test_a_job_runs_through_under_them_with_keys(
    broker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each party is a run of its own, with processes of its own, that logs in with its own name and has its own key."""
    del broker
    data(tmp_path, "a", 1)
    acl = printed(capsys, str(everything(tmp_path)), "--mosquitto")
    public = {}
    for party in ("lead", "learn-a", "learn-b"):
        assert main.run(["fl", "key", str(tmp_path / f"{party}.key")]) == 0
        public[party] = capsys.readouterr().out.strip()
    (tmp_path / "devices").write_text("".join(f"{name}: {public[name]}\n" for name in ("learn-a", "learn-b")))

    def learner(url: str, name: str, seed: int) -> Path:
        keys = f'key: ../{name}.key, coordinator: "{public["lead"]}"'
        path = site(tmp_path, url, name, (
            "  camera: {ingest: {source: arrays, path: seen.npz}}\n"
            f"  {name}: {{train: {{job: belt, {TRAINER}, broker: site, scale: 1/255, least: 40, {keys}}}, "
            "from: {camera: {delivery: safe}}}\n"
        ))  # fmt: skip
        data(path.parent, "seen", seed)
        return path

    def leader(url: str) -> Path:
        return site(tmp_path, url, "lead", (
            f"  lead: {{federate: {{job: belt, {TRAINER}, broker: site, rounds: 5, clients: {{least: 2, quorum: 2}}, "
            "key: ../lead.key, devices: ../devices}}\n"
            "  out: {uplink: {sink: jsonl, path: rounds.jsonl}, from: lead}\n"
        ))  # fmt: skip

    async def follow(url: str) -> str:
        options = {"model": "belt.npz", "job": "belt", "coordinator": public["lead"]}
        config = kinds.module("node", "infer").Config.model_validate(
            {**options, "backend": {"trained": {"trainer": {"mlp": {"layers": [4, 3]}}}}}
        )
        context = Context("plant", "seen", tmp_path, tmp_path / "state" / "seen", broker="site", brokers={"site": url},
                          credentials={"site": {"user": "seen", "password": "nees"}})  # fmt: skip
        infer = build(config, context)
        assert isinstance(infer, Infer)
        infer.open()
        task = asyncio.create_task(infer.beside())
        await until(lambda: infer.model.version == "5" or task.done(), within=40)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        infer.close()
        return infer.model.version

    with guarded(tmp_path, acl) as there:
        paths = [leader(there.url), learner(there.url, "learn-a", 1), learner(there.url, "learn-b", 2)]
        command = [sys.executable, "-m", "nodes.cli.main", "run"]
        runs = [begun([*command, str(path)], path.parent / "log") for path in paths]
        try:
            version = asyncio.run(follow(there.url))
            codes = [process.wait(60) for process in runs]
        finally:
            for process in runs:
                process.kill()
                process.wait(20)
        told = printed_status(paths[0], capsys)
    logs = [(path.parent / "log").read_text() for path in paths]
    assert (codes, version) == ([0, 0, 0], "5"), logs
    assert not any("not published" in text or "not believed" in text or "passed over" in text for text in logs), logs
    rows = [json.loads(line)["body"]["columns"] for line in (paths[0].parent / "rounds.jsonl").read_text().splitlines()]
    assert [row["clients"] for row in rows] == [[2]] * 5
    assert told["phase"] == "over"
    assert (told["passed_over"], len(told["clients"])) == (0, 2)


def printed_status(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main.run(["fl", "status", str(path), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    return dict(told)


# -- the table itself -----------------------------------------------------------------------------------------------


def test_the_table_has_all_that_the_machines_say_and_hear() -> None:
    said: dict[str, set[str]] = {}
    world = World(tap=lambda peer, say: said.setdefault(peer.name, set()).add(say.topic))
    sizes: dict[str, Any] = {"inline": 64, "chunk": 256}
    examples = Examples(np.eye(4, dtype=np.float32).repeat(9, 0), np.array([0, 1, 2, 1]).repeat(9))

    def trainer() -> Mlp:
        made = Mlp([4, 300, 3], "relu", "cross-entropy", 3)
        made.open()
        return made

    def learner() -> Client:
        return Client("belt", "learn-a", trainer(), lambda: examples, lambda: len(examples), **sizes)

    rules = Rules(job="belt", rounds=3, least=1, quorum=1)
    lead = world.add("lead", lambda: Coordinator(rules, FedAvg(Config()), trainer().weights(), **sizes))
    client = world.add("learn-a", learner)
    world.add("seen", lambda: Follower("belt", "seen-model", lambda manifest, weights: None), at=1.0)
    world.after(0.5, world.kill, client)
    world.after(0.6, world.begin, client)
    assert world.run(lambda: lead.over, seconds=1000)
    for name, (publish, subscribe), machine in (
        ("lead", rights.coordinator(), Coordinator(rules, FedAvg(Config()), trainer().weights())),
        ("learn-a", rights.client("learn-a"), learner()),
        ("seen", rights.follower("seen-model"), Follower("belt", "seen-model", lambda manifest, weights: None)),
    ):
        assert {topic for topic in said.get(name, set()) if not any(matches(f, topic) for f in publish)} == set()
        assert sorted(machine.filters()) == sorted(subscribe)
    assert {topic.rpartition("/")[2] for topic in said["learn-a"]} >= {"state", "offer", "blob", "need"}


def test_users_of_the_topology_are_the_brokers_and_one_for_several_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data(tmp_path, "a", 1)
    path = everything(tmp_path)
    text = path.read_text().replace(
        "nodes:\n",
        'brokers: {site: {url: "mqtt://127.0.0.1:1", user: plant-user, password: {env: NONE_SUCH}}}\nnodes:\n',
        1,
    )
    path.write_text(text)
    assert main.run(["fl", "rights", str(path), "--mosquitto"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("user ")] == ["user plant-user"]
    assert "lead, learn-a, learn-b, seen log in as the same user 'plant-user'" in err
    assert main.run(["fl", "rights", str(path), "--job", "blet"]) == 2
    assert "there is no job 'blet'; did you mean 'belt'?" in capsys.readouterr().err
    assert main.run(["fl", "rights", str(path), "--mosquitto", "--reader", "a\nuser root"]) == 2
    assert "cannot be a user in mosquitto's file" in capsys.readouterr().err


# -- what penstock fl believes --------------------------------------------------------------------------------------


def test_status_passes_over_what_the_leader_did_not_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nodes.federated import keyring
    from nodes.federated.identity import Leader
    from nodes.federated.trust import CoordinatorTrust
    from nodes.privacy.keys import Signer

    signer = Signer()
    lead = Leader("belt", CoordinatorTrust(signer))
    false = wire.say(wire.Call("belt", 5, 9, 99, wire.COLLECTING, ""))
    true = lead.say("round", wire.say(wire.Call("belt", 5, 6, 7, wire.IDLE, "")))
    model = wire.say(wire.Manifest("belt", 5, 9, 99, 98, "d", "b", 1, ()))

    async def put(url: str, *said: tuple[str, bytes]) -> None:
        bus = connect(url, client_id="anybody")
        await bus.open()
        await (await bus.publish([Publication(f"{ROOT}/{topic}", payload, 1, True) for topic, payload in said]))
        await bus.close()

    with brokers.started("embedded", tmp_path) as there:
        data(tmp_path, "a", 1)
        path = everything(tmp_path)
        path.write_text(path.read_text().replace("nodes:\n", f'brokers: {{b: {{url: "{there.url}"}}}}\nnodes:\n', 1))
        asyncio.run(put(there.url, ("round", false), ("model", model)))
        assert printed_status(path, capsys)["round"] == 99  # without a key all is believed
        key = keyring.text_of(signer.public)
        assert main.run(["fl", "status", str(path), "--coordinator", key]) == 0
        said = capsys.readouterr().out
        assert "nothing is heard of it" in said
        assert "2 messages passed over: not signed by those whose keys are known here" in said
        asyncio.run(put(there.url, ("round", true)))
        assert main.run(["fl", "status", str(path), "--coordinator", key, "--json"]) == 0
        [told] = json.loads(capsys.readouterr().out)
        assert (told["round"], told["version"], told["passed_over"]) == (7, None, 1)
