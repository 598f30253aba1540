"""The live table of ``penstock run``: what each node does, once a second or so, by rich."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from nodes.cli._books import span

if TYPE_CHECKING:
    from rich.table import Table

    from nodes.supervisor import Supervisor

_COLOURS = {"ready": "green", "ended": "dim", "stopped": "dim", "failed": "red", "restarting": "yellow"}
_EVERY = 0.5


def picture(supervisor: Supervisor, since: float) -> Table:
    """The table as it is now."""
    from rich.table import Table

    table = Table(title=f"{time.monotonic() - since:.0f} s", title_justify="right", box=None, pad_edge=False)
    table.add_column("node")
    table.add_column("state")
    for name in ("in", "out", "msg/s", "held", "dropped", "dead", "wait p99", "process p99", "age p99", "MB"):
        table.add_column(name, justify="right")
    for name, view in supervisor.views.items():
        colour = _COLOURS.get(view.state, "")
        state = f"[{colour}]{view.state}[/]" if colour else view.state
        if (book := view.books) is None:
            table.add_row(name, state)
            continue
        stages = [book.latency.get(stage) for stage in ("wait", "process", "since-source")]
        table.add_row(
            name,
            f"{state} ×{view.restarts}" if view.restarts else state,
            str(sum(flow.rows for flow in book.received.values())) if book.received else "",
            str(sum(flow.rows for flow in book.emitted.values())) if book.emitted else "",
            f"{view.rate:.0f}",
            str(book.held or ""),
            str(sum(book.dropped.values()) or ""),
            f"[red]{dead}[/]" if (dead := sum(book.dead.values())) else "",
            *(span(stage["p99"]) if stage else "" for stage in stages),
            f"{view.rss / 1e6:.0f}" if view.rss else "",
        )
    return table


async def paint(supervisor: Supervisor) -> None:
    """Show it until cancelled; the table is left as it was last."""
    from rich.live import Live

    since = time.monotonic()
    with Live(auto_refresh=False, transient=True) as live:
        while True:
            live.update(picture(supervisor, since), refresh=True)
            await asyncio.sleep(_EVERY)
