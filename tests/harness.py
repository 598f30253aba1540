"""Runs topologies in tests as ``penstock run`` does, with a hand on the supervisor to break things."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nodes import log
from nodes.plan import prepare
from nodes.supervisor import Outcome, Supervisor

Meddle = Callable[[Supervisor], Coroutine[Any, Any, None]]
"""What a test does to a run while it runs."""


def run(
    path: Path,
    *,
    state: Path | None = None,
    host: str | None = None,
    meddle: Meddle | None = None,
    within: float = 50.0,
) -> Outcome:
    """Run the topology in ``path`` to its end. What fails in ``meddle`` fails here.

    :raises TimeoutError: it did not end ``within`` so many seconds.
    """
    folder = state or path.parent / "state"

    async def go() -> Outcome:
        supervisor = Supervisor(prepare(path, state=folder), state=folder, host=host)
        running = asyncio.create_task(supervisor.run())
        tasks: set[asyncio.Task[Any]] = {running}
        if meddle is not None:
            tasks.add(asyncio.create_task(meddle(supervisor)))
        try:
            async with asyncio.timeout(within):
                while running in tasks:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done - {running}:
                        task.result()
        finally:
            for task in (running, *tasks):
                task.cancel()
            await asyncio.gather(running, *tasks, return_exceptions=True)
        return running.result()

    return asyncio.run(go())


async def until(condition: Callable[[], bool], *, within: float = 20.0) -> None:
    """Wait for a condition.

    :raises TimeoutError: it did not come true in time.
    """
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - what tests wait for has no event
            await asyncio.sleep(0.01)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """What an SQLite file answers."""
    db = sqlite3.connect(path)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def stored(folder: Path, table: str = "rows") -> int:
    """Rows in a table of ``out.sqlite``. What happens in a run is aimed by this: the supervisor's figures come once a second."""
    try:
        return int(rows(folder / "out.sqlite", f"SELECT count(*) FROM {table}")[0][0])  # noqa: S608 - a name of ours
    except sqlite3.OperationalError:  # no such table yet
        return 0


async def advance(folder: Path, count: int, table: str = "rows") -> None:
    """Wait until a table of ``out.sqlite`` has so many rows more."""
    there = stored(folder, table) + count
    await until(lambda: stored(folder, table) >= there)


def passed(supervisor: Supervisor, node: str) -> int:
    """Rows that a node is done with."""
    book = supervisor.views[node].books
    return book.passed if book is not None else 0


@contextmanager
def events() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What was logged."""
    out: list[tuple[str, dict[str, Any]]] = []
    before = log._sink
    log.send_to(lambda level, event, fields: out.append((event, fields)))
    try:
        yield out
    finally:
        log.send_to(before)
