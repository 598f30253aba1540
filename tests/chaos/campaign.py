"""A campaign of faults: ``python tests/chaos/campaign.py [--seed N] [--minutes M] [--json]``.

A topology of five nodes, each a process, with a window in it, runs on the embedded broker and then on mosquitto, while its
processes and the broker are killed and the network is cut, by a schedule drawn from the seed. Then the sinks are compared
with what an undisturbed run must give. Ends with code 0 if every reading is there once and the books balance, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "broker"), str(HERE.parents[1])]

# what follows is found by the line before
import chaos_verdict as verdict  # noqa: E402
from brokers import KINDS  # noqa: E402
from chaos_schedule import BROKER, NODES, Blow, schedule  # noqa: E402
from harness import rows, until  # noqa: E402
from postgres_server import PASSWORD, Server, programs  # noqa: E402

from nodes import log  # noqa: E402
from nodes.drill.behind import Behind  # noqa: E402
from nodes.drill.proxy import Link  # noqa: E402
from nodes.plan import prepare  # noqa: E402
from nodes.supervisor import Outcome, Supervisor  # noqa: E402
from schemas.errors import PenstockError  # noqa: E402

DEFAULT_MINUTES = 5.0
STUCK = 60.0
"""Seconds without a row in the sink after which the run is given up."""
BATCH = 20

TOPOLOGY = """
topology: chaos
brokers: {{site: {{run: {broker}}}}}
nodes:
  meter:
    ingest:
      {{source: csv, path: meter.csv, device_column: device, time: time, batch: {batch}, split: true, rate: {rate}/s}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter}}
  means:
    aggregate:
      window: {window}s
      by: source
      watermark: {{delay: 60s}} # a message is of one device, so devices are apart by the length of a message
      fields: {{n: count(), sum: sum(value), least: min(value), most: max(value)}}
    from: warm
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm}}
  report: {{uplink: {report}, from: means}}
"""


@dataclass
class Tally:
    """What was done to one run, and how it bore it.

    :ivar recoveries: seconds from each blow until its victim was ready and rows came into the sink again.
    :ivar longest_gap: most seconds without a row in the sink.
    :ivar repeats: deliveries recognised as repeats, by node.
    :ivar struck: blows that were struck and got over.
    """

    broker: str
    readings: int
    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    restarts: dict[str, int] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    recoveries: list[float] = field(default_factory=list)
    longest_gap: float = 0.0
    struck: int = 0
    faults: list[str] = field(default_factory=list)

    def count(self, victim: str) -> None:
        """One more kill."""
        self.kills[victim] = self.kills.get(victim, 0) + 1


class Campaign:
    """One run of the topology and the blows that it takes."""

    def __init__(self, folder: Path, broker: str, readings: int, seconds: float, server: Server | None) -> None:
        self.folder = folder
        self.tally = Tally(broker, readings)
        self._server = server
        self._stored = 0
        self._moved_at = 0.0
        self._struck_at = 0.0
        verdict.write(folder / "meter.csv", readings)
        report = "{sink: sqlite, path: means.sqlite, table: means}"
        if server is not None:
            report = f"{{sink: postgres, url: {server.url}, user: meter, password: {{env: METER_PASSWORD}}, table: {self.table}}}"
        rate = max(1, round(readings / seconds))
        batch = BATCH * verdict.DEVICES
        text = TOPOLOGY.format(broker=broker, batch=batch, rate=rate, window=verdict.WINDOW, report=report)
        (folder / "chaos.yaml").write_text(text)

    @property
    def table(self) -> str:
        return f"means_{self.tally.broker}" if self._server is not None else "means"

    async def run(self, blows: list[Blow], limit: float) -> Outcome:
        """Run to the end, for at most ``limit`` seconds; raises what stopped it before."""
        path, state = self.folder / "chaos.yaml", self.folder / "state"
        plan = prepare(path, state=state)
        supervisor = Supervisor(plan, state=state, level="error")
        supervisor.brokers = brokers = Behind(plan, state, None)
        if {view.process for view in supervisor.views.values()} != set(NODES):
            raise RuntimeError("not every node is a process")
        running = asyncio.create_task(supervisor.run())
        hands = [
            asyncio.create_task(work) for work in (self._watch(supervisor), self._strike(supervisor, brokers, blows))
        ]
        try:
            until_then = time.monotonic() + limit
            while not running.done():
                left = until_then - time.monotonic()
                await asyncio.wait({running, *hands}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
                if left <= 0:
                    raise TimeoutError(
                        f"not over within {limit:.0f} s, at {self._stored} rows in the sink; see --within"
                    )
                for hand in [hand for hand in hands if hand.done()]:
                    hands.remove(hand)
                    hand.result()
            return await running
        finally:
            for task in (running, *hands):
                task.cancel()
            await asyncio.gather(running, *hands, return_exceptions=True)
            self._close_books(supervisor)

    async def _watch(self, supervisor: Supervisor) -> None:
        """Follow the sink; raise when nothing moves any more."""
        await until(lambda: (self.folder / "out.sqlite").exists(), within=30)
        db = sqlite3.connect(f"file:{self.folder / 'out.sqlite'}?mode=ro", uri=True)
        self._moved_at = time.monotonic()
        try:
            while True:
                with suppress(sqlite3.OperationalError):  # no such table yet, or locked while it is opened again
                    stored = db.execute("SELECT count(*) FROM rows").fetchone()[0]
                    now = time.monotonic()
                    if stored > self._stored:
                        if self._stored:
                            self.tally.longest_gap = max(self.tally.longest_gap, now - self._moved_at)
                        self._stored, self._moved_at = stored, now
                if time.monotonic() - max(self._moved_at, self._struck_at) > STUCK:
                    states = {name: view.state for name, view in supervisor.views.items()}
                    raise TimeoutError(f"nothing moved for {STUCK:.0f} s at {self._stored} rows in the sink; {states}")
                await asyncio.sleep(0.05)
        finally:
            db.close()

    async def _strike(self, supervisor: Supervisor, brokers: Behind, blows: list[Blow]) -> None:
        there = goal = 0
        for blow in blows:
            goal += blow.after  # of the whole run: what came while the blow before was got over counts too
            aim = max(goal, there + 1)
            await _forever(lambda aim=aim: self._stored >= aim)  # type: ignore[misc] # mypy knows no default arguments of lambdas
            self._struck_at = began = time.monotonic()
            if blow.kind == "cut":
                await _cut(brokers.links["site"], blow)
                self.tally.cuts += 1
            elif blow.victim == BROKER:
                child = brokers.children["site"]
                before = child.restarts
                child.kill()
                await _forever(lambda child=child, before=before: child.restarts > before)  # type: ignore[misc]
                self.tally.count(BROKER)
            else:
                await self._kill(supervisor, blow.victim, blow.twice)
            there = self._stored
            await _forever(lambda there=there: self._stored > there)  # type: ignore[misc]
            self.tally.recoveries.append(round(time.monotonic() - began, 2))
            self.tally.struck += 1

    async def _kill(self, supervisor: Supervisor, victim: str, twice: bool) -> None:
        """Kill a node that is ready and wait until it is ready again. Only deaths that the supervisor saw count."""
        view = supervisor.views[victim]
        states = [{"ready"}, {"starting", "ready"}] if twice else [{"ready"}]
        for state in states:
            await _forever(lambda state=state: view.state in state or view.gone)  # type: ignore[misc]
            before = view.restarts
            supervisor.kill(victim)
            await _forever(lambda before=before: view.restarts > before or view.gone)  # type: ignore[misc]
            if view.restarts > before:
                self.tally.count(victim)
        await _forever(lambda: view.state == "ready" or view.gone)

    def _close_books(self, supervisor: Supervisor) -> None:
        for name, view in supervisor.views.items():
            self.tally.restarts[name] = view.restarts
            if view.books is not None:
                self.tally.repeats[name] = sum(view.books.repeated.values())

    def judge(self, outcome: Outcome) -> list[str]:
        """What is wrong with what is in the sinks and in the books."""
        expected = verdict.kept(self.tally.readings)
        answers = verdict.windows(expected)
        faults = verdict.differences("readings", expected, self._rows())
        faults += verdict.differences("aggregates", answers, self._means())
        return faults + verdict.books(outcome, self.tally.readings, len(expected), len(answers))

    def _rows(self) -> list[tuple[Any, ...]]:
        return rows(self.folder / "out.sqlite", "SELECT source, time, value FROM rows")

    def _means(self) -> list[tuple[Any, ...]]:
        query = f'SELECT source, start, revision, n, sum, least, most FROM "{self.table}"'  # noqa: S608 - a name of ours
        if self._server is not None:
            return self._server.query(query)
        return rows(self.folder / "means.sqlite", query)


async def _cut(proxy: Link, blow: Blow) -> None:
    try:
        await until(lambda: proxy.served >= len(NODES), within=30)
    except TimeoutError:
        raise TimeoutError(f"a cut would break {proxy.served} of {len(NODES)} links") from None
    if blow.silent:
        proxy.stall()
        await asyncio.sleep(0.3)
    proxy.refuse = True
    proxy.cut()
    proxy.go_on()
    await asyncio.sleep(blow.seconds)
    proxy.refuse = False


async def _forever(condition: Callable[[], bool]) -> None:
    """Wait for a condition; who watches ends it when nothing moves."""
    await until(condition, within=86400)


def disturb(
    folder: Path, broker: str, readings: int, seconds: float, blows: list[Blow], server: Server | None, limit: float
) -> Tally:
    """One broker's part of the campaign; given up after ``limit`` seconds, which is a fault."""
    folder.mkdir(parents=True)
    campaign = Campaign(folder, broker, readings, seconds, server)
    tally = campaign.tally
    began = time.monotonic()
    try:
        outcome = asyncio.run(campaign.run(blows, limit))
        tally.faults = campaign.judge(outcome)
    except (PenstockError, TimeoutError, sqlite3.Error) as error:
        tally.faults = [f"{type(error).__name__}: {error}"]
    tally.seconds = round(time.monotonic() - began, 1)
    tally.longest_gap = round(tally.longest_gap, 2)
    planned = sum(blow.kind == "kill" for blow in blows) + sum(blow.twice for blow in blows)
    if tally.struck < len(blows) or sum(tally.kills.values()) < planned:
        kills = sum(tally.kills.values())
        tally.faults.append(f"only {tally.struck} of {len(blows)} blows and {kills} of {planned} kills were struck")
    return tally


@contextmanager
def postgres(wanted: bool) -> Iterator[Server | None]:
    """A server, where there is one to be had."""
    found = programs() if wanted and find_spec("asyncpg") is not None else None
    if found is None:
        yield None
        return
    os.environ["METER_PASSWORD"] = PASSWORD
    server = Server(found)
    try:
        yield server
    finally:
        server.remove()


def tell(tally: Tally, blows: list[Blow]) -> None:
    """One broker's figures, for people."""
    recoveries = sorted(tally.recoveries) or [0.0]
    worst = f"{recoveries[-1]:.2f} s"
    if tally.recoveries:
        worst += f" ({blows[tally.recoveries.index(recoveries[-1])]})"
    print(
        f"{tally.broker}: {'FAILED' if tally.faults else 'ok'}; {tally.readings} readings in {tally.seconds:.0f} s\n"
        f"  kills     {sum(tally.kills.values())} {tally.kills}; cuts {tally.cuts}; restarts {sum(tally.restarts.values())}\n"
        f"  recovery  median {recoveries[len(recoveries) // 2]:.2f} s, worst {worst};"
        f" longest without a row {tally.longest_gap:.2f} s\n"
        f"  repeats   {sum(tally.repeats.values())} {tally.repeats}, recognised"
    )
    for fault in tally.faults:
        print(f"  FAULT     {fault}")


def main() -> int:
    """Read the command line, run, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the schedule")
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="about so long; blows and readings grow with it"
    )
    parser.add_argument("--within", type=float, help="minutes after which it is given up; twice --minutes if left out")
    parser.add_argument("--readings", type=int, help="in all; 40,000 a minute if left out")
    parser.add_argument("--broker", choices=["embedded", "mosquitto"], action="append", help="only this one")
    parser.add_argument(
        "--smoke", action="store_true", help="some seconds, six kills, the embedded broker, no PostgreSQL"
    )
    parser.add_argument("--json", action="store_true", help="the result for programs")
    parser.add_argument("--keep", type=Path, help="leave the files there")
    given = parser.parse_args()
    if (
        given.minutes <= 0
        or (given.within is not None and given.within <= 0)
        or (given.readings is not None and given.readings <= 0)
    ):
        parser.error("--minutes, --within and --readings must be greater than 0")
    chosen = given.broker or (["embedded"] if given.smoke else ["embedded", "mosquitto"])
    installed = [name for name in chosen if KINDS[name].found() is not None]
    minutes = 0.1 if given.smoke else given.minutes
    readings = given.readings or (9600 if given.smoke else round(40_000 * minutes))
    each = max(1, readings // max(1, len(installed)))
    rounds = 1 if given.smoke else max(1, round(18 / len(installed) * minutes / DEFAULT_MINUTES))
    cuts = 1 if given.smoke else max(1, round(12 / len(installed) * minutes / DEFAULT_MINUTES))
    plans = {
        b: schedule(given.seed, b, len(verdict.kept(each)), rounds, cuts, 0.4 if given.smoke else 0.7)
        for b in installed
    }
    say = (lambda *_: None) if given.json else print
    most = 60.0 * (given.within or 2 * given.minutes)
    over = time.monotonic() + most
    say(f"given up after {most / 60:g} minutes if it is not over by then")
    for name, blows in plans.items():
        say(f"seed {given.seed}, {name}: {'; '.join(map(str, blows))}")
    log.send_to(log.structured("error"))  # that killed processes are started again is no news here
    tallies = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary, postgres(not given.smoke) as server:
        folder = given.keep or Path(temporary)
        say(f"aggregates go to {'PostgreSQL' if server is not None else 'SQLite; PostgreSQL is not there'}")
        for number, (name, blows) in enumerate(plans.items()):
            # a third of the time is for getting up again
            seconds = 12 if given.smoke else minutes * 40 / len(plans)
            limit = (over - time.monotonic()) / (len(plans) - number)
            tally = disturb(folder / name, name, each, seconds, blows, server, limit)
            tallies.append(tally)
            if not given.json:
                tell(tally, blows)
    missing = [name for name in chosen if name not in installed]
    faults = sum(len(tally.faults) for tally in tallies) + (not tallies)
    if given.json:
        runs = [{**asdict(tally), "schedule": [str(blow) for blow in plans[tally.broker]]} for tally in tallies]
        shown = {"seed": given.seed, "ok": not faults, "not_installed": missing, "runs": runs}
        print(json.dumps(shown))
    else:
        for name in missing:
            print(f"{name}: not installed, left out")
        kills = sum(sum(tally.kills.values()) for tally in tallies)
        print(
            f"{'FAILED' if faults else 'passed'}: {kills} kills, {sum(t.cuts for t in tallies)} cuts, seed {given.seed}"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
