"""Joint learning as a user runs it: gateways, a trainer, a broker that hears all and reads nothing; killed, withdrawn, mixed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import brokers
import numpy as np
import pytest
from harness import rows, run, until

from broker.connect import connect
from nodes.cli import main
from nodes.federated import keyring
from nodes.federated.store import look
from nodes.plan import prepare
from nodes.privacy.keys import Signer
from nodes.supervisor import Supervisor
from schemas.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "federated"
NETWORK = "trainer: {mlp: {layers: [64, 32, 10], seed: 1}}"
SEEN = {"a": 542, "b": 406, "c": 400}
"""How many images each camera of the example has."""


def prepared(folder: Path) -> None:
    """Cameras' files and everybody's keys."""
    for name in SEEN:
        with np.load(EXAMPLE / f"gateway-{name}.npz") as found:
            np.savez(folder / f"{name}.npz", images=found["images"], labels=found["labels"])
    with np.load(EXAMPLE / "held_out.npz") as held:
        np.savez(folder / "held_out.npz", images=held["images"], labels=held["labels"])
    (folder / "devices").mkdir()
    for name in ("lead", *SEEN):
        signer = Signer()
        keyring.write_private(folder / f"{name}.key", signer.private())
        public = folder / "lead.pub" if name == "lead" else folder / "devices" / f"give-{name}.pub"
        public.write_text(keyring.text_of(signer.public) + "\n")


def topology(folder: Path, broker: str, lead: str, *, more: list[str] | None = None, **give: str) -> Path:
    """``give-a`` and so on, with those options, and ``lead``."""
    lines = ["topology: plant", f"brokers: {{local: {broker}}}", "nodes:"]
    for name, options in give.items():
        lines += [
            f"  camera-{name}: {{ingest: {{source: arrays, path: {name}.npz}}}}",
            f"  give-{name}: {{pool: {{job: digits, key: {name}.key, coordinator: lead.pub, {options}}}, "
            f"from: {{camera-{name}: {{delivery: safe}}}}, process: give-{name}}}",
        ]
    lines += [
        f"  lead: {{federate: {{job: digits, {NETWORK}, key: lead.key, devices: devices, {lead}}}, process: lead}}",
        "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}",
        *(more or []),
    ]
    path = folder / "plant.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def pooled(folder: Path) -> dict[str, int]:
    """Examples in the pool, by who gave them."""
    try:
        found = rows(
            folder / "state" / "lead" / "pool.sqlite",
            "SELECT substr(id, 1, instr(id, '/') - 1), count(*) FROM examples GROUP BY 1",
        )
    except sqlite3.Error:
        return {}
    return {name: count for name, count in found if count}


def gifts(folder: Path) -> dict[str, Any]:
    kept = look(folder / "state" / "lead" / "digits.pool.sqlite")[1]
    return {key.removeprefix("gift/"): value for key, value in kept.items() if key.startswith("gift/")}


async def listen(url: str, heard: list[tuple[str, bytes]]) -> None:
    """Everything that is said of the job."""
    bus = connect(url, client_id="somebody-else")
    await bus.open()
    try:
        subscription = await bus.subscribe(["plant/fed/#"])
        while True:
            deliveries = await subscription.receive()
            heard += [(delivery.topic, bytes(delivery.payload)) for delivery in deliveries]
            subscription.acknowledge(deliveries)
    finally:
        await bus.close()


ALONE = (
    "rounds: 1000, fit: {epochs: 5}, evaluate: {path: held_out.npz, scale: 1/255}, "
    "pool: {scale: 1/255, alone: {every: 200ms}}"
)


@pytest.mark.parametrize("kind", [brokers.param("embedded"), brokers.param("mosquitto")])
def test_killed_on_both_sides_all_is_there_once_and_who_listens_reads_nothing(kind: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    everything = {f"give-{name}": count for name, count in SEEN.items()}
    heard: list[tuple[str, bytes]] = []
    with brokers.started(kind, tmp_path) as broker:
        options = "consent: given, batch: 4096, linger: 200ms"
        infer = [
            "  test: {ingest: {source: arrays, path: held_out.npz, rate: 50, loop: true}}",
            f"  seen: {{infer: {{model: m.npz, job: digits, coordinator: lead.pub, scale: 1/255, "
            f"backend: {{trained: {{{NETWORK}}}}}}}, from: test}}",
            "  out: {uplink: {sink: jsonl, path: seen.jsonl}, from: seen}",
        ]
        path = topology(tmp_path, f"{{url: '{broker.url}'}}", ALONE, more=infer, a=options, b=options, c=options)

        async def meddle(supervisor: Supervisor) -> None:
            listening = asyncio.create_task(listen(broker.url, heard))
            try:
                for at, victim in ((60, "lead"), (300, "give-a"), (600, "lead"), (900, "give-b")):
                    await until(lambda at=at: sum(pooled(tmp_path).values()) >= at, within=40)  # type: ignore[misc] # its default
                    supervisor.kill(victim)
                await until(lambda: pooled(tmp_path) == everything, within=40)
                done = sum(SEEN.values())
                store = tmp_path / "state" / "lead" / "digits.sqlite"
                await until(lambda: any(row["samples"] == done for row in look(store)[0]), within=40)
                version = f'"version":"{look(store)[0][-1]["version"]}"'
                await until(lambda: version in (tmp_path / "seen.jsonl").read_text(), within=40)
                supervisor.end()
            finally:
                listening.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await listening

        outcome = run(path, meddle=meddle, within=58)
    assert outcome.complete
    assert {name: gift["examples"] for name, gift in gifts(tmp_path).items()} == everything, "each is counted once"
    found = rows(tmp_path / "rounds.sqlite", "SELECT round, accuracy, samples FROM store WHERE status = 'committed'")
    assert len({number for number, _, _ in found}) == len(found)
    assert found[-1][1:] == (pytest.approx(0.9, abs=0.1), sum(SEEN.values()))
    bus = b"\0".join(payload for _, payload in heard)
    assert len(bus) > 80_000
    assert any(topic.endswith("/up") and "/p/" in topic for topic, _ in heard)
    for name in SEEN:
        with np.load(tmp_path / f"{name}.npz") as images:
            assert not any(image.tobytes()[20:44] in bus for image in images["images"] if image[2:6].any())
    assert b"fl-examples" not in bus
    assert b"camera" not in bus, "nor whose images they are"


def test_a_gateway_that_withdraws_is_forgotten_and_the_others_stay(tmp_path: Path) -> None:
    prepared(tmp_path)
    given: dict[str, Any] = {"a": "consent: given", "b": "consent: given, part: 0.2"}
    path = topology(tmp_path, "{run: embedded}", ALONE, **given)

    async def all_given(supervisor: Supervisor) -> None:
        await until(lambda: pooled(tmp_path).get("give-a") == SEEN["a"] and "give-b" in pooled(tmp_path), within=40)
        await until(lambda: supervisor.views["give-b"].gone, within=40)
        await supervisor.stop()

    run(path, meddle=all_given)
    part = pooled(tmp_path)["give-b"]
    assert 50 < part < 120
    for name in ("camera-a", "give-a"):  # what comes from now on
        for file in (tmp_path / "state" / name).glob("journal*"):
            file.unlink()
    path = topology(tmp_path, "{run: embedded}", ALONE, **{**given, "a": "consent: withdrawn"})

    async def forgotten(supervisor: Supervisor) -> None:
        await until(lambda: "give-a" not in pooled(tmp_path), within=40)
        await until(lambda: supervisor.views["give-a"].gone, within=40)
        supervisor.end()

    assert run(path, meddle=forgotten).complete
    assert pooled(tmp_path) == {"give-b": part}
    assert gifts(tmp_path)["give-a"]["until"] > 0
    with np.load(tmp_path / "a.npz") as images:
        files = b"".join(p.read_bytes() for p in (tmp_path / "state" / "lead").rglob("*") if p.is_file())
        assert not any(image.tobytes() in files for image in images["images"])


def test_beside_the_clients_the_pool_is_one_more(tmp_path: Path) -> None:
    prepared(tmp_path)
    learn = [
        "  camera-b: {ingest: {source: arrays, path: b.npz}}",
        f"  learn-b: {{train: {{job: digits, {NETWORK}, scale: 1/255, least: {SEEN['b']}, client: give-b, key: b.key, "
        "coordinator: lead.pub}, from: {camera-b: {delivery: safe}}}",
    ]
    lead = "rounds: 5, clients: {least: 2, quorum: 2}, pool: {scale: 1/255, least: 542}"
    path = topology(tmp_path, "{run: embedded}", lead, more=learn, a="consent: given")
    outcome = run(path)
    assert outcome.complete
    assert outcome.findings == []
    found = rows(tmp_path / "rounds.sqlite", "SELECT status, clients, samples FROM store ORDER BY round")
    assert found == [("committed", 2, SEEN["a"] + SEEN["b"])] * 5


def test_plain_by_name_only(tmp_path: Path) -> None:
    prepared(tmp_path)
    path = topology(tmp_path, "{run: embedded}", ALONE.replace("rounds: 1000", "rounds: 1"), a="consent: given")
    text = path.read_text().replace("key: a.key, coordinator: lead.pub", "plain: true")
    path.write_text(
        text.replace("key: lead.key, devices: devices, ", "").replace("pool: {scale", "pool: {plain: true, scale")
    )
    assert run(path).complete
    assert pooled(tmp_path) == {"give-a": SEEN["a"]}


def test_what_a_job_that_is_over_does_not_take_any_more_holds_nobody_up(tmp_path: Path) -> None:
    prepared(tmp_path)
    once = ALONE.replace("rounds: 1000", "rounds: 1").replace("every: 200ms", "every: 1h, fresh: 30")
    path = topology(tmp_path, "{run: embedded}", once, a="consent: given, batch: 1KiB, linger: 1s")
    outcome = run(path)
    assert outcome.complete
    assert rows(tmp_path / "rounds.sqlite", "SELECT status FROM store") == [("committed",)]
    left = rows(tmp_path / "state" / "give-a" / "given.sqlite", "SELECT count(*) FROM waiting")[0][0]
    assert left + pooled(tmp_path)["give-a"] >= SEEN["a"], "what was not taken is still there"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("consent: given", "part: 0.5", "consent"),
        ("consent: given", "consent: maybe", "given"),
        ("key: a.key, ", "", "needs 'key' and 'coordinator'"),
        (", coordinator: lead.pub", "", "needs 'key' and 'coordinator'"),
        ("consent: given", "consent: given, plain: true", "there are keys: leave 'plain' out"),
        ("key: lead.key, devices: devices, ", "", "needs 'key' and 'devices'"),
        ("pool: {scale", "pool: {plain: true, scale", "leave 'plain' out"),
        ("pool: {scale", "pool: {target: number, policy: balanced, scale", "no classes to balance"),
        ("rounds: 1000", "privacy: {clip: 1, epsilon: 1}", "no updates of clients"),
        (", pool: {scale: 1/255, alone: {every: 200ms}}", "", "has no 'pool'"),
        ("devices: devices", "devices: others", "no key of 'give-a' among its devices"),
    ],
)
def test_what_is_wrong_is_said_before_it_runs(old: str, new: str, said: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.pub").write_bytes((tmp_path / "devices" / "give-b.pub").read_bytes())
    path = topology(tmp_path, "{run: embedded}", ALONE, a="consent: given")
    prepare(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        prepare(path)
    assert any(said in str(line) for line in getattr(caught.value, "lines", ())), caught.value.lines  # type: ignore[attr-defined]


def test_two_of_one_name_and_their_rights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path)
    path = topology(tmp_path, "{run: embedded}", ALONE, a="consent: given", b="consent: given")
    assert main.run(["fl", "rights", str(path)]) == 0
    said = capsys.readouterr().out
    assert "plant/fed/digits/p/give-a/up" in said
    assert "plant/fed/digits/p/+/up" in said
    path = topology(tmp_path, "{run: embedded}", ALONE, a="consent: given", b="consent: given, client: give-a")
    with pytest.raises(ConfigError) as caught:
        prepare(path)
    assert any("'give-a' already gives to the job" in str(line) for line in caught.value.lines)  # type: ignore[attr-defined]
