"""A whole drill: what is prepared before anything runs, the runs, and the report."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nodes import log
from nodes.drill import schedule as schedules
from nodes.drill.disguise import Choices, Disguise
from nodes.drill.fault import Blow, Ground
from nodes.drill.performance import Performance, Result, Struck
from nodes.drill.probes import Probes
from nodes.drill.verdict import Verdict, differs, fast_edges, judge
from nodes.plan import Plan, plan, prepare
from schemas.errors import ConfigError, RunError, did_you_mean

DEFAULT_SECONDS = 60.0
Perform = Callable[[Performance], Result]
"""Runs one performance: the command line does so with its screen and its Ctrl-C around it."""


@dataclass
class Report:
    """How a drill ended.

    :ivar undisturbed: rows that came into all probes, and the seconds that took; None: no such run was made.
    :ivar left_out: faults that cannot be done here, with the reason.
    :ivar errors: what nodes said that went wrong, and how often.
    """

    seed: int
    seconds: float
    verdict: Verdict
    result: Result
    undisturbed: tuple[int, float] | None
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Drill:
    """Everything that can be known, and found to be wrong, before anything runs.

    :param faults: as written after ``--fault``.
    :param seconds: how long the data are to last; None: a minute, or longer if the blows need that.
    :param host: only what runs on this host is struck.
    :param keep: folder where the probes' records are left; None: nowhere.
    :raises PenstockError: the topology or what was asked for is wrong.
    """

    def __init__(
        self,
        topology: Path,
        *,
        faults: Sequence[str] = (),
        seconds: float | None = None,
        seed: int = 1,
        host: str | None = None,
        choices: Choices | None = None,
        keep: Path | None = None,
    ) -> None:
        self.plan = prepare(topology)
        if host is not None and host not in self.plan.topology.hosts:
            raise ConfigError(f"--host: there is no host {host!r}{did_you_mean(host, self.plan.topology.hosts)}")
        self.seed = seed
        self._keep = keep
        self._host = host
        self._errors: Counter[str] = Counter()
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-drill-"))
        try:
            self._choices = replace(choices or Choices(), seconds=seconds or DEFAULT_SECONDS)
            self._token = f"{random.getrandbits(24):06x}"
            self.disguise = Disguise(self.plan, self._choices, self._folder, self._token)
            self.ground = self._ground()
            self.wanted, self.left_out = schedules.choose(faults, self.ground)
            blows = schedules.all_blows(self.wanted, self.ground)
            if seconds is None and schedules.least(blows) > DEFAULT_SECONDS:
                self._choices = replace(self._choices, seconds=float(round(schedules.least(blows) + 0.5)))
                self.disguise = Disguise(self.plan, self._choices, self._folder, self._token)
            self.schedule = schedules.schedule(blows, seed, self.seconds)
        except BaseException:
            self.close()
            raise

    @property
    def seconds(self) -> float:
        """How long the data are to last."""
        return self._choices.seconds

    @property
    def notes(self) -> list[str]:
        """What the user should know of the data."""
        out = [source.note for source in self.disguise.sources.values() if source.note]
        out += [f"{name}: the drill publishes to its topics itself" for name in self.disguise.fed]
        live = [name for name, source in self.disguise.sources.items() if source.how == "live"]
        out += [f"{name}: live; no run is like another, so only the books are judged" for name in live]
        return out

    def close(self) -> None:
        """Remove the scratch folder."""
        if self._keep is not None and self._folder.is_dir():
            for file in sorted(self._folder.glob("*/probes/*.sqlite")):
                goal = self._keep / file.parent.parent.name
                goal.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, goal / file.name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, perform: Perform, say: Callable[[Struck], None], tell: Callable[[str], None]) -> Report:
        """The undisturbed run where the data are the same each time, then the drill.

        :param say: told each blow.
        :param tell: told what goes on, a line.
        :raises RunError: the topology does not run undisturbed.
        """
        log.send_to(self._hear)
        baseline = self._baseline(perform, tell)
        if baseline is not None and baseline.interrupted:
            raise KeyboardInterrupt
        rows = baseline.emitted if baseline is not None else {}
        real = self._choices.keep_sinks
        result = self._perform("drill", perform, rows, real_sinks=real, schedule=self.schedule, say=say)
        unsteady, wavering = self._unsteady(perform, tell, baseline, result)
        killed = {struck.blow.target for struck in result.struck if struck.blow.fault == "kill-broker" and struck.did}
        stands_for = self.disguise.standing_for(real_sinks=real)
        live = any(source.how == "live" for source in self.disguise.sources.values())
        verdict = judge(result, baseline, unsteady, stands_for, killed, live=live)
        verdict.broken += wavering
        undisturbed = None
        if baseline is not None:
            count = sum(one.rows for name in baseline.probes.names for one in baseline.probes.arrivals(name).values())
            undisturbed = (count, baseline.lasting)
        return Report(self.seed, self.seconds, verdict, result, undisturbed, self.left_out, self.notes, self._errors)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _hear(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """What goes wrong while things are broken on purpose is no news; it is counted, for the report."""
        if level == "error":
            where = fields.get("node") or fields.get("process") or ""
            self._errors[": ".join(filter(None, (where, event, str(fields.get("reason", "")))))] += 1

    def _ground(self) -> Ground:
        disguised = self._plan(self._folder / "ground", None)
        nodes = [n.name for n in disguised.nodes.values() if self._host in {None, n.host}]
        return Ground(
            disguised,
            self.disguise.own,
            frozenset(self.disguise.fed),
            [name for name in nodes if name in self.plan.nodes],
        )

    def _plan(self, folder: Path, rows: dict[str, int] | None, *, real_sinks: bool = False) -> Plan:
        topology = self.disguise.topology(folder / "probes", rows, real_sinks=real_sinks)
        return plan(topology, state=folder / "state")

    def _perform(
        self,
        name: str,
        perform: Perform,
        rows: dict[str, int] | None,
        *,
        real_sinks: bool = False,
        schedule: Sequence[tuple[float, Blow]] = (),
        say: Callable[[Struck], None] = lambda struck: None,
    ) -> Result:
        folder = self._folder / name
        folder.mkdir()
        chosen = self._plan(folder, rows, real_sinks=real_sinks)
        probes = Probes(folder / "probes", self.disguise.standing_for(real_sinks=real_sinks))
        ground = replace(self.ground, plan=chosen)
        performance = Performance(
            chosen,
            ground,
            folder,
            probes,
            schedule,
            seed=self.seed,
            seconds=self.seconds,
            ends=self.disguise.repeatable,
            say=say,
        )
        return perform(performance)

    def _baseline(self, perform: Perform, tell: Callable[[str], None], name: str = "undisturbed") -> Result | None:
        if not self.disguise.repeatable:
            return None
        tell("first undisturbed, as fast as it goes" if name == "undisturbed" else "undisturbed once more, to compare")
        result = self._perform(name, perform, None)
        if not result.interrupted and (result.failure or result.outcome is None or not result.outcome.complete):
            raise RunError(f"the topology does not run undisturbed: {result.failure or 'it did not complete'}")
        return result

    def _unsteady(
        self, perform: Perform, tell: Callable[[str], None], baseline: Result | None, result: Result
    ) -> tuple[dict[str, str], list[str]]:
        """Probes that differ from one undisturbed run to the next, and what of it is a fault. Looked for when in doubt."""
        if baseline is None or result.interrupted or result.failure:
            return {}, []
        fast = fast_edges(result.plan)
        doubtful = {
            probe: name
            for probe, name in zip(result.probes.names, baseline.probes.names, strict=True)
            if probe not in fast and differs(baseline.probes.arrivals(name), result.probes.arrivals(probe))
        }
        if not doubtful:
            return {}, []
        again = self._baseline(perform, tell, "again")
        if again is None or again.interrupted:
            return {}, []
        unsteady, faults = {}, []
        said = any(book.dropped or book.dead for run in (baseline, again) for book in run.books.values())
        for probe, name in doubtful.items():
            one, other = baseline.probes.arrivals(name), again.probes.arrivals(name)
            if one.keys() != other.keys() and not said:
                missing = len(one.keys() ^ other.keys())
                unsteady[probe] = "two undisturbed runs differ"
                faults.append(
                    f"{name}: two undisturbed runs differ already, by {missing} messages that no book speaks of, e.g."
                    f" {min(one.keys() ^ other.keys())[0]}"
                )
            elif differs(one, other):
                unsteady[probe] = "two undisturbed runs differ, so it cannot be compared"
        return unsteady, faults


def plain(report: Report) -> dict[str, Any]:
    """A report as plain values, for programs."""
    result, verdict = report.result, report.verdict
    return {
        "kept": verdict.kept and not result.interrupted,
        "interrupted": result.interrupted,
        "seed": report.seed,
        "seconds": report.seconds,
        "lasting": round(result.lasting, 3),
        "undisturbed": None
        if report.undisturbed is None
        else {"rows": report.undisturbed[0], "seconds": round(report.undisturbed[1], 3)},
        "blows": [
            {
                "fault": struck.blow.fault,
                "target": struck.blow.target,
                "at": struck.at,
                "did": struck.did,
                "missed": struck.missed,
                "recovery": struck.recovery,
            }
            for struck in result.struck
        ],
        "left_out": report.left_out,
        "notes": report.notes,
        "sinks": {sink: {k: v for k, v in vars(seen).items() if k != "sink"} for sink, seen in verdict.seen.items()},
        "restarts": {name: count for name, count in result.restarts.items() if count},
        "backlog": {"in_flight": result.in_flight, "held": result.held},
        "dropped": {name: dict(book.dropped) for name, book in result.books.items() if book.dropped},
        "dead": {name: dict(book.dead) for name, book in result.books.items() if book.dead},
        "repeated": {name: sum(book.repeated.values()) for name, book in result.books.items() if book.repeated},
        "fed": {name: feed.sent for name, feed in result.feeds.items()},
        "errors": dict(report.errors),
        "findings": result.outcome.findings if result.outcome is not None else [],
        "broken": verdict.broken,
        "allowed": verdict.allowed,
    }
