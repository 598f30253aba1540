"""``penstock ledger``: the books of a topology's nodes, added up, while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError, RunError, UnbalancedError

if TYPE_CHECKING:
    from nodes.cli._collect import Collection

_EVERY = 1.0
"""Seconds between two pictures of --watch; nodes publish their books as often."""


def command(
    where: Annotated[
        str | None, typer.Argument(help="A topology's YAML file, or a broker's URL (mqtt://host).", show_default=False)
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(help="URL of the broker to ask, instead of those of the topology's file, or without a file."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every second, until Ctrl-C or the end of the run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with --watch a line every second.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the run's state; default: .penstock/<topology> beside the file.")
    ] = None,
) -> int:
    """The ledger of a topology: rows in, out, filtered, dropped, dead-lettered and held by each node, messages sent and
    received on each edge, what is under way, and what does not balance. Of a run that was stopped: as it was left.
    Exit code 5: the run has ended and does not balance.
    """
    from nodes.cli import _collect

    path, url = (None, where) if where is not None and "://" in where else (where, broker)
    if path is None and url is None:
        raise ConfigError("say a topology's file or --broker URL")
    collection = _collect.of_topology(Path(path), state, url) if path is not None else _collect.of_broker(url or "")
    try:
        return asyncio.run(_show(collection, watch=watch, as_json=as_json))
    except KeyboardInterrupt:
        return 0


async def _show(collection: Collection, *, watch: bool, as_json: bool) -> int:
    async with collection:
        await collection.first()
        if not collection.books:
            raise RunError(f"no node of {collection.name} tells its books: it does not run, or has just begun")
        if watch:
            await _watch(collection, as_json=as_json)
        else:
            print("\n".join(_json(collection) if as_json else told(collection)))
    return UnbalancedError.exit_code if collection.ended and collection.findings() else 0


async def _watch(collection: Collection, *, as_json: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with _painter(as_json=as_json) as paint:
        while True:
            paint("\n".join(_json(collection) if as_json else told(collection)))
            if collection.ended or not collection.live:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY):
                    await stop.wait()
            if stop.is_set():
                return


@contextlib.contextmanager
def _painter(*, as_json: bool) -> Iterator[Any]:
    """In a terminal each picture replaces the one before."""
    if as_json or not sys.stdout.isatty():
        yield lambda text: print(text, flush=True)
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        yield lambda text: live.update(Text(text), refresh=True)


def _json(collection: Collection) -> list[str]:
    import msgspec

    findings = collection.findings()
    plain = {
        "topology": collection.name,
        "ended": collection.ended,
        "balanced": not findings if collection.ended else None,
        "findings": findings,
        "silent": collection.silent(),
        "nodes": {
            f"{topology}/{node}" if collection.several else node: {
                "state": collection.states.get((topology, node), ""),
                "ledger": msgspec.to_builtins(book),
            }
            for (topology, node), book in collection.books.items()
        },
        "edges": [
            {
                "edge": edge.name,
                "delivery": edge.delivery,
                "sent": edge.sent,
                "received": edge.received,
                "under_way": edge.under_way,
                "lost": edge.lost,
                **({"relay": edge.relay, "dropped": edge.dropped} if edge.relay else {}),
            }
            for edge in collection.edges()
        ],
    }
    return [json.dumps(plain, ensure_ascii=False)]


def told(collection: Collection) -> list[str]:
    """The books for people."""
    from nodes.cli._books import books_table, reasons, spools_table, table

    books = {f"{t}/{n}" if collection.several else n: book for (t, n), book in collection.books.items()}
    states = {f"{t}/{n}" if collection.several else n: state for (t, n), state in collection.states.items()}
    lines = books_table(books, before=("state", states), after=("", {}))
    edges = collection.edges()
    if edges:
        rows = [("edge", "delivery", "sent", "received", "under way", "lost")]
        rows += [
            (e.name, e.delivery, str(e.sent), str(e.received), str(e.under_way or ""), str(e.lost or "")) for e in edges
        ]
        lines += ["", *table(rows)]
    lines += [*spools_table(books), "", *reasons(books)]
    lines += [f"{name}: nothing is heard of it" for name in collection.silent()]
    findings = collection.findings()
    lines += [f"does not balance: {finding}" for finding in findings]
    if collection.ended:
        if not findings:
            lines.append("ended; the ledger balances (nodes count rows, edges messages)")
    else:
        held = sum(book.held for book in collection.books.values())
        way = sum(edge.under_way for edge in edges)
        what = "under way" if collection.live else "left under way by a stopped run"
        lines.append(f"{what}: {way} messages on edges, {held} rows in nodes")
    return lines
