"""Jobs with secure sums: what the sum is, who may be lost in which phase, and kills at every commit and every publication."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from job_site import PLAN, Deaths, Mean, Site, Softmax, name, parts
from secure_site import Listened, audit_secure

from nodes.federated import wire
from nodes.federated.rules import Rules, Secure
from nodes.federated.trust import ClientTrust, CoordinatorTrust
from nodes.federated.virtual import BEGAN, Fault, Link
from nodes.federated.weights import flat, minus
from nodes.privacy.fixed_point import FixedPoint
from nodes.privacy.keys import Signer
from nodes.strategies import fedadam, fedavg, fedavgm
from nodes.strategies._strategy import ClientUpdate, Strategy
from nodes.trainers._trainer import Examples, Fit

pytest.importorskip("cryptography", reason="cryptography is not installed: no masks, no secure sums")

RULES = Rules(job="j", rounds=3, least=5, quorum=3, fit=PLAN, deadline=30, secure=Secure())
DATA = parts(5)


def ten(**changes: Any) -> Rules:
    return replace(RULES, rounds=1, least=10, quorum=5, **changes)


class Dies:
    """Is killed for ever, or for ``back`` seconds, the first time that what it commits or says has that word."""

    def __init__(self, point: str, word: str, back: float = 1e9) -> None:
        self.point, self.word, self.back = point, word, back
        self.died = False

    def __call__(self, point: str, what: str) -> float | None:
        if self.died or point != self.point or self.word not in what.split(","):
            return None
        self.died = True
        return self.back


def plain(site: Site, clients: Iterable[int], number: int = 1) -> np.ndarray[Any, Any]:
    """FedAvg of these clients' updates in the clear, on the model that the round began with; float64."""
    model = site.bases()[number]
    updates = []
    for k in clients:
        trainer = Softmax()
        trainer.load(model)
        trainer.fit(site.data[k], Fit(**PLAN, seed=wire.seed_of(0, number, name(k))))
        updates.append((minus(trainer.weights(), model), len(site.data[k])))
    total = sum(samples for _, samples in updates)
    return np.asarray(sum(flat(delta) * (samples / total) for delta, samples in updates))


def right(site: Site, clients: list[int], clip: float = 8.0, *, places: int = 10, equal: bool = False) -> None:
    """The model moved by the plain mean, to half a step of the scale for each client, and the rounding of float32."""
    moved = flat(minus(site.weights(), site.bases()[1]))
    wanted = plain(site, clients)
    most = max(len(examples) for examples in site.data)
    samples = [len(site.data[k]) for k in clients]
    fixed = FixedPoint(places, clip, most)
    off = len(clients) * 0.5 * fixed.step * most / sum(samples)
    assert np.abs(moved - wanted).max() <= off * 1.001 + 2e-8
    assert np.abs(wanted).max() > 0.01
    assert site.rows[0]["samples"] == sum(samples)


# -- the sum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [fedavg, fedavgm, fedadam])
def test_any_strategy_that_sums_gives_what_it_gives_in_the_clear(strategy: Any) -> None:
    def make() -> Strategy:
        built: Strategy = strategy.build(strategy.Config())
        return built

    plainly = Site(replace(RULES, secure=None), DATA, strategy=make)
    masked = Site(RULES, DATA, strategy=make)
    assert plainly.run()
    assert masked.run()
    np.testing.assert_allclose(flat(masked.weights()), flat(plainly.weights()), atol=1e-5)
    assert [(row["clients"], row["samples"]) for row in masked.rows] == [
        (row["clients"], row["samples"]) for row in plainly.rows
    ]
    audit_secure(masked)


def test_thirty_in_a_hundred_are_lost_after_the_masks_are_agreed() -> None:
    """The bar: the sum is that of the others, exact to the scale's step."""
    faults: dict[str, Fault] = {name(k): Dies("commit", "sent") for k in (1, 4, 8)}
    site = Site(ten(), parts(10), client_faults=faults)
    assert site.run()
    assert [(row["status"], row["clients"], row["asked"]) for row in site.rows] == [("committed", 7, 10)]
    right(site, [0, 2, 3, 5, 6, 7, 9])
    assert audit_secure(site) == {1: [name(k) for k in (0, 2, 3, 5, 6, 7, 9)]}


LOST = {
    "keys": ("committed", "secure"),
    "shares": ("said", "r"),
    "masked": ("commit", "sent"),
}


@pytest.mark.parametrize("agreed", [False, True])
@pytest.mark.parametrize("phase", ["keys", "shares", "masked", "unmasking"])
@pytest.mark.parametrize("lost", [3, 4])
def test_three_of_ten_may_be_lost_in_any_phase_and_four_may_not(phase: str, lost: int, agreed: bool) -> None:
    signers = {name(k): Signer() for k in range(10)}
    devices = {who: signer.public for who, signer in signers.items()}
    lead = Signer()
    site = Site(ten(retries=0, secure=Secure(agreed=agreed)), parts(10))
    if agreed:
        site = Site(
            site.rules,
            site.data,
            lead_trust=CoordinatorTrust(lead, devices),
            client_trust=lambda client: ClientTrust(signers[client], lead.public, devices),
        )
    phases = {"keys": "key", "shares": "share", "masked": "ask", "unmasking": "reveal"}
    gone: set[str] = set()

    def doomed(k: int) -> Fault:
        def dies(point: str, what: str) -> float | None:
            """Before it commits the step of that phase, so that nothing of it is said."""
            if point != "commit" or "secure" not in what.split(","):
                return None
            peer = site.clients[k]
            assert peer.machine is not None
            if peer.machine.secure._said[0] != phases[phase]:  # type: ignore[attr-defined]
                return None
            gone.add(peer.name)
            return 1e9

        return dies

    for k in range(lost):
        site.clients[k].fault = doomed(k)
    assert site.run(seconds=200)
    assert len(gone) == lost
    row = site.rows[0]
    assert row["seconds"] <= 30.5
    alive = audit_secure(site)
    if lost == 3 or phase == "keys":  # of those that never came nothing is needed
        assert (row["status"], site.leads[-1].outcome) == ("committed", "rounds"), row
        left = range(0 if phase == "unmasking" else lost, 10)
        assert row["clients"] == len(left)
        assert alive == {1: [name(k) for k in left]}
        right(site, list(left))
    else:
        assert (row["status"], site.leads[-1].outcome) == ("aborted", "aborted")
        assert "too few for a secure sum: 6 of 10 clients" in row["why"]
        assert "7 are needed" in row["why"]
        assert alive == {}
        assert Listened(site).bare(1) == {}, "below the threshold no mask at all is known"


def test_one_that_counts_each_client_the_same() -> None:
    site = Site(replace(RULES, rounds=1, secure=Secure(equal=True)), DATA)
    assert site.run()
    deltas = [flat(minus(one, site.bases()[1])) for one in trained(site)]
    moved = flat(minus(site.weights(), site.bases()[1]))
    np.testing.assert_allclose(moved, np.mean(deltas, axis=0), atol=1e-7)


def trained(site: Site) -> list[dict[str, np.ndarray[Any, Any]]]:
    out = []
    for k, examples in enumerate(site.data):
        trainer = Softmax()
        trainer.load(site.bases()[1])
        trainer.fit(examples, Fit(**PLAN, seed=wire.seed_of(0, 1, name(k))))
        out.append(trainer.weights())
    return out


def test_numbers_beyond_the_clip_are_cut() -> None:
    site = Site(replace(RULES, rounds=1, secure=Secure(clip=0.02)), DATA)
    assert site.run()
    assert np.abs(flat(minus(site.weights(), site.bases()[1]))).max() <= 0.02
    assert all(client.machine is None or client.machine.secure.clipped > 0 for client in site.clients)  # type: ignore[attr-defined]


def test_large_updates_come_in_chunks() -> None:
    site = Site(replace(RULES, rounds=2), DATA, sizes={"inline": 64, "chunk": 256})
    small = Site(replace(RULES, rounds=2), DATA)
    assert site.run()
    assert small.run()
    assert site.model == small.model
    assert any(say.topic.endswith("/blob") for _, say in site.heard)


# -- kills ----------------------------------------------------------------------------------------------------------


def undisturbed() -> tuple[bytes, Deaths, Deaths]:
    lead, client = Deaths(), Deaths()
    site = Site(RULES, DATA, fault=lead, client_faults={name(1): client})
    assert site.run()
    audit_secure(site)
    return site.model, lead, client


MODEL, LEAD, CLIENT = undisturbed()
EVERYBODY = {number: [name(k) for k in range(5)] for number in (1, 2, 3)}


def test_there_are_all_kinds_of_points() -> None:
    assert {word.split()[0] for word in LEAD.where} == {"commit", "committed", "said"}
    assert LEAD.points > 150
    assert CLIENT.points > 35


@pytest.mark.parametrize("point", range(LEAD.points))
def test_a_coordinator_killed_anywhere_gives_the_same_bytes(point: int) -> None:
    died = Deaths([point])
    site = Site(RULES, DATA, fault=died)
    assert site.run()
    assert died.points > point
    assert audit_secure(site) == EVERYBODY
    assert site.model == MODEL
    assert [(row["round"], row["status"], row["clients"]) for row in site.rows] == [
        (number, "committed", 5) for number in (1, 2, 3)
    ]
    assert (site.world.now - BEGAN) / 1e9 < 12
    assert site.world.run(lambda: all(client.over for client in site.clients), seconds=60)


@pytest.mark.parametrize("sizes", [{}, {"inline": 64, "chunk": 256}])
@pytest.mark.parametrize("back", [0.0, 20.0])
def test_a_coordinator_killed_again_and_again_gives_the_same_bytes(back: float, sizes: dict[str, int]) -> None:
    site = Site(RULES, DATA, fault=Deaths(range(5, 4000, 19), back), sizes=sizes)
    assert site.run()
    assert site.model == MODEL
    if not sizes:
        assert audit_secure(site) == EVERYBODY


@pytest.mark.parametrize("point", range(CLIENT.points))
def test_a_client_killed_anywhere_goes_on_where_it_was(point: int) -> None:
    died = Deaths([point])
    site = Site(replace(RULES, quorum=5), DATA, client_faults={name(1): died})
    assert site.run()
    assert died.points > point
    assert audit_secure(site) == EVERYBODY
    assert site.model == MODEL


@pytest.mark.parametrize("point", range(CLIENT.points))
def test_a_client_killed_anywhere_that_nobody_has_to_wait_for_is_in_the_sum_or_not(point: int) -> None:
    died = Deaths([point], 1e9)
    site = Site(RULES, DATA, client_faults={name(1): died})
    assert site.run()
    assert died.points > point
    alive = audit_secure(site)
    assert [(row["round"], row["status"], row["clients"]) for row in site.rows] == [
        (number, "committed", len(alive[number])) for number in (1, 2, 3)
    ]
    others = [name(k) for k in (0, 2, 3, 4)]
    for number, clients in alive.items():
        assert clients in (others, EVERYBODY[number])


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_it_ends_and_no_mask_is_used_twice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rules = replace(RULES, rounds=3, least=6, quorum=3, deadline=20, wait=120, retries=4)
    faults: dict[str, Fault] = {
        name(k): Deaths(rng.integers(0, 80, 3).tolist(), float(rng.choice([0.0, 0.5, 8.0]))) for k in range(8)
    }
    site = Site(
        rules,
        parts(8),
        seed=seed,
        fault=Deaths(rng.integers(0, 300, int(rng.integers(0, 6))).tolist()),
        client_faults=faults,
        link=Link(0.01, float(rng.choice([0.0, 0.5, 2.0])), float(rng.choice([0.0, 0.1, 0.25])), 0.1),
    )
    for k in rng.integers(0, 8, 3):
        site.world.after(float(rng.uniform(0, 30)), site.world.kill, site.clients[k])
        if rng.random() < 0.6:
            site.world.after(40.0, site.world.begin, site.clients[k])
    assert site.run(seconds=5000)
    counted = audit_secure(site)
    job = msgspec.msgpack.decode(site.lead.disk["job"])
    assert job["outcome"] in {"rounds", "aborted", "too-few"}
    deaths = len(site.leads) - 1
    for row in site.rows:
        assert row["seconds"] <= 20.5 + 10.5 * deaths  # a coordinator that was away gives them half of it again
        if row["status"] == "committed":
            assert len(counted[row["round"]]) == row["clients"] >= 3
        else:
            assert row["why"]
    assert not [key for key in site.lead.disk if key.startswith(("secure/", "update/"))], (
        "a round leaves nothing behind"
    )


@pytest.mark.parametrize("lost", range(1, 40, 2))
@pytest.mark.parametrize("at", [0.05, 0.5, 1.04, 1.09, 2.0])
def test_a_disk_that_lost_its_last_moments_with_the_power_lays_nothing_open(at: float, lost: int) -> None:
    site = Site(RULES, DATA)
    disks: list[dict[str, bytes]] = [{}]
    witness = site.world.witness
    assert witness is not None

    def watch(peer: Any, commit: dict[str, Any]) -> None:
        witness(peer, commit)
        if peer is site.lead:
            disks.append(dict(peer.disk))

    site.world.witness = watch

    def cut() -> None:
        site.world.kill(site.lead)
        if len(disks) > lost + 1:
            site.lead.disk = dict(disks[-1 - lost])

    site.world.after(at, cut)
    site.world.after(at + 1.0, site.world.begin, site.lead)
    assert site.run()
    audit_secure(site, forgetful=True)
    assert site.leads[-1].outcome == "rounds"
    assert site.leads[-1].job.version == 3
    assert (site.world.now - BEGAN) / 1e9 < 100


# -- who does not take part -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [None, 3])
def test_one_that_trains_for_secure_sums_only_sends_nothing_in_the_clear(buffer: int | None) -> None:
    site = Site(replace(RULES, secure=None, rounds=1, retries=0, deadline=5, buffer=buffer), DATA, company=3)
    assert site.run()
    assert all(site.fits(k) == [] for k in range(5))
    assert site.leads[-1].outcome in {"aborted", "too-few"}
    assert not [say for _, say in site.heard if say.topic.endswith(("/up", "/offer", "/blob"))]
    said = [
        wire.hear(wire.Presence, say.payload).why
        for _, say in site.heard
        if say.topic.endswith("/state") and say.payload
    ]
    assert any("trains for secure sums only" in why for why in said)


def test_one_that_wants_more_company_stays_away_and_says_why() -> None:
    site = Site(replace(RULES, rounds=1, retries=0, deadline=5), DATA, company=6)
    assert site.run()
    assert site.rows[0]["status"] == "aborted"
    said = [
        wire.hear(wire.Presence, say.payload).why
        for _, say in site.heard
        if say.topic.endswith("/state") and say.payload
    ]
    assert any("few" in why for why in said), said
    assert site.rows[0]["seconds"] < 1, "nobody is waited for who has said that he will not"


def test_an_update_in_the_clear_is_refused() -> None:
    site = Site(replace(RULES, rounds=1), DATA)
    model = flat(Softmax().weights())
    said: list[wire.Call] = []

    def offer() -> None:
        call = said[-1]
        delta = {n: np.ones_like(a) for n, a in Softmax().weights().items()}
        for base in (call.base, "0" * 64):
            body = wire.pack_update(
                "j", call.run, 1, name(0), base=base, samples=3, packed=delta, extra={}, metrics={}, time=0
            )
            site.world.inject(f"c/{name(0)}/up", body)

    def look(peer: Any, say: Any) -> None:
        site.heard.append((peer.name, say))
        if say.topic == "round" and (call := wire.hear(wire.Call, say.payload)).phase == wire.MASKED:
            said.append(call)
            site.world.after(0.1, offer)

    site.world.tap = look
    assert site.run()
    assert site.rows[0]["status"] == "committed"
    acks = [wire.hear(wire.Ack, say.payload) for _, say in site.heard if say.topic == f"c/{name(0)}/ack"]
    assert {ack.reason for ack in acks if ack.status == wire.REFUSED} == {"base"}
    assert model.size == 123


def test_nonsense_on_the_topics_of_a_sum_disturbs_nobody() -> None:
    """Forged steps, steps of others repeated, of other rounds, cut short, and what is no message at all."""
    site = Site(RULES, DATA)
    rng = np.random.default_rng(3)

    def tap(peer: Any, say: Any) -> None:
        site.heard.append((peer.name, say))
        if say.topic.endswith(("/part", "/inbox")) or say.topic.startswith("r/"):
            part = wire.hear(wire.Part, say.payload)
            what = str(
                rng.choice(
                    ["key", "share", "agree", "reveal", "ask", "roster", "inbox", "survivors", "agreements", "?"]
                )
            )
            body = bytes(rng.integers(0, 256, 40, np.uint8))
            other = name(int(rng.integers(0, 5)))
            for topic in (say.topic, f"c/{other}/part", f"c/{other}/inbox", "r/1/roster"):
                for payload in (
                    b"",
                    say.payload[: int(rng.integers(1, len(say.payload)))],
                    wire.say(wire.Part(part.run, part.epoch, part.round, what, body)),
                    wire.say(wire.Part(part.run, part.epoch, part.round + 1, part.what, part.body)),
                    wire.say(wire.Part(part.run, part.epoch + 1, part.round, part.what, part.body)),
                ):
                    site.world.inject(topic, payload)
            if say.topic.endswith("/part"):
                site.world.inject(f"c/{other}/part", say.payload)  # in the name of somebody else

    site.world.tap = tap
    assert site.run()
    assert site.model == MODEL
    assert audit_secure(site) == EVERYBODY


def test_private_updates_are_shortened_where_they_are_made() -> None:
    """Central privacy: the coordinator cannot clip what it does not see; and the noise is on the sum, as without masks."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    from nodes.privacy.dp import Chance, Privacy, clipped
    from nodes.privacy.private import Private
    from schemas.problems import validated

    def make() -> Strategy:
        privacy = validated(Privacy, {"clip": 0.3, "noise": 0.2})
        return Private(fedavg.build(fedavg.Config()), privacy, 1, Chance(5))

    site = Site(replace(RULES, rounds=1, secure=Secure(equal=True, clip=0.3)), DATA, strategy=make)
    assert site.run()
    base = site.bases()[1]
    deltas = [minus(one, base) for one in trained(site)]
    assert all(np.linalg.norm(flat(delta)) > 0.3 for delta in deltas), "all of them are too long"
    total = np.asarray(sum(flat(clipped(delta, 0.3)) for delta in deltas))
    drawn = Chance(5)
    noise = np.concatenate([0.2 * 0.3 * drawn.normal(array.size) for array in base.values()])
    np.testing.assert_allclose(flat(minus(site.weights(), base)), (total + noise) / 5, atol=1e-6)
    assert site.rows[0]["samples"] == 5
    assert site.rows[0]["epsilon"] > 0


def test_the_mean_of_several_is_not_shortened_again() -> None:
    from nodes.privacy.dp import Chance, central

    delta = {"w": np.array([0.6, 0.8])}
    update = ClientUpdate("sum", delta, 4, clients=4)
    out = central([update], clip=1.0, noise=1e-9, expected=8, chance=Chance(0))
    np.testing.assert_allclose(out.delta["w"], delta["w"] / 2, atol=1e-8)


def test_a_job_whose_secure_was_changed_calls_the_round_again() -> None:
    site = Site(replace(RULES, rounds=1), DATA)
    site.world.after(0.5, lambda: site.world.kill(site.lead))

    def come_back() -> None:
        site.rules = replace(site.rules, secure=None)
        site.world.begin(site.lead)

    site.world.after(1.0, come_back)
    assert site.run()
    assert [(row["status"], "was changed" in row["why"]) for row in site.rows] == [
        ("aborted", True),
        ("committed", False),
    ]


def test_examples_are_not_looked_at_by_who_only_reads_a_call() -> None:
    """One that comes when keys are agreed takes no part, and is asked in the next round."""
    data: list[Examples] = parts(6)
    site = Site(replace(RULES, rounds=2, least=5), data, starts={name(5): 0.5})
    assert site.run()
    assert [row["clients"] for row in site.rows] == [5, 6]
    assert len(site.fits(5)) == 1


def test_the_mean_strategy_of_these_tests_sums() -> None:
    assert Mean.sums
