"""The benchmark of learning at a small scale: bytes as the broker gets them, and the order of asynchronous and synchronous.

With a client that is killed in between: what its compressor owes is on its disk.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import brokers
import numpy as np
import pytest
from harness import rows, run, until

from benchmarks import wire_count
from benchmarks.workloads import federated_learning as bench
from nodes.federated.store import Store
from nodes.federated.weights import norm
from nodes.federated.wire import arrays
from nodes.supervisor import Supervisor

pytestmark = pytest.mark.campaign

MOSQUITTO = brokers.param("mosquitto")


def packet(kind: int, rest: bytes) -> bytes:
    assert len(rest) < 128
    return bytes([kind << 4, len(rest)]) + rest


def test_the_count_knows_packets_clients_and_aliases() -> None:
    count = wire_count.Count()
    stream = wire_count._Stream(count)
    connect = packet(1, b"\x00\x04MQTT\x05\x02\x00\x1e" + b"\x00" + b"\x00\x01a")
    named = packet(3, b"\x00\x04x/up" + b"\x03\x23\x00\x07" + b"12345")
    by_alias = packet(3, b"\x00\x00" + b"\x03\x23\x00\x07" + b"123")
    plain = packet(3, b"\x00\x07x/state" + b"\x00" + b"1")
    every = connect + named + by_alias + plain + packet(4, b"\x00\x01")
    for at in range(len(every)):  # byte by byte
        stream.feed(every[at : at + 1])
    sent = count.of("a")
    assert sent.total == len(every)
    assert sent.bytes["publish (up)"] == len(named) + len(by_alias)
    assert sent.packets == {"connect": 1, "publish (up)": 2, "publish (state)": 1, "puback": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MOSQUITTO])
def test_compressed_updates_take_the_share_of_bytes_that_they_may(kind: str) -> None:
    """To a goal that is reached soon; to 95 %: ``make bench NAME=federated_learning``."""
    del kind
    seen = {compress: bench.compressed(compress, 0.7) for compress in ("", "int8", "{top-k: {fraction: 0.01}}")}
    plain = seen.pop("")
    for learned, most in zip(seen.values(), (1 / 4, 1 / 50), strict=True):
        assert learned.accuracy >= 0.7
        assert learned.sent.packets["publish (up)"] == bench.CLIENTS * learned.rounds
        assert learned.sent.total / learned.rounds < most * plain.sent.total / plain.rounds


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MOSQUITTO])
def test_asynchronously_it_is_learned_sooner_where_speeds_differ(kind: str) -> None:
    del kind
    paces = [0.01] * 8 + [0.2] * 2
    slow, fast = (bench.paced(buffer, 0.85, paces) for buffer in (None, bench.BUFFER))
    assert fast.seconds < slow.seconds
    assert slow.seconds > 0.2 * slow.rounds, "a round waits for the slowest"


@pytest.mark.slow
def test_what_a_compressor_owes_outlives_its_client(tmp_path: Path) -> None:
    """Killed after some rounds, it goes on with its residual, and at the end owes what an undisturbed run's client owes."""
    owed = {}
    for deaths in (0, 3):
        folder = tmp_path / str(deaths)
        folder.mkdir()
        lines = ["topology: plant", "nodes:"]
        trainer = "trainer: {mlp: {layers: [64, 32, 10], seed: 1}}"
        for k, (images, labels) in enumerate(bench.parts(alike=False)[:2]):
            np.savez(folder / f"{k}.npz", images=images, labels=labels)
            lines += [
                f"  camera-{k}: {{ingest: {{source: arrays, path: {k}.npz}}, process: cameras}}",
                f"  learn-{k}: {{train: {{job: owes, {trainer}, scale: 1/255, least: {len(labels)}}}, "
                f"from: {{camera-{k}: {{delivery: safe}}}}}}",
            ]
        lines += [
            f"  lead: {{federate: {{job: owes, {trainer}, rounds: 30, compress: {{top-k: {{fraction: 0.01}}}}, "
            "clients: {least: 2, quorum: 2}, deadline: 30s}}",
            "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}",
        ]
        path = folder / "plant.yaml"
        path.write_text("\n".join(lines) + "\n")

        async def kill(supervisor: Supervisor, folder: Path = folder, deaths: int = deaths) -> None:
            def made() -> int:
                try:
                    return int(rows(folder / "rounds.sqlite", "SELECT count(*) FROM store")[0][0])
                except Exception:  # noqa: BLE001 - there is no table yet
                    return 0

            for death in range(deaths):
                await until(lambda death=death: made() >= 5 * death + 3, within=30)  # type: ignore[misc] # its default
                supervisor.kill("learn-0")
                await asyncio.sleep(0)

        outcome = run(path, meddle=kill)
        assert outcome.complete
        assert outcome.nodes["learn-0"].restarts == deaths
        assert rows(folder / "rounds.sqlite", "SELECT count(*), min(clients) FROM store") == [(30, 2)]
        store = Store(folder / "state" / "learn-0" / "owes.sqlite")
        owed[deaths] = arrays(store.kept()["sent"]["memory"]["residual"])
        store.close()
    assert norm(owed[0]) > 0.1
    for name, array in owed[0].items():
        np.testing.assert_allclose(owed[3][name], array, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is told on Linux only")
def test_a_client_with_a_model_of_megabytes_stays_small(tmp_path: Path) -> None:
    """4.8 MB; its process had 86 MB when what a round needs for a moment stayed with it."""
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "0.npz", images=rng.integers(0, 255, (8, 784), dtype=np.uint8), labels=np.arange(8))
    trainer = "trainer: {mlp: {layers: [784, 1216, 200, 10]}}"
    path = tmp_path / "plant.yaml"
    path.write_text(
        "topology: plant\nnodes:\n"
        "  camera: {ingest: {source: arrays, path: 0.npz}, process: camera}\n"
        f"  learn: {{train: {{job: large, {trainer}, scale: 1/255, least: 8}}, from: {{camera: {{delivery: safe}}}}}}\n"
        f"  lead: {{federate: {{job: large, {trainer}, rounds: 8, deadline: 30s}}}}\n"
        "  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead}\n"
    )
    outcome = run(path)
    assert outcome.complete
    assert rows(tmp_path / "rounds.sqlite", "SELECT count(*), min(clients) FROM store") == [(8, 1)]
    assert 20e6 < outcome.nodes["learn"].rss < 75e6
