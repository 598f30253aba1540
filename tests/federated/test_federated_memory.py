"""What a client carries from round to round: residuals of its compressor, control variates; and what becomes of them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_site import PLAN, Deaths, Mean, Site, Softmax, name, parts

from nodes.compressors._compressor import Compressor
from nodes.federated.rules import Rules
from nodes.federated.virtual import Link
from nodes.federated.weights import Shape, UnfitError, Weights, flat, minus, norm, plus, shapes, unflat
from nodes.federated.wire import arrays, seed_of
from nodes.strategies import scaffold
from nodes.strategies._strategy import ClientUpdate, Strategy
from nodes.trainers._trainer import Fit


class Largest(Compressor):
    """The few largest numbers, with error feedback."""

    feeds_back = True

    def pack(self, delta: Weights, seed: int = 0) -> Weights:
        vector = flat(delta, "<f4")
        at = np.sort(np.argsort(-np.abs(vector), kind="stable")[:3])
        return {"at": at.astype(np.uint32), "value": vector[at]}

    def unpack(self, packed: Weights, wanted: tuple[Shape, ...]) -> Weights:
        vector = np.zeros(sum(shape.size for shape in wanted), np.float32)
        if (
            packed.keys() != {"at", "value"}
            or len(packed["at"]) != len(packed["value"])
            or packed["at"].max() >= len(vector)
        ):
            raise UnfitError("shape", "no pairs of a place and a number")
        vector[packed["at"]] = packed["value"]
        return unflat(vector, wanted)


DATA = parts(4)
RULES = Rules(job="j", rounds=6, least=4, quorum=4, fit=PLAN, deadline=20.0, compress="largest")


def compressed_loop(rounds: int) -> tuple[Weights, dict[str, Weights]]:
    """The model and the residuals of a plain loop."""
    trainer, squeeze = Softmax(), Largest()
    model, residual = (
        trainer.weights(),
        {name(k): {n: np.zeros_like(a) for n, a in trainer.weights().items()} for k in range(4)},
    )
    for number in range(1, rounds + 1):
        total = sum(map(len, DATA))
        step = {n: np.zeros(a.shape) for n, a in model.items()}
        for k, examples in enumerate(DATA):
            trainer.load(model)
            trainer.fit(examples, Fit(**PLAN, seed=seed_of(0, number, name(k))))
            whole = plus(minus(trainer.weights(), model), residual[name(k)])
            sent = squeeze.unpack(squeeze.pack(whole), shapes(model))
            residual[name(k)] = minus(whole, sent)
            for n in step:
                step[n] += sent[n].astype(np.float64) * (len(examples) / total)
        model = plus(model, step)
    return model, residual


def residuals(site: Site) -> dict[str, Weights]:
    """What the clients would add to their next deltas, if their last update was used."""
    out = {}
    for peer in site.clients:
        sent = msgspec.msgpack.decode(peer.disk["sent"])
        out[peer.name] = arrays(sent["memory"]["residual"])
    return out


def close(one: Weights, other: Weights) -> bool:
    return norm(minus(one, other)) < 1e-5


def test_residuals_are_those_of_the_loop() -> None:
    site = Site(RULES, DATA, compressor=Largest())
    assert site.run()
    model, residual = compressed_loop(6)
    assert close(site.weights(), model)
    assert all(close(residuals(site)[who], wanted) for who, wanted in residual.items())
    assert all(norm(wanted) > 0.01 for wanted in residual.values())


@settings(derandomize=True, max_examples=25, deadline=None)
@given(kills=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 8)), max_size=6))
def test_they_survive_restarts(kills: list[tuple[int, float]]) -> None:
    site = Site(RULES, DATA, compressor=Largest())
    for k, at in kills:
        peer = site.lead if k == 4 else site.clients[k]
        site.world.after(at, site.world.kill, peer)
        site.world.after(at + 0.2, site.world.begin, peer)
    assert site.run()
    model, residual = compressed_loop(6)
    assert close(site.weights(), model)
    assert all(close(residuals(site)[who], wanted) for who, wanted in residual.items())


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), loss=st.sampled_from([0.1, 0.3]))
def test_they_are_right_when_answers_are_lost(seed: int, loss: float) -> None:
    """A lost acknowledgement does not make a client guess what became of its update: it asks."""
    rules = Rules(job="j", rounds=6, least=4, quorum=4, fit=PLAN, deadline=1e5, compress="largest", repeat=2.0)
    site = Site(rules, DATA, compressor=Largest(), link=Link(0.01, loss=loss), seed=seed)
    assert site.run()
    model, residual = compressed_loop(6)
    assert close(site.weights(), model)
    assert all(close(residuals(site)[who], wanted) for who, wanted in residual.items())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    loss=st.sampled_from([0.0, 0.1, 0.3]),
    deaths=st.sets(st.integers(0, 200), max_size=5),
    lives=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 60), st.sampled_from([0.5, 5.0, 25.0])), max_size=8),
    sizes=st.sampled_from([{}, {"inline": 64, "chunk": 256}]),
)
def test_whatever_happens_nothing_that_was_learnt_is_lost_or_sent_twice(
    seed: int, loss: float, deaths: set[int], lives: list[tuple[int, float, float]], sizes: dict[str, int]
) -> None:
    """All that a client's counted trainings changed is in what was counted of it, and in its residual."""
    rules = Rules(
        job="j", rounds=6, least=3, quorum=2, fit=PLAN, deadline=15.0, grace=1.5, retries=9, compress="largest"
    )
    site = Site(
        rules,
        DATA,
        compressor=Largest(),
        seed=seed,
        link=Link(0.01, 0.3, loss, loss),
        fault=Deaths(deaths),
        sizes=sizes,
    )
    for k, at, back in lives:
        site.world.after(at, site.world.kill, site.clients[k])
        site.world.after(at + back, site.world.begin, site.clients[k])
    assert site.run(seconds=5000)
    used = site.replay(None)
    assert len(used) == len(set(used))
    bases = site.bases()
    squeeze, trainer, form = Largest(), Softmax(), shapes(Softmax().weights())
    for k, examples in enumerate(DATA):
        learnt, sent = ({n: np.zeros(a.shape) for n, a in trainer.weights().items()} for _ in range(2))
        rounds = [number for client, number in used if client == name(k)]
        for number in rounds:
            trainer.load(bases[number])
            trainer.fit(examples, Fit(**PLAN, seed=seed_of(0, number, name(k))))
            learnt = plus(learnt, minus(trainer.weights(), bases[number]))
            sent = plus(sent, squeeze.unpack(site.update(name(k), number).tensors, form))
        disk = {key: msgspec.msgpack.decode(value) for key, value in site.clients[k].disk.items()}
        last = disk.get("sent")
        kept = last["memory"] if last is not None and last["round"] in rounds else disk.get("memory")
        left = arrays(kept["residual"]) if kept is not None else {}
        whole = plus(sent, left) if left else sent
        assert norm(minus(whole, learnt)) < 1e-4


def test_an_aborted_round_leaves_no_trace_in_them() -> None:
    class Shaky(Mean):
        """Fails once."""

        failed = False

        def aggregate(self, model: Weights, updates: Any) -> Weights:
            if not Shaky.failed:
                Shaky.failed = True
                raise ArithmeticError
            return super().aggregate(model, updates)

    rules = Rules(job="j", rounds=1, least=4, quorum=4, fit=PLAN, compress="largest")
    site = Site(rules, DATA, compressor=Largest(), strategy=Shaky)
    assert site.run()
    assert [row["status"] for row in site.rows] == ["aborted", "committed"]
    trainer = Softmax()
    zero = trainer.weights()
    for k, examples in enumerate(DATA):  # the second round's update is of its own delta only
        trainer.load(zero)
        trainer.fit(examples, Fit(**PLAN, seed=seed_of(0, 2, name(k))))
        delta = trainer.weights()
        wanted = minus(delta, Largest().unpack(Largest().pack(delta), shapes(zero)))
        assert close(residuals(site)[name(k)], wanted)


# -- SCAFFOLD -------------------------------------------------------------------------------------------------------


def scaffold_loop(rounds: int) -> tuple[Weights, Weights]:
    """The model and c, by the paper's lines."""
    trainer = Softmax()
    model = trainer.weights()
    c = {n: np.zeros_like(a) for n, a in model.items()}
    own = [{n: np.zeros_like(a) for n, a in model.items()} for _ in DATA]
    for number in range(1, rounds + 1):
        deltas, changes = [], []
        for k, examples in enumerate(DATA):
            trainer.load(model)
            done = trainer.fit(examples, Fit(**PLAN, seed=seed_of(0, number, name(k)), correction=minus(c, own[k])))
            delta = minus(trainer.weights(), model)
            new = {n: own[k][n] - c[n] - delta[n] / (done.steps * PLAN["rate"]) for n in model}
            deltas.append(delta)
            changes.append(minus(new, own[k]))
            own[k] = new
        model = plus(model, {n: np.mean([delta[n].astype(np.float64) for delta in deltas], 0) for n in model})
        c = plus(c, {n: np.mean([change[n].astype(np.float64) for change in changes], 0) for n in model})
    return model, c


def scaffolding() -> Strategy:
    return scaffold.build(scaffold.Config(clients=4))


def test_scaffold_is_that_of_the_loop() -> None:
    site = Site(RULES, DATA, strategy=scaffolding)
    site.rules = Rules(job="j", rounds=6, least=4, quorum=4, fit=PLAN)
    assert site.run()
    model, c = scaffold_loop(6)
    assert norm(minus(site.weights(), model)) < 1e-4
    assert norm(c) > 0.05
    shared = site.shared()
    assert norm(minus({n: shared[n] for n in c}, c)) < 1e-4


@pytest.mark.parametrize("at", [0.3, 1.02, 1.5, 2.1, 3.3])
def test_scaffold_survives_deaths_on_both_sides(at: float) -> None:
    site = Site(Rules(job="j", rounds=6, least=4, quorum=4, fit=PLAN, deadline=20.0), DATA, strategy=scaffolding)
    for peer, when in ((site.lead, at), (site.clients[1], at + 0.4), (site.clients[2], 2 * at)):
        site.world.after(when, site.world.kill, peer)
        site.world.after(when + 0.3, site.world.begin, peer)
    assert site.run()
    model, _ = scaffold_loop(6)
    assert norm(minus(site.weights(), model)) < 1e-4


# -- asynchronous ---------------------------------------------------------------------------------------------------


class Seen(Strategy):
    """FedBuff's weights, and what it was given."""

    def __init__(self) -> None:
        self.calls: list[list[ClientUpdate]] = []

    def aggregate(self, model: Weights, updates: Any) -> Weights:
        self.calls.append(list(updates))
        total = sum(update.samples for update in updates)
        step = {
            n: sum(u.delta[n].astype(np.float64) * u.samples / np.sqrt(1 + u.staleness) for u in updates) / total
            for n in model
        }
        return plus(model, step)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    loss=st.sampled_from([0.0, 0.1]),
    kills=st.lists(st.tuples(st.integers(-1, 5), st.floats(0, 40)), max_size=4),
)
def test_asynchronously_each_update_is_used_once_with_its_staleness(
    seed: int, loss: float, kills: list[tuple[int, float]]
) -> None:
    data = parts(6)
    speeds = {name(k): 1.0 + 3.0 * k for k in range(6)}
    strategies: list[Seen] = []

    def strategy() -> Seen:
        strategies.append(Seen())
        return strategies[-1]

    site = Site(
        Rules(job="j", rounds=12, least=6, fit=PLAN, buffer=3, deadline=60.0),
        data,
        seed=seed,
        strategy=strategy,
        link=Link(0.01, loss=loss),
        took=lambda machine, work: speeds[machine.name] if work == "fit" else 0.0,  # type: ignore[attr-defined]
    )
    for k, at in kills:
        peer = site.lead if k < 0 else site.clients[k]
        site.world.after(at, site.world.kill, peer)
        site.world.after(at + 0.5, site.world.begin, peer)
    assert site.run(seconds=5000)
    rows = site.rows
    assert [row["status"] for row in rows].count("committed") == 12
    used = site.replay(Seen().aggregate)
    assert len(used) == len(set(used))
    if not kills:
        assert {client for client, _ in used} == set(speeds)
        staleness = [update.staleness for call in strategies[0].calls for update in call]
        assert max(staleness) >= 2
        assert all(row["clients"] == 3 for row in rows)


def test_asynchronously_the_slow_hold_nobody_up() -> None:
    data = parts(6)
    rules = {"job": "j", "rounds": 10, "least": 6, "quorum": 6, "fit": PLAN, "deadline": 600.0}
    took = lambda machine, work: (20.0 if machine.name == name(5) else 1.0) if work == "fit" else 0.0  # noqa: E731
    seconds = {}
    for buffer in (None, 5):
        site = Site(Rules(**rules, buffer=buffer), data, took=took)  # type: ignore[arg-type]
        began = site.world.now
        assert site.run()
        seconds[buffer] = (site.world.now - began) / 1e9
    assert seconds[5] < seconds[None] / 10


def test_asynchronously_fewer_clients_than_the_buffer_are_enough() -> None:
    site = Site(Rules(job="j", rounds=5, least=2, fit=PLAN, buffer=10, deadline=60.0), parts(3))
    site.world.after(2.5, site.world.kill, site.clients[0])
    assert site.run(seconds=100)
    assert [row["status"] for row in site.rows] == ["committed"] * 5
    assert site.rows[-1]["clients"] == 2


def test_asynchronously_too_old_is_stale() -> None:
    site = Site(
        Rules(job="j", rounds=30, least=4, fit=PLAN, buffer=3, stale=5, deadline=60.0),
        DATA,
        took=lambda machine, work: (20.0 if machine.name == name(3) else 1.0) if work == "fit" else 0.0,  # type: ignore[attr-defined]
    )
    assert site.run()
    assert sum(row["stale"] for row in site.rows) >= 1
    used = site.replay(None)
    assert name(3) not in {client for client, _ in used}
