"""Gateways below sites below a cloud: what their job comes to, whoever dies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_site import PLAN, Deaths, Mean, Softmax, name, parts, plain_loop
from tree import TOP, Placed, Tree, audit, two_sites

from nodes.compressors import top_k
from nodes.compressors._compressor import Compressor
from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.follower import Follower
from nodes.federated.machine import Machine
from nodes.federated.rules import Limits, Rules, Secure
from nodes.federated.site import Site, client
from nodes.federated.told import Told, endless
from nodes.federated.virtual import Fault, Link
from nodes.federated.weights import Weights, digest, minus, norm
from nodes.privacy.dp import Chance, Privacy
from nodes.privacy.private import Private
from nodes.strategies import krum
from nodes.trainers._trainer import Examples


def far(one: Weights, other: Weights) -> float:
    return norm(minus(one, other))


def test_sites_of_gateways_come_to_what_all_gateways_together_come_to() -> None:
    tree = Tree(two_sites())
    assert tree.run()
    flat = plain_loop(parts(5), 3)[-1]
    assert far(tree.model(tree.cloud), flat) < 1e-6
    assert far(flat, Softmax().weights()) > 0.1
    for peer, gateways in zip(tree.peers, (2, 3), strict=True):
        assert far(tree.model(peer), flat) < 1e-6, "the final model is the site's too"
        rows = tree.rows(peer)
        assert [(row["round"], row["above"], row["status"], row["clients"]) for row in rows] == [
            (n, n, "committed", gateways) for n in (1, 2, 3)
        ]
    sent = tree.updates()
    assert sorted(sent) == [(n, f"s{k}") for n in (1, 2, 3) for k in (0, 1)]
    assert [sent[1, f"s{k}"].samples for k in (0, 1)] == [sum(map(len, data)) for data in two_sites()]


def test_rounds_of_its_own_come_between() -> None:
    """Two rounds at each site are two rounds of the plain loop, where there is one site."""
    data = parts(3)
    tree = Tree([data], top=replace(TOP, least=1, quorum=1), rounds=2)
    assert tree.run()
    assert far(tree.model(tree.cloud), plain_loop(data, 6)[-1]) < 1e-6
    assert [(row["round"], row["above"]) for row in tree.rows(tree.peers[0])] == [
        (n, (n + 1) // 2) for n in range(1, 7)
    ]
    assert {body.samples for body in tree.updates().values()} == {sum(map(len, data))}


def test_a_site_of_sites() -> None:
    """Gateways, lines, a plant and a cloud: still what all gateways together come to."""
    data = parts(4)
    tree = Tree([], top=replace(TOP, least=1, quorum=1))
    plant = tree.add(
        "plant",
        lambda: Site(
            Told(endless(replace(tree.rules, job="plant", least=2, quorum=2), {}), Mean(), Softmax().weights()),
            client("factory", "plant", lambda spec: None),
            1,
        ),
        {"above/": "factory/", "": "plant/"},
    )
    for k in (0, 1):

        def line(k: int = k) -> Machine:
            below = Told(
                endless(replace(tree.rules, job=f"line-{k}", least=2, quorum=2), {}), Mean(), Softmax().weights()
            )
            return Site(below, client("plant", f"s{k}", lambda spec: None), 1)

        tree.peers.append(tree.add(f"line-{k}", line, {"above/": "plant/", "": f"line-{k}/"}))
        tree.gateways.append([tree._gateway(k, 2 * k + i, each) for i, each in enumerate(data[2 * k : 2 * k + 2])])
    assert tree.run()
    flat = plain_loop(data, 3)[-1]
    for peer in (tree.cloud, plant, *tree.peers):
        assert far(tree.model(peer), flat) < 1e-6


def undisturbed() -> tuple[Weights, list[str]]:
    died = Deaths()
    tree = Tree(two_sites(), faults={"site-0": died})
    assert tree.run()
    return tree.model(tree.cloud), died.where


MODEL, POINTS = undisturbed()


def test_there_are_all_kinds_of_points() -> None:
    kinds = {point.split()[0] for point in POINTS}
    assert kinds == {"commit", "committed", "said"}
    assert any("above/sent" in point for point in POINTS)
    assert any("task" in point and "model" in point for point in POINTS)


@pytest.mark.parametrize("point", range(len(POINTS)))
def test_a_site_killed_anywhere_gives_the_same_model(point: int) -> None:
    died = Deaths([point])
    tree = Tree(two_sites(), faults={"site-0": died})
    assert tree.run(), died.where[point]
    assert died.points > point
    assert far(tree.model(tree.cloud), MODEL) == 0
    assert [(row["round"], row["status"]) for row in tree.rows(tree.cloud)] == [(n, "committed") for n in (1, 2, 3)]
    assert [(row["round"], row["above"], row["status"]) for row in tree.rows(tree.peers[0])] == [
        (n, n, "committed") for n in (1, 2, 3)
    ]
    audit(tree)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    sites=st.lists(st.sets(st.integers(0, 200), max_size=8), min_size=2, max_size=2),
    cloud=st.sets(st.integers(0, 100), max_size=5),
    gateway=st.sets(st.integers(0, 40), max_size=3),
    back=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_any_deaths_give_the_same_model(sites: list[set[int]], cloud: set[int], gateway: set[int], back: float) -> None:
    faults: dict[str, Fault] = {f"site-{k}": Deaths(at, back) for k, at in enumerate(sites)}
    faults |= {"cloud": Deaths(cloud, back), name(0): Deaths(gateway, back)}
    tree = Tree(two_sites(), faults=faults)
    assert tree.run()
    assert far(tree.model(tree.cloud), MODEL) == 0
    audit(tree)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    loss=st.sampled_from([0.0, 0.1, 0.3]),
    twice=st.sampled_from([0.0, 0.3]),
    jitter=st.sampled_from([0.0, 0.5, 3.0]),
    rounds=st.integers(1, 3),
    deaths=st.lists(st.sets(st.integers(0, 200), max_size=4), min_size=2, max_size=2),
    cuts=st.lists(st.tuples(st.integers(0, 1), st.floats(0, 60), st.sampled_from([1.0, 20.0])), max_size=4),
)
def test_whatever_happens_it_ends_and_every_model_is_made_of_what_was_taken(
    seed: int,
    loss: float,
    twice: float,
    jitter: float,
    rounds: int,
    deaths: list[set[int]],
    cuts: list[tuple[int, float, float]],
) -> None:
    tree = Tree(
        two_sites(),
        top=replace(TOP, quorum=1, deadline=25, grace=2, wait=900, retries=50),
        whole=False,
        rules=Rules(job="line", quorum=1, deadline=8, grace=1),
        rounds=rounds,
        link=Link(0.01, jitter, loss, twice),
        faults={f"site-{k}": Deaths(at) for k, at in enumerate(deaths)},
        seed=seed,
    )
    for k, at, seconds in cuts:
        tree.world.after(at, tree.world.cut, tree.peers[k], seconds)
    assert tree.world.run(lambda: tree.cloud.over, seconds=5000)
    tree.world.run(lambda: all(peer.over for peer in tree.peers), seconds=300)
    audit(tree)
    committed = [row for row in tree.rows(tree.cloud) if row["status"] == "committed"]
    assert len(committed) == 3
    sent = tree.updates()
    for row in committed:
        assert 1 <= row["clients"] <= sum(number == row["round"] for number, _ in sent)


def test_a_site_without_enough_gateways_is_not_asked_and_comes_back_with_them() -> None:
    tree = Tree(two_sites(), top=replace(TOP, least=1, quorum=1, rounds=8, deadline=30))
    tree.world.after(1.5, tree.world.kill, tree.gateways[0][0])
    tree.world.after(5.5, tree.world.begin, tree.gateways[0][0])
    assert tree.run()
    audit(tree)
    rows = tree.rows(tree.cloud)
    assert [row["status"] for row in rows] == ["committed"] * 8
    assert {row["clients"] for row in rows} == {1, 2}
    assert rows[-1]["clients"] == 2
    said = [wire.hear(wire.Presence, say.payload) for _, say in tree.heard if say.topic == "factory/c/s0/state"]
    assert 0 in {presence.samples for presence in said if presence.here}


def test_a_site_whose_rounds_come_to_nothing_says_that_it_skips_before_the_deadline_above() -> None:
    tree = Tree(two_sites(), top=replace(TOP, least=2, quorum=1, rounds=2, deadline=20, grace=30))

    def silent(machine: Machine, work: str) -> float:
        return 1e9 if work == "fit" else 0.0

    tree.gateways[0][0].took = silent
    assert tree.world.run(lambda: tree.cloud.over, seconds=200)
    audit(tree)
    rows = tree.rows(tree.cloud)
    assert [(row["status"], row["clients"]) for row in rows] == [("committed", 1)] * 2
    said = [wire.hear(wire.Presence, say.payload) for _, say in tree.heard if say.topic == "factory/c/s0/state"]
    assert (1, "SkippedError: line-0: below quorum") in {(each.skips, each.why) for each in said}
    ours = tree.rows(tree.peers[0])
    assert [(row["status"], row["above"], row["why"]) for row in ours[:1]] == [("aborted", 1, "below quorum")]
    assert ours[0]["seconds"] < 20 * 0.9 + 0.1


def test_what_a_site_does_for_a_round_that_is_over_is_dropped() -> None:
    tree = Tree(two_sites(), top=replace(TOP, quorum=1, grace=3, rounds=3), whole=False)

    def slow(machine: Machine, work: str) -> float:
        return 10.0 if work == "fit" else 0.0

    for gateway in tree.gateways[0]:
        gateway.took = slow
    assert tree.run()
    audit(tree)
    assert [(row["status"], row["clients"]) for row in tree.rows(tree.cloud)] == [("committed", 1)] * 3
    ours = tree.rows(tree.peers[0])
    assert {row["status"] for row in ours} == {"aborted"}
    assert ours[0]["why"] == "the job above went on"
    assert ours[-1]["why"] in {"the job above went on", "the job above is over"}
    assert tree.updates().keys() == {(n, "s1") for n in (1, 2, 3)}
    assert far(tree.model(tree.peers[0]), tree.model(tree.cloud)) == 0


@pytest.mark.parametrize("work", ["aggregate", "read", "fit"])
def test_what_a_site_is_computing_for_a_round_that_is_over_is_dropped_when_it_is_there(work: str) -> None:
    tree = Tree(two_sites(), top=replace(TOP, quorum=1, grace=3), whole=False, works={("site-0", work): 7.0})
    assert tree.run()
    audit(tree)
    assert [(row["status"], row["clients"]) for row in tree.rows(tree.cloud)] == [("committed", 1)] * 3
    assert far(tree.model(tree.peers[0]), tree.model(tree.cloud)) == 0
    ours = {(row["status"], row["why"]) for row in tree.rows(tree.peers[0])}
    statuses = {status for status, _ in ours}
    if work == "aggregate":
        assert statuses == {"aborted"}
        assert ("aborted", "SkippedError: the job above went on") in ours
    else:
        assert ("committed" in statuses) == (work == "fit")


def test_the_way_up_is_compressed_and_what_was_left_out_is_sent_later_also_after_a_death() -> None:
    def compressor() -> Compressor:
        return top_k.build(top_k.Config(fraction=0.2))

    top = replace(TOP, rounds=4, compress={"top-k": {"fraction": 0.2}})
    plain = Tree(two_sites(), top=top, compressor=compressor())
    assert plain.run()
    (site,) = {frozenset(body.tensors) for body in plain.updates().values()}
    assert site == {"gaps", "values"}
    kept = msgspec.msgpack.decode(plain.peers[0].disk["above/sent"])["memory"]["residual"]
    assert norm(wire.arrays(kept)) > 0
    died = Tree(two_sites(), top=top, compressor=compressor(), faults={"site-0": Deaths(range(20, 200, 9))})
    assert died.run()
    assert far(plain.model(plain.cloud), died.model(died.cloud)) == 0
    assert {body.samples for body in plain.updates().values()} == {sum(map(len, each)) for each in two_sites()}


def test_the_gateways_reports_go_up_weighted() -> None:
    data = parts(5)
    flat = Tree([data], top=replace(TOP, least=1, quorum=1, evaluate=True))
    tree = Tree(two_sites(), top=replace(TOP, evaluate=True))
    assert flat.run()
    assert tree.run()
    for one, other in zip(tree.rows(tree.cloud), flat.rows(flat.peers[0]), strict=True):
        for metric in ("local_accuracy", "local_loss", "train_loss"):
            assert one[metric] == pytest.approx(other[metric], abs=1e-6)


def test_each_level_has_a_strategy_of_its_own() -> None:
    """One of five gateways lies; the site that it belongs to takes who is most like the others."""

    class Liar(Softmax):
        def fit(self, examples: Examples, plan: Any) -> Any:
            fitted = super().fit(examples, plan)
            self._w = {key: array + np.float32(3.0) for key, array in self._w.items()}
            return fitted

    data = parts(8)
    tree = Tree([data[:5], data[5:]], strategy_below=lambda: krum.build(krum.Config(faulty=1, choose=3)))
    tree.sites[1] = []
    liar = tree.gateways[0][0]
    liar.make = lambda: Placed(
        Client("line-0", name(0), Liar(), lambda: data[0], lambda: len(data[0])), {"": "line-0/"}
    )
    tree.top = replace(TOP, least=1, quorum=1)
    assert tree.world.run(lambda: tree.cloud.over, seconds=1000)
    assert all(np.abs(array).max() < 1 for array in tree.model(tree.cloud).values())


def test_a_job_above_without_rounds_takes_a_sites_updates_whenever_they_come() -> None:
    """The buffer moves the model on while a slow site is still at an older one; its work is not lost."""
    top = replace(TOP, buffer=1, rounds=12, stale=20, deadline=30, least=2)
    tree = Tree(two_sites(), top=top, whole=False)

    def slow(machine: Machine, work: str) -> float:
        return 3.5 if work == "fit" else 0.0

    for gateway in tree.gateways[0]:
        gateway.took = slow
    assert tree.run()
    rows = tree.rows(tree.cloud)
    assert [row["status"] for row in rows] == ["committed"] * 12
    slow_ones = [number for number, client in tree.updates() if client == "s0"]
    assert len(slow_ones) >= 2
    assert all(row["status"] == "committed" for row in tree.rows(tree.peers[0])[:2])


@pytest.mark.parametrize("fit", [{"control": "scaffold"}, {"warmup": 3}])
def test_what_a_site_cannot_do_it_says(fit: dict[str, Any]) -> None:
    top = replace(TOP, least=1, quorum=1, rounds=1, deadline=5, retries=1, wait=5, fit={**PLAN, **fit})
    tree = Tree(two_sites()[:1], top=top)
    assert tree.world.run(lambda: tree.cloud.over, seconds=200)
    assert tree.updates() == {}
    said = [wire.hear(wire.Presence, say.payload) for _, say in tree.heard if say.topic == "factory/c/s0/state"]
    assert any(each.skips == 1 and ("scaffold" in each.why or "warmup" in each.why) for each in said)
    assert tree.rows(tree.peers[0]) == []


def test_the_final_model_is_taken_though_it_is_larger_than_a_message() -> None:
    tree = Tree(two_sites())
    sizes: dict[str, Any] = {"inline": 100, "chunk": 256}
    tree.cloud.make = lambda: Placed(Coordinator(TOP, Mean(), Softmax().weights(), **sizes), {"": "factory/"})
    assert tree.run()
    assert far(tree.model(tree.cloud), MODEL) == 0
    for peer in tree.peers:
        assert far(tree.model(peer), MODEL) == 0


def test_a_site_that_begins_when_the_job_above_is_over_takes_its_model_and_ends() -> None:
    tree = Tree(two_sites())
    for peer in (tree.peers[1], *tree.gateways[1]):
        peer.over = True  # not here yet
    tree.top = replace(TOP, least=1, quorum=1)
    assert tree.world.run(lambda: tree.cloud.over, seconds=100)
    for peer in (tree.peers[1], *tree.gateways[1]):
        peer.over = False
        tree.world.begin(peer)
    assert tree.run(seconds=300)
    assert far(tree.model(tree.peers[1]), tree.model(tree.cloud)) == 0
    assert tree.rows(tree.peers[1]) == []


@pytest.mark.parametrize("where", ["central", "local"])
def test_privacy_above_counts_whole_sites(where: Literal["central", "local"]) -> None:
    """An update says nothing of how many rows a site has, and with local noise it leaves the site with the noise in it."""
    privacy = Privacy(clip=0.5, epsilon=500.0, noise=1.0, where=where)

    def strategy() -> Private:
        return Private(Mean(), privacy, 3, Chance(7))

    tree = Tree(two_sites(), top=replace(TOP, rounds=1, limits=Limits(samples=1)), strategy=strategy)
    assert tree.run()
    sent = tree.updates()
    assert [(body.samples, body.metrics) for body in sent.values()] == [(1, {})] * 2
    assert all((norm(body.tensors) > 2) == (where == "local") for body in sent.values())


def test_who_follows_a_sites_model_gets_every_newer_one_and_the_final_one_at_last() -> None:
    """Also over the deaths of the site: each comes once, and none after a newer one."""
    seen: list[tuple[int, str]] = []
    tree = Tree(two_sites(), faults={"site-0": Deaths(range(15, 200, 11))})

    def follower() -> Machine:
        return Follower("line-0", "seen", lambda manifest, weights: seen.append((manifest.version, digest(weights))))

    follows = tree.add("follower", follower, {"": "line-0/"})
    assert tree.world.run(lambda: all(peer.over for peer in tree.peers), seconds=1000)
    tree.world.run(seconds=5)
    assert follows.machine is not None
    assert seen[-1][1] == digest(tree.model(tree.cloud))
    newest: dict[int, str] = {}
    for version, name_of in seen:
        assert newest.setdefault(version, name_of) == name_of
    assert [version for version, _ in seen] == sorted(version for version, _ in seen)
    assert len(newest) >= 6, "what came from above, and what its rounds made of it"


def test_a_site_takes_no_part_in_secure_sums_and_says_so() -> None:
    """Where the two topologies are not one, ``check`` cannot see it."""
    top = replace(TOP, least=3, quorum=3, retries=0, deadline=10, secure=Secure())
    tree = Tree([[one] for one in parts(3)], top=top)
    tree.run(seconds=200)
    said = [wire.hear(wire.Presence, say.payload) for _, say in tree.heard if say.topic == "factory/c/s0/state"]
    assert {(one.skips, one.why) for one in said if one.skips} == {
        (1, "asked for a secure sum, in which a site takes no part")
    }
    assert not any(say.topic.endswith(("/part", "/up")) for _, say in tree.heard)
    [row] = tree.rows(tree.cloud)
    assert (row["status"], row["clients"]) == ("aborted", 0)
