"""From where much comes at once, the link reads a moment later, more at once; and what it owes to others it keeps."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker import session_link
from broker.session_link import MANY, Incoming, Link

DEADLINE = 30.0
PUBACK = b"\x40\x02\x00\x01"
"""The smallest packet that a broker sends often."""


class Site:
    """A link whose far end is ours.

    :ivar came: number of packets of each read.
    """

    def __init__(self, link: Link, far: socket.socket, came: list[int]) -> None:
        self.link = link
        self.far = far
        self.came = came

    @property
    def reads(self) -> bool:
        """Whether the transport reads."""
        return bool(self.link._transport.is_reading())

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not true():  # noqa: ASYNC110 - the transport tells nobody
                await asyncio.sleep(0.001)

    async def nothing_comes(self) -> bool:
        """Whether nothing was read, though there is something; what may come in an hour is not waited for."""
        before = len(self.came)
        self.far.sendall(PUBACK)
        await asyncio.sleep(0.05)
        return len(self.came) == before and not self.reads


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    near, far = socket.socketpair()
    came: list[int] = []

    def on_packets(link: Link, packets: list[Incoming]) -> None:
        came.append(len(packets))

    def made() -> Link:
        return Link(on_packets, lambda: None, 1_000_000, {}, lambda *_: None)

    with far:
        _, link = await asyncio.get_running_loop().create_connection(made, sock=near)
        yield Site(link, far, came)
        link.abort("done")
        await link.lost


def run(scenario: Callable[[Site], Any]) -> None:
    async def main() -> None:
        async with site() as made:
            await scenario(made)

    asyncio.run(main())


def test_after_many_packets_in_one_read_the_next_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_link, "REST", 3600.0)

    async def scenario(at: Site) -> None:
        at.far.sendall(PUBACK * MANY)
        await at.until(lambda: at.came == [MANY])
        assert await at.nothing_comes()

    run(scenario)


def test_after_few_it_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_link, "REST", 3600.0)

    async def scenario(at: Site) -> None:
        for i in range(1, 4):
            at.far.sendall(PUBACK * (MANY - 1))
            await at.until(lambda: sum(at.came) == i * (MANY - 1))  # noqa: B023 - awaited here
            assert at.reads

    run(scenario)


def test_the_rest_is_short_and_loses_nothing() -> None:
    assert session_link.REST == 0.001

    async def scenario(at: Site) -> None:
        for i in range(1, 20):
            at.far.sendall(PUBACK * 2 * MANY)
            if i % 2:
                await at.until(lambda: sum(at.came) == 2 * MANY * i)  # noqa: B023
        await at.until(lambda: sum(at.came) == 2 * MANY * 19)
        await at.until(lambda: at.reads)

    run(scenario)


def test_who_pauses_while_it_rests_is_heeded_and_who_resumes_does_not_end_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_link, "REST", 3600.0)

    async def scenario(at: Site) -> None:
        at.far.sendall(PUBACK * MANY)
        await at.until(lambda: at.came == [MANY])
        at.link.pause()
        at.link.resume()
        assert await at.nothing_comes()
        at.link.pause()
        at.link._rested()  # the hour is over
        assert await at.nothing_comes()
        at.link.resume()
        await at.until(lambda: sum(at.came) == MANY + 2)
        assert at.reads

    run(scenario)
