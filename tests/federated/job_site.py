"""What the tests of federated learning share: a small model, data in parts, and a job on a virtual bus."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from nodes.compressors._compressor import Compressor
from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.machine import Machine, Say
from nodes.federated.rules import Rules
from nodes.federated.trust import CLIENT, COORDINATOR, ClientTrust, CoordinatorTrust
from nodes.federated.uploads import Place
from nodes.federated.virtual import Fault, Link, Peer, Took, World
from nodes.federated.weights import Weights, fit, plus, shapes
from nodes.federated.wire import seed_of
from nodes.strategies._strategy import ClientUpdate, Strategy, mean
from nodes.trainers._trainer import Examples, Fit, Fitted, Trainer
from schemas.messages import Update

FEATURES, CLASSES = 40, 3


class Softmax(Trainer):
    """A linear softmax classifier by plain SGD, with everything that a plan can ask."""

    def __init__(self, features: int = FEATURES, classes: int = CLASSES) -> None:
        self._w: Weights = {
            "kernel": np.zeros((features, classes), np.float32),
            "bias": np.zeros(classes, np.float32),
        }
        self.form = shapes(self._w)
        self.fits: list[int] = []

    def open(self) -> None:
        pass

    def weights(self) -> Weights:
        return {name: array.copy() for name, array in self._w.items()}

    def load(self, weights: Weights) -> None:
        fit(weights, self.form)
        self._w = {name: array.copy() for name, array in weights.items()}

    def fit(self, examples: Examples, plan: Fit) -> Fitted:
        self.fits.append(plan.seed)
        rng = np.random.default_rng(plan.seed)
        start = self.weights()
        moved = {name: np.zeros_like(array) for name, array in self._w.items()}
        steps, losses = 0, [math.nan]
        for _ in range(plan.epochs):
            order, losses = rng.permutation(len(examples)), []
            for at in range(0, len(order), plan.batch):
                rows = order[at : at + plan.batch]
                x, y = examples.x[rows], examples.y[rows]
                p = self.predict(x)
                losses.append(float(-np.mean(np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)))))
                p[np.arange(len(y)), y] -= 1
                p /= len(y)
                for name, grad in (("kernel", x.T @ p), ("bias", p.sum(0))):
                    grad = grad + np.float32(plan.proximal) * (self._w[name] - start[name])
                    if plan.correction:
                        grad = grad + plan.correction[name]
                    moved[name] = np.float32(plan.momentum) * moved[name] + grad
                    self._w[name] = (self._w[name] - np.float32(plan.rate) * moved[name]).astype(np.float32)
                steps += 1
        return Fitted(steps, float(np.mean(losses)))

    def predict(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        z = x @ self._w["kernel"] + self._w["bias"]
        z = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(z / z.sum(1, keepdims=True), np.float32)


class Mean(Strategy):
    """FedAvg and nothing else."""

    sums = True

    def aggregate(self, model: Weights, updates: Any) -> Weights:
        return plus(model, mean(updates, [float(update.samples) for update in updates]))


def parts(clients: int, rows: int = 24, seed: int = 0) -> list[Examples]:
    """Three noisy clusters; each client sees one of them twice as often as the others."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, FEATURES)) / 3
    out = []
    for k in range(clients):
        n = rows + k % 5
        y = rng.choice([*range(CLASSES), k % CLASSES], n)
        out.append(Examples((centres[y] + rng.normal(size=(n, FEATURES))).astype(np.float32), y.astype(np.int64)))
    return out


def name(k: int) -> str:
    return f"c{k:03}"


PLAN: dict[str, Any] = {"epochs": 1, "batch": 8, "rate": 0.2}


def plain_loop(data: list[Examples], rounds: int, plan: dict[str, Any] = PLAN, seed: int = 0) -> list[Weights]:
    """FedAvg in ten lines: the model after each round."""
    trainer = Softmax()
    model, out = trainer.weights(), []
    for number in range(1, rounds + 1):
        updates = []
        for k, examples in enumerate(data):
            trainer.load(model)
            trainer.fit(examples, Fit(**plan, seed=seed_of(seed, number, name(k))))
            updates.append(({n: a - model[n] for n, a in trainer.weights().items()}, len(examples)))
        total = sum(samples for _, samples in updates)
        model = {
            n: (a + sum(delta[n].astype(np.float64) * (samples / total) for delta, samples in updates)).astype(
                np.float32
            )
            for n, a in model.items()
        }
        out.append(model)
    return out


class Deaths:
    """Dies at the points of those numbers, counted from 0, and is back after so many seconds."""

    def __init__(self, at: Iterable[int] = (), back: float = 0.5) -> None:
        self.at, self.back, self.points = set(at), back, 0
        self.where: list[str] = []

    def __call__(self, point: str, what: str) -> float | None:
        self.points += 1
        self.where.append(f"{point} {what}")
        return self.back if self.points - 1 in self.at else None


@dataclass
class Site:
    """A job on a virtual bus: ``lead`` and its clients."""

    rules: Rules
    data: list[Examples]
    seed: int = 0
    strategy: Callable[[], Strategy] = Mean
    compressor: Compressor | None = None
    evaluate: Callable[[Weights], dict[str, float]] | None = None
    link: Link = field(default_factory=lambda: Link(0.01))
    took: Took = lambda machine, work: 1.0 if work == "fit" else 0.0
    fault: Fault | None = None
    client_faults: dict[str, Fault] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    heard: list[tuple[str, Say]] = field(default_factory=list)
    trainer: Callable[[], Softmax] = Softmax
    place: Callable[[], Place] = Place
    sizes: dict[str, Any] = field(default_factory=dict)
    lead_trust: CoordinatorTrust = COORDINATOR
    client_trust: Callable[[str], ClientTrust] = lambda _: CLIENT

    def __post_init__(self) -> None:
        self.commits: list[dict[str, Any]] = []
        self.leads: list[Coordinator] = []
        self.world = World(self.seed, lambda peer, say: self.heard.append((peer.name, say)), self._witness)
        self.trainers: dict[str, list[Softmax]] = {}
        self.lead = self.world.add("lead", self.coordinator, link=self.link, took=self.took, fault=self.fault)
        self.clients = [self.client(k) for k in range(len(self.data))]

    def _witness(self, peer: Peer, commit: dict[str, Any]) -> None:
        if peer.name == "lead":
            self.commits.append(dict(commit))

    def coordinator(self) -> Coordinator:
        lead = Coordinator(
            self.rules,
            self.strategy(),
            Softmax().weights(),
            compressor=self.compressor,
            evaluate=self.evaluate,
            place=self.place(),
            trust=self.lead_trust,
            **self.sizes,
        )
        self.leads.append(lead)
        return lead

    def client(self, k: int) -> Peer:
        examples = self.data[k]

        def make() -> Machine:
            trainer = self.trainer()
            self.trainers.setdefault(name(k), []).append(trainer)
            return Client(
                self.rules.job,
                name(k),
                trainer,
                lambda: examples,
                lambda: len(examples),
                compressors=lambda spec: self.compressor,
                trust=self.client_trust(name(k)),
                **self.sizes,
            )

        return self.world.add(
            name(k),
            make,
            link=self.link,
            took=self.took,
            fault=self.client_faults.get(name(k)),
            at=self.starts.get(name(k), 0.0),
        )

    def fits(self, k: int) -> list[int]:
        """The seeds of all trainings of a client, in all its lives."""
        return [seed for trainer in self.trainers[name(k)] for seed in trainer.fits]

    def run(self, seconds: float = 1e5) -> bool:
        """Until the coordinator is over."""
        return self.world.run(lambda: self.lead.over, seconds=seconds)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each round that ended, in order; a row that came twice is the same twice."""
        seen: dict[int, dict[str, Any]] = {}
        for row in self.lead.rows:
            assert seen.setdefault(row["round"], row) == row or str(seen[row["round"]]) == str(row)
        return [seen[number] for number in sorted(seen)]

    @property
    def model(self) -> bytes:
        """The bytes of the model as the coordinator committed it last."""
        kept: bytes = msgspec.msgpack.decode(self.lead.disk["model"])["data"]
        return kept

    def models_by_version(self) -> dict[int, Weights]:
        """Every model that was published."""
        said = [wire.hear(wire.Manifest, say.payload) for _, say in self.heard if say.topic == "model"]
        return {manifest.version: wire.unpack_model(manifest.data, manifest.shapes)[0] for manifest in said}

    def shared(self) -> Weights:
        """What the strategy shares beside the model."""
        return wire.unpack_model(self.model, shapes(Softmax().weights()))[1]

    def replay(self, aggregate: Callable[[Weights, Any], Weights] | None) -> list[tuple[str, int]]:
        """Recompute every model that was committed from the updates that were; (client, round) of each that was used.

        :param aggregate: None: only look at who was.
        """
        updates: dict[str, bytes] = {}
        counted: list[tuple[str, int]] = []
        models: list[tuple[bytes, str]] = []
        used: list[tuple[str, int]] = []
        form = shapes(Softmax().weights())
        for commit in self.commits:
            if (made := commit.get("model")) is not None:
                if models and aggregate is not None:
                    versions = {base: version for version, (_, base) in enumerate(models)}
                    given = []
                    for client, number in counted:
                        _, body, extra = wire.unpack_update(updates[f"update/{number}/{client}"])
                        late = len(models) - 1 - versions[body.base]
                        given.append(ClientUpdate(client, body.tensors, body.samples, extra, {}, late))
                    new = aggregate(wire.unpack_model(models[-1][0], form)[0], given)
                    assert wire.pack_model(new, {}) == made["data"]
                if models:
                    used += counted
                models.append((made["data"], made["digest"]))
            updates.update(
                {key: value for key, value in commit.items() if key.startswith("update/") and value is not None}
            )
            if (held := commit.get("round")) is not None:
                counted = [(client, number) for client, number in held["counted"]]
        return used

    def bases(self) -> dict[int, Weights]:
        """The model that each round began with."""
        models: dict[str, Weights] = {}
        out = {}
        for commit in self.commits:
            if (made := commit.get("model")) is not None:
                models[made["digest"]] = wire.unpack_model(made["data"], shapes(Softmax().weights()))[0]
            if (held := commit.get("round")) is not None:
                out[held["number"]] = models[held["base"]]
        return out

    def update(self, client: str, number: int) -> Update:
        """An update as it was committed."""
        key = f"update/{number}/{client}"
        payload = next(commit[key] for commit in self.commits if commit.get(key) is not None)
        return wire.unpack_update(payload)[1]

    def weights(self) -> Weights:
        return wire.unpack_model(self.model, shapes(Softmax().weights()))[0]


def audit(site: Site) -> dict[int, list[str]]:
    """Recompute every model that was published from the updates that were acknowledged; who was counted, by round.

    No update is counted twice, none of a dead round, none that was not answered with ``taken``; and nobody trains twice for a
    round: all publications of one update are the same bytes.
    """
    updates: dict[tuple[int, str], bytes] = {}
    taken: dict[int, set[str]] = {}
    models: dict[int, Weights] = {}
    order: list[tuple[int, int]] = []
    for who, say in site.heard:
        parts = say.topic.split("/")
        if say.topic == "model":
            manifest = wire.hear(wire.Manifest, say.payload)
            weights, _ = wire.unpack_model(manifest.data, manifest.shapes)
            if manifest.version not in models:
                models[manifest.version] = weights
                order.append((manifest.version, manifest.round))
            assert wire.pack_model(weights, {}) == wire.pack_model(models[manifest.version], {})
        elif parts[-1] == "up" and who == parts[1]:
            _, body, _ = wire.unpack_update(say.payload)
            assert updates.setdefault((body.round, who), say.payload) == say.payload
        elif parts[-1] == "ack":
            ack = wire.hear(wire.Ack, say.payload)
            if ack.status == wire.TAKEN:
                taken.setdefault(ack.round, set()).add(parts[1])
    counted: dict[int, list[str]] = {}
    assert [version for version, _ in order] == list(range(len(order)))
    assert [number for _, number in order] == sorted({number for _, number in order})
    for (version, _), (_, number) in itertools.pairwise(order):
        names = counted[number] = sorted(taken[number])
        bodies = [wire.unpack_update(updates[number, who])[1] for who in names]
        new = Mean().aggregate(
            models[version],
            [ClientUpdate(who, body.tensors, body.samples) for who, body in zip(names, bodies, strict=True)],
        )
        assert wire.pack_model(new, {}) == wire.pack_model(models[version + 1], {})
    return counted
