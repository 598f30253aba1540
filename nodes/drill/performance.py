"""One run of the disguised topology: undisturbed, or under the blows of a schedule."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.bus import Publication
from nodes.drill import fault
from nodes.drill.behind import Behind
from nodes.drill.fault import Blow, Ground, MissedError, Stage
from nodes.drill.feed import Feed
from nodes.drill.probes import Probes
from nodes.plan import Plan
from nodes.sources.mqtt import Config as MqttConfig
from nodes.supervisor import Outcome, Supervisor
from nodes.variants import VariantConfig
from schemas.errors import BusError, ConnectError, PenstockError

if TYPE_CHECKING:
    from schemas.messages import Ledger

STUCK = 60.0
"""Seconds without a row in a probe or a change in the books, after which a run is given up."""
_GOT_UP = 20.0
"""Seconds that are waited for rows after a blow."""
_FIRST_ROW = 5.0
"""Seconds that the first blow waits for a first row: before it there is nothing to lose."""
_PATIENCE = 5.0
"""Seconds for a broker that is there already to let us in."""
_TIDY = 1.0
"""Seconds without a retained message of ours after which a broker is clean."""
_RARE = 3.0
"""Seconds without a row behind a blow after which, if rows move elsewhere, they are rare there and not waited for."""
_QUIET = 2.0
"""Seconds without a row after which what the drill published has gone through."""


@dataclass
class Struck:
    """A blow that was struck, or was not.

    :ivar at: seconds after the start.
    :ivar did: what was done; ``missed``: why nothing was.
    :ivar recovery: longest time without a row in the probes behind it, from the blow until it was over and rows came again, in
        seconds; None: none came.
    """

    blow: Blow
    at: float = 0.0
    did: str = ""
    missed: str = ""
    recovery: float | None = None


@dataclass
class Result:
    """What is known of a run when it is over.

    :ivar failure: why it did not end by itself; empty if it did.
    :ivar in_flight: messages sent and not yet taken in, at worst; ``held``: rows taken in and not done, at worst. Both as
        the books said, which come once a second.
    :ivar lasting: seconds from its start to its end.
    """

    plan: Plan
    probes: Probes
    outcome: Outcome | None = None
    failure: str = ""
    interrupted: bool = False
    struck: list[Struck] = field(default_factory=list)
    injected: dict[str, int] = field(default_factory=dict)
    feeds: dict[str, Feed] = field(default_factory=dict)
    books: dict[str, Ledger] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    held: int = 0
    lasting: float = 0.0

    @property
    def emitted(self) -> dict[str, int]:
        """Rows that each source gave."""
        return {
            name: sum(flow.rows for flow in book.emitted.values())
            for name, book in self.books.items()
            if self.plan.nodes[name].kind == "ingest"
        }


class Performance:
    """A run with blows.

    :param folder: of this run: its state and the probes' records.
    :param schedule: blows with the earliest moment of each; empty: undisturbed.
    :param seconds: least time that live sources go on.
    :param say: told each blow when it is struck or over.
    """

    def __init__(
        self,
        plan: Plan,
        ground: Ground,
        folder: Path,
        probes: Probes,
        schedule: Sequence[tuple[float, Blow]] = (),
        *,
        seed: int = 1,
        seconds: float = 0.0,
        ends: bool = True,
        say: Callable[[Struck], None] = lambda struck: None,
    ) -> None:
        self.result = Result(plan, probes)
        state = folder / "state"
        self.supervisor = Supervisor(plan, state=state, level="error")
        self.supervisor.brokers = self._brokers = Behind(plan, state, None, seed)
        draw = random.Random(f"blows/{seed}")  # noqa: S311 - faults, not secrets
        self._stage = Stage(ground, self.supervisor, self._brokers, state, draw)
        self._stage.injected = self.result.injected
        self._finishes: list[Callable[[Stage], None]] = []
        for module in map(fault.module, sorted({blow.fault for _, blow in schedule})):
            if hasattr(module, "prepare"):
                module.prepare(self._stage)
                self._finishes.append(module.finish)
        for name in ground.fed:
            config = plan.nodes[name].config
            if isinstance(config, VariantConfig) and isinstance(config.options, MqttConfig):
                self._stage.feeds[name] = Feed(name, config.options)
        self.result.feeds = self._stage.feeds
        self._schedule = schedule
        self._seconds = seconds
        self._ends = ends
        self._say = say
        self._striking: asyncio.Task[None] | None = None
        self._moved = self._busy = time.monotonic()
        self.now = "starting"

    def interrupt(self) -> None:
        """No more blows; what is under way is finished."""
        self.result.interrupted = True
        if self._striking is not None:
            self._striking.cancel()

    async def run(self) -> Result:
        """Run to the end. What stops it before is in the result."""
        result, supervisor = self.result, self.supervisor
        await self._reach()
        running = asyncio.create_task(supervisor.run())
        began = time.monotonic()
        self._striking = asyncio.create_task(self._direct())
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            result.outcome = await running
        except PenstockError as error:
            result.failure = str(error)
        except TimeoutError as error:
            result.failure = str(error)
        finally:
            for task in (self._striking, watching, running):
                task.cancel()
            await asyncio.gather(self._striking, watching, running, return_exceptions=True)
            result.lasting = time.monotonic() - began
            for name, view in supervisor.views.items():
                result.restarts[name] = view.restarts
                if view.books is not None:
                    result.books[name] = view.books
            with suppress(BusError):
                await self._tidy()
            await self._stage.close()
            for finish in self._finishes:
                finish(self._stage)
        for _, blow in self._schedule[len(result.struck) :]:
            why = "Ctrl-C came before" if result.interrupted else "the data had ended before"
            result.struck.append(Struck(blow, missed=why if not result.failure else "the run had ended before"))
        return result

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _reach(self) -> None:
        """Brokers that are there already answer; otherwise every node would wait for them without end.

        :raises BusError: one does not.
        """
        from broker.connect import connect

        for name, broker in self.result.plan.brokers().items():
            if broker.run is None and broker.url is not None:
                bus = connect(broker.url, patience=_PATIENCE, **_known(self._brokers.credentials(name)))
                try:
                    await bus.open()
                except BusError as error:
                    raise ConnectError(f"broker {name!r}: {error}; --own-brokers runs without it") from error
                finally:
                    await bus.close()

    async def _direct(self) -> None:
        """The blows, then the end of sources that have none."""
        views = self.supervisor.views.values()
        await fault.until(lambda: all(view.ready_at for view in views))
        feeding = [asyncio.create_task(self._feed(feed)) for feed in self._stage.feeds.values()]
        try:
            try:
                await fault.until(lambda: self.result.probes.last() > 0, within=_FIRST_ROW)
                began = time.monotonic()
                for at, blow in self._schedule:
                    self.now = "undisturbed"
                    await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                    await self._strike(blow, began)
                self.now = "undisturbed"
                if not self._ends:
                    await asyncio.sleep(max(0.0, began + self._seconds - time.monotonic()))
            except asyncio.CancelledError:  # the blow under way has put everything right again
                if not self.result.interrupted:
                    raise
            for feed in feeding:
                feed.cancel()
            await asyncio.gather(*feeding, return_exceptions=True)
            if not self._ends or self.result.interrupted:
                self.now = "ending"
                await fault.until(lambda: all(view.state == "ready" or view.gone for view in views), within=_GOT_UP)
                if feeding:
                    await fault.until(lambda: time.monotonic() - self._probed() > _QUIET, within=_GOT_UP)
                self.supervisor.end()
        finally:
            for feed in feeding:
                feed.cancel()

    def _probed(self) -> float:
        return self.result.probes.last() / 1e9

    async def _feed(self, feed: Feed) -> None:
        node = self.result.plan.nodes[feed.name]
        broker = getattr(getattr(node.config, "options", None), "broker", None) or node.broker
        await feed.run(await self._stage.bus(broker))

    async def _tidy(self) -> None:
        """Nothing of ours stays on a broker that is there already: nodes have their state and books retained there."""
        brokers = self.result.plan.brokers()
        for name in [name for name, broker in brokers.items() if broker.run is None and name in self._brokers.direct]:
            bus = await self._stage.bus(name)
            found = await bus.subscribe(
                [f"{self.result.plan.topology.name}/#"], qos=0, capacity=4096, overflow="sample"
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(_TIDY):
                    while True:
                        kept = [one.topic for one in await found.receive() if one.retain and one.payload]
                        await (await bus.publish([Publication(topic, b"", qos=1, retain=True) for topic in kept]))

    async def _strike(self, blow: Blow, began: float) -> None:
        struck = Struck(blow, at=round(time.monotonic() - began, 2))
        self.now = str(blow)
        struck_at, self._busy = time.monotonic_ns(), time.monotonic()
        try:
            struck.did = await fault.module(blow.fault).strike(self._stage, blow)
        except MissedError as error:
            struck.missed = str(error)
        else:
            self._busy = time.monotonic()
            self.result.struck.append(struck)
            await self._recover(struck, struck_at)
            self._say(struck)
            return
        self.result.struck.append(struck)
        self._say(struck)

    async def _recover(self, struck: Struck, since: int) -> None:
        """Wait for rows behind what was struck."""
        over = time.monotonic_ns()
        behind = self._behind(struck.blow.target)
        found = False

        def came() -> bool:
            nonlocal found
            probes = self.result.probes
            if probes.first_after(over, behind) is not None:
                found = True
                return True
            if all(self.supervisor.views[name].gone for name in behind):
                return True
            if time.monotonic_ns() - over < _RARE * 1e9:
                return False
            return probes.first_after(over, probes.names) is not None or self._flows(over / 1e9 + 1)

        await fault.until(came, within=_GOT_UP)
        if found and (gap := self.result.probes.longest_gap(since, behind)) is not None:
            struck.recovery = round(gap / 1e9, 3)

    def _flows(self, since: float) -> bool:
        """Whether all nodes are there and each that is no sink has told books since, and some of them took rows in."""
        views = [view for view in self.supervisor.views.values() if view.kind != "uplink" and not view.gone]
        if not views or any(view.state != "ready" or view.seen_at < since for view in views):
            return False
        return any(view.rate > 0 for view in views)

    def _behind(self, target: str) -> list[str]:
        """Probes that see what goes through a node; all of them where it is none."""
        plan = self.result.plan
        if target not in plan.nodes:
            return self.result.probes.names
        reached, waiting = set[str](), [target]
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting += [edge.consumer for edge in plan.nodes[name].consumers if edge.consumer not in reached]
        return [name for name in self.result.probes.names if name in reached]

    async def _watch(self) -> None:
        """Follow the books; give up when nothing moves.

        :raises TimeoutError: nothing did for :data:`STUCK` seconds.
        """
        plan, views, result = self.result.plan, self.supervisor.views, self.result
        before: object = None
        while True:
            await asyncio.sleep(0.2)
            books = {name: view.books for name, view in views.items() if view.books is not None}
            now = [(name, view.state, view.restarts) for name, view in views.items()]
            picture = (now, [(b.passed, b.held, {p: f.messages for p, f in b.emitted.items()}) for b in books.values()])
            if picture != before:
                before, self._moved = picture, time.monotonic()
            flying = 0
            for edge in plan.edges:
                if edge.producer in books and edge.consumer in books and edge.delivery == "safe":
                    sent = books[edge.producer].emitted.get(edge.port)
                    taken = books[edge.consumer].received.get(edge.name)
                    flying += max(0, (sent.messages if sent else 0) - (taken.messages if taken else 0))
            result.in_flight = max(result.in_flight, flying)
            result.held = max(result.held, sum(max(0, book.held) for book in books.values()))
            if time.monotonic() - max(self._moved, self._busy, self._probed()) > STUCK:
                states = ", ".join(f"{name} {view.state}" for name, view in views.items())
                raise TimeoutError(f"nothing moved any more for {STUCK:.0f} s: {states}")


def _known(credentials: dict[str, str | None]) -> dict[str, Any]:
    return {key: value for key, value in credentials.items() if value is not None}
