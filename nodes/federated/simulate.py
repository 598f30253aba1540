"""A federated job that is not real: the machines of ``federate`` and ``train`` on a virtual bus, with a virtual clock.

What is said, committed and computed is what it is on a real one; only time, distance, loss and death are made up. A thousand
clients share one trainer and one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nodes.compressors._compressor import Compressor
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.machine import Machine
from nodes.federated.rules import SECOND, Rules
from nodes.federated.virtual import Link, Peer, Took, World
from nodes.federated.weights import Weights
from nodes.strategies._strategy import Strategy
from nodes.trainers._trainer import Examples, Trainer
from schemas.errors import ConfigError
from schemas.messages import Array


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    :param trainer: makes the model, opened; one is used for all clients.
    :param data: what the clients have, together.
    :param held_out: what the coordinator evaluates on; None: nothing.
    :param parts: rows of each client; None: ``clients`` parts by ``alpha``.
    :param alpha: of the Dirichlet distribution that divides each class among the clients: 0.1 very unlike, 100 alike; None:
        at random.
    :param pace: seconds that the fastest client takes for one row of one epoch.
    :param spread: how many times slower the slowest is; the others lie between, evenly on a logarithmic scale.
    :param dropout: part of the trainings in which a client dies.
    :param back: seconds until it is there again.
    :param will: seconds until the bus notices its death.
    :param gather: the clients come one by one within so many seconds.
    :param seconds: of virtual time, after which it is given up.
    """

    rules: Rules
    trainer: Callable[[], Trainer]
    strategy: Callable[[], Strategy]
    data: Examples
    held_out: Examples | None = None
    compressor: Callable[[], Compressor | None] = lambda: None
    clients: int = 100
    parts: Sequence[Array] | None = None
    alpha: float | None = None
    pace: float = 0.01
    spread: float = 1.0
    dropout: float = 0.0
    back: float = 30.0
    will: float = 5.0
    gather: float = 0.0
    link: Link = Link(0.02)  # noqa: RUF009 - frozen
    seed: int = 0
    seconds: float = 1e7


@dataclass
class Outcome:
    """What came of it.

    :param rows: one for each round, with ``time``: virtual seconds since the beginning.
    :param reason: why it ended (:attr:`nodes.federated.coordinator.Coordinator.outcome`); empty: it was given up.
    :param published: messages; ``delivered`` counts each receiver.
    :param sizes: rows of each client.
    """

    rows: list[dict[str, Any]]
    weights: Weights
    reason: str
    seconds: float
    published: int
    delivered: int
    sizes: list[int] = field(default_factory=list)


def partition(y: Array, clients: int, alpha: float | None, seed: int) -> list[Array]:
    """Rows for each client, at least one each: every row to one of them.

    :param y: classes, int64; of a regression (float) the rows are dealt at random.
    :param alpha: see :class:`Scenario`. Hsu, Qi and Brown 2019, https://arxiv.org/abs/1909.06335, with the shares drawn by class.
    :raises ConfigError: there are fewer rows than clients.
    """
    if len(y) < clients:
        raise ConfigError(f"{len(y)} examples for {clients} clients; each needs one at least")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    if alpha is None or y.dtype.kind == "f":
        return [np.sort(order[k::clients]) for k in range(clients)]
    owner = np.empty(len(y), np.int64)
    for label in np.unique(y):
        rows = order[y[order] == label]
        shares = rng.dirichlet(np.full(clients, alpha))
        owner[rows] = np.searchsorted(np.cumsum(shares), rng.random(len(rows))).clip(max=clients - 1)
    counts = np.bincount(owner, minlength=clients)
    for k in np.flatnonzero(counts == 0):
        rich = int(counts.argmax())
        row = int(rng.choice(np.flatnonzero(owner == rich)))
        owner[row], counts[rich], counts[k] = k, counts[rich] - 1, 1
    return [np.flatnonzero(owner == k) for k in range(clients)]


def simulate(scenario: Scenario, progress: Callable[[dict[str, Any]], None] | None = None) -> Outcome:
    """Let it happen.

    :param progress: called with each row, as soon as its round is over.
    """
    s = scenario
    rng = np.random.default_rng([s.seed, 1])
    parts = partition(s.data.y, s.clients, s.alpha, s.seed) if s.parts is None else list(s.parts)
    trainer, compressor = s.trainer(), s.compressor()
    world = World(s.seed)
    first = trainer.weights()
    began = world.now
    rows: dict[int, dict[str, Any]] = {}

    def evaluate(weights: Weights) -> dict[str, float]:
        trainer.load(weights)
        return {} if s.held_out is None else trainer.evaluate(s.held_out)

    leads: list[Coordinator] = []

    def coordinator() -> Machine:
        leads.append(Coordinator(s.rules, s.strategy(), first, compressor=compressor, evaluate=evaluate))
        return leads[-1]

    lead = world.add("lead", coordinator, link=Link())
    slowness = s.spread ** rng.permutation(np.linspace(0, 1, len(parts)))
    for k, part in enumerate(parts):
        examples = Examples(s.data.x[part], s.data.y[part])
        name = f"client-{k:0{len(str(len(parts) - 1))}}"
        epochs = float(s.rules.fit.get("epochs", 1))
        took = _took(s, world, name, s.pace * float(slowness[k]) * len(part) * epochs, rng)
        world.add(
            name,
            _client(s.rules.job, name, trainer, examples, compressor),
            link=s.link,
            took=took,
            at=float(rng.random()) * s.gather,
        )

    def over() -> bool:
        while lead.rows:
            row = lead.rows.pop(0)
            if row["round"] not in rows:
                rows[row["round"]] = {**row, "time": (world.now - began) / SECOND}
                if progress is not None:
                    progress(rows[row["round"]])
        return lead.over

    world.run(over, seconds=s.seconds)
    machine = leads[-1]
    return Outcome(
        rows=[rows[number] for number in sorted(rows)],
        weights=machine.model,
        reason=machine.outcome,
        seconds=(world.now - began) / SECOND,
        published=world.published,
        delivered=world.delivered,
        sizes=[len(part) for part in parts],
    )


def _client(
    job: str, name: str, trainer: Trainer, examples: Examples, compressor: Compressor | None
) -> Callable[[], Machine]:
    def make() -> Machine:
        return Client(job, name, trainer, lambda: examples, lambda: len(examples), compressors=lambda _: compressor)

    return make


def _took(s: Scenario, world: World, name: str, seconds: float, rng: np.random.Generator) -> Took:
    """How long a client trains; sometimes it dies over it."""

    def took(machine: Machine, work: str) -> float:
        if work != "fit":
            return 0.0
        if s.dropout and rng.random() < s.dropout:
            peer: Peer = world.peers[name]
            at = seconds * float(rng.random())
            world.after(at, lambda: world.kill(peer, will=s.will))
            world.after(at + s.back, world.begin, peer)
        return seconds

    return took
