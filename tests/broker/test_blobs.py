"""Blobs over a virtual link that loses, repeats, delays and reorders: they always arrive, and little is sent twice."""

from __future__ import annotations

from random import Random

import pytest
from blob_link import BEGIN, SECOND, Link
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.blobs import Broadcast, Fetching, Incoming, Memory, Outgoing, offer


def content(size: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(size)


def carry(out: Outgoing, come: Incoming, link: Link, *, until: float = 3600.0) -> float:
    """Until the sender knows that it has arrived; virtual seconds."""
    end = link.now + int(until * SECOND)
    began = link.now
    while not out.over:
        link.deliver()
        for payload in out.send(link.now):
            link.send(come.take, payload)
        if (said := come.say(link.now)) is not None:
            link.send(out.heard, said)
        times = [at for at in (link.next(), out.wake(), come.wake()) if at is not None]
        if not out.over:
            assert times, "nothing will ever happen again"
            link.now = max(link.now + 1, min(times))
            assert link.now < end, (out.acknowledged, come.hold.held.total)
    return (link.now - began) / SECOND


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 300_000])
def test_on_a_good_link_each_chunk_is_sent_once(size: int) -> None:
    data = content(size)
    wanted = offer(data, 1024)
    out, come = Outgoing(wanted, data, BEGIN), Incoming(Memory(wanted, size), BEGIN)
    carry(out, come, Link())
    assert isinstance(come.hold, Memory)
    assert come.hold.data == data
    assert out.done
    assert out.sent == wanted.count == max(1, -(-size // 1024))


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(0, 60_000),
    seed=st.integers(0, 1 << 20),
    loss=st.sampled_from([0.0, 0.02, 0.2, 0.5]),
    repeat=st.sampled_from([0.0, 0.3]),
    spread=st.sampled_from([0.0, 0.5, 30.0]),
)
def test_it_always_arrives(size: int, seed: int, loss: float, repeat: float, spread: float) -> None:
    data = content(size, seed)
    wanted = offer(data, 1024)
    out, come = Outgoing(wanted, data, BEGIN), Incoming(Memory(wanted, size), BEGIN)
    link = Link(seed, loss=loss, repeat=repeat, spread=spread)
    carry(out, come, link, until=24 * 3600)
    assert isinstance(come.hold, Memory)
    assert come.hold.data == data


def carry_to_all(out: Broadcast, all_: list[Fetching], link: Link, *, until: float = 3600.0) -> int:
    """Until each has it; how many asks there were. A chunk is one message to all, and lost by each on its own."""
    end, asks = link.now + int(until * SECOND), 0
    while not all(one.over for one in all_):
        link.deliver()
        for payload in out.send(link.now):
            for one in all_:
                link.send(one.take, payload)
        for one in all_:
            if (said := one.say(link.now)) is not None:
                asks += 1
                link.send(out.heard, said)
        times = [at for at in (link.next(), *(one.wake() for one in all_)) if at is not None]
        if out.waiting:
            continue
        if not all(one.over for one in all_):
            link.now = max(link.now + 1, min(times))
            assert link.now < end
    return asks


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(0, 40_000),
    seed=st.integers(0, 1 << 20),
    loss=st.sampled_from([0.0, 0.02, 0.3]),
    receivers=st.integers(1, 8),
    push=st.integers(0, 8),
)
def test_what_is_published_once_reaches_all(size: int, seed: int, loss: float, receivers: int, push: int) -> None:
    data = content(size, seed)
    wanted = offer(data, 1024)
    all_ = [Fetching(Memory(wanted, size), BEGIN) for _ in range(receivers)]
    out = Broadcast(wanted, data, BEGIN, push=push)
    carry_to_all(out, all_, Link(seed, loss=loss))
    for one in all_:
        assert isinstance(one.hold, Memory)
        assert one.hold.data == data
    if not loss:
        assert out.sent == wanted.count
