"""What is known of a run: of each node while it runs, and of the whole when it is over, with its books audited."""

from __future__ import annotations

from dataclasses import dataclass, field

from nodes import ledger
from nodes.plan import Plan
from nodes.replicas import logical
from schemas.messages import Ledger


@dataclass
class NodeView:
    """What is known of one node while it runs; the live table shows it.

    :param rate: messages per second that left it (for a sink: came in), over the last second or so.
    :param ready_at: when it was last ready (``time.monotonic``); ``left_at``: when it had left.
    """

    name: str
    kind: str
    host: str
    process: str
    state: str = "waiting"
    pid: int = 0
    rss: int = 0
    cpu: float = 0.0
    restarts: int = 0
    rate: float = 0.0
    passing: bool = False
    books: Ledger | None = None
    seen_at: float = 0.0
    ready_at: float = 0.0
    left_at: float = 0.0

    @property
    def gone(self) -> bool:
        """It left by itself."""
        return self.state in {"ended", "stopped"}


@dataclass
class Outcome:
    """How a run ended.

    :param complete: every stream ended by itself.
    :param findings: what does not balance, one line each.
    :param lost: messages lost on ``fast`` edges, by edge.
    """

    nodes: dict[str, NodeView]
    seconds: float
    complete: bool
    findings: list[str] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """The books, by node."""
        return {name: view.books for name, view in self.nodes.items() if view.books is not None}


def audited(plan: Plan, views: dict[str, NodeView], seconds: float) -> Outcome:
    """How the run of a plan has ended; its books are audited if all streams ended by themselves. Called by the supervisor."""
    groups = {n: members for n, members in logical(plan).items() if set(members) <= set(views)}
    edges = [
        (e.origin, e.port, e.target, e.delivery == "safe")
        for e in plan.edges
        if e.origin in groups and e.target in groups
    ]
    outcome = Outcome(views, seconds, all(view.state == "ended" for view in views.values()))
    if outcome.complete:
        books = ledger.together(outcome.ledgers, groups)
        passing = {n for n, members in groups.items() if any(views[m].passing for m in members)}
        outcome.findings = ledger.audit(books, edges, passing & books.keys())
        outcome.findings += [f"{n}: {b.held} rows are still held" for n, b in outcome.ledgers.items() if b.held]
        outcome.lost = ledger.lost(books, edges)
    return outcome


def traffic(book: Ledger) -> int:
    """Messages by which a node's rate is told: what left it; what came in where nothing leaves."""
    side = book.emitted or book.received
    return sum(flow.messages for flow in side.values())
