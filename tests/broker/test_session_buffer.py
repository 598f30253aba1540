"""The buffer that a link reads into: kept for large packets while they come, given back after them; nothing is torn."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import mqtt5
import pytest
from bare_link import Wire, feed

from broker import session_link
from broker.session_link import BUFFER, KEPT, Incoming, Link


def _link(got: list[bytes]) -> Link:
    def take(_: Link, packets: list[Incoming]) -> None:
        got.extend(p[1] if isinstance(p, tuple) else cast("mqtt5.PublishPacket", p).payload for p in packets)

    link = Link(take, lambda: None, 4 * KEPT, {}, lambda before, packet: None)
    wire: Any = Wire()
    link.connection_made(wire)
    return link


def _packet(payload: bytes) -> bytes:
    head = mqtt5.PublishPacket("a", b"").write()
    rest, length, coded = head[2:], len(head) - 2 + len(payload), bytearray()
    while True:
        length, byte = length >> 7, length & 127
        coded.append(byte | (128 if length else 0))
        if not length:
            return head[:1] + bytes(coded) + rest + payload


@pytest.mark.parametrize("seed", range(6))
def test_packets_of_all_sizes_in_any_pieces_arrive_whole(seed: int) -> None:
    asyncio.run(_packets_of_all_sizes_in_any_pi(seed))


async def _packets_of_all_sizes_in_any_pi(seed: int) -> None:
    chance, got = random.Random(seed), list[bytes]()
    sizes = (3, 5000, BUFFER - 20, BUFFER, BUFFER + 1, 900_000, 921_600, KEPT + 10)
    sent = [chance.randbytes(chance.choice(sizes)) for _ in range(25)]
    link, data, at = _link(got), b"".join(map(_packet, sent)), 0
    while at < len(data):
        step = chance.choice((1, 7, 65_536, 300_000, 2_000_000))
        feed(link, data[at : at + step])
        at += step
    assert got == sent


def test_a_large_buffer_is_kept_while_large_packets_come_and_given_back_after(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(_a_large_buffer_is_kept_while_l(monkeypatch))


async def _a_large_buffer_is_kept_while_l(monkeypatch: pytest.MonkeyPatch) -> None:
    got = list[bytes]()
    link, frame = _link(got), _packet(bytes(921_600))
    feed(link, frame)
    kept = link._buffer
    assert len(kept) == len(frame)
    for _ in range(3):
        feed(link, _packet(b"small"))
        feed(link, frame)
        assert link._buffer is kept
    monkeypatch.setattr(session_link, "KEEP", -1.0)
    feed(link, _packet(b"small"))
    assert len(link._buffer) == BUFFER


def test_a_buffer_beyond_what_is_kept_goes_with_its_packet() -> None:
    asyncio.run(_a_buffer_beyond_what_is_kept_g())


async def _a_buffer_beyond_what_is_kept_g() -> None:
    got = list[bytes]()
    link = _link(got)
    feed(link, _packet(bytes(KEPT + 1)))
    await asyncio.sleep(0)
    assert [len(payload) for payload in got] == [KEPT + 1]
    assert len(link._buffer) == BUFFER
