"""The coordinator and the clients are killed at every point at which they commit or say something."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_site import PLAN, Deaths, Site, audit, name, parts

from nodes.federated.rules import Rules
from nodes.federated.virtual import BEGAN, Fault, Link, Peer

DATA = parts(3)
RULES = Rules(job="j", rounds=3, least=3, quorum=3, fit=PLAN, deadline=30)


def undisturbed() -> tuple[bytes, Deaths, Deaths]:
    lead, client = Deaths(), Deaths()
    site = Site(RULES, DATA, fault=lead, client_faults={name(1): client})
    assert site.run()
    audit(site)
    return site.model, lead, client


MODEL, LEAD, CLIENT = undisturbed()


def test_there_are_all_kinds_of_points() -> None:
    assert {word.split()[0] for word in LEAD.where} == {"commit", "committed", "said"}
    assert LEAD.points > 40
    assert CLIENT.points > 15


@pytest.mark.parametrize("point", range(LEAD.points))
def test_a_coordinator_killed_anywhere_gives_the_same_bytes(point: int) -> None:
    died = Deaths([point])
    site = Site(RULES, DATA, fault=died)
    assert site.run()
    assert died.points > point
    assert site.model == MODEL
    assert [(row["round"], row["status"], row["clients"]) for row in site.rows] == [
        (number, "committed", 3) for number in (1, 2, 3)
    ]
    assert audit(site) == {number: [name(0), name(1), name(2)] for number in (1, 2, 3)}
    for k in range(3):
        assert len(site.fits(k)) == len(set(site.fits(k))) == 3
    assert site.world.run(lambda: all(client.over for client in site.clients), seconds=60)


@pytest.mark.parametrize("back", [0.0, 40.0])
def test_a_coordinator_killed_at_every_third_point_gives_the_same_bytes(back: float) -> None:
    site = Site(RULES, DATA, fault=Deaths(range(5, 2000, 17), back))
    assert site.run()
    assert site.model == MODEL
    audit(site)
    assert [len(site.fits(k)) for k in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("point", range(CLIENT.points))
def test_a_client_killed_anywhere_trains_no_round_twice_that_it_has_committed(point: int) -> None:
    died = Deaths([point])
    site = Site(RULES, DATA, client_faults={name(1): died})
    assert site.run()
    assert died.points > point
    assert site.model == MODEL
    audit(site)
    lost = died.where[point] == "commit job,sent"
    assert len(site.fits(1)) == 3 + lost  # what was not committed is lost with the process, and only that
    assert len(set(site.fits(1))) == 3


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    points=st.sets(st.integers(0, 200), max_size=20),
    clients=st.lists(st.sets(st.integers(0, 60), max_size=4), min_size=3, max_size=3),
    back=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_any_deaths_give_the_same_bytes(points: set[int], clients: list[set[int]], back: float) -> None:
    faults: dict[str, Fault] = {name(k): Deaths(at, back) for k, at in enumerate(clients)}
    site = Site(RULES, DATA, fault=Deaths(points, back), client_faults=faults)
    assert site.run()
    assert site.model == MODEL
    audit(site)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    at=st.floats(0.01, 4.0),
    lost=st.integers(1, 12),
    client=st.booleans(),
    sizes=st.sampled_from([{}, {"inline": 64, "chunk": 256}]),
)
def test_a_disk_that_lost_its_last_moments_with_the_power_costs_no_round(
    at: float, lost: int, client: bool, sizes: dict[str, int]
) -> None:
    """The coordinator comes back with an older disk than others have heard of; and a client may restart meanwhile."""
    site = Site(RULES, DATA, sizes=sizes)
    disks: list[dict[str, bytes]] = [{}]
    witness = site.world.witness
    assert witness is not None

    def watch(peer: Peer, commit: dict[str, Any]) -> None:
        witness(peer, commit)
        if peer is site.lead:
            disks.append(dict(peer.disk))

    site.world.witness = watch

    def cut() -> None:
        site.world.kill(site.lead)
        if len(disks) > lost + 1:
            site.lead.disk = dict(disks[-1 - lost])
        if client:
            site.world.kill(site.clients[1])
            site.world.begin(site.clients[1])

    site.world.after(at, cut)
    site.world.after(at + 1.0, site.world.begin, site.lead)
    assert site.run()
    assert site.model == MODEL
    assert all(row["status"] == "committed" for row in site.lead.rows)
    assert (site.world.now - BEGAN) / 1e9 < 12


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    loss=st.sampled_from([0.0, 0.1, 0.3]),
    twice=st.sampled_from([0.0, 0.3]),
    jitter=st.sampled_from([0.0, 0.5, 3.0]),
    deaths=st.sets(st.integers(0, 150), max_size=5),
    lives=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 60), st.sampled_from([1.0, 20.0, math.inf])), max_size=6),
)
def test_whatever_happens_it_ends_and_every_model_is_made_of_what_was_taken(
    seed: int,
    loss: float,
    twice: float,
    jitter: float,
    deaths: set[int],
    lives: list[tuple[int, float, float]],
) -> None:
    rules = Rules(job="j", rounds=4, least=3, quorum=2, fit=PLAN, deadline=20, grace=2, wait=120, retries=3)
    site = Site(rules, parts(5), seed=seed, fault=Deaths(deaths), link=Link(0.01, jitter, loss, twice))
    for k, at, back in lives:
        peer = site.clients[k]
        site.world.after(at, site.world.kill, peer)
        if back < math.inf:
            site.world.after(at + back, site.world.begin, peer)
    assert site.run(seconds=5000)
    counted = audit(site)
    job = msgspec.msgpack.decode(site.lead.disk["job"])
    assert job["outcome"] in {"rounds", "aborted", "too-few"}
    for row in site.rows:
        assert row["seconds"] <= 20 + 0.5 + 10 * len(deaths)  # a coordinator that was away gives them half of it again
        if row["status"] == "committed":
            assert len(counted[row["round"]]) == row["clients"] >= 2
    assert job["version"] == len(counted)
