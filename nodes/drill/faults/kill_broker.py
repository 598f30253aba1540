"""The broker is killed (SIGKILL), where the run starts it itself."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from nodes.drill.fault import Blow, Ground, Stage, until
from schemas.errors import ConfigError, did_you_mean

SECONDS = 2.0


def why_not(ground: Ground) -> str | None:
    """Only brokers of the run's own."""
    others = [name for name in ground.brokers() if name not in ground.own]
    if len(others) == len(ground.brokers()):
        which = f"the broker {others[0]!r} is" if len(others) == 1 else "the brokers are"
        return f"{which} there already and not the drill's to kill; --own-brokers runs on brokers of its own"
    return None


def targets(ground: Ground) -> list[str]:
    """Each broker of our own."""
    return [name for name in ground.brokers() if name in ground.own]


def chosen(ground: Ground, name: str) -> str:
    """The target that the user named.

    :raises ConfigError: there is none, or it is not ours.
    """
    if name not in ground.brokers():
        raise ConfigError(f"--fault kill-broker: there is no broker {name!r}{did_you_mean(name, ground.brokers())}")
    if name not in ground.own:
        raise ConfigError(f"--fault kill-broker: the broker {name!r} is there already and not the drill's to kill")
    return name


async def strike(stage: Stage, blow: Blow) -> str:
    """Kill it; wait until the next one answers."""
    child = stage.brokers.children[blow.target]
    before = child.restarts
    child.kill()
    await until(lambda: child.restarts > before)
    to = urlsplit(stage.brokers.direct[blow.target])
    while True:
        try:
            _, writer = await asyncio.open_connection(to.hostname, to.port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        return "SIGKILL"
