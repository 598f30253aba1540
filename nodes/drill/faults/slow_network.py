"""Delay, jitter, loss and little bandwidth between nodes and brokers."""

from __future__ import annotations

import asyncio

from nodes.drill.fault import Blow, Ground, Stage
from nodes.drill.faults import cut_network

SECONDS = 6.0
_DELAY = (0.05, 0.25)
"""Seconds in each direction: a bad mobile link."""
_BANDWIDTH = (64_000, 512_000)
_LOSS = 0.02


def why_not(ground: Ground) -> str | None:
    """As for a cut."""
    return cut_network.why_not(ground)


def targets(ground: Ground) -> list[str]:
    """All links at once."""
    del ground
    return [""]


async def strike(stage: Stage, blow: Blow) -> str:
    """Make all links slow for the time."""
    links = list(stage.brokers.links.values())
    delay, bandwidth = stage.draw.uniform(*_DELAY), round(stage.draw.uniform(*_BANDWIDTH))
    try:
        for link in links:
            link.delay, link.jitter, link.loss, link.bandwidth = delay, delay / 2, _LOSS, bandwidth
        await asyncio.sleep(blow.seconds)
    finally:
        for link in links:
            link.calm()
    return (
        f"{blow.seconds:.1f} s of {delay * 1000:.0f} ms ± {delay * 500:.0f} ms, {_LOSS:.0%} lost,"
        f" {bandwidth / 1000:.0f} kB/s, by a proxy"
    )
