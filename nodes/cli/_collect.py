"""The books of running nodes, collected from their brokers; or, of a run that was stopped, from its state folder."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from nodes import ledger
from schemas import codec, topics
from schemas.errors import ConfigError, PayloadError, RunError
from schemas.messages import Flow, Ledger, State

if TYPE_CHECKING:
    from broker.bus import Bus, Subscription
    from nodes.cli._reach import Place
    from schemas.topology import Topology

_PATIENCE = 5.0
"""Seconds for a broker to let us in."""
_WITHIN = 2.5
"""Seconds for all nodes to be heard of; each publishes every second, and the broker keeps the last."""
_QUIET = 0.4
"""Seconds without news after which no more is expected, where the nodes are not known."""
_LEFT = frozenset({"ended"})


@dataclass(frozen=True, slots=True)
class EdgeBooks:
    """What the books of an edge's two ends say, in messages.

    :param under_way: sent and not taken in yet, or taken in and not acknowledged yet.
    :param lost: of a ``fast`` edge whose ends have ended.
    :param relay: that keeps it, if one does; ``dropped``: what it dropped or dead-lettered.
    """

    name: str
    delivery: str
    sent: int
    received: int
    under_way: int
    lost: int
    relay: str = ""
    dropped: int = 0


class Collection:
    """The books that were heard of so far; ``async with``, then :meth:`first`.

    :param nodes: those of the topology, with their replicas (or themselves); None: not known.
    :param wires: (producer, port, consumer, delivery) of its edges; None: not known.
    :ivar books: by (topology, node).
    :ivar live: they are being heard from a broker.
    """

    def __init__(
        self,
        name: str,
        buses: list[tuple[Bus, str]],
        nodes: Mapping[str, Sequence[str]] | None = None,
        wires: Sequence[tuple[str, str, str, str]] | None = None,
    ) -> None:
        self.name = name
        self._groups = nodes or {}
        self.books: dict[tuple[str, str], Ledger] = {}
        self.states: dict[tuple[str, str], str] = {}
        self.live = bool(buses)
        self._buses = buses
        self._nodes = [member for several in self._groups.values() for member in several]
        self._wires = wires
        self._news = asyncio.Event()
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def several(self) -> bool:
        """Nodes of more than one topology."""
        return len({topology for topology, _ in self.books}) > 1

    @property
    def ended(self) -> bool:
        """Every node says that its stream has ended."""
        wanted = self.books.keys() | {(self.name, name) for name in self._nodes}
        return bool(wanted) and all(self.states.get(key) in _LEFT for key in wanted)

    def silent(self) -> list[str]:
        """Nodes that nothing is heard of, and those whose process died."""
        lacking = [name for name in self._nodes if (self.name, name) not in self.books]
        return lacking + [
            node for (_, node), state in self.states.items() if state == "offline" and node not in lacking
        ]

    def edges(self) -> list[EdgeBooks]:
        """Every edge whose two ends are there."""
        out = []
        whole = self._whole()
        for topology, producer, port, consumer, delivery in self._edges():
            source, sink = whole.get((topology, producer)), whole.get((topology, consumer))
            if source is None or sink is None:
                continue
            sent = source.emitted.get(port, Flow()).messages
            received = sink.received.get(f"{producer}.{port}", Flow()).messages
            ends = [*self._groups.get(producer, [producer]), *self._groups.get(consumer, [consumer])]
            gone = all(self.states.get((topology, node)) in _LEFT for node in ends)
            lost = max(0, sent - received) if gone and delivery == "fast" else 0
            prefix = f"{topology}/" if self.several else ""
            name = f"{prefix}{producer}.{port} → {consumer}"
            relay, dropped = self._kept(topology, f"{producer}.{port}", consumer)
            way = 0 if gone else abs(sent - received - dropped)
            out.append(EdgeBooks(name, delivery, sent, received, way, lost, relay, dropped))
        return out

    def _whole(self) -> dict[tuple[str, str], Ledger]:
        """The books, with a node's replicas as one."""
        members = {member for several in self._groups.values() for member in several}
        mine = {node: book for (t, node), book in self.books.items() if t == self.name and node in members}
        rest = {key: book for key, book in self.books.items() if key[0] != self.name or key[1] not in members}
        return rest | {(self.name, node): book for node, book in ledger.together(mine, self._groups).items()}

    def _kept(self, topology: str, edge: str, reader: str) -> tuple[str, int]:
        """The relay that keeps an edge, and messages that it did not give on for good; ``""``, 0: none keeps it."""
        books = {node: book for (t, node), book in self.books.items() if t == topology}
        relay = ledger.keepers(books).get((edge, reader), "")
        if not relay:
            return "", 0
        port = (books[relay].spooled or {})[edge]
        return relay, port.dead.messages + sum(flow.messages for flow in port.dropped.values())

    def findings(self) -> list[str]:
        """What does not balance. As long as it runs the two ends of an edge may differ: that is under way."""
        out = []
        for topology in {topology for topology, _ in self.books}:
            books = {node: book for (t, node), book in self._whole().items() if t == topology}
            edges = [(p, port, c, d == "safe") for t, p, port, c, d in self._edges() if t == topology]
            out += ledger.audit(books, edges if self.ended else ())
            if self.ended:
                out += [f"{name}: {book.held} rows are still held" for name, book in books.items() if book.held]
        return out

    async def __aenter__(self) -> Self:
        for bus, pattern in self._buses:
            await self._stack.enter_async_context(bus)
            filters = [topics.ledger(pattern, "+"), topics.state(pattern, "+")]
            subscription = await bus.subscribe(filters, qos=0, capacity=4096, overflow="latest")

            self._tasks.append(asyncio.create_task(self._listen(subscription)))
        return self

    async def _listen(self, subscription: Subscription) -> None:
        while True:
            for delivery in await subscription.receive():
                self._take(delivery.topic, delivery.payload)
            self._news.set()

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def first(self) -> None:
        """Wait until all that is to be expected was heard of."""
        if not self.live:
            return
        known = {(self.name, name) for name in self._nodes}
        try:
            async with asyncio.timeout(_WITHIN):
                while not known or not (known <= self.books.keys() and known <= self.states.keys()):
                    self._news.clear()
                    if known or not self.books:
                        await self._news.wait()
                    else:
                        async with asyncio.timeout(_QUIET):
                            await self._news.wait()
        except TimeoutError:
            return

    def _take(self, topic: str, payload: bytes) -> None:
        topology, _, _ = topic.partition("/")
        try:
            body = codec.decode(payload).body
        except PayloadError:
            return
        if isinstance(body, Ledger):
            self.books[topology, body.node] = body
        elif isinstance(body, State):
            self.states[topology, body.node] = body.status

    def _edges(self) -> list[tuple[str, str, str, str, str]]:
        """(topology, producer, port, consumer, delivery); without a topology's file as the consumers' books name them."""
        if self._wires is not None:
            return [(self.name, *wire) for wire in self._wires]
        out = []
        for (topology, consumer), book in self.books.items():
            for edge in () if book.spooled else book.received:
                producer, dot, port = edge.rpartition(".")
                if dot:
                    out.append((topology, producer, port, consumer, ""))
        return out


def of_broker(url: str) -> Collection:
    """Whatever nodes tell their books on one broker."""
    from broker.connect import connect

    bus = connect(url, client_id=f"penstock-ledger-{os.getpid()}", patience=_PATIENCE)
    return Collection(url, [(bus, "+")])


def of_topology(path: Path, state: Path | None, url: str | None) -> Collection:
    """The books of a topology: from its brokers if it runs, otherwise as its last run left them.

    :param url: a broker to ask instead of those of the file.
    :raises RunError: it does not run, and nothing is left of an earlier run.
    """
    from broker.connect import connect
    from nodes.cli._reach import place

    found = place(path, state)
    name, client = found.topology.name, f"penstock-ledger-{os.getpid()}"
    relays, wires = _wires(path, found.topology)
    nodes = {name: list(node.members) for name, node in found.topology.nodes.items()} | {
        name: [name] for name in relays
    }
    if url is not None:
        return Collection(name, [(connect(url, client_id=client, patience=_PATIENCE), name)], nodes, wires)
    used = {found.topology.hosts[host] for _, host in found.topology.members.values()}
    try:
        buses = [(found.bus(broker, client, patience=_PATIENCE), name) for broker in used]
    except ConfigError:
        if found.runs():
            raise
        return _left(found, nodes, wires)
    return Collection(name, buses, nodes, wires)


def _wires(path: Path, topology: Topology) -> tuple[list[str], list[tuple[str, str, str, str]]]:
    """Relays that keep, and the edges, with how they deliver; that follows from what travels, so a plan is needed."""
    from nodes.plan import prepare

    try:
        plan = prepare(path)
    except ConfigError:  # a file that a node needs is not on this machine
        return [], [(e.producer, e.port, node.name, "") for node in topology.nodes.values() for e in node.inputs]
    return [*plan.relays], list({(e.origin, e.port, e.target, e.delivery): None for e in plan.edges})


def _left(found: Place, nodes: Mapping[str, Sequence[str]], wires: Sequence[tuple[str, str, str, str]]) -> Collection:
    from nodes import relay_books

    collection = Collection(found.topology.name, [], nodes, wires)
    for node in [member for several in nodes.values() for member in several]:
        path = found.state / f"{node}.journal"
        if not path.exists():
            try:
                kept = relay_books.left(found.state / node, node)
            except sqlite3.Error as error:
                raise RunError(f"{found.state / node} cannot be read: {error}") from error
            if kept is not None:
                collection.books[found.topology.name, node] = kept
                collection.states[found.topology.name, node] = "stopped"
            continue
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
                row = db.execute("SELECT value FROM meta WHERE key = 'books'").fetchone()
        except sqlite3.Error as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if row is not None:
            books = ledger.Books(node)
            books.restore(msgspec.msgpack.decode(row[0]))
            collection.books[found.topology.name, node] = books.ledger(books.total.received)
            collection.states[found.topology.name, node] = "stopped"
    if not collection.books:
        raise RunError(
            f"{found.topology.name} does not run here, and nothing is left of an earlier run (state in {found.state})"
        )
    return collection
