"""Imported into the process that workers are forks of: has a node with a spool die at chosen points, by SIGKILL.

``SPOOL_DEATHS`` says of one process after another at which call of what it dies: ``written 3,opened 1`` is the third of the first
process, and the first of the second. Each death leaves a file in ``SPOOL_GRAVES``.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nodes import spool_shelf, spooling
from nodes.journal import Journal

POINTS: dict[str, tuple[type, str]] = {
    "opened": (spool_shelf.Shelf, "open"),
    "reconciled": (spool_shelf.Shelf, "reconcile"),
    "resumed": (spooling.SpoolingRuntime, "resume"),
    "appended": (spool_shelf.Shelf, "append"),
    "doomed": (spool_shelf.Shelf, "doom"),
    "read": (spool_shelf.Shelf, "read"),
    "written": (spooling.SpoolingRuntime, "_write_out"),
    "removed": (spool_shelf.Shelf, "committed"),
}
"""Name → what has just returned. ``committed`` is one more, and ``gone``: a commit that says of messages that they are gone."""
calls: Counter[str] = Counter()
plan = [(point, int(call)) for point, call in (each.split() for each in os.environ["SPOOL_DEATHS"].split(","))]
graves = Path(os.environ["SPOOL_GRAVES"])


def die(point: str) -> None:
    calls[point] += 1
    died = len(list(graves.iterdir()))
    if died < len(plan) and plan[died][0] == point and calls[point] >= plan[died][1]:
        (graves / str(died)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def deadly(point: str, act: Callable[..., Any]) -> Callable[..., Any]:
    async def asynchronous(*args: Any, **options: Any) -> Any:
        out = await act(*args, **options)
        if point not in {"doomed", "read"} or (out and out[0]):
            die(point)
        return out

    return asynchronous


def commit(self: Journal, *args: Any, **options: Any) -> None:
    whole_commit(self, *args, **options)
    if self.path is not None and self.path.name == "store.journal" and "position" in args[0]:
        die("committed")
        if msgspec.msgpack.decode(args[0]["position"])["gone"]:
            die("gone")


whole_commit = Journal.commit
Journal.commit = commit  # type: ignore[method-assign]
for name, (owner, method) in POINTS.items():
    setattr(owner, method, deadly(name, getattr(owner, method)))
