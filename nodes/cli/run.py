"""``penstock run``: a topology on this machine, with a live table in a terminal, until it ends or Ctrl-C drains it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes import log
from schemas.errors import ConfigError, UnbalancedError, did_you_mean

if TYPE_CHECKING:
    from nodes.plan import Plan
    from nodes.supervisor import Outcome, Supervisor


def command(
    topology: Annotated[Path, typer.Argument(help="The topology's YAML file.", show_default=False)],
    host: Annotated[
        str | None, typer.Option(help="Run this host's nodes only; by default all, on this machine.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this node only; may be given more than once.")] = None,
    duration: Annotated[
        str | None, typer.Option(help="End the sources after this time, e.g. 30s, as if their data had ended.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder for the run's state; default: .penstock/<topology> beside the file.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the state of an earlier run and begin anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    log_level: Annotated[
        str, typer.Option(help="Least level of log events shown: debug, info, warning, error.")
    ] = "info",
) -> int:
    """Run a topology until its streams end. Ctrl-C drains: what is under way is finished, state is kept, and the next run
    continues there; a second Ctrl-C ends at once. Exit code 5: the ledger does not balance.
    """
    from nodes.plan import prepare
    from nodes.replicas import logical
    from schemas.units import duration as parse

    if log_level not in log.LEVELS:
        raise ConfigError(f"--log-level {log_level!r}{did_you_mean(log_level, log.LEVELS)}")
    try:
        seconds = parse(duration) / 1e9 if duration is not None else None
    except ValueError as error:
        raise ConfigError(f"--duration: {error}") from None
    plan = prepare(topology, state=state)
    if host is not None and host not in plan.topology.hosts:
        raise ConfigError(f"--host: there is no host {host!r}{did_you_mean(host, plan.topology.hosts)}")
    groups = logical(plan)
    for name in only or ():
        if name not in plan.nodes and name not in groups:
            raise ConfigError(f"--only: there is no node {name!r}{did_you_mean(name, [*groups, *plan.nodes])}")
    chosen = [member for name in only or () for member in groups.get(name, [name])]
    outcome = execute(
        plan,
        state=state,
        host=host,
        only=chosen or None,
        seconds=seconds,
        fresh=fresh,
        level=log_level,
        live=not as_json,
    )
    return conclude(outcome, as_json=as_json)


def execute(
    plan: Plan,
    *,
    state: Path | None = None,
    host: str | None = None,
    only: list[str] | None = None,
    seconds: float | None = None,
    fresh: bool = False,
    level: str = "info",
    live: bool = True,
) -> Outcome:
    """Run a plan to its end; what ``run`` and ``demo`` share.

    :raises PenstockError: it could not start, or a node failed for good.
    """
    from nodes.supervisor import Supervisor

    folder = state if state is not None else plan.topology.base / ".penstock" / plan.topology.name
    log.send_to(log.structured(level))
    supervisor = Supervisor(plan, state=folder, host=host, only=only, level=level)
    if fresh:
        supervisor.forget()
    shown = live and sys.stdout.isatty()
    return asyncio.run(_run(supervisor, seconds, shown))


async def _run(supervisor: Supervisor, seconds: float | None, shown: bool) -> Outcome:
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    def interrupt() -> None:
        if draining:
            for task in running:
                task.cancel()
            return
        sys.stderr.write("draining; Ctrl-C again ends at once\n")
        draining.append(loop.create_task(supervisor.stop()))

    running = [loop.create_task(supervisor.run(seconds))]
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    painting: asyncio.Task[None] | None = None
    if shown:
        from nodes.cli._live import paint

        painting = loop.create_task(paint(supervisor))
    try:
        return await running[0]
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for task in (*draining, *([painting] if painting else ())):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def conclude(outcome: Outcome, *, as_json: bool = False) -> int:
    """Show how a run ended; its exit code.

    :raises UnbalancedError: the books do not balance.
    """
    if as_json:
        import msgspec

        print(msgspec.json.encode(plain(outcome)).decode())
    else:
        print("\n".join(summary(outcome)))
    if outcome.findings:
        if as_json:
            return UnbalancedError.exit_code
        raise UnbalancedError("the ledger does not balance")
    return 0


def plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values."""
    return {
        "complete": outcome.complete,
        "seconds": round(outcome.seconds, 3),
        "balanced": not outcome.findings,
        "findings": outcome.findings,
        "lost": outcome.lost,
        "nodes": {
            name: {
                "state": view.state,
                "restarts": view.restarts,
                "rss": view.rss,
                "cpu": view.cpu,
                "ledger": view.books,
            }
            for name, view in outcome.nodes.items()
        },
    }


def summary(outcome: Outcome) -> list[str]:
    """An outcome for people: a table of the books, and what they say."""
    from nodes.cli._books import books_table, reasons, spools_table

    books = {name: view.books for name, view in outcome.nodes.items()}
    restarts = {name: str(view.restarts or "") for name, view in outcome.nodes.items()}
    lines = ["", *books_table(books, before=("", {}), after=("restarts", restarts)), *reasons(books)]
    lines += [*spools_table(books), ""] if spools_table(books) else []
    lines += [f"{edge}: {count} messages lost on a fast edge" for edge, count in outcome.lost.items()]
    if outcome.findings:
        lines += [f"does not balance: {finding}" for finding in outcome.findings]
    elif outcome.complete:
        lines.append(f"ended after {outcome.seconds:.1f} s; the ledger balances (counts are rows)")
    else:
        lines.append(f"stopped after {outcome.seconds:.1f} s; the next run continues here (--fresh begins anew)")
    return lines
