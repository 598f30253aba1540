"""Every connection between nodes and brokers is dropped, and new ones are refused for a while."""

from __future__ import annotations

import asyncio

from nodes.drill.behind import unlinkable
from nodes.drill.fault import Blow, Ground, Stage

SECONDS = 3.0
_SILENCE = 0.3
"""Seconds of silence before every other cut, so that what is on its way is lost too."""


def why_not(ground: Ground) -> str | None:
    """Where no link can stand before any broker."""
    reasons = {}
    for name in ground.brokers():
        reasons[name] = unlinkable(ground.plan.topology.brokers[name].url or "")
    if reasons and all(reasons.values()):
        return f"no proxy can stand before the broker {next(iter(reasons))!r}: {next(iter(reasons.values()))}"
    return None


def targets(ground: Ground) -> list[str]:
    """All links at once."""
    del ground
    return [""]


async def strike(stage: Stage, blow: Blow) -> str:
    """Cut all links; let them connect again after the time."""
    links = list(stage.brokers.links.values())
    silent = stage.draw.random() < 0.5
    try:
        if silent:
            for link in links:
                link.stall()
            await asyncio.sleep(min(_SILENCE, blow.seconds / 2))
        for link in links:
            link.refuse = True
            link.cut()
            link.go_on()
        await asyncio.sleep(blow.seconds)
    finally:
        for link in links:
            link.calm()
    return f"{blow.seconds:.1f} s, by a proxy{', silent before' if silent else ''}"
