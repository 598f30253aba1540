"""Blobs over a virtual link that loses, repeats, delays and reorders: they always arrive, and little is sent twice."""

from __future__ import annotations

from importlib import import_module
from random import Random
from typing import Any

import pytest
from blob_link import BEGIN, SECOND, Link
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.blob_format import HEAD
from broker.blobs import (
    Ack,
    BlobError,
    Broadcast,
    Chunk,
    Fetching,
    Incoming,
    Memory,
    Need,
    Offer,
    Outgoing,
    chunk_size,
    offer,
)

SIZES = st.one_of(st.integers(0, 5000), st.integers(50_000, 200_000))
"""Bytes, in chunks of 1024."""


def content(size: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(size)


def data_of(receiver: Incoming | Fetching) -> memoryview:
    assert isinstance(receiver.hold, Memory)
    return receiver.hold.data


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
    assert data_of(come) == data
    assert out.done
    assert out.sent == wanted.count == max(1, -(-size // 1024))


@settings(deadline=None, max_examples=400)
@given(
    size=SIZES,
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
    assert data_of(come) == data
    if not spread:  # else what is late counts as lost
        assert out.sent <= wanted.count + 3 * link.lost + 8
    else:
        assert out.sent <= 3 * wanted.count + 3 * link.lost + 8


EVENTS = ["receiver", "receiver forgets", "sender", "cut", "silence", "clock back", "clock ahead"]


@settings(deadline=None, max_examples=400)
@given(
    size=SIZES,
    seed=st.integers(0, 1 << 20),
    loss=st.sampled_from([0.0, 0.02, 0.2]),
    rate=st.sampled_from([0.0, 50_000.0]),
    events=st.lists(st.tuples(st.integers(1, 60), st.sampled_from(EVENTS)), max_size=8),
)
def test_both_sides_may_end_and_begin_at_any_moment(
    size: int, seed: int, loss: float, rate: float, events: list[tuple[int, str]]
) -> None:
    """An event happens after so many steps; a receiver keeps its chunks, but for one that forgets, and a sender nothing: its
    carrier repeats the offer until the receiver was heard.
    """
    data = content(size, seed)
    wanted = offer(data, 1024)
    link = Link(seed, loss=loss, rate=rate)
    out, come = Outgoing(wanted, data, BEGIN), Incoming(Memory(wanted, size), BEGIN)
    todo, steps, sent, up, shift, due = list(events), 0, 0, 0, 0, link.now
    end = link.now + 24 * 3600 * SECOND

    def take(payload: bytes, now: int) -> None:
        come.take(payload, now + shift)

    def heard(payload: bytes, now: int) -> None:
        out.heard(payload, now + shift)

    def offered(_: bytes, now: int) -> None:
        come.linked(now + shift)

    while not out.over:
        steps += 1
        if todo and steps >= todo[0][0]:
            (_, event), steps = todo.pop(0), 0
            now = link.now + shift
            if event == "receiver":
                come = Incoming(come.hold, now)
            elif event == "receiver forgets" and not come.whole:  # who said that it has it keeps it
                come = Incoming(Memory(wanted, size), now)
            elif event == "sender":
                sent += out.sent
                out, due = Outgoing(wanted, data, now), link.now
            elif event == "cut":
                link.clear()
                out.linked(now)
                come.linked(now)
            elif event == "silence":
                link.down, up = True, link.now + 90 * SECOND
            elif event.startswith("clock"):
                shift += (-1 if event == "clock back" else 1) * 3600 * SECOND
        if link.down and link.now >= up:
            link.down = False
        if not out.begun and link.now >= due:
            link.send(offered, b"")
            due = link.now + SECOND
        link.deliver()
        for payload in out.send(link.now + shift):
            link.send(take, payload)
        if (said := come.say(link.now + shift)) is not None:
            link.send(heard, said)
        times = [at - shift for at in (out.wake(), come.wake()) if at is not None]
        times += [at for at in (link.next(), up if link.down else None, None if out.begun else due) if at is not None]
        if not out.over:
            assert times, "nothing will ever happen again"
            link.now = max(link.now + 1, min(times))
            assert link.now < end
    assert come.whole
    assert data_of(come) == data
    forgets = sum(event == "receiver forgets" for _, event in events)
    assert out.sent + sent <= (1 + forgets) * (wanted.count + 8) + 3 * link.lost + 24 * len(events) + 8


def test_a_corrupted_chunk_makes_all_come_again_and_a_sender_that_lies_is_refused() -> None:
    data = content(50_000)
    wanted = offer(data, 1024)
    come = Incoming(Memory(wanted, len(data)), BEGIN)
    assert come.take(Chunk(wanted.digest, 7, memoryview(b"?" * 1024)), BEGIN) == "new"
    out, link = Outgoing(wanted, data, BEGIN), Link()
    carry(out, come, link)
    assert (come.spoiled, come.whole) == (1, True)
    assert data_of(come) == data
    assert out.sent == 2 * wanted.count - 1

    come = Incoming(Memory(wanted, len(data)), BEGIN)
    out = Outgoing(wanted, bytes(50_000), BEGIN)
    carry(out, come, link)
    assert (out.refused, out.done, come.whole, come.spoiled) == ("damaged", False, False, 3)
    with pytest.raises(BlobError, match="not whole"):
        data_of(come)


def test_what_is_no_chunk_of_it_changes_nothing() -> None:
    data = content(3000)
    wanted = offer(data, 1024)
    come = Incoming(Memory(wanted, 3000), BEGIN)
    view = memoryview(data)
    for payload, took in [
        (b"", "garbage"),
        (b"\xc1", "garbage"),
        (b"\x90" * 5000, "garbage"),
        (Ack(wanted.digest).encode(), "garbage"),
        (Chunk("0" * 64, 0, view[:1024]).encode(), "foreign"),
        (Chunk(wanted.digest, 3, view[:1024]).encode(), "wrong"),
        (Chunk(wanted.digest, 1 << 39, view[:1024]).encode(), "wrong"),
        (Chunk(wanted.digest, 0, view[:1023]).encode(), "wrong"),
        (Chunk(wanted.digest, 2, view[:1024]).encode(), "wrong"),
        (Chunk(wanted.digest, 2, view[2048:]).encode(), "new"),
        (Chunk(wanted.digest, 2, view[2048:]).encode(), "repeat"),
    ]:
        assert come.take(payload, BEGIN) == took, payload[:80]
    assert come.hold.held.total == 1


def test_a_sender_takes_any_answer() -> None:
    data = content(30_000)
    wanted = offer(data, 1024)
    out = Outgoing(wanted, data, BEGIN)
    assert out.send(BEGIN) == []  # nobody was heard
    assert out.wake() is None
    for payload in (
        b"",
        b"\xc1",
        Ack("0" * 64).encode(),
        Ack(wanted.digest, 31).encode(),
        Need(wanted.digest).encode()[:9],
    ):
        assert not out.heard(payload, BEGIN)
    assert not out.begun
    assert out.heard(Ack(wanted.digest, 10, b"\xfe" + b"\xff" * 1000, life=1, seq=5), BEGIN)
    assert out.acknowledged == 29  # what lies behind the end is passed over
    assert out.heard(Ack(wanted.digest, 0, life=1, seq=4), BEGIN)  # overtaken
    assert out.acknowledged == 29
    assert [Chunk.decode(payload).index for payload in out.send(BEGIN)] == [10]
    assert out.heard(Ack(wanted.digest, 0, life=2, seq=1), BEGIN)  # begun anew, with nothing
    assert out.acknowledged == 0
    assert out.send(BEGIN)
    assert out.heard(Ack(wanted.digest, life=2, seq=2, refused="no-room"), BEGIN)
    assert (out.over, out.done, out.refused, out.send(BEGIN), out.wake()) == (True, False, "no-room", [], None)


@given(st.binary(max_size=300))
def test_nothing_that_arrives_raises(payload: bytes) -> None:
    data = content(5000)
    wanted = offer(data, 1024)
    out, come = Outgoing(wanted, data, BEGIN), Incoming(Memory(wanted, 5000), BEGIN)
    many, get = Broadcast(wanted, data, BEGIN), Fetching(Memory(wanted, 5000), BEGIN)
    for one in (out, many):
        assert not one.heard(payload, BEGIN)
    for each in (come, get):
        assert each.take(payload, BEGIN) in {"garbage", "foreign"}


def test_the_window_opens_and_a_silent_receiver_is_asked_ever_more_rarely() -> None:
    data = content(200_000)
    wanted = offer(data, 1024)
    out, come, link = Outgoing(wanted, data, BEGIN), Incoming(Memory(wanted, 200_000), BEGIN), Link(delay=5)
    assert out.heard(come.say(BEGIN) or b"", BEGIN)
    most = 0
    while out.acknowledged < 100:
        chunks = out.send(link.now)
        for payload in chunks:
            link.send(come.take, payload)
        link.deliver()
        if (said := come.say(link.now)) is not None:
            link.send(out.heard, said)
        most = max(most, len(out._flight))
        link.now = max(link.now + 1, min(at for at in (link.next(), out.wake()) if at is not None))
    assert most == 8
    link.clear()
    now, times, before = link.now, [], out.sent
    while now < link.now + 600 * SECOND:
        if out.send(now):
            times.append(now)
        wake = out.wake()
        assert wake is not None
        now = max(now + 1, wake)
    assert 10 < out.sent - before < 30  # one at a time, up to a minute apart
    assert times[-1] - times[-2] == 60 * SECOND
    come.linked(now)
    assert out.heard(come.say(now) or b"", now)  # it is back: no minute is waited for
    out_now = out.wake()
    assert out.send(now) or (out_now is not None and out_now - now < SECOND)


def test_a_full_link_is_not_filled_further() -> None:
    """32 KiB/s: beyond two chunks under way there is nothing to gain, and pings would wait behind them."""
    data = content(1 << 20)
    wanted = offer(data, 32 * 1024)
    out, come = Outgoing(wanted, data, BEGIN), Incoming(Memory(wanted, 1 << 20), BEGIN)
    link = Link(rate=32 * 1024, delay=20)
    seconds = carry(out, come, link)
    assert out.pace.window <= 4
    assert out.sent == wanted.count
    assert 32 <= seconds < 33.5


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, 64 * 1024),
        ({"max_payload": 128 * 1024}, 64 * 1024),
        ({"max_payload": 10_000, "topic": 40}, 9 * 1024),
        ({"max_payload": 1000, "topic": 40}, 800),
        ({"most": 1 << 20}, 127 * 1024),  # AWS IoT Core does not say what it takes
        ({"most": 1 << 20, "max_payload": 1 << 30}, 1 << 20),
        ({"rate": 32 * 1024, "keep_alive": 5}, 40 * 1024),
        ({"rate": 32 * 1024, "keep_alive": 0}, 64 * 1024),
        ({"rate": 100, "keep_alive": 5}, 256),
    ],
)
def test_the_size_of_chunks(arguments: dict[str, Any], size: int) -> None:
    assert chunk_size(**arguments) == size
    data = content(size)
    wanted = offer(data, size)
    payload = Chunk(wanted.digest, 1 << 20, memoryview(data)).encode()
    assert len(payload) <= size + HEAD


def test_a_broker_that_takes_next_to_nothing() -> None:
    with pytest.raises(BlobError, match="a chunk needs more"):
        chunk_size(300)


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


@settings(deadline=None, max_examples=150)
@given(
    size=SIZES,
    seed=st.integers(0, 1 << 20),
    loss=st.sampled_from([0.0, 0.02, 0.3]),
    receivers=st.integers(1, 8),
    push=st.integers(0, 8),
)
def test_what_is_published_once_reaches_all(size: int, seed: int, loss: float, receivers: int, push: int) -> None:
    data = content(size, seed)
    wanted = offer(data, 1024)
    all_ = [Fetching(Memory(wanted, size), BEGIN, since=BEGIN - SECOND) for _ in range(receivers)]
    out = Broadcast(wanted, data, BEGIN, push=push)
    carry_to_all(out, all_, Link(seed, loss=loss))
    for one in all_:
        assert data_of(one) == data
    if not loss:
        assert out.sent == wanted.count


def test_asks_are_merged_and_nothing_is_sent_twice_while_it_may_be_under_way() -> None:
    data = content(20_000)
    wanted = offer(data, 1024)
    out = Broadcast(wanted, data, BEGIN, push=2)

    def sent(now: int) -> list[int]:
        return [Chunk.decode(payload).index for payload in out.send(now)]

    assert sent(BEGIN) == [0, 1]
    first = out._first
    now = BEGIN + 10_000_000
    # who listened when they were sent; who has the first of them; who came too late
    assert out.heard(Need(wanted.digest, ((0, 3),), since=20_000_000), now)
    assert sent(now) == [2]
    assert out.heard(Need(wanted.digest, ((1, 4),), last=first + 1), now)
    assert sent(now) == [3, 4]
    assert out.heard(Need(wanted.digest, ((0, 2),), since=5_000_000), now)
    assert out.heard(Need(wanted.digest, ((0, 2),), since=5_000_000), now)
    assert sent(now) == [0, 1]
    now += 10_000_000
    assert out.heard(Need(wanted.digest, ((1, 3),), last=first + 5), now)  # what was sent before that is lost
    assert sent(now) == [2, 3]
    assert out.heard(Need(wanted.digest, ((2, 1),), last=first + 7, again=True), now)
    assert sent(now) == []  # within a round trip
    assert out.heard(Need(wanted.digest, ((2, 1),), last=first + 7, again=True), now + 10 * SECOND)
    assert sent(now + 10 * SECOND) == [2]
    assert out.heard(Need(wanted.digest, ((5, 1), (2, 1)), last=first, since=1 << 40), now + 10 * SECOND)
    assert sent(now + 10 * SECOND) == [5]  # it heard another sender last


def test_a_broadcast_takes_any_ask() -> None:
    data = content(20_000)
    wanted = offer(data, 1024)
    out = Broadcast(wanted, data, BEGIN)
    for payload in (b"", b"\xc1", Need("0" * 64, ((0, 1),)).encode()):
        assert not out.heard(payload, BEGIN)
    assert out.heard(Need(wanted.digest, ((1 << 39, 1 << 39), (19, 1 << 39), *(((3, 1 << 20),) * 1000))), BEGIN)
    assert sum(len(out.send(BEGIN)) for _ in range(20)) == 17  # 3 to 19, each once
    assert not out.waiting


def test_a_slow_receiver_is_not_sent_twice_what_is_on_its_way() -> None:
    """A fast one drives; the slow one's link has seconds of chunks in it."""
    data = content(400_000)
    wanted = offer(data, 4096)
    fast, slow = (Fetching(Memory(wanted, 400_000), BEGIN, since=BEGIN - SECOND) for _ in range(2))
    out, near, far = Broadcast(wanted, data, BEGIN, push=4), Link(delay=1), Link(delay=30, rate=40_000)
    for _ in range(100_000):
        for link in (near, far):
            link.deliver()
        for payload in out.send(near.now):
            near.send(fast.take, payload)
            far.send(slow.take, payload)
        for one in (fast, slow):
            if (said := one.say(near.now)) is not None:
                near.send(out.heard, said)
        if fast.whole and slow.whole:
            break
        times = [at for at in (near.next(), far.next(), fast.wake(), slow.wake()) if at is not None]
        near.now = far.now = max(near.now + 1, min(times))
    assert data_of(slow) == data_of(fast) == data
    assert out.sent <= wanted.count + 8


@settings(deadline=None, max_examples=200)
@given(
    size=SIZES,
    seed=st.integers(0, 1 << 20),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    spread=st.sampled_from([0.0, 3.0]),
    rate=st.sampled_from([0.0, 150_000.0]),
    push=st.integers(0, 8),
    events=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from(["comes", "restarts", "forgets", "sender", "cut", "silence"])),
        max_size=8,
    ),
)
def test_of_many_each_may_come_and_go_at_any_moment(
    size: int, seed: int, loss: float, spread: float, rate: float, push: int, events: list[tuple[int, str]]
) -> None:
    data, draw = content(size, seed), Random(seed)
    wanted, link = offer(data, 1024), Link(seed, loss=loss, spread=spread, rate=rate)
    all_ = [Fetching(Memory(wanted, size), BEGIN, since=BEGIN - SECOND) for _ in range(3)]
    out, todo, steps, sent, up = Broadcast(wanted, data, BEGIN, push=push), list(events), 0, 0, 0
    end = link.now + 24 * 3600 * SECOND

    def heard(payload: bytes, now: int) -> None:
        out.heard(payload, now)

    while todo or not all(one.whole for one in all_):
        steps += 1
        if todo and steps >= todo[0][0]:
            (_, event), steps = todo.pop(0), 0
            which = draw.randrange(len(all_))
            if event == "comes":
                all_.append(Fetching(Memory(wanted, size), link.now))
            elif event == "restarts":
                all_[which] = Fetching(all_[which].hold, link.now)
            elif event == "forgets":
                all_[which] = Fetching(Memory(wanted, size), link.now)
            elif event == "sender":
                sent += out.sent
                out = Broadcast(wanted, data, link.now)
            elif event == "cut":
                link.clear()
                out.linked(link.now)
                for one in all_:
                    one.linked(link.now)
            else:
                link.down, up = True, link.now + 90 * SECOND
        if link.down and link.now >= up:
            link.down = False
        link.deliver()
        for payload in out.send(link.now):
            for one in all_:
                link.send(one.take, payload)
        for one in all_:
            if (said := one.say(link.now)) is not None:
                link.send(heard, said)
        times = [at for at in (link.next(), up if link.down else None, *(o.wake() for o in all_)) if at is not None]
        if not out.waiting and times:
            link.now = max(link.now + 1, min(times))
        assert link.now < end
    for one in all_:
        assert data_of(one) == data
    late = sum(event in {"comes", "forgets"} for _, event in events)
    if not spread:
        assert out.sent + sent <= (1 + late) * (wanted.count + 8) + link.lost + 8 * len(all_) * (1 + len(events))


def test_the_bytes_on_the_wire() -> None:
    """Maps that any msgpack library reads; pinned, for other versions and other programs read them."""
    msgpack = import_module("msgpack")

    digest = "ab" * 32
    for message, plain in [
        (Offer(digest, 70_000), {"digest": digest, "size": 70_000, "chunk": 65_536}),
        (Chunk(digest, 1, memoryview(b"data"), 9), {"digest": digest, "index": 1, "data": b"data", "turn": 9}),
        (
            Ack(digest, 3, b"\x06", 7, 2, 9, ask=True),
            {"digest": digest, "upto": 3, "bits": b"\x06", "life": 7, "seq": 2, "last": 9}
            | {"whole": False, "ask": True, "refused": ""},
        ),
        (
            Need(digest, ((1, 2), (5, 1)), 9, 10, again=True),
            {"digest": digest, "ranges": [[1, 2], [5, 1]], "last": 9, "since": 10, "again": True},
        ),
    ]:
        payload = message.encode()
        assert msgpack.unpackb(payload) == plain
        assert payload == msgpack.packb(plain)
        assert type(message).decode(payload) == message
        later = msgpack.packb({**plain, "unknown": [1]})
        assert type(message).decode(later) == message
