"""Each node's process is killed (SIGKILL) in turn; kill-node:NAME: that of one node."""

from __future__ import annotations

from nodes.drill.fault import Blow, Ground, MissedError, Stage, until
from schemas.errors import ConfigError, did_you_mean

SECONDS = 1.5


def why_not(ground: Ground) -> str | None:
    """It can always be done."""
    return None if ground.nodes else "no node runs here"


def targets(ground: Ground) -> list[str]:
    """One node of each process."""
    return list(ground.processes())


def chosen(ground: Ground, name: str) -> str:
    """The target that the user named.

    :raises ConfigError: there is no such node.
    """
    if name not in ground.nodes:
        raise ConfigError(f"--fault kill-node: there is no node {name!r}{did_you_mean(name, ground.nodes)}")
    return name


async def strike(stage: Stage, blow: Blow) -> str:
    """Kill it when it is ready; wait until it is again."""
    view = stage.alive(blow.target)
    if not await until(lambda: view.state == "ready" or view.gone, within=30):
        raise MissedError(f"{blow.target} was not ready within 30 s ({view.state})")
    stage.alive(blow.target)
    before = view.restarts
    stage.supervisor.kill(blow.target)
    await until(lambda: view.restarts > before or view.gone)
    if view.restarts == before:
        raise MissedError(f"{blow.target} had {view.state} before")
    await until(lambda: view.state == "ready" or view.gone)
    return "SIGKILL"
