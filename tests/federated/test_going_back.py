"""Somebody wants an older model back: once, whoever is killed meanwhile; what was spent of a budget stays spent."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from job_site import PLAN, Deaths, Site, name, parts

from nodes.federated import wire
from nodes.federated.past import BEFORE, Order, Ordered, heard
from nodes.federated.rules import Rules

DATA = parts(3)
RULES = Rules(job="j", rounds=6, least=3, quorum=3, fit=PLAN, deadline=30)


class Told(Site):
    """A job to which an order is said each second until it is answered, as the command does."""

    def __init__(self, to: int, at: float = 2.5, **options: Any) -> None:
        super().__init__(options.pop("rules", RULES), DATA, **options)
        self.to = to
        self.world.after(at, self.say)

    def answers(self) -> list[Ordered]:
        return [heard(Ordered, say.payload) for _, say in self.heard if say.topic == "ordered"]

    def say(self) -> None:
        if not self.answers() and not self.lead.over:
            run = max((manifest.run for manifest in self.manifests()), default=0)
            self.world.inject("order", msgspec.msgpack.encode(Order("me", run, self.to)))
            self.world.after(1.0, self.say)

    def manifests(self) -> list[wire.Manifest]:
        return [wire.hear(wire.Manifest, say.payload) for _, say in self.heard if say.topic == "model"]

    def lead_phase(self) -> tuple[str, int]:
        held = self.leads[-1].round if self.leads else None
        return ("", 0) if held is None else (held.phase, held.number)

    def versions(self) -> list[tuple[str, int, str]]:
        return [(row["status"], row["version"], row["why"]) for row in self.rows if row["status"] == "committed"]


def test_an_older_model_is_a_new_version_with_the_old_numbers() -> None:
    site = Told(to=1)
    assert site.run()
    (done,) = site.answers()
    assert (done.of, done.refused) == (1, "")
    models = site.models_by_version()
    assert all((models[1][key] == models[done.version][key]).all() for key in models[1])
    assert [why for _, number, why in site.versions() if number == done.version] == ["gone back to version 1"]
    assert [number for _, number, _ in site.versions()] == [1, 2, 3, 4, 5, 6]
    aborted = [row["why"] for row in site.rows if row["status"] == "aborted"]
    assert aborted in ([], ["gone back"])
    following = models[done.version + 1]
    assert any((following[key] != models[1][key]).any() for key in following), "and it learns on from there"
    assert all(client.over or site.world.run(lambda: True) for client in site.clients)


def undisturbed() -> int:
    died = Deaths()
    assert Told(to=BEFORE, fault=died).run()
    return died.points


@pytest.mark.parametrize("point", range(undisturbed()))
def test_it_is_done_once_wherever_the_coordinator_dies(point: int) -> None:
    site = Told(to=BEFORE, fault=Deaths([point]))
    assert site.run()
    backs = [row for row in site.rows if "gone back to" in row["why"]]
    assert len(backs) == 1
    assert {(done.version, done.of) for done in site.answers()} <= {(backs[0]["version"], backs[0]["version"] - 2)}
    assert [number for _, number, _ in site.versions()] == [1, 2, 3, 4, 5, 6]
    models = site.models_by_version()
    back = backs[0]["version"]
    assert all((models[back][key] == models[back - 2][key]).all() for key in models[back])
    assert {name(k) for k in range(3)} == set(site.trainers)


def test_while_a_round_is_added_up_it_waits_for_that() -> None:
    site = Told(to=1, at=1e6, took=lambda machine, work: 1.0 if work == "fit" else 0.6)
    assert site.world.run(lambda: site.lead_phase() == ("aggregating", 3))
    site.say()
    assert site.run()
    assert [done.refused for done in site.answers()] == [""]
    assert [number for _, number, _ in site.versions()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("to", "keep", "said"),
    [
        (9, 3, "version 9 is not kept; older ones that are: 0, 1"),
        (BEFORE, 0, "no older model is kept"),
        (0, 1, "not kept"),
    ],
)
def test_what_is_not_there_cannot_be_had(to: int, keep: int, said: str) -> None:
    site = Told(to=to, rules=Rules(job="j", rounds=6, least=3, quorum=3, fit=PLAN, deadline=30, keep=keep))
    assert site.run()
    (answer,) = site.answers()
    assert said in answer.refused
    assert all("back" not in row["why"] for row in site.rows)


def test_an_old_order_said_again_is_not_followed_again() -> None:
    """Not the last one, which has its answer: one from before it, that somebody kept."""
    site = Told(to=1, at=1e6)
    assert site.world.run(lambda: len(site.versions()) >= 2)
    run = max(manifest.run for manifest in site.manifests())
    kept, newer = (Order(ident, run, 1, 2) for ident in ("kept", "newer"))
    site.world.inject("order", msgspec.msgpack.encode(newer))
    assert site.world.run(lambda: bool(site.answers()))
    site.world.inject("order", msgspec.msgpack.encode(kept))
    assert site.run()
    assert [(done.ident, bool(done.refused)) for done in site.answers()][:2] == [("newer", False), ("kept", True)]
    assert len([row for row in site.rows if "gone back to" in row["why"]]) == 1


def test_an_order_for_another_run_or_garbage_changes_nothing() -> None:
    site = Site(RULES, DATA)
    for payload in (
        b"",
        b"\xff",
        msgspec.msgpack.encode({"type": "fl-order/1"}),
        msgspec.msgpack.encode(Order("x", 1, 1)),
    ):
        site.world.after(2.5, site.world.inject, "order", payload)
    assert site.run()
    assert [row["status"] for row in site.rows] == ["committed"] * 6


def test_what_was_spent_stays_spent() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    from nodes.privacy.dp import Chance, Privacy
    from nodes.privacy.private import Private
    from nodes.strategies import fedavgm
    from nodes.strategies._strategy import ClientUpdate

    private = Private(fedavgm.build(fedavgm.Config()), Privacy(clip=1.0, noise=2.0), 10, Chance(1))
    model, update = {"w": np.zeros(3, np.float32)}, ClientUpdate("a", {"w": np.ones(3, np.float32)}, 1)
    private.aggregate(model, [update])
    state, spent = private.snapshot(), private.epsilon
    private.aggregate(model, [update])
    private.revert(state)
    assert private.epsilon > spent
    assert private.snapshot()["inner"] == state["inner"]
