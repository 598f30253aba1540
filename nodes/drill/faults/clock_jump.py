"""The time of day of the node processes jumps an hour forward, two back, and to the truth again.

What a process reads as the time is moved within it (:mod:`nodes.drill.clock`): the machine's clock is not touched, and Linux
has no namespace for the time of day.
"""

from __future__ import annotations

import asyncio

from nodes.drill.fault import Blow, Ground, Stage

SECONDS = 4.0
_HOUR = 3600 * 10**9


def why_not(ground: Ground) -> str | None:
    """It can always be done."""
    return None if ground.nodes else "no node runs here"


def targets(ground: Ground) -> list[str]:
    """All processes at once."""
    del ground
    return [""]


async def strike(stage: Stage, blow: Blow) -> str:
    """Forward, back beyond the truth, and right again."""
    try:
        for offset in (_HOUR, -_HOUR):
            stage.supervisor.move_clocks(offset)
            await asyncio.sleep(blow.seconds / 2)
    finally:
        stage.supervisor.move_clocks(0)
    return f"+1 h, -1 h, {blow.seconds / 2:.1f} s each, within the processes"
