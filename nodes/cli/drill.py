"""``penstock drill``: the user's own topology while things break, in a scratch folder, and a verdict on what it kept."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from nodes.drill.conduct import Drill
    from nodes.drill.performance import Performance, Result, Struck

_INTERRUPTED = 130


def command(
    topology: Annotated[Path, typer.Argument(help="The topology's YAML file.", show_default=False)],
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, NAME=TIMES or NAME:TARGET; may be given more than once. All that can be done if left out."
        ),
    ] = None,
    lasting: Annotated[
        str | None,
        typer.Option(
            "--for", help="How long the data are to last, e.g. 60s; as long as the faults need, at least 60s."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the schedule.")] = 1,
    listed: Annotated[
        bool, typer.Option("--list", help="Tell the faults, and what can be done here; run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    host: Annotated[str | None, typer.Option(help="Strike only what runs on this host.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="NODE=FILE: this source reads a recording instead; may be given more than once."),
    ] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Made-up data in place of live sources.")] = False,
    own_brokers: Annotated[
        bool, typer.Option("--own-brokers", help="Brokers of the drill's own in place of those that are there already.")
    ] = False,
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Write to the real sinks too.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Leave what arrived at each sink in this folder.")] = None,
) -> int:
    """Find out whether a topology keeps its promises when things break: it runs here, in a scratch folder and with probes in
    the place of its sinks, while faults strike. Exit code 0: everything promised was kept; 1: not. Ctrl-C ends it early.
    """
    from nodes.cli._drill import listing, text
    from nodes.drill.conduct import Drill, plain
    from nodes.drill.disguise import Choices
    from schemas.units import duration

    try:
        seconds = duration(lasting) / 1e9 if lasting is not None else None
    except ValueError as error:
        raise ConfigError(f"--for: {error}") from None
    if seconds is not None and seconds <= 0:
        raise ConfigError("--for: expected more than 0")
    choices = Choices(
        replaced=_replaced(source or []), synthetic=synthetic, keep_sinks=keep_sinks, own_brokers=own_brokers
    )
    drill = Drill(topology, faults=fault or (), seconds=seconds, seed=seed, host=host, choices=choices, keep=keep)
    try:
        if listed:
            print("\n".join(listing(drill, as_json=as_json)))
            return 0
        screen = _Screen(drill, quiet=as_json)
        screen.tell("\n".join(screen.opening()))
        report = drill.run(screen.perform, screen.say, screen.tell)
        if as_json:
            import msgspec

            print(msgspec.json.encode(plain(report)).decode())
        else:
            print("\n".join(text(report)))
    finally:
        drill.close()
    if report.result.interrupted:
        return _INTERRUPTED
    return 0 if report.verdict.kept else 1


def _replaced(given: list[str]) -> dict[str, Path]:
    out = {}
    for one in given:
        node, sign, path = one.partition("=")
        if not sign or not node or not path:
            raise ConfigError(f"--source: expected NODE=FILE, got {one!r}")
        out[node] = Path(path)
    return out


class _Screen:
    """What is seen while it runs: a line for each blow, and in a terminal the table of the nodes below them."""

    def __init__(self, drill: Drill, *, quiet: bool) -> None:
        self._drill = drill
        self._quiet = quiet
        self._live: Any = None

    def opening(self) -> list[str]:
        """What is going to be done."""
        drill = self._drill
        struck = ", ".join(dict.fromkeys(str(wanted.fault) for wanted in drill.wanted))
        out = [
            f"{drill.plan.topology.name}: {len(drill.schedule)} blows in {drill.seconds:.0f} s, seed {drill.seed}: {struck}"
        ]
        out += [f"left out: {name}: {why}" for name, why in drill.left_out.items()]
        return out + drill.notes

    def tell(self, line: str) -> None:
        """A line on standard output, unless a program reads that."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def say(self, struck: Struck) -> None:
        """A blow is over."""
        if struck.missed:
            end = f"not struck: {struck.missed}"
        elif struck.recovery is None:
            end = f"{struck.did}; no row came behind it since"
        else:
            end = f"{struck.did}; {struck.recovery:.2f} s without a row"
        self.tell(f"{struck.at:6.1f} s  {struck.blow}: {end}")

    def perform(self, performance: Performance) -> Result:
        """Run one performance, with Ctrl-C in hand."""
        return asyncio.run(self._perform(performance))

    async def _perform(self, performance: Performance) -> Result:
        loop = asyncio.get_running_loop()
        running = loop.create_task(performance.run())

        def interrupt() -> None:
            if performance.result.interrupted:
                running.cancel()
                return
            sys.stderr.write("ending; Ctrl-C again ends at once\n")
            performance.interrupt()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        painting = loop.create_task(self._paint(performance)) if sys.stdout.isatty() and not self._quiet else None
        try:
            return await running
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            if painting is not None:
                painting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await painting

    async def _paint(self, performance: Performance) -> None:
        from rich.live import Live

        from nodes.cli._live import picture

        since = time.monotonic()
        with Live(auto_refresh=False, transient=True) as live:
            self._live = live
            try:
                while True:
                    table = picture(performance.supervisor, since)
                    table.caption = performance.now
                    live.update(table, refresh=True)
                    await asyncio.sleep(0.5)
            finally:
                self._live = None
