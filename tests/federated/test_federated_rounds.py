"""When rounds begin and end, and who is in them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from job_site import PLAN, Mean, Site, Softmax, audit, name, parts

from nodes.federated import wire
from nodes.federated.machine import Machine
from nodes.federated.rules import Rules
from nodes.federated.virtual import Link
from nodes.federated.weights import Weights
from nodes.trainers._trainer import Examples, Fit, Fitted


def rules(**more: Any) -> Rules:
    return Rules(**{"job": "j", "rounds": 3, "least": 4, "quorum": 4, "fit": PLAN, "deadline": 30.0, **more})


def outcome(site: Site) -> str:
    found: str = msgspec.msgpack.decode(site.lead.disk["job"])["outcome"]
    return found


def calls(site: Site) -> list[wire.Call]:
    return [wire.hear(wire.Call, say.payload) for who, say in site.heard if who == "lead" and say.topic == "round"]


def slow(**seconds: float) -> Any:
    """Seconds of training by client, 1 for the others."""

    def took(machine: Machine, work: str) -> float:
        return seconds.get(getattr(machine, "name", ""), 1.0) if work == "fit" else 0.0

    return took


def test_a_round_closes_as_soon_as_all_have_answered() -> None:
    site = Site(rules(), parts(4))
    assert site.run()
    for row in site.rows:
        assert row["seconds"] == pytest.approx(1.04, abs=0.01)  # a second of training and two ways of 20 ms
    assert outcome(site) == "rounds"


def test_a_round_closes_with_its_quorum_after_the_grace() -> None:
    site = Site(rules(quorum=3, grace=2.0), parts(4), took=slow(c003=25.0))
    assert site.run()
    first = site.rows[0]
    assert (first["clients"], first["status"]) == (3, "committed")
    assert first["seconds"] == pytest.approx(3.04, abs=0.05)
    assert audit(site)[1] == [name(0), name(1), name(2)]


def test_a_late_update_is_stale_and_harmless() -> None:
    site = Site(rules(quorum=3, grace=2.0, rounds=12), parts(4), took=slow(c003=4.0))
    late: list[wire.Ack] = []
    assert site.run()
    for _, say in site.heard:
        if say.topic == "c/c003/ack":
            late.append(wire.hear(wire.Ack, say.payload))
    audit(site)  # what was stale is in none
    counted = audit(site)
    assert any(name(3) not in names for names in counted.values())
    # the client does not send what nobody waits for any more, so it is seldom that one comes too late
    assert {ack.status for ack in late} <= {wire.STALE, wire.TAKEN}


def test_an_update_that_comes_when_its_round_is_closed_is_answered_with_stale() -> None:
    site = Site(rules(rounds=2, quorum=3, grace=1.0), parts(4), link=Link(0.01))
    site.clients[3].link = Link(1.5)  # three seconds there and back: its update is on the way when the round is closed
    assert site.run()
    acks = [wire.hear(wire.Ack, say.payload) for _, say in site.heard if say.topic == "c/c003/ack"]
    assert [(ack.round, ack.status) for ack in acks][:1] == [(1, wire.STALE)]
    assert all(name(3) not in names for names in audit(site).values())
    assert sum(row["stale"] for row in site.rows) >= 1


def test_at_the_deadline_it_is_closed_with_what_there_is() -> None:
    site = Site(rules(quorum=2, grace=100.0), parts(4), took=slow(c002=1e9, c003=1e9))
    assert site.run()
    for row in site.rows:
        assert (row["clients"], row["status"]) == (2, "committed")
        assert row["seconds"] == pytest.approx(30.0, abs=0.1)


def test_below_quorum_it_is_aborted_and_called_again_with_others() -> None:
    site = Site(rules(share=0.5, quorum=3, least=6, rounds=4), parts(6), took=slow(c000=1e9, c001=1e9))
    assert site.run()
    rows = site.rows
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    assert "aborted" in {row["status"] for row in rows}
    aborted = {row["round"] for row in rows if row["status"] == "aborted"}
    cohorts = {call.round: set(call.cohort) for call in calls(site) if call.cohort}
    for number in aborted:
        if number + 1 in cohorts:  # those who kept silent are not asked again at once
            assert not cohorts[number + 1] & {name(0), name(1)}
    assert outcome(site) == "rounds"
    assert not aborted & set(audit(site))


def test_those_who_always_fall_below_quorum_end_the_job() -> None:
    site = Site(rules(retries=2), parts(4), took=slow(c003=1e9))
    assert site.run()
    assert [row["status"] for row in site.rows] == ["aborted"] * 3
    assert outcome(site) == "aborted"
    assert calls(site)[-1].phase == wire.OVER


def test_with_too_few_clients_it_ends_and_says_so() -> None:
    site = Site(rules(wait=50.0), parts(3))
    assert site.run()
    assert site.rows == []
    assert outcome(site) == "too-few"
    assert site.world.run(lambda: all(client.over for client in site.clients), seconds=60)


@pytest.mark.parametrize(("quorum", "how"), [(1, "rounds"), (2, "too-few")])
@pytest.mark.parametrize("at", [0.5, 1.5, 2.3])
def test_two_clients_three_rounds_one_killed_for_ever(quorum: int, how: str, at: float) -> None:
    site = Site(rules(least=2, quorum=quorum, wait=100.0), parts(2))
    site.world.after(at, site.world.kill, site.clients[1])
    assert site.run(seconds=200)
    assert outcome(site) == how
    assert audit(site).keys() == {row["round"] for row in site.rows if row["status"] == "committed"}
    if quorum == 1:
        assert [row["status"] for row in site.rows] == ["committed"] * 3
        assert max(row["seconds"] for row in site.rows) < 5


@pytest.mark.parametrize("phase", ["announce", "train", "upload"])
def test_three_of_ten_killed_in_a_phase_hold_nobody_up(phase: str) -> None:
    site = Site(rules(least=10, quorum=6, grace=2.0, rounds=5), parts(10))
    at = {"announce": 0.025, "train": 0.5, "upload": 1.035}[phase]
    for k in (2, 5, 7):
        site.world.after(at, site.world.kill, site.clients[k])
    assert site.run()
    assert [row["status"] for row in site.rows] == ["committed"] * 5
    assert all(row["seconds"] < 4 for row in site.rows)
    audit(site)


def test_silent_death_without_a_will_costs_the_grace_only() -> None:
    site = Site(rules(least=10, quorum=6, grace=2.0, rounds=5), parts(10))
    for k in (2, 5, 7):
        site.world.after(0.5, lambda peer: site.world.kill(peer, will=1e6), site.clients[k])
    assert site.run(seconds=100)
    assert [row["clients"] for row in site.rows] == [7] * 5
    assert all(row["seconds"] == pytest.approx(3.04, abs=0.1) for row in site.rows)


def test_a_will_frees_its_place_at_once_for_another() -> None:
    site = Site(rules(share=0.5, least=8, quorum=4, rounds=1), parts(8))
    site.world.run(lambda: bool(calls(site) and calls(site)[-1].cohort))
    first = calls(site)[-1].cohort
    assert len(first) == 4
    site.world.after(0.3, site.world.kill, site.world.peers[first[0]])
    assert site.run()
    [row] = site.rows
    assert (row["status"], row["clients"], row["asked"]) == ("committed", 4, 5)
    assert row["seconds"] < 1.5
    [counted] = audit(site).values()
    assert first[0] not in counted
    assert set(first[1:]) < set(counted)


def test_one_who_joins_in_the_middle_takes_a_free_place_and_else_waits() -> None:
    site = Site(rules(least=3, quorum=4, rounds=3), parts(5), starts={name(3): 0.5, name(4): 1.2})
    assert site.run()  # three are here, and four are needed: the first round waits for the fourth
    assert [row["clients"] for row in site.rows] == [4, 5, 5]
    audit(site)


def test_one_who_comes_for_a_freed_place() -> None:
    site = Site(rules(least=4, quorum=4, rounds=1), parts(5), starts={name(4): 1.0})
    site.world.after(0.5, site.world.kill, site.clients[0])
    assert site.run()
    [row] = site.rows
    assert (row["clients"], row["asked"]) == (4, 5)
    assert audit(site) == {1: [name(k) for k in (1, 2, 3, 4)]}


def test_one_who_comes_back_keeps_its_place() -> None:
    site = Site(rules(rounds=1), parts(4))
    site.world.after(0.5, site.world.kill, site.clients[0])
    site.world.after(5.0, site.world.begin, site.clients[0])
    assert site.run()
    assert [row["clients"] for row in site.rows] == [4]
    assert site.rows[0]["seconds"] == pytest.approx(6.0, abs=0.2)


def test_a_will_that_comes_after_its_client_is_back_is_contradicted() -> None:
    site = Site(rules(rounds=1), parts(4), took=slow(c000=5.0))
    site.world.run(seconds=0.1)
    gone = site.clients[3].machine
    assert gone is not None
    will = gone.will()
    assert will is not None
    site.world.after(0.2, lambda: site.world.inject(will.topic, will.payload, retain=True))
    assert site.run()
    assert [row["clients"] for row in site.rows] == [4]
    assert wire.hear(wire.Presence, site.world.retained[will.topic]).here


def test_cut_links_cost_time_and_nothing_else() -> None:
    site = Site(rules(rounds=4), parts(4))
    for k, at in ((0, 0.5), (1, 1.5), (2, 2.0)):
        site.world.after(at, site.world.cut, site.clients[k], 6.0)
    site.world.after(10.0, site.world.cut, site.lead, 4.0)
    assert site.run(seconds=200)
    assert [row["status"] for row in site.rows] == ["committed"] * 4
    assert [len(site.fits(k)) for k in range(4)] == [4] * 4
    audit(site)


def test_a_fault_in_training_frees_the_place() -> None:
    class Faulty(Softmax):
        def fit(self, examples: Examples, plan: Fit) -> Fitted:
            if len(examples) == len(data[1]):
                raise RuntimeError("out of memory")
            return super().fit(examples, plan)

    data = parts(4)
    site = Site(rules(quorum=3, grace=100.0, rounds=2), data, trainer=Faulty)
    assert site.run()
    assert [row["clients"] for row in site.rows] == [3, 3]
    assert all(row["seconds"] < 2 for row in site.rows)
    said = [wire.hear(wire.Presence, say.payload) for _, say in site.heard if say.topic == "c/c001/state"]
    assert any("out of memory" in state.why for state in said)


def test_a_client_without_examples_is_not_asked() -> None:
    import numpy as np

    data = parts(3)
    data.append(Examples(np.zeros((0, 6), np.float32), np.zeros(0, np.int64)))
    site = Site(rules(least=3, quorum=3, rounds=2), data)
    assert site.run()
    assert all(call.cohort in {(), (name(0), name(1), name(2))} for call in calls(site))


def test_of_another_model_is_not_asked() -> None:
    site = Site(rules(least=3, quorum=3, rounds=2), parts(3))
    site.world.inject("c/odd/state", wire.say(wire.Presence(here=True, form="0" * 16, samples=5)), retain=True)
    assert site.run()
    assert all("odd" not in call.cohort for call in calls(site))


# -- when it ends ---------------------------------------------------------------------------------------------------


def accuracy(site_data: list[Examples]) -> Any:
    def evaluate(weights: Weights) -> dict[str, float]:
        trainer = Softmax()
        trainer.load(weights)
        return trainer.evaluate(site_data[0])

    return evaluate


def test_it_ends_at_the_target() -> None:
    data = parts(4)
    site = Site(rules(rounds=200, target=("loss", 0.5)), data, evaluate=accuracy(data))
    assert site.run()
    assert outcome(site) == "target"
    losses = [row["loss"] for row in site.rows]
    assert losses[-1] <= 0.5 < losses[-2]


def test_it_ends_when_nothing_gets_better() -> None:
    data = parts(4)
    site = Site(rules(rounds=200, stall=3, watch="loss", fit={**PLAN, "epochs": 0}), data, evaluate=accuracy(data))
    assert site.run()
    assert outcome(site) == "stall"
    assert [row["status"] for row in site.rows] == ["committed"] * 4
    assert all(math.isnan(row["train_loss"]) for row in site.rows)


def test_it_ends_when_its_time_is_over() -> None:
    site = Site(rules(rounds=10_000, time=25.0), parts(4))
    assert site.run()
    assert outcome(site) == "time"
    assert 20 < sum(row["seconds"] for row in site.rows) < 26


def test_a_round_that_makes_it_worse_is_thrown_away() -> None:
    data = parts(4)
    quality = iter([0.5, 0.6, 0.1, 0.7, 0.8])

    def evaluate(weights: Weights) -> dict[str, float]:
        return {"accuracy": next(quality)}

    site = Site(rules(rounds=4, tolerance=0.2), data, evaluate=evaluate)
    assert site.run()
    assert [row["status"] for row in site.rows] == ["committed", "committed", "rejected", "committed", "committed"]
    assert sorted(audit(site)) == [1, 2, 4, 5]
    digests: dict[int, str] = {}
    for call in calls(site):
        digests.setdefault(call.round, call.base)
    assert digests[3] == digests[4]  # the round after began where the one before had


def test_a_strategy_that_fails_aborts_its_round_only() -> None:
    class Shaky(Mean):
        calls = 0

        def aggregate(self, model: Weights, updates: Any) -> Weights:
            Shaky.calls += 1
            if Shaky.calls == 2:
                raise ArithmeticError("singular")
            return super().aggregate(model, updates)

    site = Site(rules(rounds=3), parts(4), strategy=Shaky)
    assert site.run()
    assert [row["status"] for row in site.rows] == ["committed", "aborted", "committed", "committed"]
    assert "singular" in site.rows[1]["why"]
    audit(site)


class Counting(Mean):
    """A strategy with a state, which it has changed already when it fails."""

    failing = {2}

    def __init__(self) -> None:
        self.n = self.tries = 0

    def aggregate(self, model: Weights, updates: Any) -> Weights:
        self.n += 1
        self.tries += 1
        if self.tries in self.failing:
            raise ArithmeticError("singular")
        return super().aggregate(model, updates)

    def snapshot(self) -> Any:
        return {"n": self.n}

    def restore(self, state: Any) -> None:
        self.n = state["n"]


@pytest.mark.parametrize("how", ["fails", "rejected", "killed"])
def test_a_strategy_forgets_what_came_to_nothing(how: str) -> None:
    quality = iter([0.5, 0.1, 0.7, 0.8])
    strategies: list[Counting] = []

    def strategy() -> Counting:
        strategies.append(Counting())
        strategies[-1].failing = {2} if how == "fails" else set()
        return strategies[-1]

    site = Site(
        rules(rounds=3, tolerance=0.2),
        parts(4),
        strategy=strategy,
        evaluate=(lambda weights: {"accuracy": next(quality)}) if how == "rejected" else None,
    )
    if how == "killed":
        site.world.after(1.5, site.world.kill, site.lead)
        site.world.after(2.0, site.world.begin, site.lead)
    assert site.run()
    assert msgspec.msgpack.decode(site.lead.disk["model"])["strategy"] == {"n": 3}
    assert strategies[-1].n == 3


def test_clients_tell_how_the_model_does_on_their_own_data() -> None:
    data = parts(4)
    site = Site(rules(rounds=3, evaluate=True), data)
    assert site.run()
    trainer = Softmax()
    for row in site.rows[:1]:  # the first model is all zeros: a third is right by chance, and the loss is ln 3
        assert row["local_loss"] == pytest.approx(math.log(3), abs=1e-4)
    weights = site.models_by_version()
    for version, row in enumerate(site.rows):
        trainer.load(weights[version])
        got = [trainer.evaluate(part)["accuracy"] for part in data]
        wanted = sum(a * len(part) for a, part in zip(got, data, strict=True)) / sum(map(len, data))
        assert row["local_accuracy"] == pytest.approx(wanted, abs=1e-9)
        assert row["train_loss"] > 0
