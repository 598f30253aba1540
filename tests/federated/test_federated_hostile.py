"""Nothing that arrives kills a machine, and nothing that is not an update of that round is added up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_site import PLAN, Mean, Site, Softmax, audit, name, parts

from nodes.federated import wire
from nodes.federated.client import Client
from nodes.federated.coordinator import Coordinator
from nodes.federated.rules import Limits, Rules
from nodes.federated.weights import UnfitError, Weights, digest
from schemas.codec import encode
from schemas.errors import ConfigError
from schemas.messages import Event, Message

RULES = Rules(job="j", rounds=2, least=4, quorum=3, fit=PLAN, deadline=30.0, limits=Limits(norm=5.0, samples=1000))
DATA = parts(4)


def running() -> tuple[Site, wire.Call, Weights]:
    """A job with three honest clients and one, ``c003``, that the test plays; and what is asked in the first round."""
    site = Site(RULES, DATA)
    peer = site.clients[3]
    site.world.run(lambda: any(say.topic == "round" and b"collecting" in say.payload for _, say in site.heard))
    site.world.kill(peer, will=1e9)
    call = next(
        found
        for found in (wire.hear(wire.Call, say.payload) for _, say in site.heard if say.topic == "round")
        if found.phase == wire.COLLECTING
    )
    return site, call, Softmax().weights()


def update(call: wire.Call, delta: Weights, **more: Any) -> bytes:
    known: dict[str, Any] = {"job": "j", "run": call.run, "number": call.round, "client": name(3), "base": call.base}
    known.update(samples=10, packed=delta, extra={}, metrics={}, time=0)
    known.update(more)
    return wire.pack_update(known.pop("job"), known.pop("run"), known.pop("number"), known.pop("client"), **known)


def ones(value: float = 0.1) -> Weights:
    return {n: np.full_like(a, value) for n, a in Softmax().weights().items()}


Forge = Callable[[wire.Call], bytes]


def nan(call: wire.Call) -> bytes:
    delta = ones()
    delta["bias"][1] = math.nan
    return update(call, delta)


BAD: dict[str, tuple[Forge, str]] = {
    "garbage": (lambda call: b"\x00\xffgarbage", "not-msgpack"),
    "empty": (lambda call: b"", "not-msgpack"),
    "another type": (
        lambda call: encode(Message("i", "s", 0, Event(name="x"))),
        "bad-body",
    ),
    "nan": (nan, "not-finite"),
    "infinite": (lambda call: update(call, ones(math.inf)), "not-finite"),
    "missing array": (lambda call: update(call, {"kernel": ones()["kernel"]}), "names"),
    "foreign array": (lambda call: update(call, {**ones(), "more": np.zeros(3, np.float32)}), "names"),
    "shape": (lambda call: update(call, {**ones(), "bias": np.zeros(4, np.float32)}), "shape"),
    "dtype": (lambda call: update(call, {**ones(), "bias": np.zeros(3, np.float64)}), "dtype"),
    "norm": (lambda call: update(call, ones(1e6)), "norm"),
    "base": (lambda call: update(call, ones(), base="0" * 64), "base"),
    "no samples": (lambda call: update(call, ones(), samples=0), "samples"),
    "fewer than none": (lambda call: update(call, ones(), samples=-5), "samples"),
    "absurd samples": (lambda call: update(call, ones(), samples=10**15), "samples"),
    "another's name": (lambda call: update(call, ones(), client=name(1)), "client"),
    "another job": (lambda call: update(call, ones(), job="k"), "job"),
    "another run": (lambda call: update(call, ones(), run=call.run + 1), "job"),
    "future": (lambda call: update(call, ones(), number=call.round + 1), "future"),
    "round 0": (lambda call: update(call, ones(), number=0), "future"),
    "extra of no form": (lambda call: update(call, ones(), extra={"kernel": np.zeros(2, np.float32)}), "extra"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_update_is_refused_with_its_reason_and_leaves_no_trace_in_the_model(what: str) -> None:
    forge, reason = BAD[what]
    site, call, _ = running()
    payload = forge(call)
    for at in (0.1, 0.2):  # a repeat gets the same answer
        site.world.after(at, site.world.inject, "c/c003/up", payload)
    assert site.run()
    acks = [wire.hear(wire.Ack, say.payload) for _, say in site.heard if say.topic == "c/c003/ack"]
    assert {(ack.status, ack.reason) for ack in acks[:2]} == {(wire.REFUSED, reason)}
    assert site.rows[0]["clients"] == 3
    assert audit(site)[1] == [name(0), name(1), name(2)]
    kept = [msgspec.msgpack.decode(value) for key, value in site.lead.disk.items() if key.startswith("quarantine/")]
    if reason == "future":
        assert kept == []
    else:
        assert [(one["reason"], one["payload"]) for one in kept] == [(reason, payload)]
        assert site.rows[0]["refused"] == 1


def test_a_refused_client_may_send_a_good_one_yet() -> None:
    site, call, _ = running()
    for k in (0, 1, 2):
        site.world.peers[name(k)].took = lambda machine, work: 5.0
    site.world.after(0.1, site.world.inject, "c/c003/up", nan(call))
    site.world.after(0.2, site.world.inject, "c/c003/up", update(call, ones()))
    site.world.after(0.3, site.world.inject, "c/c003/up", update(call, ones(0.2)))  # the first good one wins
    assert site.run()
    acks = [wire.hear(wire.Ack, say.payload) for _, say in site.heard if say.topic == "c/c003/ack"]
    assert [ack.status for ack in acks][:3] == [wire.REFUSED, wire.TAKEN, wire.TAKEN]
    assert site.rows[0]["clients"] == 4
    models = site.models_by_version()
    honest = [
        wire.unpack_update(say.payload)[1]
        for who, say in site.heard
        if say.topic.endswith("/up") and wire.unpack_update(say.payload)[1].round == 1
    ]
    total = sum(body.samples for body in honest) + 10
    wanted = sum(body.tensors["bias"] * body.samples for body in honest) / total + 0.1 * 10 / total
    assert models[1]["bias"] == pytest.approx(wanted, abs=1e-6)


def test_who_is_unknown_or_not_asked_is_told() -> None:
    site, call, _ = running()
    stranger = update(call, ones(), client="nobody")
    site.world.after(0.1, site.world.inject, "c/nobody/up", stranger)
    late = Softmax().form
    site.world.after(0.15, site.world.inject, "c/late/state", wire.say(wire.Presence(True, wire.form(late), 5)))
    site.world.after(0.2, site.world.inject, "c/late/up", update(call, ones(), client="late"))
    assert site.run()
    acks = {say.topic: wire.hear(wire.Ack, say.payload) for _, say in site.heard if say.topic.endswith("/ack")}
    assert acks["c/nobody/ack"].reason == "unknown-client"
    assert acks["c/late/ack"].reason == "not-asked"
    assert not any(key.startswith("quarantine/") for key in site.lead.disk)


def test_the_quarantine_is_bounded() -> None:
    site, _, _ = running()
    for k in range(200):
        site.world.inject(f"c/x{k:03}/up", b"rubbish")
    assert site.run()
    assert sum(key.startswith("quarantine/") for key in site.lead.disk) == 32


# -- fencing --------------------------------------------------------------------------------------------------------


def test_a_newer_coordinator_fences_the_older() -> None:
    site = Site(RULES, DATA)
    site.world.run(seconds=0.45)
    twin = site.world.add("twin", site.coordinator, at=0.1)
    twin.disk = dict(site.lead.disk)  # a standby with a copy
    assert site.world.run(lambda: twin.over, seconds=200)
    assert site.lead.over
    assert site.lead.rows == []  # it did not get to one
    assert [row["status"] for row in twin.rows] == ["committed"] * 2
    assert msgspec.msgpack.decode(twin.disk["job"])["outcome"] == "rounds"


def test_what_an_older_coordinator_says_is_passed_over() -> None:
    site, call, _ = running()
    old = msgspec.structs.replace(call, epoch=call.epoch - 1, round=99, cohort=(name(0),), base="1" * 64)
    site.world.inject("round", wire.say(old), retain=True)
    assert site.run()
    assert wire.hear(wire.Call, site.world.retained["round"]).epoch >= call.epoch  # ours is put back
    audit(site)
    assert all(len(site.fits(k)) == 2 for k in range(3))


def test_the_remains_of_yesterday_end_nobody() -> None:
    yesterday = wire.Call("j", run=5, epoch=5, round=7, phase=wire.OVER, base="", why="rounds")
    site = Site(RULES, DATA)
    site.world.retained["round"] = wire.say(yesterday)
    assert site.run()
    assert [row["status"] for row in site.rows] == ["committed"] * 2


def test_a_client_that_finds_only_the_remains_ends_after_a_while() -> None:
    site = Site(RULES, DATA)
    site.world.kill(site.lead)
    site.world.peers.pop("lead")
    site.lead.over = True
    site.world.retained["round"] = wire.say(wire.Call("j", run=5, epoch=5, round=7, phase=wire.OVER, base=""))
    began = site.world.now
    assert site.world.run(lambda: all(client.over for client in site.clients), seconds=1000)
    assert 55e9 < site.world.now - began < 70e9


def test_a_coordinator_that_lost_its_disk_begins_a_new_run_and_the_clients_follow() -> None:
    site = Site(RULES, DATA)
    site.world.run(lambda: len(site.lead.rows) == 1)
    site.world.kill(site.lead)
    site.lead.disk.clear()
    site.world.after(1.0, site.world.begin, site.lead)
    assert site.run()
    assert [row["round"] for row in site.lead.rows][-2:] == [1, 2]
    assert site.world.run(lambda: all(client.over for client in site.clients), seconds=60)


# -- anything at all ------------------------------------------------------------------------------------------------

PIECES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MESSAGES: list[Any] = [
    wire.Presence(True, "f", 3),
    wire.Call("j", 1, 2, 3, wire.COLLECTING, "b", 5, 2, ("c000",)),
    wire.Manifest("j", 1, 2, 3, 4, "d", "b", 1, Softmax().form, data=b"x"),
    wire.Ack(1, 2, 3, wire.TAKEN),
    wire.Ask("m", 3),
]
TOPICS = ["round", "model", "c/c000/ack", "c/c000/up", "c/c000/state", "c/c000/ask", "c/c000/need", "c//up", "x", ""]


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Noise, plain msgpack, and messages of ours with something else in one place."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=64))
    fields = msgspec.to_builtins(draw(st.sampled_from(MESSAGES)))
    for key in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
        fields[key] = draw(PIECES)
    return msgspec.msgpack.encode(fields)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(heard=st.lists(st.tuples(st.sampled_from(TOPICS), payloads()), max_size=12))
def test_no_message_raises(heard: list[tuple[str, bytes]]) -> None:
    model = Softmax().weights()
    now = 10**18
    client = Client("j", "c000", Softmax(), lambda: DATA[0], lambda: len(DATA[0]))
    lead = Coordinator(Rules(job="j", fit=PLAN), Mean(), model)
    for machine in (client, lead):
        machine.start({}, now)
        for topic, payload in heard:
            now += 10**8
            answer = machine.heard(topic, payload, now)
            msgspec.msgpack.encode([answer.commit, [say.topic for say in answer.say]])
            if answer.work is not None:
                try:
                    result: Any = answer.work.act()
                except Exception as error:  # noqa: BLE001 - as who carries it would
                    result = error
                machine.worked(answer.work.name, result, now)
            due = machine.wake()
            if due is not None and due <= now:
                machine.tick(now)


def test_the_digest_binds_names_shapes_and_numbers() -> None:
    one = ones()
    assert digest(one) == digest({n: a.copy() for n, a in one.items()})
    assert digest(one) != digest({**one, "bias": one["bias"] + np.float32(1e-7)})
    assert digest(one) != digest(dict(reversed(one.items())))


# -- a client by hand -----------------------------------------------------------------------------------------------


def trained(call: wire.Call) -> tuple[Client, int]:
    """A client that has said its update for that call, and the time."""
    model, now = Softmax().weights(), 10**18
    data = wire.pack_model(model, {})
    client = Client("j", "c000", Softmax(), lambda: DATA[0], lambda: len(DATA[0]))
    client.start({}, now)
    manifest = wire.Manifest("j", call.run, call.epoch, 0, 0, digest(model), "", len(data), Softmax().form, data=data)
    client.heard("model", wire.say(manifest), now)
    work = client.heard("round", wire.say(call), now).work
    assert work is not None
    answer = client.worked(work.name, work.act(), now)
    assert [say.topic for say in answer.say] == ["c/c000/up"]
    return client, now


CALL = wire.Call(
    "j", 5, 6, 7, wire.COLLECTING, digest(Softmax().weights()), cohort=("c000",), fit={**PLAN, "proximal": 0.01}
)


@pytest.mark.parametrize(
    ("ack", "settled"),
    [
        (wire.Ack(5, 6, 7, wire.TAKEN), True),
        (wire.Ack(5, 6, 7, wire.STALE), True),
        (wire.Ack(5, 6, 7, wire.REFUSED, "norm"), True),
        (wire.Ack(5, 6, 6, wire.TAKEN), False),
        (wire.Ack(5, 6, 8, wire.TAKEN), False),
        (wire.Ack(4, 6, 7, wire.TAKEN), False),
        (wire.Ack(5, 5, 7, wire.TAKEN), False),
        (wire.Ack(5, 6, 7, wire.REFUSED, "unknown-client"), False),
    ],
)
def test_only_the_answer_to_its_update_ends_its_repetition(ack: wire.Ack, settled: bool) -> None:
    client, now = trained(CALL)
    client.heard("c/c000/ack", wire.say(ack), now)
    for seconds in (1, 3, 7):
        said = [say.topic for say in client.tick(now + seconds * 10**9).say]
        assert said == ([] if settled else ["c/c000/up"])


def test_what_was_taken_stays_taken() -> None:
    client, now = trained(CALL)
    client.heard("c/c000/ack", wire.say(wire.Ack(5, 6, 7, wire.TAKEN)), now)
    client.heard("c/c000/ack", wire.say(wire.Ack(5, 6, 7, wire.STALE)), now)
    assert client.tick(now + 10**10).say == []
    client.heard("c/c000/ack", wire.say(wire.Ack(5, 6, 7, wire.REFUSED, "norm")), now)
    assert client.refused == []


@pytest.mark.parametrize("fit", [{"speed": 3}, {**PLAN, "control": "magic"}])
def test_a_call_that_asks_for_what_is_not_known_is_not_done_by_halves(fit: dict[str, Any]) -> None:
    model, now = Softmax().weights(), 10**18
    data = wire.pack_model(model, {})
    client = Client("j", "c000", Softmax(), lambda: DATA[0], lambda: len(DATA[0]))
    client.start({}, now)
    manifest = wire.Manifest("j", 5, 6, 0, 0, digest(model), "", len(data), Softmax().form, data=data)
    client.heard("model", wire.say(manifest), now)
    work = client.heard("round", wire.say(msgspec.structs.replace(CALL, fit=fit)), now).work
    assert work is not None
    with pytest.raises(ConfigError) as raised:
        work.act()
    [said] = client.worked(work.name, raised.value, now).say
    state = wire.hear(wire.Presence, said.payload)
    assert (said.topic, state.skips) == ("c/c000/state", 7)
    assert "which this version does not know" in state.why


def test_another_model_than_the_one_called_for_is_not_trained() -> None:
    model, now = Softmax().weights(), 10**18
    other = wire.pack_model({**model, "bias": model["bias"] + 1}, {})
    client = Client("j", "c000", Softmax(), lambda: DATA[0], lambda: len(DATA[0]))
    client.start({}, now)
    manifest = wire.Manifest("j", 5, 6, 0, 0, digest(model), "", len(other), Softmax().form, data=other)
    client.heard("model", wire.say(manifest), now)
    work = client.heard("round", wire.say(CALL), now).work
    assert work is not None
    with pytest.raises(UnfitError):
        work.act()


def test_it_trains_when_it_may() -> None:
    model, now = Softmax().weights(), 10**18
    data = wire.pack_model(model, {})
    rows = [0]
    client = Client("j", "c000", Softmax(), lambda: DATA[0], lambda: rows[0])

    def presence(answer: Any) -> int:
        [said] = [say for say in answer.say if say.topic == "c/c000/state"]
        return wire.hear(wire.Presence, said.payload).samples

    assert presence(client.start({}, now)) == 0
    rows[0] = 24
    assert presence(client.fed(now)) == 24
    assert presence(client.permit("on battery", now)) == 0
    manifest = wire.Manifest("j", 5, 6, 0, 0, digest(model), "", len(data), Softmax().form, data=data)
    client.heard("model", wire.say(manifest), now)
    assert client.heard("round", wire.say(CALL), now).work is None
    answer = client.permit("", now)
    assert presence(answer) == 24
    assert answer.work is not None
