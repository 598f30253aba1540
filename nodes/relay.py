"""A relay that keeps: safe edges from one broker to another, each port of theirs through a spool on this host's disk.

It is a hop with delivery on both of its sides (:mod:`nodes.relay_port`), a process of its own, and has books like a node. See
``docs/decisions/0011-spooling-relay.md``. Edges that are not kept go through :mod:`broker.relay`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from broker.bus import Bus, Will
from broker.throttle import Throttle
from nodes import log, relay_books
from nodes.assignment import Assignment, NodeSpec, RelayPort, RelaySpec, Report
from nodes.link import link
from nodes.relay_port import Hop
from nodes.relay_store import Store
from nodes.signs import Signs, state_payload
from schemas import topics
from schemas.errors import BusError

BOOKS_EVERY = 1.0
"""Seconds between publications of the books."""
_LEAVES_WITHIN = 15.0
_GOODBYE = 5.0


class Relay:
    """Runs one relay that keeps; the worker calls it as it does a node's runtime."""

    def __init__(self, assignment: Assignment, spec: RelaySpec, report: Callable[[Report], None]) -> None:
        self.name = spec.name
        self._spec = spec
        self._topology = assignment.topology
        self._folder = Path(assignment.state) / spec.name
        self._stopping = asyncio.Event()
        self._moved = asyncio.Event()
        self._left: set[str] = set()
        self._hops: list[Hop] = []
        self._greeting: set[asyncio.Task[None]] = set()
        self._open = False
        state = topics.state(self._topology, spec.name)
        will = Will(state, state_payload(spec.name, "offline", spec.host))
        self._lower = self._link(assignment, spec.broker, "", self._below_again, will)
        self._upper = self._link(assignment, spec.far, "-up", self._above_again, None)
        own = NodeSpec(
            name=spec.name, kind="relay", config={}, inputs=[], outputs=[], host=spec.host, broker=spec.broker
        )
        self._signs = Signs(self._topology, own, self._lower, report, Path(assignment.state))

    def _link(
        self, assignment: Assignment, broker: str, suffix: str, again: Callable[[], None], will: Will | None
    ) -> Bus:
        client_id = f"{assignment.topology}-{self.name}{suffix}"
        return link(assignment.brokers[broker], client_id, up=again, will=will, node=self.name, broker=broker)

    # -- what the worker calls ---------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Open the files and the link below, and subscribe there; the far broker may be away.

        :raises BusError: a spool is in use, or cannot be used.
        """
        self._signs.say("starting")
        spec, throttle = self._spec, Throttle(self._spec.rate) if self._spec.rate is not None else None
        for port in spec.ports:
            folder = self._folder / f"{port.producer}.{port.port}"
            store = await self._store(folder, port)
            self._hops.append(
                Hop(
                    self._topology,
                    self.name,
                    port,
                    store,
                    lower=self._lower,
                    upper=self._upper,
                    throttle=throttle,
                    signs=self._signs,
                )
            )
        for folder in self._folder.glob("*/"):
            if folder.name not in {hop.edge for hop in self._hops}:
                log.warning("a spool that no edge uses any more", node=self.name, folder=str(folder))
        await self._lower.open()
        for hop in self._hops:
            await hop.below()
            for reader in self._left:
                hop.left(reader)
        self._open = True
        await self._signs.show_state("ready")
        self._signs.say("ready")

    async def _store(self, folder: Path, port: RelayPort) -> Store:
        """The files of a port. A killed run's process may still be leaving, and has them until then."""
        until = time.monotonic() + _LEAVES_WITHIN
        while True:
            try:
                return await asyncio.to_thread(
                    Store, folder, port.consumers, port.budget, self._spec.overflow, self._spec.order
                )
            except BusError:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.1)

    async def run(self) -> None:
        """Relay until every stream has ended, or until told to stop.

        :raises ConnectError: the far broker refuses us for good.
        """
        complete = asyncio.create_task(self._complete())
        stopping = asyncio.create_task(self._stopping.wait())
        work = [self._above(), self._publish_books(), *(task for hop in self._hops for task in hop.tasks())]
        tasks = [asyncio.create_task(each) for each in work]
        try:
            pending: set[asyncio.Task[object]] = {complete, stopping, *tasks}
            while not (complete.done() or stopping.done()):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            ended = complete.done() and not complete.cancelled()
            for task in (complete, stopping, *tasks, *self._greeting):
                task.cancel()
            await asyncio.gather(complete, stopping, *tasks, *self._greeting, return_exceptions=True)
        await self._leave(ended=ended)

    def stop(self) -> None:
        """Leave now; what is kept stays on the disk."""
        self._stopping.set()

    def end(self) -> None:
        """For sources only."""

    def left(self, name: str) -> None:
        """A node has ended and left: a reader, or a producer, which needs us no more."""
        self._left.add(name)
        self._moved.set()
        for hop in self._hops:
            hop.left(name)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _below_again(self) -> None:
        if self._open:
            self._greet(below=True)

    def _above_again(self) -> None:
        self._greet(below=False)

    def _greet(self, *, below: bool) -> None:
        async def greet() -> None:
            try:
                for hop in self._hops:
                    await (hop.greet_below() if below else hop.greet_above())
            except BusError as error:
                log.debug("not greeted", node=self.name, reason=str(error))

        task = asyncio.get_running_loop().create_task(greet())
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _above(self) -> None:
        """Reach the far broker, whenever that may be, and give it what there is."""
        await self._upper.open()
        for hop in self._hops:
            await hop.above()
        await asyncio.gather(*(task for hop in self._hops for task in hop.tasks_above()))

    async def _complete(self) -> None:
        """Every stream has ended beyond, and the producers of this run have heard so."""
        for hop in self._hops:
            await hop.complete.wait()
        while not self._left.issuperset(self._spec.local):
            self._moved.clear()
            await self._moved.wait()

    async def _publish_books(self) -> None:
        due = time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            await self._signs.send_foreign()
            if time.monotonic() >= due:
                due = time.monotonic() + BOOKS_EVERY
                await self._show_books()

    async def _show_books(self) -> None:
        book = relay_books.ledger(
            self.name, {hop.edge: hop.books for hop in self._hops}, {hop.edge: hop.repeated for hop in self._hops}
        )
        await self._signs.show_books(book, passing=False)

    async def _leave(self, *, ended: bool) -> None:
        if ended:
            for hop in self._hops:
                await hop.farewell()
        for hop in self._hops:
            await hop.close()
        await self._signs.burials.close(self.name)
        await self._show_books()
        with contextlib.suppress(TimeoutError):  # the broker may be gone, and with it whoever would hear
            async with asyncio.timeout(None if ended else _GOODBYE):
                await self._signs.show_state("ended" if ended else "stopped")
                for bus in (self._upper, self._lower):
                    await bus.close()
        if ended:
            for hop in self._hops:
                hop.remove()
            with contextlib.suppress(OSError):
                self._folder.rmdir()
        self._signs.say("ended" if ended else "stopped")
