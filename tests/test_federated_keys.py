"""Keys as a user has them: files, the command that makes them, what ``check`` says of them; and what is on the wire with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import brokers
import numpy as np
import pytest

from broker.connect import connect
from nodes.cli import main
from nodes.federated import keyring, wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.party import Party
from nodes.federated.rules import Rules
from nodes.federated.store import Store
from nodes.federated.trust import CLIENT, COORDINATOR, ClientTrust, CoordinatorTrust
from nodes.federated.weights import Weights, minus
from nodes.privacy.keys import Signer
from nodes.strategies.fedavg import Config, FedAvg
from nodes.trainers._trainer import Examples, Fit, Fitted
from nodes.trainers.mlp import Mlp
from schemas.errors import ConfigError

TEXT = keyring.text_of(bytes(range(32)))
OTHER = keyring.text_of(bytes(32))


def made(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """A key, made as a user makes it; gives the public one."""
    capsys.readouterr()
    assert main.run(["fl", "key", str(folder / f"{name}.key")]) == 0
    public = capsys.readouterr().out.strip()
    (folder / f"{name}.pub").write_text(public + "\n")
    return public


# -- the command ----------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "device.key"
    public = made(tmp_path, "device", capsys)
    assert path.stat().st_mode & 0o777 == 0o600
    private = path.read_text()
    assert private.startswith("ed25519-private:")
    assert keyring.public_of(public) == Signer(keyring.read_private(path)).public
    assert main.run(["fl", "key", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, path.read_text()) == ("", private)
    assert "is there already; a key is never overwritten" in err
    assert main.run(["fl", "key", "--public", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"file": str(path), "public": public}
    assert private.strip().removeprefix("ed25519-private:") not in out + err
    assert main.run(["fl", "key", "--json", str(tmp_path / "second.key")]) == 0
    assert json.loads(capsys.readouterr().out)["public"] not in {public, ""}


@pytest.mark.parametrize("name", ["no/such/folder/x.key", "."])
def test_a_key_that_cannot_be_written_or_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(["fl", "key", name]) == 2
    assert main.run(["fl", "key", "--public", name]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        keyring.write_private(tmp_path / "x.key", bytes(32))
    assert list(tmp_path.iterdir()) == []


# -- files of keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_private_key_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "x.key"
    keyring.write_private(path, bytes(32))
    assert keyring.read_private(path) == bytes(32)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"others may read \(mode {mode:04o}\): chmod 600"):
        keyring.read_private(path)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "expected ed25519:…"),
        ("hello", "expected ed25519:…"),
        ("ed25519:", "not 32 bytes"),
        ("ed25519:AAAA", "not 32 bytes"),
        (TEXT + "AAAA", "not 32 bytes"),
        ("ed25519:" + "!" * 43, "not 32 bytes"),
        ("ed25519-private:" + "A" * 43, "a private key, where a public one is wanted"),
    ],
)
def test_what_is_no_public_key(text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "x.pub").write_text(text)
    reads: list[Callable[[], bytes]] = [
        lambda: keyring.public_of(text),
        lambda: keyring.read_public(tmp_path / "x.pub"),
    ]
    for read in reads:
        with pytest.raises(ConfigError, match=wrong) as caught:
            read()
        assert "AAAAAAAA" not in str(caught.value)  # should it be a secret


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ("", "has no line NAME"),
        ("# nobody yet\n", "has no line NAME"),
        ("a\n", ":1: expected NAME"),
        (f"a: {TEXT}\nb: nothing\n", ":2: not a public key"),
        (f"a: {TEXT}\na: {OTHER}\n", "'a' is there twice"),
        (f"a: {TEXT}\nb: {TEXT}\n", "'a' and 'b' have the same key"),
        (f"A/b: {TEXT}\n", "cannot be a client's name"),
    ],
)
def test_a_table_of_devices_that_is_wrong(table: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "devices").write_text(table)
    with pytest.raises(ConfigError, match=wrong):
        keyring.read_devices(tmp_path / "devices")


def test_devices_may_be_a_folder_a_file_or_a_map(tmp_path: Path) -> None:
    expected = {"a": bytes(range(32)), "b": bytes(32)}
    (tmp_path / "table").write_text(f"# two\na: {TEXT}   # the first\n\nb: {OTHER}\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"no file NAME\.pub"):
        keyring.read_devices(folder)
    (folder / "a.pub").write_text(TEXT + "\n")
    (folder / "b.pub").write_text(OTHER)
    (folder / "README").write_text("not a key")
    assert keyring.read_devices(tmp_path / "table") == keyring.read_devices(folder) == expected
    assert keyring.named({"a": TEXT, "b": OTHER}) == expected
    (folder / "c.pub").write_text("rubbish")
    with pytest.raises(ConfigError, match=r"c\.pub: not a public key"):
        keyring.read_devices(folder)


# -- penstock check -------------------------------------------------------------------------------------------------

TRAINER = "trainer: {mlp: {layers: [4, 3], seed: 3}}"
TOPOLOGY = f"""topology: plant
nodes:
  camera: {{ingest: {{source: arrays, path: a.npz}}}}
  learn-a: {{train: {{job: belt, KEY-A coordinator: lead.pub, {TRAINER}}}, from: {{camera: {{delivery: safe}}}}}}
  learn-b: {{train: {{job: belt, key: b.key, coordinator: lead.pub, {TRAINER}}}, from: {{camera: {{delivery: safe}}}}}}
  lead: {{federate: {{job: belt, LEAD {TRAINER}}}}}
  seen: {{infer: {{model: m.npz, SEEN backend: {{trained: {{{TRAINER}}}}}}}, from: camera}}
  out: {{uplink: {{sink: jsonl, path: out.jsonl}}, from: [lead, seen]}}
"""
GOOD = {"KEY-A": "key: a.key,", "LEAD": "key: lead.key, devices: devices,", "SEEN": "job: belt, coordinator: lead.pub,"}
SECRET = "ed25519-private:" + "Zm9yYmlkZGVu" * 3 + "Zm9yYmk"


def checked(folder: Path, capsys: pytest.CaptureFixture[str], **changes: str) -> list[str]:
    text = TOPOLOGY
    for word, options in {**GOOD, **{key.replace("_", "-"): value for key, value in changes.items()}}.items():
        text = text.replace(word, options)
    (folder / "plant.yaml").write_text(text)
    capsys.readouterr()
    code = main.run(["check", str(folder / "plant.yaml")])
    out, err = capsys.readouterr()
    assert (code == 0) == (err == "")
    assert SECRET not in out + err
    return [line.removeprefix("error: ").removeprefix(str(folder) + "/") for line in err.splitlines()]


def places(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lead", "a", "b"):
        made(folder, name, capsys)
    (folder / "devices").write_text("".join(f"learn-{c}: {(folder / f'{c}.pub').read_text()}" for c in "ab"))
    np.savez(folder / "a.npz", images=np.zeros((3, 2, 2, 1), np.uint8), labels=np.zeros(3, np.int64))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"KEY_A": "key: {env: NOT_SET_HERE},"}, None),
        ({"KEY_A": "key: none.key,"}, "plant.yaml:4:37: no such file: "),
        ({"KEY_A": "key: ../x,"}, "plant.yaml:4:37: no such file: "),
        ({"KEY_A": "key: a.pub,"}, "plant.yaml:4:37: "),
        ({"KEY_A": "key: b.key,"}, "plant.yaml:4:37: not the key that 'lead' has of 'learn-a', but that of 'learn-b'"),
        ({"KEY_A": f'key: "{SECRET}",'}, "plant.yaml:4:37: a private key is never written here"),
        ({"KEY_A": f'key: {{file: "{SECRET}"}},'}, "plant.yaml:4:37: a private key is never written here"),
        ({"KEY_A": ""}, "plant.yaml:4:13: needs a 'key': 'lead' knows its devices by theirs"),
        (
            {"KEY_A": "key: a.key, client: learn-c,"},
            "plant.yaml:4:13: 'lead' has no key of 'learn-c' among its devices",
        ),
        ({"LEAD": "devices: devices,"}, "plant.yaml:6:32: needs 'key' too: clients seal their updates to it"),
        ({"LEAD": "key: lead.key, devices: nowhere,"}, "plant.yaml:6:56: no such file: "),
        (
            {"LEAD": f'key: lead.key, devices: {{learn-a: "{SECRET}"}},'},
            "plant.yaml:6:56: learn-a: a private key, where",
        ),
        ({"LEAD": "key: a.key, devices: devices,"}, "plant.yaml:4:57: not the key of 'lead', which leads the job"),
        ({"LEAD": ""}, "plant.yaml:4:57: 'lead' has no 'key', and signs nothing"),
        ({"SEEN": "coordinator: lead.pub,"}, "plant.yaml:7:32: there is no 'job' that it leads"),
        ({"SEEN": "job: belt, coordinator: lead.key,"}, "plant.yaml:7:56: "),
    ],
)
def test_check_finds_keys_that_are_wrong(
    changes: dict[str, str], wrong: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places(tmp_path, capsys)
    found = checked(tmp_path, capsys, **changes)
    if wrong is None:
        assert found == []
    else:
        assert any(line.startswith(wrong) for line in found), found


def test_a_private_key_of_another_host_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same path on each gateway, with each gateway's own key in it: here is only ours."""
    places(tmp_path, capsys)
    hosts = 'brokers: {b: {url: "mqtt://127.0.0.1:1"}}\nhosts: {top: {broker: b}, low: {broker: b}}\nnodes:\n'
    text = TOPOLOGY.replace("nodes:\n", hosts, 1)
    for word, options in {**GOOD, "KEY-A": "key: lead.key,"}.items():
        text = text.replace(word, options)
    nodes = [line for line in text.splitlines() if line.startswith("  ")]
    for line in nodes:
        text = text.replace(line, f"{line[:-1]}, on: {'top' if line.startswith('  lead') else 'low'}}}")
    (tmp_path / "plant.yaml").write_text(text)
    code = main.run(["check", str(tmp_path / "plant.yaml")])
    assert (code, capsys.readouterr().err) == (0, "")


def test_a_key_is_nowhere_but_in_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not in what describes a run, nor in what a node says when it fails."""
    places(tmp_path, capsys)
    assert checked(tmp_path, capsys) == []
    private = [(tmp_path / f"{name}.key").read_text().strip().partition(":")[2] for name in ("lead", "a", "b")]
    for words in (["graph", "plant.yaml"], ["check", "plant.yaml", "--json"], ["fl", "rights", "plant.yaml", "--json"]):
        main.run([word if word != "plant.yaml" else str(tmp_path / word) for word in words])
    out, err = capsys.readouterr()
    assert out
    assert not any(key in out + err for key in private)


# -- on the wire ----------------------------------------------------------------------------------------------------


class Tells(Mlp):
    """A trainer that tells what its updates are."""

    def __init__(self) -> None:
        super().__init__([4, 12, 3], "relu", "cross-entropy", 3)
        self.open()
        self.deltas: list[Weights] = []

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        before = self.weights()
        done = super().fit(examples, plan)
        self.deltas.append(minus(self.weights(), before))
        return done


@contextlib.asynccontextmanager
async def recorded(port: int) -> AsyncIterator[tuple[int, bytearray]]:
    """A port that leads to that one, and all bytes that pass, in both directions."""
    seen, tasks = bytearray(), set()

    async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        whole = bytearray()
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                whole += data
                sink.write(data)
                await sink.drain()
        seen.extend(whole)  # one direction of one connection in a piece
        sink.close()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", port)
        for pair in ((reader, to_there), (there, writer)):
            task = asyncio.create_task(pass_on(*pair))
            tasks.add(task)

    server = await asyncio.start_server(joined, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], seen
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def readable(deltas: list[Weights], seen: bytes) -> int:
    """How many pairs of neighbouring numbers of the updates are anywhere in those bytes, at any offset."""
    found = 0
    for delta in deltas:
        for array in delta.values():
            numbers = array.ravel()
            pairs = [numbers[i : i + 2] for i in range(len(numbers) - 1)]
            found += sum(bool(pair.all()) and pair.tobytes() in seen for pair in pairs)
    return found


@pytest.mark.parametrize("broker", [brokers.param("mosquitto"), brokers.param("embedded")])
@pytest.mark.parametrize("sizes", [{}, {"inline": 64, "chunk": 256}], ids=["inline", "blobs"])
def test_no_number_of_an_update_is_readable_on_the_wire(broker: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """All that three clients, the coordinator and a real broker send each other is recorded; the same without keys shows that the
    search finds what is there."""
    names = ("a", "b", "c")
    signers = {name: Signer() for name in ("lead", *names)}
    devices = {name: signers[name].public for name in names}

    async def job(port: int, keys: bool) -> tuple[list[Weights], bytes]:
        draw = np.random.default_rng(4)
        trainers = {name: Tells() for name in names}
        rules = Rules(job="belt", rounds=3, least=3, quorum=3, fit={"epochs": 2, "batch": 8, "rate": 0.3})
        async with recorded(port) as (there, seen):

            def party(machine: Any, name: str) -> Party:
                def bus(**more: Any) -> Any:
                    return connect(f"mqtt://127.0.0.1:{there}", client_id=f"{name}-{keys}", patience=20, **more)

                return Party(machine, Store(None), bus, f"plant-{keys}/fed/belt")

            trust = CoordinatorTrust(signers["lead"], devices) if keys else COORDINATOR
            parties = [party(Coordinator(rules, FedAvg(Config()), Tells().weights(), trust=trust, **sizes), "lead")]
            for name in names:
                examples = Examples(draw.random((24, 4), np.float32), draw.integers(0, 3, 24))
                known = ClientTrust(signers[name], signers["lead"].public) if keys else CLIENT
                client = Client(
                    "belt", name, trainers[name], lambda e=examples: e, lambda: 24, trust=known, **sizes  # type: ignore[misc]
                )  # fmt: skip
                parties.append(party(client, name))
            for each in parties:
                await each.open()
            async with asyncio.timeout(40):
                await asyncio.gather(*(each.run() for each in parties))
            for each in parties:
                await each.close()
        return [delta for trainer in trainers.values() for delta in trainer.deltas], bytes(seen)

    with brokers.started(broker, tmp_path) as there:
        sealed, seen = asyncio.run(job(there.port, True))
        plain, all_of_it = asyncio.run(job(there.port, False))
    assert len(sealed) == len(plain) == 9
    assert readable(plain, all_of_it) > 9 * 60  # of 99 numbers in each
    assert readable(sealed, seen) == 0
    assert wire.EXTRA.encode() not in seen
    assert b"update/1" in all_of_it
    assert b"update/1" not in seen
