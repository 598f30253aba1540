"""The books of one node, and the audit of a whole topology's.

A row is booked when its effect is done, together with everything that followed from it, so the books that a killed node
left behind agree with what its neighbours know.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import pairwise
from time import monotonic
from typing import Any

import msgspec

from schemas.messages import Flow, Ledger

_BASE = 1.2
"""Each latency bucket is a fifth wider than the one before: percentiles are right to within 10 %."""
_BUCKETS = 160
SPAN = 15.0
"""Seconds after which latencies are counted anew."""


class Latency:
    """A histogram of durations in ns with logarithmic buckets, from 1 µs to over an hour; constant memory."""

    __slots__ = ("counts", "total")

    _edges: tuple[int, ...] = tuple(int(1000 * _BASE**i) for i in range(_BUCKETS))

    def __init__(self) -> None:
        self.counts = [0] * (_BUCKETS + 1)
        self.total = 0

    def add(self, duration: int, times: int = 1) -> None:
        """``duration`` was seen ``times`` times. Negative ones (a clock was set) count as none."""
        self.counts[bisect_left(self._edges, duration)] += times
        self.total += times

    def percentile(self, p: float) -> int:
        """The duration below which a share ``p`` (0 to 1) lies, in ns; 0 when nothing was seen."""
        wanted, seen = p * self.total, 0
        for i, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return int(self._edges[min(i, _BUCKETS - 1)])
        return 0


_EDGES = Latency._edges


class Recent:
    """Latencies of the last while: of the span that is under way and the one before, so of :data:`SPAN` to twice as much."""

    __slots__ = ("_before", "_now", "_since")

    def __init__(self) -> None:
        self._before, self._now, self._since = Latency(), Latency(), monotonic()

    @property
    def total(self) -> int:
        """How many were seen."""
        return self._before.total + self._now.total

    def add(self, duration: int, times: int = 1, now: float | None = None) -> None:
        """As :meth:`Latency.add`; ``now`` by ``time.monotonic``, where the caller has it."""
        now = monotonic() if now is None else now
        if now - self._since > SPAN:
            # after a long pause the span before is as old as the pause: nothing of it is recent
            self._before = self._now if now - self._since < 2 * SPAN else Latency()
            self._now, self._since = Latency(), now
        latency = self._now
        latency.counts[bisect_left(_EDGES, duration)] += times
        latency.total += times

    def percentile(self, p: float) -> int:
        """As :meth:`Latency.percentile`."""
        both = Latency()
        both.counts = [a + b for a, b in zip(self._before.counts, self._now.counts, strict=True)]
        both.total = self.total
        return both.percentile(p)


class Entry:
    """What one step of a node adds to its books, all at once, when its effect is done."""

    __slots__ = ("dead", "dropped", "emitted", "filtered", "passed", "received", "repeated")

    def __init__(self) -> None:
        self.received: dict[str, tuple[int, int]] = {}
        self.emitted: dict[str, tuple[int, int]] = {}
        self.repeated: dict[str, int] = {}
        self.passed = 0
        self.filtered = 0
        self.dropped: dict[str, int] = {}
        self.dead: dict[str, int] = {}

    @property
    def messages(self) -> int:
        """Messages that came in; of a source, which has none, that went out."""
        total = 0
        for messages, _ in (self.received or self.emitted).values():
            total += messages
        return total

    def receive(self, edge: str, messages: int, rows: int) -> None:
        """Messages and rows that came by an edge."""
        m, r = self.received.get(edge, (0, 0))
        self.received[edge] = (m + messages, r + rows)

    def emit(self, port: str, messages: int, rows: int) -> None:
        """Messages and rows that go out by a port."""
        m, r = self.emitted.get(port, (0, 0))
        self.emitted[port] = (m + messages, r + rows)

    def drop(self, reason: str, rows: int) -> None:
        """Rows lost on purpose."""
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def bury(self, reason: str, rows: int) -> None:
        """Rows sent to the dead letters."""
        self.dead[reason] = self.dead.get(reason, 0) + rows


class Books:
    """The running totals of one node. :meth:`book` takes entries whose effects are done; :meth:`ledger` shows them."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.total = Entry()
        self.latency = {"wait": Recent(), "process": Recent(), "since-source": Recent()}

    def book(self, entry: Entry) -> None:
        """Add an entry."""
        total = self.total
        for edge, (messages, rows) in entry.received.items():
            total.receive(edge, messages, rows)
        for port, (messages, rows) in entry.emitted.items():
            total.emit(port, messages, rows)
        for edge, count in entry.repeated.items():
            total.repeated[edge] = total.repeated.get(edge, 0) + count
        total.passed += entry.passed
        total.filtered += entry.filtered
        for reason, rows in entry.dropped.items():
            total.drop(reason, rows)
        for reason, rows in entry.dead.items():
            total.bury(reason, rows)

    def ledger(self, live: Mapping[str, tuple[int, int]], moved: Mapping[str, int] | None = None) -> Ledger:
        """What is published.

        :param live: messages and rows taken in by edge, those under way included.
        :param moved: see :class:`~schemas.messages.Ledger`.
        """
        total = self.total
        gone = total.passed + total.filtered + sum(total.dropped.values()) + sum(total.dead.values())
        return Ledger(
            node=self.node,
            received={e: Flow(messages=m, rows=r) for e, (m, r) in live.items()},
            held=sum(r for _, r in live.values()) - gone if live else 0,
            repeated=dict(total.repeated),
            emitted={p: Flow(messages=m, rows=r) for p, (m, r) in total.emitted.items()},
            passed=total.passed,
            filtered=total.filtered,
            dropped=dict(total.dropped),
            dead=dict(total.dead),
            moved=dict(moved) if moved else msgspec.UNSET,
            latency={
                stage: {"p50": h.percentile(0.5), "p99": h.percentile(0.99)}
                for stage, h in self.latency.items()
                if h.total
            },
        )

    def snapshot(self) -> Any:
        """Plain types for the journal."""
        t = self.total
        return [t.received, t.emitted, t.repeated, t.passed, t.filtered, t.dropped, t.dead]

    def restore(self, state: Any) -> None:
        """Continue from a :meth:`snapshot`."""
        t = self.total
        received, emitted, t.repeated, t.passed, t.filtered, t.dropped, t.dead = state
        t.received = {edge: (m, r) for edge, (m, r) in received.items()}
        t.emitted = {port: (m, r) for port, (m, r) in emitted.items()}


def rows(flows: Iterable[Flow]) -> int:
    """Rows of several flows together."""
    return sum(flow.rows for flow in flows)


def together(ledgers: Mapping[str, Ledger], nodes: Mapping[str, Iterable[str]]) -> dict[str, Ledger]:
    """The books of nodes as the user named them: those of a node's replicas are added up.

    :param nodes: node → its replicas, or itself.
    """
    out = {}
    for name, members in nodes.items():
        books = [ledgers[member] for member in members if member in ledgers]
        if not books:
            continue
        if len(books) == 1:
            out[name] = books[0]
            continue
        total, moved, held = Books(name), dict[str, int](), 0
        for book in books:
            entry = Entry()
            for edge, flow in book.received.items():
                entry.receive(edge, flow.messages, flow.rows)
            for port, flow in book.emitted.items():
                entry.emit(port, flow.messages, flow.rows)
            entry.repeated, entry.dropped, entry.dead = book.repeated, book.dropped, book.dead
            entry.passed, entry.filtered = book.passed, book.filtered
            total.book(entry)
            held += book.held
            for consumer, count in (book.moved or {}).items():
                moved[consumer] = moved.get(consumer, 0) + count
        out[name] = msgspec.structs.replace(total.ledger(total.total.received, moved), held=held)
    return out


def audit(
    ledgers: Mapping[str, Ledger], edges: Iterable[tuple[str, str, str, bool]], passing: Iterable[str] = ()
) -> list[str]:
    """What does not balance, one line each; empty when all does.

    What one replica took over from another may have been done by both; its repeats were recognised further on. So where
    messages were moved, that many may have been received more than were sent, and that many fewer behind.

    :param ledgers: by node; replicas are one, see :func:`together`.
    :param edges: (producer, port, consumer, safe) of each edge between them. Where a relay keeps one, its two halves are
        compared, each if the books of its ends are here.
    :param passing: nodes each of whose rows, if not left out, leaves by a port (not sources, sinks, aggregates).
    """
    findings = []
    for name, book in ledgers.items():
        if not book.received:
            continue
        came = rows(book.received.values())
        gone = book.passed + book.filtered + sum(book.dropped.values()) + sum(book.dead.values())
        if came != gone + book.held:
            findings.append(
                f"{name}: {came} rows received, but {book.passed} passed + {book.filtered} filtered"
                f" + {sum(book.dropped.values())} dropped + {sum(book.dead.values())} dead + {book.held} held"
                f" = {gone + book.held}"
            )
    left = {name: rows(ledgers[name].emitted.values()) for name in passing if name in ledgers}
    findings += [
        f"{name}: {ledgers[name].passed} rows passed, but {out} rows left"
        for name, out in left.items()
        if out != ledgers[name].passed
    ]
    twice: dict[str, int] = {}
    for book in ledgers.values():
        for consumer, count in (book.moved or {}).items():
            twice[consumer] = twice.get(consumer, 0) + count
    relays = keepers(ledgers)
    for producer, port, consumer, safe in dict.fromkeys(edges):
        edge = f"{producer}.{port}"
        way = [
            (producer, port),
            *([(relays[edge, consumer], edge)] if (edge, consumer) in relays else []),
            (consumer, ""),
        ]
        for (name, out), (then, _) in pairwise(way):
            source, sink = ledgers.get(name), ledgers.get(then)
            if source is None or sink is None or not safe:
                continue
            sent = source.emitted.get(out, Flow())
            taken = sink.received.get(edge, Flow())
            if (sent.messages, sent.rows) == (taken.messages, taken.rows):
                continue
            if -twice.get(producer, 0) <= taken.messages - sent.messages <= (source.moved or {}).get(consumer, 0):
                continue
            by = f" from {name}" if name != producer else ""
            finding = (
                f"{edge}{by} → {then}: {sent.messages} messages ({sent.rows} rows) sent,"
                f" {taken.messages} ({taken.rows} rows) received"
            )
            findings += [finding] if finding not in findings else []
    return findings


def keepers(ledgers: Mapping[str, Ledger]) -> dict[tuple[str, str], str]:
    """Which relay keeps an edge, by (``<producer>.<port>``, consumer); from the relays' own books."""
    return {
        (edge, reader): name
        for name, book in ledgers.items()
        for edge, port in (book.spooled or {}).items()
        for reader in port.readers
    }


def lost(ledgers: Mapping[str, Ledger], edges: Iterable[tuple[str, str, str, bool]]) -> dict[str, int]:
    """Messages that ``fast`` edges lost on the way, by edge; only those that lost any."""
    out = {}
    for producer, port, consumer, safe in dict.fromkeys(edges):
        source, sink = ledgers.get(producer), ledgers.get(consumer)
        if safe or source is None or sink is None:
            continue
        missing = source.emitted.get(port, Flow()).messages - sink.received.get(f"{producer}.{port}", Flow()).messages
        if missing > 0:
            out[f"{producer}.{port} → {consumer}"] = missing
    return out
