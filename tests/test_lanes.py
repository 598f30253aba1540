"""Which replica gets what, who takes over, and how their streams are made one again: plain values."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from broker.window import Ack, SendWindow
from nodes.channel import Channel, Mark
from nodes.lanes import TAKEOVER, Lanes, Member, by_source, newest
from nodes.merge import FLOOR, Merge
from schemas.messages import Message, Readings

SOURCES = [f"device-{i}" for i in range(400)]


def lanes(count: int) -> Lanes:
    members = []
    for i in range(count):
        window = SendWindow(7, {f"n-{i + 1}": False})
        members.append(Member(f"n-{i + 1}", Channel(f"out/n-{i + 1}", "out", window, f"t/n-{i + 1}/in/p/out")))
    return Lanes("p", "n", members)


def owners(team: Lanes) -> dict[str, str]:
    return {source: team.of(source).key for source in SOURCES}


def test_every_producer_gives_a_source_to_the_same_replica_and_all_have_a_part() -> None:
    one, other = owners(lanes(4)), owners(lanes(4))
    assert one == other
    parts = [list(one.values()).count(f"out/n-{i}") for i in (1, 2, 3, 4)]
    assert sum(parts) == 400
    assert min(parts) > 60


def test_a_replica_that_leaves_moves_its_own_sources_only_and_gets_them_back() -> None:
    team = lanes(4)
    before = owners(team)
    team.told("n-2", "offline", 100.0)
    assert team.lost(100.0 + TAKEOVER - 0.1) == []
    assert [member.name for member in team.lost(100.0 + TAKEOVER)] == ["n-2"]
    during = owners(team)
    assert {s for s in SOURCES if before[s] != during[s]} == {s for s in SOURCES if before[s] == "out/n-2"}
    settling = team.settling
    team.told("n-2", "ready", 120.0)
    assert (settling, team.settling) == (False, True)
    assert team.settled()
    assert owners(team) == before


def test_one_that_is_back_hears_how_far_time_has_come_though_it_gets_nothing_yet() -> None:
    """Else readers that merge would wait for it, the others for them, and it for the others."""
    team = lanes(2)
    team.newest = 10
    assert [m.name for m in team.behind()] == ["n-1", "n-2"]
    assert team.behind() == []
    team.told("n-1", "offline", 0.0)
    team.lost(TAKEOVER)
    team.newest = 20
    assert [m.name for m in team.behind()] == ["n-2"]
    team.told("n-1", "ready", 9.0)
    assert [m.name for m in team.behind()] == ["n-1"]


def test_one_that_is_back_in_time_loses_nothing() -> None:
    team = lanes(2)
    team.told("n-1", "offline", 0.0)
    team.told("n-1", "starting", 3.0)
    assert team.lost(60.0) == []
    team.told("n-1", "stopped", 60.0)
    assert [member.name for member in team.lost(70.0)] == ["n-1"]


def test_the_last_replica_and_one_with_its_state_on_its_disk_are_waited_for() -> None:
    team = lanes(2)
    team.rooted("n-1", rooted=True)
    team.told("n-1", "offline", 0.0)
    team.told("n-2", "offline", 0.0)
    assert [member.name for member in team.lost(60.0)] == ["n-2"]
    team = lanes(2)
    for name in ("n-1", "n-2"):
        team.told(name, "offline", 0.0)
    assert team.lost(60.0) == []


def test_a_step_waits_for_what_was_taken_from_its_channel() -> None:
    team = lanes(2)
    one, other = (member.channel for member in team.members.values())
    mark = Mark()
    for _ in range(3):
        mark.number(one, one.window.next)
        one.window.push("t", b"x", 0)
    one.window.heard("n-1", Ack(7, 1, 1), 0)
    floor = one.window.floor
    moved = one.window.withdraw()
    assert [kept.seq for kept in moved] == [2, 3]
    other.window.push("t", b"x", 0)
    other.window.push("t", b"x", 0)
    one.owe({other.key: (other, 2)}, floor)
    seen = [(mark.done, one.clear)]
    for count in (1, 2):
        other.window.heard("n-2", Ack(7, count, count), 0)
        seen.append((mark.done, one.clear))
    assert seen == [(False, False), (False, False), (True, True)]


def test_rows_of_several_devices_are_parted_with_identities_of_their_own() -> None:
    body = Readings(
        n=4, columns={"v": np.arange(4), "t": ["a", "b", "c", "d"]}, time=np.arange(4) + 10, source=["x", "y", "x", "z"]
    )
    message = Message("m:1", "gateway", 10, body, None, 5)
    assert newest(message) == 13
    parts = by_source(message)
    assert [(p.id, p.source, p.rows) for p in parts] == [("m:1~x", "x", 2), ("m:1~y", "y", 1), ("m:1~z", "z", 1)]
    first = parts[0].body
    assert isinstance(first, Readings)
    assert first.columns["v"].tolist() == [0, 2]  # type: ignore[union-attr]  # an array
    assert first.columns["t"] == ["a", "c"]
    assert first.time is not None
    assert first.time.tolist() == [10, 12]
    assert by_source(parts[0]) == [parts[0]]


# -- merging -----------------------------------------------------------------------------------------------------------


def test_a_message_waits_until_every_other_stream_has_come_as_far() -> None:
    merge = Merge[str]([FLOOR, FLOOR])
    merge.put(0, 10, "a")
    merge.put(0, 20, "b")
    assert merge.free() == []
    merge.put(1, 15, "c")
    assert merge.free() == ["a", "c"]
    merge.put(1, 30, "d")
    assert merge.free() == ["b"]
    merge.sides[0].over = True
    assert merge.free() == ["d"]


def test_a_stream_that_is_away_is_not_waited_for() -> None:
    merge = Merge[str]([FLOOR, FLOOR])
    merge.put(0, 10, "a")
    merge.sides[1].away = True
    assert merge.free() == ["a"]


@given(st.data())
def test_no_row_is_later_than_it_was_before_it_was_divided(data: st.DataObject) -> None:
    """A stream in some disorder is divided among replicas of different speed, and merged again."""
    count = data.draw(st.integers(2, 4))
    times = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=60))
    draw = random.Random(data.draw(st.integers(0, 1000)))
    newest_yet, lateness = FLOOR, {}
    streams: list[list[tuple[int, int | None]]] = [[] for _ in range(count)]
    for i, time in enumerate(times):
        lateness[i] = max(0, newest_yet - time)
        newest_yet = max(newest_yet, time)
        streams[draw.randrange(count)].append((time, i))
        if draw.random() < 0.3:  # the producer tells all how far it has come
            for stream in streams:
                stream.append((newest_yet, None))
    merge = Merge[int | None]([FLOOR] * count)
    for side, stream in zip(merge.sides, streams, strict=True):
        side.over = not stream
    out: list[int | None] = []
    while any(streams):
        number = draw.choice([i for i in range(count) if streams[i]])
        time, item = streams[number].pop(0)
        merge.put(number, time, item)
        merge.sides[number].over = not streams[number]
        out += merge.free()
    rows = [i for i in out if i is not None]
    assert sorted(rows) == list(range(len(times)))
    newest_yet = FLOOR
    for i in rows:
        assert newest_yet - times[i] <= lateness[i]
        newest_yet = max(newest_yet, times[i])
