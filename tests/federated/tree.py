"""A cloud, sites and gateways as machines on one virtual bus; and what must be true of their models, whatever happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
from job_site import PLAN, Mean, Softmax, name, parts

from nodes.compressors._compressor import Compressor
from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.machine import Answer, Machine, Say
from nodes.federated.rules import Rules
from nodes.federated.site import Site, client
from nodes.federated.told import Told, endless
from nodes.federated.virtual import Fault, Link, Peer, World
from nodes.federated.weights import Weights, digest, shapes
from nodes.strategies._strategy import Strategy
from nodes.trainers._trainer import Examples
from schemas.messages import Update

TOP = Rules(job="factory", rounds=3, least=2, quorum=2, fit=PLAN, deadline=60, grace=5)


class Placed(Machine):
    """A machine whose topics are somewhere below the one bus that there is."""

    def __init__(self, machine: Machine, places: Mapping[str, str]) -> None:
        self.machine, self.places = machine, places

    def _out(self, topic: str) -> str:
        here = max((prefix for prefix in self.places if topic.startswith(prefix)), key=len)
        return self.places[here] + topic[len(here) :]

    def _in(self, topic: str) -> str:
        prefix, there = next((p, t) for p, t in self.places.items() if topic.startswith(t))
        return prefix + topic[len(there) :]

    def _answer(self, answer: Answer) -> Answer:
        answer.say = [self._say(say) for say in answer.say]
        return answer

    def _say(self, say: Say) -> Say:
        return Say(self._out(say.topic), say.payload, say.retain, say.expiry)

    def filters(self) -> tuple[str, ...]:
        return tuple(self._out(topic) for topic in self.machine.filters())

    def will(self) -> Say | None:
        last = self.machine.will()
        return None if last is None else self._say(last)

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        return self._answer(self.machine.start(kept, now))

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        return self._answer(self.machine.heard(self._in(topic), payload, now))

    def worked(self, name: str, result: Any, now: int) -> Answer:
        return self._answer(self.machine.worked(name, result, now))

    def linked(self, now: int) -> Answer:
        answer = self._answer(self.machine.linked(now))
        if isinstance(self.machine, Site):
            more = self._answer(self.machine.linked_above(now))
            answer.say += more.say
            answer.commit.update(more.commit)
            answer.work = answer.work or more.work
        return answer

    def wake(self) -> int | None:
        return self.machine.wake()

    def tick(self, now: int) -> Answer:
        return self._answer(self.machine.tick(now))


@dataclass
class Tree:
    """A cloud, sites, and gateways with data below each; all in one world.

    :param whole: a site's quorum is all of its gateways.
    :param train: seconds that a gateway's training takes; ``works``: (who, which work) → seconds of others.
    """

    sites: list[list[Examples]]
    top: Rules = TOP
    rules: Rules = Rules(job="line", quorum=1, deadline=30, grace=2)  # noqa: RUF009 - frozen
    rounds: int = 1
    strategy: Callable[[], Strategy] = Mean
    strategy_below: Callable[[], Strategy] = Mean
    compressor: Compressor | None = None
    link: Link = field(default_factory=lambda: Link(0.01))
    faults: dict[str, Fault] = field(default_factory=dict)
    whole: bool = True
    train: float = 1.0
    works: dict[tuple[str, str], float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.heard: list[tuple[str, Say]] = []
        self.machines: dict[str, Machine] = {}
        self.world = World(self.seed, lambda peer, say: self.heard.append((peer.name, say)))
        self.cloud = self.add("cloud", self._cloud, {"": "factory/"})
        self.peers: list[Peer] = []
        self.gateways: list[list[Peer]] = []
        first = 0
        for k, data in enumerate(self.sites):
            places = {"above/": "factory/", "": f"line-{k}/"}
            self.peers.append(self.add(f"site-{k}", partial(self._site, k), places))
            self.gateways.append([self._gateway(k, first + i, each) for i, each in enumerate(data)])
            first += len(data)

    def add(self, who: str, make: Callable[[], Machine], places: Mapping[str, str]) -> Peer:
        def placed() -> Machine:
            self.machines[who] = make()
            return Placed(self.machines[who], places)

        def took(machine: Machine, work: str) -> float:
            return self.train if who.startswith("c0") and work == "fit" else self.works.get((who, work), 0.0)

        return self.world.add(who, placed, link=self.link, took=took, fault=self.faults.get(who))

    def _cloud(self) -> Machine:
        return Coordinator(self.top, self.strategy(), Softmax().weights(), compressor=self.compressor)

    def _site(self, k: int) -> Machine:
        quorum = len(self.sites[k]) if self.whole else self.rules.quorum
        rules = endless(replace(self.rules, job=f"line-{k}", least=quorum, quorum=quorum), {})
        below = Told(rules, self.strategy_below(), Softmax().weights())
        return Site(below, client("factory", f"s{k}", lambda spec: self.compressor), self.rounds)

    def _gateway(self, k: int, number: int, data: Examples) -> Peer:
        def make() -> Machine:
            return Client(f"line-{k}", name(number), Softmax(), lambda: data, lambda: len(data))

        return self.add(name(number), make, {"": f"line-{k}/"})

    def run(self, seconds: float = 1e5) -> bool:
        return self.world.run(lambda: all(peer.over for peer in self.world.peers.values()), seconds=seconds)

    def model(self, peer: Peer) -> Weights:
        kept = msgspec.msgpack.decode(peer.disk["model"])["data"]
        return wire.unpack_model(kept, shapes(Softmax().weights()))[0]

    def rows(self, peer: Peer) -> list[dict[str, Any]]:
        """Of each round once."""
        return list({row["round"]: row for row in peer.rows}.values())

    def updates(self) -> dict[tuple[int, str], Update]:
        """Those that sites sent up."""
        found = [
            wire.unpack_update(say.payload)[1]
            for _, say in self.heard
            if say.topic.startswith("factory/") and say.topic.endswith("/up")
        ]
        return {(body.round, body.client): body for body in found}


def two_sites() -> list[list[Examples]]:
    data = parts(5)
    return [data[:2], data[2:]]


def audit(tree: Tree) -> None:
    """Every update that a site sent is made of those that its gateways sent for that round of the job above, each once; and
    every model of the job above of those.
    """
    models: dict[str, dict[int, Weights]] = {}
    makers: dict[str, dict[int, int]] = {}
    sent: dict[str, dict[tuple[int, str], bytes]] = {}
    taken: dict[str, dict[int, set[str]]] = {}
    for who, say in tree.heard:
        job, *topic = say.topic.split("/")
        if topic == ["model"]:
            manifest = wire.hear(wire.Manifest, say.payload)
            weights, _ = wire.unpack_model(manifest.data, manifest.shapes)
            known = models.setdefault(job, {}).setdefault(manifest.version, weights)
            assert wire.pack_model(known, {}) == wire.pack_model(weights, {}), "a version has one model"
            makers.setdefault(job, {})[manifest.version] = manifest.round
        elif topic[-1] == "up":
            body = wire.unpack_update(say.payload)[1]
            known_bytes = sent.setdefault(job, {}).setdefault((body.round, topic[1]), say.payload)
            assert known_bytes == say.payload, f"{who} made one update for one round"
        elif topic[-1] == "ack":
            ack = wire.hear(wire.Ack, say.payload)
            if ack.status == wire.TAKEN:
                taken.setdefault(job, {}).setdefault(ack.round, set()).add(topic[1])
    for job, versions in models.items():
        for version, number in makers[job].items():
            if not number:
                continue  # what it began with, or got from above
            bodies = [wire.unpack_update(sent[job][number, who])[1] for who in sorted(taken[job][number])]
            assert {body.base for body in bodies} == {digest(versions[version - 1])[: wire.BASE]}
            total = sum(body.samples for body in bodies)
            for key, array in versions[version - 1].items():
                added = sum(body.tensors[key].astype(np.float64) * (body.samples / total) for body in bodies)
                assert np.abs(versions[version][key] - array - added).max() < 1e-6
    for k, peer in enumerate(tree.peers):
        ours = models[f"line-{k}"]
        last = {row["above"]: row["version"] for row in tree.rows(peer) if row["status"] == "committed"}
        sent_up = {number: payload for (number, who), payload in sent.get("factory", {}).items() if who == f"s{k}"}
        assert sent_up.keys() <= last.keys(), "no update without a round of its own"
        for number, payload in sent_up.items():
            body = wire.unpack_update(payload)[1]
            (base,) = (model for model in models["factory"].values() if digest(model).startswith(body.base))
            for key, array in body.tensors.items():
                assert np.abs(ours[last[number]][key] - base[key] - array).max() < 1e-6
