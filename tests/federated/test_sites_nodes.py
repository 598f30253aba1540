"""Gateways, two sites and a cloud as a user runs them: node processes, three brokers, disks; killed and cut off."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import brokers
import numpy as np
import pytest
from harness import rows, run, until
from test_federated_nodes import PLAN, TRAINER, counted, last_model, loop, parts

from broker.connect import connect
from nodes.cli import _jobs, fl, main
from nodes.drill.proxy import Link
from nodes.federated import wire
from nodes.federated.weights import minus, norm
from nodes.supervisor import Supervisor
from nodes.trainers._trainer import Examples

SITES = {"a": [0, 1], "b": [2, 3, 4]}
"""Gateways of each site."""
FIT = ", ".join(f"{key}: {value}" for key, value in PLAN.items())


def topology(folder: Path, urls: dict[str, str], data: list[Examples], *, flat: bool = False, **lead: str) -> Path:
    """``lead`` at the cloud, ``line-a`` and ``line-b``, and gateways.

    :param flat: these are clients of a job ``flat`` too, which has no sites, at the same cloud by another way.
    """
    options = {"rounds": "20", "clients": "{least: 2, quorum: 2}", "deadline": "20s", "retries": "50", **lead}
    said = ", ".join(f"{key}: {value}" for key, value in options.items())
    lines = ["topology: plant", "brokers:"]
    lines += [f"  {name}: {{url: '{url}'}}" for name, url in urls.items()]
    lines += ["hosts: {cloud: {broker: cloud}, a: {broker: a}, b: {broker: b}}", "nodes:"]
    lines += [f"  lead: {{federate: {{job: factory, {TRAINER}, fit: {{{FIT}}}, {said}}}, on: cloud}}"]
    lines += ["  store: {uplink: {sink: sqlite, path: rounds.sqlite}, from: lead, on: cloud}"]
    if flat:
        everybody = f"clients: {{least: {len(data)}, quorum: {len(data)}}}"
        everybody += f", rounds: {options['rounds']}"
        lines += [
            f"  flat: {{federate: {{job: flat, {TRAINER}, fit: {{{FIT}}}, {everybody}}}, on: cloud}}",
            "  flats: {uplink: {sink: sqlite, path: flat.sqlite}, from: flat, on: cloud}",
        ]
    for site, gateways in SITES.items():
        many = f"{{least: {len(gateways)}, quorum: {len(gateways)}}}"
        lines += [
            f"  line-{site}: {{federate: {{job: line-{site}, of: {{job: factory, broker: wan}}, {TRAINER}, clients: {many}, "
            f"deadline: 20s}}, on: {site}}}",
            f"  store-{site}: {{uplink: {{sink: sqlite, path: {site}.sqlite}}, from: line-{site}, on: {site}}}",
        ]
        for k in gateways:
            learn = f"{TRAINER}, scale: 1/255, least: {len(data[k])}"
            inputs = f"from: {{camera-{k}: {{delivery: safe}}}}, on: {site}, process: learn-{site}"
            lines += [
                f"  camera-{k}: {{ingest: {{source: arrays, path: {k}.npz}}, on: {site}, process: learn-{site}}}",
                f"  learn-{k}: {{train: {{job: line-{site}, {learn}}}, {inputs}}}",
            ]
            if flat:
                lines += [f"  flat-{k}: {{train: {{job: flat, broker: far, client: learn-{k}, {learn}}}, {inputs}}}"]
    path = folder / "plant.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


class Counting(Link):
    """Knows how many bytes went through it."""

    passed = 0

    def _due(self, now: float, last: float, size: int) -> float:
        self.passed += size
        return super()._due(now, last, size)


@contextmanager
def proxied(url: str) -> Iterator[Counting]:
    """A link in a thread of its own, so that it is there before the run and after."""
    events = asyncio.new_event_loop()
    thread = threading.Thread(target=events.run_forever)
    thread.start()
    link = Counting(url)
    asyncio.run_coroutine_threadsafe(link.__aenter__(), events).result(20)
    try:
        yield link
    finally:
        asyncio.run_coroutine_threadsafe(link.__aexit__(), events).result(20)
        events.call_soon_threadsafe(events.stop)
        thread.join(20)
        events.close()


@contextmanager
def plant(folder: Path) -> Iterator[tuple[dict[str, brokers.Broker], Callable[[str], Counting]]]:
    """Brokers of the cloud and of both sites; and further ways to the cloud."""
    with ExitStack() as stack:
        found = {
            name: stack.enter_context(brokers.started(kind, folder / f"broker-{name}"))
            for name, kind in (("cloud", "mosquitto"), ("a", "embedded"), ("b", "mosquitto"))
        }
        yield found, lambda name: stack.enter_context(proxied(found[name].url))


def retained(url: str, job: str) -> tuple[wire.Call, wire.Manifest]:
    """What stands at a broker of a job."""

    async def hear() -> tuple[wire.Call, wire.Manifest]:
        heard: dict[str, bytes] = {}
        async with connect(url, client_id="looks") as bus:
            subscription = await bus.subscribe([f"plant/fed/{job}/round", f"plant/fed/{job}/model"])
            async with asyncio.timeout(20):
                while len(heard) < 2:
                    for delivery in await subscription.receive():
                        heard[delivery.topic.rpartition("/")[2]] = bytes(delivery.payload)
        return wire.hear(wire.Call, heard["round"]), wire.hear(wire.Manifest, heard["model"])

    return asyncio.run(hear())


def lines(folder: Path, site: str) -> list[tuple[Any, ...]]:
    return rows(folder / f"{site}.sqlite", f'SELECT round, above, status, clients FROM "store-{site}" ORDER BY round')  # noqa: S608


def test_sites_come_to_the_model_of_all_gateways_with_fewer_bytes_over_the_wan(tmp_path: Path, capsys: Any) -> None:
    data = parts(tmp_path, 5, iid=False)
    with plant(tmp_path) as (there, way):
        wan, far = way("cloud"), way("cloud")
        urls = {name: broker.url for name, broker in there.items()} | {"wan": wan.url, "far": far.url}
        path = topology(tmp_path, urls, data, flat=True)
        outcome = run(path)
        assert outcome.complete
        assert outcome.findings == []
        state = tmp_path / "state"
        sites, flat = last_model(state, "lead", "factory"), last_model(state, "flat", "flat")
        assert max(float(np.abs(array - flat[name]).max()) for name, array in sites.items()) < 1e-6
        assert norm(minus(sites, loop(data, 20))) < 1e-4
        for site, gateways in SITES.items():
            assert lines(tmp_path, site) == [(n, n, "committed", len(gateways)) for n in range(1, 21)]
            call, model = retained(there[site].url, f"line-{site}")
            assert (call.phase, call.why) == (wire.OVER, "rounds")
            assert model.digest == retained(there["cloud"].url, "factory")[1].digest
        flags = ["--state", str(state)]
        capsys.readouterr()
        assert main.run(["fl", "status", str(path), "--job", "line-a", *flags]) == 0
        said = capsys.readouterr().out
        assert "part of the job factory" in said
        assert "over (rounds), round 20" in said
        assert main.run(["fl", "rounds", str(path), "--job", "line-a", *flags]) == 0
        assert "above" in capsys.readouterr().out.splitlines()[1]
        print(f"over the WAN: {far.passed:,} bytes without sites, {wan.passed:,} with")
        assert wan.passed < 0.5 * far.passed, "two sites and not five gateways"


@pytest.mark.campaign
@pytest.mark.slow
def test_a_sites_node_killed_again_and_again_gives_the_same_model(tmp_path: Path) -> None:
    data = parts(tmp_path, 5, iid=False)
    rounds = 60

    async def meddle(supervisor: Supervisor) -> None:
        for death in range(10):
            name = f"line-{'ab'[death % 2]}"
            await until(lambda name=name: supervisor.views[name].state == "ready", within=30)  # type: ignore[misc] # its default
            at = counted(tmp_path / "rounds.sqlite")
            await until(lambda at=at: counted(tmp_path / "rounds.sqlite") > at, within=30)  # type: ignore[misc] # its default
            assert not supervisor.views[name].gone, f"it was over after {death} deaths"
            supervisor.kill(name)
            await until(lambda name=name: supervisor.views[name].state != "ready", within=30)  # type: ignore[misc] # its default

    with plant(tmp_path) as (there, _):
        urls = {name: broker.url for name, broker in there.items()} | {"wan": there["cloud"].url}
        path = topology(tmp_path, urls, data, rounds=str(rounds))
        outcome = run(path, meddle=meddle)
        assert outcome.complete
        assert outcome.findings == []
    found = rows(tmp_path / "rounds.sqlite", "SELECT round, status, version FROM store ORDER BY round")
    assert [version for _, status, version in found if status == "committed"] == list(range(1, rounds + 1))
    for site in SITES:
        numbers = [number for number, *_ in lines(tmp_path, site)]
        assert len(set(numbers)) == len(numbers), "each round is in the table once"
    if all(len(each) == rounds for each in (found, *(lines(tmp_path, site) for site in SITES))):
        assert norm(minus(last_model(tmp_path / "state", "lead", "factory"), loop(data, rounds))) < 1e-4


@pytest.mark.campaign
@pytest.mark.slow
def test_the_wan_is_away_for_a_while_and_the_sites_stay(tmp_path: Path) -> None:
    data = parts(tmp_path, 5, iid=False)
    rounds = 60
    away: list[wire.Manifest] = []
    status: list[str] = []

    with plant(tmp_path) as (there, _):

        async def meddle(supervisor: Supervisor) -> None:
            for at in (8, 25):
                await until(lambda at=at: counted(tmp_path / "rounds.sqlite") >= at, within=30)  # type: ignore[misc] # its default
                await asyncio.to_thread(there["cloud"].stop, kill=True)
                supervisor.kill("line-b")  # it starts without a cloud
                away.append((await asyncio.to_thread(retained, there["a"].url, "line-a"))[1])
                _, (job,) = _jobs.jobs(path, tmp_path / "state", "line-a")
                status.append(fl._status(job, "")[1])
                await until(lambda: supervisor.views["line-b"].state != "ready", within=30)
                await until(lambda: supervisor.views["line-b"].state == "ready", within=30)
                away.append((await asyncio.to_thread(retained, there["b"].url, "line-b"))[1])
                await asyncio.to_thread(there["cloud"].start)

        urls = {name: broker.url for name, broker in there.items()} | {"wan": there["cloud"].url}
        path = topology(tmp_path, urls, data, rounds=str(rounds))
        outcome = run(path, meddle=meddle, within=58)
        assert outcome.complete
        assert outcome.findings == []
        final = retained(there["a"].url, "line-a")[1]
    assert [manifest.job for manifest in away] == ["line-a", "line-b"] * 2
    assert all(manifest.version >= 8 for manifest in away)
    assert len(status) == 2
    assert all(
        re.search(r"part of the job factory: round \d+ there, [01] of 1 rounds done for it", said) for said in status
    )
    found = rows(tmp_path / "rounds.sqlite", "SELECT version FROM store WHERE status = 'committed' ORDER BY round")
    assert [version for (version,) in found] == list(range(1, rounds + 1))
    weights, _ = wire.unpack_model(final.data, final.shapes)
    assert norm(minus(weights, last_model(tmp_path / "state", "lead", "factory"))) == 0
