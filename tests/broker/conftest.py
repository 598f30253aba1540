"""Fixtures of the broker tests: mosquitto, and the arrangements of the bus's behaviour suite."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from bus_site import MOSQUITTO, LocalSite, Mosquitto, NetworkSite, Run, Site

from broker.embedded.limits import Limits
from broker.embedded.server import EmbeddedBroker
from broker.legacy import Legacy
from broker.session import Session

NEEDS_MOSQUITTO = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


@pytest.fixture(scope="session")
def shared_mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """One for all tests that need nothing special and never stop it."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto")).start()
    yield broker
    broker.stop()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Starts a mosquitto with the given configuration lines; stopped when the test ends."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    started: list[Mosquitto] = []

    def start(*lines: str) -> Mosquitto:
        started.append(Mosquitto(tmp_path / f"mosquitto-{len(started)}", *lines))
        return started[-1].start()

    yield start
    for each in started:
        each.stop(kill=True)


@pytest.fixture(
    params=[
        "local",
        pytest.param("session@mosquitto", marks=[pytest.mark.connected, NEEDS_MOSQUITTO]),
        pytest.param("legacy@mosquitto", marks=[pytest.mark.connected, NEEDS_MOSQUITTO]),
        "session@embedded",
        "legacy@embedded",
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario in one arrangement; fails it after 50 seconds."""
    name: str = request.param

    async def on_mosquitto(stack: AsyncExitStack) -> int:
        broker: Mosquitto = request.getfixturevalue("shared_mosquitto")
        return broker.port

    async def on_embedded(stack: AsyncExitStack) -> int:
        broker = await stack.enter_async_context(EmbeddedBroker(limits=Limits(stall_seconds=60)))
        return broker.port

    if name.endswith("@mosquitto"):
        request.getfixturevalue("shared_mosquitto")  # fixtures cannot be made inside a running loop

    def make() -> Site:
        if name == "local":
            return LocalSite()
        kind = Session if name.startswith("session") else Legacy
        site = NetworkSite(kind, on_mosquitto if name.endswith("mosquitto") else on_embedded)
        site.name = name
        return site

    def runner(scenario: Callable[[Site], Awaitable[None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(50), make() as site:
                await scenario(site)

        asyncio.run(main())

    return runner
