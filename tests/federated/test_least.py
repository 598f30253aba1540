"""A client insists: what asks for less noise than it wants, or for more than its budget, gets no update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from job_site import PLAN, Deaths, Site, Softmax, name, parts
from test_train_options import CAMERA, MLP, wrong

from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.local import Memory, train
from nodes.federated.machine import Machine
from nodes.federated.rules import Rules
from nodes.federated.virtual import Peer
from nodes.federated.weights import digest, shapes
from nodes.privacy.least import Insists, Least
from nodes.strategies import fedavg
from nodes.strategies._strategy import Strategy
from schemas.errors import ConfigError
from schemas.problems import validated

DATA = parts(3)
LOCAL = {"where": "local", "clip": 1.0, "noise": 4.0, "by_tensor": False}
RULES = Rules(job="j", rounds=8, least=3, quorum=2, fit=PLAN, deadline=10, retries=2)


def insisting(**options: Any) -> Insists:
    return validated(Insists, options)


class Asks(fedavg.FedAvg):
    """FedAvg that asks for that, whatever a real one would."""

    def __init__(self, private: dict[str, Any]) -> None:
        super().__init__(fedavg.Config())
        self._private = private

    def asked(self) -> dict[str, Any]:
        return self._private


class Insisting(Site):
    """A job whose second client insists."""

    def __init__(self, private: dict[str, Any], insists: Insists, **options: Any) -> None:
        self.insists = insists
        strategy: Callable[[], Strategy] = lambda: Asks(private)  # noqa: E731 - one line
        super().__init__(options.pop("rules", RULES), DATA, strategy=strategy, **options)

    def client(self, k: int) -> Peer:
        peer = super().client(k)
        if k == 1:
            before = peer.make

            def make() -> Machine:
                client = before()
                assert isinstance(client, Client)
                client.least = Least(self.insists)
                return client

            peer.make = make
        return peer

    def updates(self) -> list[bytes]:
        """What the second client ever said, each once."""
        return list(dict.fromkeys(say.payload for _, say in self.heard if say.topic == f"c/{name(1)}/up"))

    def presences(self) -> list[wire.Presence]:
        said = [say.payload for peer, say in self.heard if say.topic == f"c/{name(1)}/state" and peer == name(1)]
        return [wire.hear(wire.Presence, payload) for payload in said]

    def spent(self) -> int:
        kept = msgspec.msgpack.decode(self.clients[1].disk.get("spent", b"\x90"))
        return sum(count for _, count in kept)


@pytest.mark.parametrize(
    ("private", "why"),
    [
        ({}, "without noise"),
        ({"where": "central"}, "without noise"),
        ({**LOCAL, "noise": 3.9}, "noise of 3.9, the least is 4"),
        ({**LOCAL, "clip": 1.5}, "clip of 1.5, the most is 1"),
        ({**LOCAL, "noise": float("nan")}, "noise of nan"),
        ({**LOCAL, "clip": 0}, "times 0"),
        ({"where": "local", "clip": 1.0}, "how much noise"),
    ],
)
def test_a_call_that_asks_for_less_gets_nothing(private: dict[str, Any], why: str) -> None:
    site = Insisting(private, insisting(clip=1.0, noise=4.0))
    site.run(seconds=200)
    assert site.updates() == []
    assert any(why in said.why and said.skips for said in site.presences())
    assert {said.samples for said in site.presences()} == {1}, "nor how many rows there are"


def test_what_is_enough_is_answered_and_the_others_go_on_without_who_has_enough() -> None:
    site = Insisting(LOCAL, insisting(clip=1.0, noise=4.0, rounds=3))
    assert site.run()
    assert len(site.updates()) == site.spent() == 3
    assert [row["clients"] for row in site.rows] == [3, 3, 3, 2, 2, 2, 2, 2]
    assert any("all 3 updates are made" in said.why for said in site.presences())


def undisturbed() -> int:
    died = Deaths()
    assert Insisting(LOCAL, insisting(rounds=3), client_faults={name(1): died}).run()
    return died.points


@pytest.mark.parametrize("point", range(undisturbed()))
def test_no_update_is_said_that_was_not_counted(point: int) -> None:
    site = Insisting(LOCAL, insisting(rounds=3), client_faults={name(1): Deaths([point])})
    assert site.run()
    assert len(site.updates()) <= site.spent() <= 3


def test_the_budget_outlives_a_coordinator_that_forgot_everything() -> None:
    site = Insisting(LOCAL, insisting(rounds=3))
    site.world.after(2.5, site.world.kill, site.lead)
    site.world.after(2.6, site.lead.disk.clear)
    site.world.after(3.0, site.world.begin, site.lead)
    assert site.run()
    assert len(site.updates()) == site.spent() == 3
    assert len({wire.hear(wire.Manifest, say.payload).run for _, say in site.heard if say.topic == "model"}) == 2


def test_epsilon_is_counted_as_the_accountant_does() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    from nodes.privacy.accountant import epsilon_of

    site = Insisting(LOCAL, insisting(epsilon=6))
    assert site.run()
    made = len(site.updates())
    assert 1 <= made < 8
    assert epsilon_of(((2.0, 1.0, made),), 1e-5) <= 6 < epsilon_of(((2.0, 1.0, made + 1),), 1e-5)
    assert any("the budget is spent, epsilon" in said.why for said in site.presences())


def test_arrays_beside_a_private_update_are_not_sent() -> None:
    """A coordinator that asks for SCAFFOLD's change, which has no noise, gets nothing from anybody."""
    assert "beside the update" in Least(insisting(noise=1.0)).why_not(LOCAL, {"control": "scaffold"})
    trainer = Softmax()
    model = trainer.weights()
    call = wire.Call("j", 1, 1, 1, wire.COLLECTING, digest(model), fit={**PLAN, "control": "scaffold"}, private=LOCAL)
    data = wire.pack_model(model, {})
    with pytest.raises(ConfigError, match="would have no noise"):
        train(call, "c", data, shapes(model), trainer, lambda: DATA[0], lambda _: None, Memory.of(None), 1)


@pytest.mark.parametrize(
    ("lead", "insists", "said"),
    [
        ("{where: local, clip: 1, noise: 4}", "{noise: 4, clip: 1}", ""),
        ("{where: local, clip: 1, epsilon: 4}", "{noise: 4}", ""),
        ("{clip: 1, noise: 4}", "{noise: 4}", "does not ask for noise of the clients' own"),
        ("", "{epsilon: 3}", "does not ask for noise of the clients' own"),
        ("{where: local, clip: 1, noise: 3}", "{noise: 4}", "noise of 3, the least is 4"),
        ("{where: local, clip: 1, noise: 4}", "{clip: 1}", "say noise, epsilon or rounds"),
    ],
)
def test_it_is_told_before_it_runs(lead: str, insists: str, said: str, tmp_path: Path) -> None:
    asks = f", privacy: {lead}" if lead else ""
    lines = wrong(
        tmp_path,
        CAMERA,
        f"  a: {{train: {{job: j, {MLP}, privacy: {insists}}}, from: camera}}",
        f"  lead: {{federate: {{job: j, {MLP}{asks}}}, publish: always}}",
    )
    assert (len(lines) == 1 and said in lines[0]) if said else lines == [], lines


def test_what_it_says_is_what_it_was_asked(tmp_path: Path) -> None:
    """The update that goes out has noise of that size."""
    site = Insisting({**LOCAL, "noise": 50.0}, insisting(noise=50.0, rounds=1))
    assert site.run()
    (payload,) = site.updates()
    _, update, _ = wire.unpack_update(payload)
    spread = float(np.std(np.concatenate([array.ravel() for array in update.tensors.values()])))
    assert 30 < spread < 70
    assert (update.samples, update.metrics) == (1, {})
