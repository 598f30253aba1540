"""Runs a topology for a benchmark, as ``penstock run`` does, and says how fast rows went through it."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

from nodes.plan import prepare
from nodes.supervisor import NodeView, Outcome, Supervisor

CACHE = Path.home() / ".cache" / "penstock-benchmarks"
"""What is made once for benchmarks: models, stacks of frames."""


@dataclass(frozen=True)
class Ran:
    """A run in which nothing was lost.

    :param seconds: from when all nodes were ready to when the last had left.
    :param cpu: seconds of CPU of each process, in the order of its nodes.
    """

    outcome: Outcome
    seconds: float
    cpu: dict[str, float]

    def emitted(self, node: str) -> int:
        """Rows that a node sent by its port ``out``."""
        return self.outcome.ledgers[node].emitted["out"].rows

    def passed(self, node: str) -> int:
        """Rows that a node is done with."""
        return self.outcome.ledgers[node].passed


def run(folder: Path, topology: str, seconds: float | None = None) -> Ran:
    """Run a topology to its end in ``folder``, which keeps its files.

    :param seconds: end the sources after so many.
    :raises RuntimeError: something was lost, or does not add up.
    """
    path, state = folder / "topology.yaml", folder / ".state"
    shutil.rmtree(state, ignore_errors=True)
    path.write_text(topology)
    supervisor = Supervisor(prepare(path, state=state), state=state, level="warning")
    outcome = asyncio.run(supervisor.run(seconds))
    wrong = [*outcome.findings, *(f"{edge}: {count} lost" for edge, count in outcome.lost.items())]
    wrong += [f"{name}: dead letters {book.dead}" for name, book in outcome.ledgers.items() if book.dead]
    wrong += [f"{name}: dropped {book.dropped}" for name, book in outcome.ledgers.items() if book.dropped]
    if wrong or not outcome.complete:
        raise RuntimeError("; ".join(wrong) or "the run was not complete")
    views: list[NodeView] = list(outcome.nodes.values())
    busy = max(view.left_at for view in views) - max(view.ready_at for view in views)
    cpu: dict[str, float] = {}
    for view in views:
        cpu[view.process] = max(cpu.get(view.process, 0.0), view.cpu)
    return Ran(outcome, busy, cpu)
