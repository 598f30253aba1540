"""``prompt``: what comes is acknowledged to TCP at once; the kernel is asked whether it does."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from broker.bus import Publication
from broker.embedded.listeners import Listener
from broker.embedded.server import EmbeddedBroker
from broker.session import Session
from broker.session_options import Options


async def talk(url: str, *, prompt: bool) -> int | None:
    """Questions and answers, after which the kernel delays acknowledgements; whether it does not. None: not TCP."""
    async with Session(url, Options(prompt=prompt)) as bus:
        echo = await bus.subscribe(["echo"], qos=0)
        for _ in range(20):
            await bus.publish([Publication("echo", b"1")])
            await echo.receive()
        assert bus._link is not None
        found = bus._link._transport.get_extra_info("socket")
        if found.family == socket.AF_UNIX:
            return None
        return int(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK))


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="this system has no TCP_QUICKACK")
def test_only_a_prompt_session_acknowledges_at_once() -> None:
    async def main() -> list[int | None]:
        async with EmbeddedBroker() as broker:
            return [await talk(broker.url, prompt=prompt) for prompt in (False, True)]

    assert asyncio.run(main()) == [0, 1]


def test_a_unix_socket_has_nothing_to_acknowledge(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "broker.sock"
        async with EmbeddedBroker([Listener(unix=path)]):
            assert await talk(f"unix://{path}", prompt=True) is None

    asyncio.run(main())
