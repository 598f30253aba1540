"""Who is asked, in few bytes, and still exactly those."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_site import PLAN, Site, name, parts

from nodes.federated import wire
from nodes.federated.cohort import NAMED, Crowd, crowd
from nodes.federated.rules import Rules


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), unique=True, min_size=1, max_size=300), st.integers(1, 300))
def test_of_those_known_exactly_the_asked_are_in_it(names: list[str], many: int) -> None:
    asked = sorted(names[:many])
    found = crowd(asked, names)
    assert {one for one in names if one in found} == set(asked)
    assert len(found) <= len(asked)


def test_a_thousand_take_two_bytes_each_and_few_strangers_are_taken_for_asked() -> None:
    names = [f"gateway-{k}-of-hall-{k % 7}" for k in range(2000)]
    everybody = crowd(names[:1000], names[:1000])
    assert len(everybody.data) <= 2000
    half = crowd(names[:1000], names)
    assert len(half.data) <= 3000
    assert {one for one in names if one in half} == set(names[:1000])
    strangers = [f"stranger-{k}" for k in range(2000)]
    assert sum(one in everybody for one in strangers) <= 2000 / 64 * 2


@pytest.mark.parametrize(
    "said", [Crowd(0, 0, b"abc"), Crowd(0, 2, b"abc"), Crowd(0, -1, b"abc"), Crowd(0, 99, b"x" * 99)]
)
def test_nonsense_asks_nobody(said: Crowd) -> None:
    assert "a" not in said
    assert len(said) >= 0


def test_many_clients_are_asked_so_and_all_answer() -> None:
    many = NAMED + 8
    rules = Rules(job="j", rounds=3, least=many, quorum=many // 2, share=0.9, fit=PLAN, deadline=30)
    site = Site(rules, parts(many))
    assert site.run()
    assert [(row["status"], row["clients"], row["refused"]) for row in site.rows] == [("committed", 36, 0)] * 3
    calls = [wire.hear(wire.Call, say.payload) for _, say in site.heard if say.topic == "round"]
    said = [call for call in calls if call.phase == wire.COLLECTING]
    assert all(call.cohort == () and call.asked == 36 for call in said)
    by_round = {call.round: {name(k) for k in range(many) if call.asks(name(k))} for call in said}
    trained: dict[int, set[str]] = {number: set() for number in by_round}
    for peer, say in site.heard:
        if say.topic.endswith("/up"):
            _, update, _ = wire.unpack_update(say.payload)
            trained[update.round].add(peer)
    assert trained == by_round
    assert msgspec.msgpack.decode(wire.say(said[0]))["crowd"]["width"] == 2
