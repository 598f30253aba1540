"""What a fault is given, and what a file in :mod:`nodes.drill.faults` has.

A fault is one file; its name is the fault's name (``kill_node.py`` is ``kill-node``). It has

- a docstring, whose first line says what it does;
- ``SECONDS``: how long one blow lasts, without the time to recover; a blow may be given less;
- ``why_not(ground) -> str | None``: why it cannot be done here, before anything runs;
- ``targets(ground) -> list[str]``: what one round strikes, one blow each (nodes, brokers); ``[""]``: everything at once;
- ``async strike(stage, blow) -> str``: does it, undoes it and waits until what it struck is there again; says what was done;
- if need be, ``prepare(stage)``, called before anything starts, and ``finish(stage)``, called when all has ended.
"""

from __future__ import annotations

import asyncio
import os
import pkgutil
import random
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nodes.planned import Plan, PlannedEdge
from schemas.errors import ConfigError, PenstockError, did_you_mean

if TYPE_CHECKING:
    from broker.bus import Bus
    from nodes.drill.behind import Behind
    from nodes.drill.feed import Feed
    from nodes.supervisor import NodeView, Supervisor

_FOLDER = "nodes.drill.faults"


class MissedError(PenstockError):
    """A blow found nothing to strike any more; it says why."""


@dataclass(frozen=True)
class Blow:
    """One fault at one time.

    :param target: a node or a broker; ``""``: everything at once.
    :param seconds: how long it lasts.
    """

    fault: str
    target: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.fault} {self.target}".rstrip()


@dataclass(frozen=True)
class Ground:
    """What is known before anything runs.

    :param plan: of the disguised topology.
    :param own: brokers that the run starts.
    :param fed: sources that the drill itself publishes to.
    :param nodes: what may be struck: the user's nodes, those of one host if the user named one.
    """

    plan: Plan
    own: frozenset[str]
    fed: frozenset[str]
    nodes: Collection[str]

    def processes(self) -> dict[str, list[str]]:
        """Nodes that may be struck by the first of their process."""
        out: dict[str, list[str]] = {}
        for nodes in self.plan.processes().values():
            if names := [node.name for node in nodes if node.name in self.nodes]:
                out[names[0]] = names
        return out

    def brokers(self) -> list[str]:
        """Brokers that the nodes use."""
        return list(dict.fromkeys(node.broker for node in self.plan.nodes.values() if node.name in self.nodes))

    def wires(self) -> list[PlannedEdge]:
        """Edges that are topics of a broker and end at a node that may be struck."""
        return [edge for edge in self.plan.edges if edge.carrier != "local" and edge.consumer in self.nodes]


@dataclass
class Stage:
    """A run that is under way, in the hands of the faults.

    :param state: the run's state folder.
    :ivar injected: messages that were sent to be refused, by the node that is to refuse them.
    :ivar bounded: why the state folder has an end that can be reached (full-disk), by :func:`prepare` of that fault.
    """

    ground: Ground
    supervisor: Supervisor
    brokers: Behind
    state: Path
    draw: random.Random
    feeds: dict[str, Feed] = field(default_factory=dict)
    injected: dict[str, int] = field(default_factory=dict)
    bounded: str = ""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _buses: dict[str, Bus] = field(default_factory=dict)

    async def bus(self, broker: str) -> Bus:
        """A connection of the drill's own, past the link that is cut."""
        if broker not in self._buses:
            from broker.connect import connect

            url, known = self.brokers.direct[broker], self.brokers.credentials(broker)
            user, password, ca, cert, key = (known[name] for name in ("user", "password", "ca", "cert", "key"))
            bus = connect(
                url, client_id=f"penstock-drill-{os.getpid()}", user=user, password=password, ca=ca, cert=cert, key=key
            )
            self._buses[broker] = await self._stack.enter_async_context(bus)
        return self._buses[broker]

    async def close(self) -> None:
        """Close what was opened."""
        await self._stack.aclose()

    def alive(self, node: str) -> NodeView:
        """A node that has not left.

        :raises MissedError: it has.
        """
        view = self.supervisor.views[node]
        if view.gone:
            raise MissedError(f"{node} had {view.state} before")
        return view


async def until(condition: Callable[[], bool], within: float = 86400.0) -> bool:
    """Wait for a condition; whether it came true in time (s). Who watches the run ends a wait that lasts for ever."""
    try:
        async with asyncio.timeout(within):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
                await asyncio.sleep(0.02)
    except TimeoutError:
        return False
    return True


@cache
def names() -> tuple[str, ...]:
    """All faults, by name."""
    spec = find_spec(_FOLDER)
    found = pkgutil.iter_modules(spec.submodule_search_locations if spec else None)
    return tuple(sorted(module.name.replace("_", "-") for module in found))


def module(name: str) -> ModuleType:
    """A fault's file.

    :raises ConfigError: there is none of that name.
    """
    if name not in names():
        raise ConfigError(f"--fault: there is no fault {name!r}{did_you_mean(name, names())}")
    return import_module(f"{_FOLDER}.{name.replace('-', '_')}")


def says(name: str) -> str:
    """What a fault does, in a sentence."""
    return (module(name).__doc__ or "").strip().split("\n", 1)[0]
