"""With keys, only what the coordinator signed moves a client, and only what a device sealed moves the model; who can merely write
to the bus can do neither, nor make one side doubt the other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_site import PLAN, Deaths, Mean, Site, Softmax, name, parts, plain_loop

from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.follower import Follower
from nodes.federated.identity import Leader, Member
from nodes.federated.local import Memory, Trained
from nodes.federated.machine import Answer
from nodes.federated.past import Order
from nodes.federated.rules import Limits, Rules, Secure
from nodes.federated.trust import ClientTrust, CoordinatorTrust
from nodes.federated.weights import Weights, digest
from nodes.privacy.keys import Signer

RULES = Rules(job="j", rounds=2, least=4, quorum=3, fit=PLAN, deadline=30.0, limits=Limits(norm=5.0, samples=1000))
DATA = parts(4)
LEAD = Signer()
DEVICES = {name(k): Signer() for k in range(4)}
KNOWN = {client: signer.public for client, signer in DEVICES.items()}
STRANGER = Signer()


def member(client: str) -> ClientTrust:
    return ClientTrust(DEVICES.get(client, STRANGER), LEAD.public)


def keyed(**more: Any) -> Site:
    """A job in which everybody has keys and knows the others'."""
    known: dict[str, Any] = {"lead_trust": CoordinatorTrust(LEAD, KNOWN), "client_trust": member, **more}
    return Site(RULES, DATA, **known)


def content(payload: bytes) -> bytes:
    """Without its signature."""
    found = wire.signed(payload)
    return payload if found is None else found.message


def calls(site: Site) -> list[wire.Call]:
    return [wire.hear(wire.Call, content(say.payload)) for _, say in site.heard if say.topic == "round"]


def acks(site: Site, client: str) -> list[wire.Ack]:
    topic = f"c/{client}/ack"
    return [wire.hear(wire.Ack, content(say.payload)) for _, say in site.heard if say.topic == topic]


def collecting(site: Site) -> wire.Call:
    """Let the first round be called, and give its call."""
    assert site.world.run(lambda: any(call.phase == wire.COLLECTING for call in calls(site)))
    return next(call for call in calls(site) if call.phase == wire.COLLECTING)


def ones(value: float = 0.1) -> Weights:
    return {n: np.full_like(a, value) for n, a in Softmax().weights().items()}


def update(call: wire.Call, client: str, number: int | None = None) -> bytes:
    more: dict[str, Any] = {"base": call.base, "samples": 10, "packed": ones(), "extra": {}, "metrics": {}, "time": 0}
    return wire.pack_update("j", call.run, call.round if number is None else number, client, **more)


def sealed(call: wire.Call, client: str, by: Signer, number: int | None = None) -> bytes:
    """An update of that client as its device would send it, by whoever has the key ``by``."""
    asked = call if number is None else msgspec.structs.replace(call, round=number)
    closing = Member("j", client, ClientTrust(by)).closed(
        asked, lambda: Trained(update(call, client, number), Memory.of(None), 9)
    )
    return closing().payload


def signed(topic: str, message: Any, by: Signer = LEAD) -> bytes:
    """A coordinator's message, signed by whoever has that key."""
    return Leader("j", CoordinatorTrust(by)).say(topic, wire.say(message))


# -- a job with keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"inline": 64, "chunk": 256}], ids=["inline", "blobs"])
def test_a_job_with_keys_learns_what_one_without_does(sizes: dict[str, int]) -> None:
    site = keyed(sizes=sizes)
    assert site.run()
    expected = plain_loop(DATA, 2)[-1]
    assert all(np.array_equal(array, expected[n]) for n, array in site.weights().items())
    for who, say in site.heard:
        what = say.topic.rpartition("/")[2]
        if who == "lead":
            assert (wire.signed(say.payload) is not None) != say.topic.startswith("blob/")
        elif what in {"state", "offer", "ask"}:
            assert wire.signed(say.payload) is not None
        elif what == "up":
            assert wire.sealed(say.payload) is not None
    assert site.leads[0].identity.passed_over == 0


@pytest.mark.parametrize("seed", range(6))
def test_deaths_on_both_sides_are_survived_with_keys_too(seed: int) -> None:
    draw = np.random.default_rng(seed)

    def deaths(among: int) -> Deaths:
        return Deaths(draw.choice(among, 4, replace=False).tolist())

    site = keyed(fault=deaths(40), client_faults={name(k): deaths(12) for k in range(4)})
    assert site.run()
    assert [row["status"] for row in site.rows] == ["committed"] * len(site.rows)
    site.replay(Mean().aggregate)  # each model is that of the updates that were committed
    assert all(not row["refused"] for row in site.rows)


@pytest.mark.parametrize(
    ("lead", "client"),
    [
        (CoordinatorTrust(), ClientTrust(STRANGER)),
        (CoordinatorTrust(LEAD), ClientTrust()),
        (CoordinatorTrust(LEAD), ClientTrust(STRANGER)),
        (CoordinatorTrust(LEAD), ClientTrust(STRANGER, LEAD.public)),
        (CoordinatorTrust(LEAD), ClientTrust(None, LEAD.public)),
        (CoordinatorTrust(None, dict.fromkeys(KNOWN, STRANGER.public)), ClientTrust(STRANGER)),
    ],
    ids=["device only", "lead only", "both, unknown", "lead known", "no device key", "devices known, lead without"],
)
def test_who_has_only_some_of_the_keys_takes_part_as_far_as_they_go(
    lead: CoordinatorTrust, client: ClientTrust
) -> None:
    site = keyed(lead_trust=lead, client_trust=lambda _: client)
    assert site.run()
    assert [row["clients"] for row in site.rows] == [4, 4]


def test_a_job_without_keys_does_not_load_the_library_for_them() -> None:
    script = (
        "import sys; from job_site import *; site = Site(Rules(job='j', rounds=1, least=2, fit=PLAN), parts(2));"
        "assert site.run(); print([name for name in sys.modules if name.startswith('cryptography')])"
    )
    there = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=there, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- what is sent in a device's name --------------------------------------------------------------------------------


def changed(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


def another_coordinator(call: wire.Call) -> bytes:
    return sealed(
        msgspec.structs.replace(call, seal=Leader("j", CoordinatorTrust(Signer())).seal), "c003", DEVICES["c003"]
    )


FORGED: dict[str, tuple[Callable[[wire.Call], bytes], str]] = {
    "garbage": (lambda call: b"\x00\xffgarbage", "unsigned"),
    "plain": (lambda call: update(call, "c003"), "unsigned"),
    "signed and not sealed": (
        lambda call: sealed(msgspec.structs.replace(call, seal=b""), "c003", DEVICES["c003"]),
        "unsealed",
    ),
    "by a stranger": (lambda call: sealed(call, "c003", STRANGER), "signature"),
    "by another device": (lambda call: sealed(call, "c003", DEVICES["c001"]), "signature"),
    "another's own": (lambda call: sealed(call, "c001", DEVICES["c001"]), "signature"),
    "of another round": (
        lambda call: wire.say(
            msgspec.structs.replace(
                wire.hear(wire.Sealed, sealed(call, "c003", DEVICES["c003"], call.round + 1)), round=call.round
            )
        ),
        "signature",
    ),
    "of another run": (
        lambda call: sealed(msgspec.structs.replace(call, run=call.run + 1), "c003", DEVICES["c003"]),
        "job",
    ),
    "to another coordinator": (another_coordinator, "signature"),
    "changed": (lambda call: changed(sealed(call, "c003", DEVICES["c003"])), "signature"),
    "an empty box": (lambda call: wire.say(wire.Sealed(call.run, call.round, KNOWN["c003"], b"")), "signature"),
}


@pytest.mark.parametrize("what", [key for key in FORGED if key != "of another run"])
def test_an_update_that_the_device_did_not_seal_is_kept_out_and_does_not_keep_the_device_out(what: str) -> None:
    forge, reason = FORGED[what]
    site = keyed(took=lambda machine, work: 3.0 if work == "fit" else 0.0)
    call = collecting(site)
    payload = forge(call)
    for at in (0.1, 0.2, 2.9):  # its own comes after three seconds
        site.world.after(at, site.world.inject, "c/c003/up", payload)
    assert site.run()
    assert {(ack.status, ack.reason) for ack in acks(site, "c003")} == {(wire.REFUSED, reason), (wire.TAKEN, "")}
    kept = [msgspec.msgpack.decode(value) for key, value in site.lead.disk.items() if key.startswith("quarantine/")]
    assert [(one["reason"], one["payload"]) for one in kept] == [(reason, payload)]
    assert [row["clients"] for row in site.rows] == [4, 4]
    expected = plain_loop(DATA, 2)[-1]
    assert all(np.array_equal(array, expected[n]) for n, array in site.weights().items())
    assert site.fits(3) == [wire.seed_of(0, number, "c003") for number in (1, 2)]


def test_an_update_of_a_run_that_was_is_refused() -> None:
    site = keyed()
    call = collecting(site)
    site.world.kill(site.clients[3], will=1e9)
    site.world.inject("c/c003/up", FORGED["of another run"][0](call))
    assert site.run()
    assert acks(site, "c003")[0].reason == "job"
    assert site.rows[0]["clients"] == 3


def test_an_update_that_was_taken_counts_once_however_often_it_is_replayed() -> None:
    site = keyed(starts={})
    collecting(site)
    assert site.world.run(lambda: len(acks(site, "c003")) == 1)
    [box] = [say.payload for who, say in site.heard if say.topic == "c/c003/up"]
    for at in (0.1, 0.7, 1.5, 2.2):  # in its round and in the next one
        site.world.after(at, site.world.inject, "c/c003/up", box)
    assert site.run()
    assert site.replay(Mean().aggregate) == [(name(k), number) for number in (1, 2) for k in range(4)]
    assert [row["refused"] for row in site.rows] == [0, 0]


def test_who_is_not_known_takes_no_part() -> None:
    site = keyed(lead_trust=CoordinatorTrust(LEAD, {client: KNOWN[client] for client in ("c000", "c001", "c002")}))
    site.rules = Rules(job="j", rounds=2, least=3, quorum=3, fit=PLAN, deadline=30.0)
    call = collecting(site)
    site.world.inject("c/c003/up", sealed(call, "c003", DEVICES["c003"]))
    assert site.run()
    assert all("c003" not in found.cohort for found in calls(site))
    assert acks(site, "c003")[0].reason == "unknown-client"
    assert not any("c003" in key for key in site.lead.disk)


def test_who_was_here_before_the_keys_came_has_to_show_his() -> None:
    """A job begun without keys and resumed with them: clients kept from then are asked only once they have signed."""
    site = Site(RULES, DATA)
    site.world.run(lambda: len(site.lead.rows) == 1)
    lead = Coordinator(RULES, Mean(), Softmax().weights(), trust=CoordinatorTrust(LEAD, {"c001": KNOWN["c001"]}))
    lead.start({key: msgspec.msgpack.decode(value) for key, value in site.lead.disk.items()}, site.world.now)
    assert set(lead.roster.members) == {"c001"}


def presence(site: Site, **changes: Any) -> bytes:
    [said] = [say.payload for _, say in site.heard if say.topic == "c/c003/state"][:1]
    return wire.say(msgspec.structs.replace(wire.hear(wire.Presence, content(said)), **changes))


@pytest.mark.parametrize("by", [None, STRANGER, DEVICES["c001"]], ids=["unsigned", "a stranger", "another device"])
def test_nobody_says_for_another_that_he_is_gone(by: Signer | None) -> None:
    site = keyed(took=lambda machine, work: 3.0 if work == "fit" else 0.0)
    call = collecting(site)
    gone = presence(site, here=False)
    if by is not None:
        gone = Member("j", "c003", ClientTrust(by)).say("c/c003/state", gone)
    skips = presence(site, skips=call.round)
    lead = site.leads[0]
    told: list[str] = []
    for payload in (gone, skips, b"", gone):
        answer = lead.heard("c/c003/state", payload, site.world.now)
        assert not answer.say
        assert not answer.commit
        told += answer.tell
    assert told == ["client 'c003' is not believed: not signed with the key that is known"]
    assert lead.identity.passed_over == 4
    assert lead.roster.able("c003", call.round)
    assert site.run()
    assert [row["clients"] for row in site.rows] == [4, 4]


def test_an_answer_is_not_had_by_asking_in_anothers_name() -> None:
    """Else, asked about an update on its way, the coordinator would truly say that it has none, and it would be dropped."""
    site = keyed()
    call = collecting(site)
    lead = site.leads[0]
    ask = wire.say(wire.Ask(answer=call.round))
    assert lead.heard("c/c003/ask", ask, site.world.now).say == []
    theirs = Member("j", "c003", ClientTrust(DEVICES["c003"])).say("c/c003/ask", ask)
    assert [say.topic for say in lead.heard("c/c003/ask", theirs, site.world.now).say] == ["c/c003/ack"]
    assert lead.heard("c/c001/ask", theirs, site.world.now).say == []  # said again on another's topic


def test_an_offer_in_anothers_name_does_not_end_what_it_sends() -> None:
    site = keyed(sizes={"inline": 64, "chunk": 256})
    call = collecting(site)
    assert site.world.run(lambda: any(say.topic == "c/c003/blob" for _, say in site.heard))
    lead = site.leads[0]
    lead.heard("c/c003/offer", wire.say(wire.Parcel(call.run, call.round, "0" * 64, 10, 10)), site.world.now)
    lead.heard("c/c003/up", b"rubbish", site.world.now)
    assert site.run()
    offers = {content(say.payload) for who, say in site.heard if say.topic == "c/c003/offer"}
    assert len(offers) == 2  # one for each round: the update went through as it was offered
    assert [row["clients"] for row in site.rows] == [4, 4]


# -- what is said in the coordinator's name -------------------------------------------------------------------------

CALL = wire.Call("j", 5, 6, 7, wire.COLLECTING, digest(Softmax().weights()), cohort=("c000",), fit=PLAN, seal=b"")
NOW = 10**18


def alone(**trust: Any) -> Client:
    """A client by hand, that has the model."""
    known: dict[str, Any] = {"signer": DEVICES["c000"], "coordinator": LEAD.public, **trust}
    client = Client("j", "c000", Softmax(), lambda: DATA[0], lambda: len(DATA[0]), trust=ClientTrust(**known))
    client.start({}, NOW)
    return client


def manifest() -> wire.Manifest:
    model = Softmax().weights()
    data = wire.pack_model(model, {})
    return wire.Manifest("j", 5, 6, 0, 0, digest(model), "", len(data), Softmax().form, data=data)


def called(seal: bool = True) -> wire.Call:
    return msgspec.structs.replace(CALL, seal=Leader("j", CoordinatorTrust(LEAD)).seal if seal else b"")


FALSE: dict[str, Callable[[str, Any], bytes]] = {
    "unsigned": lambda topic, message: wire.say(message),
    "by a stranger": lambda topic, message: signed(topic, message, STRANGER),
    "by a device": lambda topic, message: signed(topic, message, DEVICES["c001"]),
    "said elsewhere": lambda topic, message: signed("c/c001/" + topic.rpartition("/")[2], message),
    "of another job": lambda topic, message: Leader("k", CoordinatorTrust(LEAD)).say(topic, wire.say(message)),
    "changed": lambda topic, message: changed(signed(topic, message)),
    "signed by nothing": lambda topic, message: wire.say(wire.Signed(b"", wire.say(message))),
}


@pytest.mark.parametrize("how", FALSE)
def test_what_the_coordinator_did_not_sign_moves_no_client(how: str) -> None:
    forge = FALSE[how]
    client = alone()
    told = client.heard("model", forge("model", manifest()), NOW).tell
    client.heard("model", signed("model", manifest()), NOW)
    for _ in range(3):
        answer = client.heard("round", forge("round", called()), NOW)
        assert (answer.work, answer.say, answer.commit) == (None, [], {})
        told += answer.tell
    assert told == [
        f"passed over on {what!r}: not signed by the coordinator whose key is known here" for what in ("model", "round")
    ]
    assert client.identity.passed_over == 4
    over = msgspec.structs.replace(called(), phase=wire.OVER, why="rounds")
    assert not client.heard("round", forge("round", over), NOW).over
    work = client.heard("round", signed("round", called()), NOW).work
    assert work is not None
    [said] = client.worked(work.name, work.act(), NOW).say
    assert said.topic == "c/c000/up"
    taken = wire.Ack(5, 6, 7, wire.TAKEN)
    client.heard("c/c000/ack", forge("c/c000/ack", taken), NOW)
    assert [say.topic for say in client.tick(NOW + 10**10).say] == ["c/c000/up"]  # it is not believed to be there
    client.heard("c/c000/ack", signed("c/c000/ack", taken), NOW)
    assert client.tick(NOW + 10**11).say[:1] != [said]


def test_a_manifest_that_is_not_the_coordinators_is_not_trained_from() -> None:
    client = alone()
    client.heard("model", wire.say(manifest()), NOW)
    assert client.heard("round", signed("round", called()), NOW).work is None


def test_a_true_answer_to_a_false_update_does_not_end_ours() -> None:
    client = alone()
    client.heard("model", signed("model", manifest()), NOW)
    work = client.heard("round", signed("round", called()), NOW).work
    assert work is not None
    client.worked(work.name, work.act(), NOW)
    refused = wire.Ack(5, 6, 7, wire.REFUSED, "signature", "not its device's")
    [told] = client.heard("c/c000/ack", signed("c/c000/ack", refused), NOW).tell
    assert told.startswith("the coordinator refused an update in our name (signature)")
    assert [say.topic for say in client.tick(NOW + 10**10).say] == ["c/c000/up"]


def test_a_client_that_knows_the_coordinator_never_sends_an_open_update_to_a_false_one() -> None:
    client = alone()
    client.heard("model", signed("model", manifest()), NOW)
    for false in (
        called(seal=False),
        msgspec.structs.replace(called(), seal=Leader("j", CoordinatorTrust(STRANGER)).seal),
    ):
        assert client.heard("round", wire.say(false), NOW).work is None


def test_an_old_call_said_again_does_nothing() -> None:
    site = keyed()
    assert site.world.run(lambda: len(site.lead.rows) == 1)
    first = [say.payload for _, say in site.heard if say.topic == "round"]
    models = [say.payload for _, say in site.heard if say.topic == "model"]
    for n, payload in enumerate(first):
        site.world.after(0.01 * n, partial(site.world.inject, "round", payload, retain=True))
        site.world.after(0.01 * n, partial(site.world.inject, "model", models[0], retain=True))
    assert site.run()
    assert all(len(site.fits(k)) == 2 for k in range(4))
    assert site.replay(Mean().aggregate) == [(name(k), number) for number in (1, 2) for k in range(4)]
    assert site.world.run(lambda: all(client.over for client in site.clients), seconds=60)


def test_a_call_of_an_earlier_life_is_passed_over_and_ours_is_put_back() -> None:
    site = keyed()
    collecting(site)
    old = next(say.payload for _, say in site.heard if say.topic == "round")
    site.world.kill(site.lead)
    site.world.after(0.1, site.world.begin, site.lead)
    site.world.run(lambda: len({call.epoch for call in calls(site)}) == 2)
    site.world.inject("round", old, retain=True)
    assert site.run()
    assert all(len(site.fits(k)) == 2 for k in range(4))
    epochs = [call.epoch for call in calls(site)]
    assert wire.hear(wire.Call, content(site.world.retained["round"])).epoch == max(epochs)


@pytest.mark.parametrize("by", [None, STRANGER], ids=["unsigned", "a stranger"])
def test_nobody_else_fences_the_coordinator(by: Signer | None) -> None:
    site = keyed()
    call = collecting(site)
    false = msgspec.structs.replace(call, epoch=call.epoch + 10**6, phase=wire.OVER, why="because")
    payload = wire.say(false) if by is None else signed("round", false, by)
    site.world.inject("round", payload, retain=True)
    assert site.run()
    assert site.leads[0].outcome == "rounds"
    assert wire.signed(site.world.retained["round"]) is not None
    assert wire.hear(wire.Call, content(site.world.retained["round"])).epoch == call.epoch


def test_a_coordinator_with_the_same_key_does() -> None:
    site = keyed()
    site.world.run(seconds=0.45)
    twin = site.world.add("twin", site.coordinator, at=0.1)
    twin.disk = dict(site.lead.disk)
    assert site.world.run(lambda: twin.over, seconds=200)
    assert site.leads[0].outcome == "fenced"
    assert [row["status"] for row in twin.rows] == ["committed"] * 2


# -- who only listens -----------------------------------------------------------------------------------------------


def test_a_follower_takes_over_only_what_the_coordinator_signed() -> None:
    taken: list[int] = []
    follower = Follower("j", "seen-model", lambda said, weights: taken.append(said.round), LEAD.public)

    def hear(payload: bytes) -> Answer:
        answer = follower.heard("model", payload, NOW)
        if answer.work is not None:
            follower.worked("take", answer.work.act(), NOW)
        return answer

    for how, forge in FALSE.items():
        assert hear(forge("model", manifest())).work is None, how
    hear(signed("model", msgspec.structs.replace(manifest(), round=3, version=2)))
    assert taken == [3]
    hear(signed("model", msgspec.structs.replace(manifest(), round=2, version=1)))  # an older one, truly signed
    assert taken == [3]


# -- anything at all ------------------------------------------------------------------------------------------------

TOPICS = [
    "round",
    "model",
    "state",
    "c/c000/ack",
    "c/c000/up",
    "c/c000/state",
    "c/c000/offer",
    "c/c000/ask",
    "c//up",
    "x",
    "",
]
MESSAGES: list[Any] = [wire.Presence(True, "f", 3), CALL, manifest(), wire.Ack(5, 6, 7, wire.TAKEN), wire.Ask("m", 3)]


@st.composite
def payloads(draw: st.DrawFn) -> tuple[str, bytes]:
    """Messages and noise, wrapped well or badly."""
    topic = draw(st.sampled_from(TOPICS))
    inner = draw(st.binary(max_size=40) | st.sampled_from([wire.say(message) for message in MESSAGES]))
    match draw(st.integers(0, 4)):
        case 0:
            return topic, inner
        case 1:
            return topic, Leader("j", CoordinatorTrust(LEAD)).say(topic, inner)
        case 2:
            return topic, wire.say(wire.Signed(draw(st.binary(max_size=64)), inner))
        case 3:
            return topic, wire.say(wire.Sealed(draw(st.integers(-5, 2**40)), 7, draw(st.binary(max_size=33)), inner))
        case _:
            return topic, wire.say(wire.Signed(b"x" * 64, inner))[: draw(st.integers(1, 60))]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(heard=st.lists(payloads(), max_size=10))
def test_no_message_raises_with_keys(heard: list[tuple[str, bytes]]) -> None:
    client, now = alone(), NOW
    lead = Coordinator(Rules(job="j", fit=PLAN), Mean(), Softmax().weights(), trust=CoordinatorTrust(LEAD, KNOWN))
    lead.start({}, now)
    for machine in (client, lead):
        for topic, payload in heard:
            now += 10**8
            answer = machine.heard(topic, payload, now)
            msgspec.msgpack.encode([answer.commit, answer.tell, [say.topic for say in answer.say]])


# -- secure sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"inline": 64, "chunk": 256}], ids=["inline", "blobs"])
def test_a_secure_sum_with_keys_is_signed_in_each_step_and_its_updates_are_sealed(sizes: dict[str, int]) -> None:
    rules = replace(RULES, secure=Secure(agreed=True))
    trusts = {client: ClientTrust(signer, LEAD.public, KNOWN) for client, signer in DEVICES.items()}
    lead = CoordinatorTrust(LEAD, KNOWN)
    site = Site(rules, DATA, lead_trust=lead, client_trust=trusts.__getitem__, sizes=sizes)
    assert site.run()
    assert [(row["status"], row["clients"]) for row in site.rows] == [("committed", 4)] * 2
    expected = plain_loop(DATA, 2)[-1]
    assert all(np.allclose(array, expected[n], atol=1e-5) for n, array in site.weights().items())
    steps = [say for _, say in site.heard if say.topic.startswith("r/") or say.topic.endswith(("/part", "/inbox"))]
    assert {wire.hear(wire.Part, content(say.payload)).what for say in steps} >= {
        "key", "roster", "share", "inbox", "survivors", "agree", "agreements", "reveal"
    }  # fmt: skip
    assert all(wire.signed(say.payload) is not None for say in steps)
    assert all(wire.sealed(say.payload) is not None for _, say in site.heard if say.topic.endswith("/up"))


@pytest.mark.parametrize("by", [None, STRANGER, DEVICES["c001"]], ids=["unsigned", "a stranger", "another device"])
def test_nobody_puts_a_client_out_of_a_secure_sum_or_speaks_for_it(by: Signer | None) -> None:
    rules = replace(RULES, rounds=1, secure=Secure())
    site = Site(rules, DATA, lead_trust=CoordinatorTrust(LEAD, KNOWN), client_trust=member)
    assert site.world.run(lambda: any(say.topic == "c/c000/part" for _, say in site.heard))
    call = next(call for call in calls(site) if call.secure)
    terms = (call.run, call.secure["epoch"], call.round)
    machine: Any = site.clients[0].machine
    for topic in ("c/c000/inbox", f"r/{call.round}/roster"):
        out = wire.say(wire.Part(*terms, "out", b"changed: it is not wanted"))
        payload = out if by is None else signed(topic, wire.hear(wire.Part, out), by)
        answer = machine.heard(topic, payload, site.world.now)
        assert not answer.commit
        assert not answer.say
    assert machine.identity.passed_over == 2
    step = wire.say(wire.Part(*terms, "key", b"rubbish"))
    said = step if by is None else Member("j", "c000", ClientTrust(by)).say("c/c000/part", step)
    answer = site.leads[0].heard("c/c000/part", said, site.world.now)
    assert not answer.commit
    assert not answer.say
    assert site.leads[0].identity.passed_over == 1
    assert site.run()
    assert [(row["status"], row["clients"]) for row in site.rows] == [("committed", 4)]


@pytest.mark.parametrize("by", [None, STRANGER, LEAD], ids=["unsigned", "a stranger", "the leader"])
def test_an_order_to_go_back_is_followed_only_with_the_leaders_key(by: Signer | None) -> None:
    site = keyed()

    def order() -> None:
        said = msgspec.msgpack.encode(Order("me", calls(site)[-1].run, 0, 1))
        site.world.inject("order", said if by is None else Leader("j", CoordinatorTrust(by)).say("order", said))

    assert site.world.run(lambda: bool(site.rows) and site.rows[-1]["version"] == 1)
    order()
    assert site.run()
    backs = [row for row in site.rows if "gone back to" in row["why"]]
    assert len(backs) == (1 if by is LEAD else 0)
