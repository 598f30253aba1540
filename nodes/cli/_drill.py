"""A drill for people: the list of faults, and the report at its end."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING

from nodes.cli._books import table

if TYPE_CHECKING:
    from nodes.drill.conduct import Drill, Report
    from nodes.drill.performance import Struck


_MOST_SAID = 8
"""Lines of what nodes said that are shown."""


def listing(drill: Drill, *, as_json: bool = False) -> list[str]:
    """Every fault: how long a blow is, how many a round has here, or why it cannot be done."""
    from nodes.drill import fault

    entries = []
    for name in fault.names():
        module = fault.module(name)
        why = module.why_not(drill.ground)
        targets = [] if why else module.targets(drill.ground)
        entries.append((name, module.SECONDS, targets, why, fault.says(name)))
    if as_json:
        import msgspec

        keys = ("fault", "seconds", "targets", "why_not", "does")
        return [msgspec.json.encode([dict(zip(keys, entry, strict=True)) for entry in entries]).decode()]
    out = []
    for name, seconds, targets, why, does in entries:
        named = ", ".join(filter(None, targets))
        out += [f"{name}: {does}"]
        out += [f"    not here: {why}" if why else f"    {seconds:g} s each{f': {named}' if named else ''}"]
    return out


def text(report: Report) -> list[str]:
    """The report: the faults, the sinks, the run, the verdict."""
    result, verdict = report.result, report.verdict
    lines = ["", *_faults(result.struck), "", *_sinks(report), ""]
    restarts = sum(result.restarts.values())
    lines.append(
        f"restarts {restarts}; at worst {result.in_flight} messages in flight, {result.held} rows held;"
        f" {sum(sum(book.repeated.values()) for book in result.books.values())} repeats recognised"
    )
    lines += [f"allowed: {line}" for line in verdict.allowed]
    if verdict.broken:
        lines += [f"said: {line} (×{times})" for line, times in report.errors.most_common(_MOST_SAID)]
    lines += [f"BROKEN: {line}" for line in verdict.broken]
    if result.interrupted:
        lines.append(
            f"interrupted after {result.lasting:.0f} s: what was lost by then is not known (seed {report.seed})"
        )
    elif verdict.kept:
        lines.append(f"kept: {_promised(report)} (seed {report.seed}, {result.lasting:.0f} s)")
    else:
        lines.append(f"NOT KEPT: see above (seed {report.seed}, {result.lasting:.0f} s)")
    return lines


def _promised(report: Report) -> str:
    if any(seen.compared for seen in report.verdict.seen.values()):
        lossy = any(seen.may_lose for seen in report.verdict.seen.values())
        where = "behind safe edges arrived what arrives" if lossy else "what arrived is what arrives"
        return f"{where} undisturbed, and the ledger balances"
    return "the ledger balances"


def _faults(struck: Iterable[Struck]) -> list[str]:
    """A line for each kind of fault."""
    rows = [("fault", "struck", "without a row, median", "worst")]
    by_fault: dict[str, list[Struck]] = {}
    for one in struck:
        by_fault.setdefault(one.blow.fault, []).append(one)
    for name, all_of in sorted(by_fault.items()):
        took = [one.recovery for one in all_of if one.recovery is not None]
        done = sum(not one.missed for one in all_of)
        count = str(done) if done == len(all_of) else f"{done} of {len(all_of)}"
        cells = (f"{median(took):.2f} s", f"{max(took):.2f} s") if took else ("-", "-")
        rows.append((name, count, *cells))
    return table(rows) if len(rows) > 1 else ["no fault was struck"]


def _sinks(report: Report) -> list[str]:
    """A line for each sink."""
    rows: list[tuple[str, ...]] = [
        ("sink", "messages", "rows", "undisturbed", "lost", "extra", "changed", "delivered again", "")
    ]
    for name, seen in report.verdict.seen.items():
        compared = (
            [str(n) for n in (seen.expected, seen.lost, seen.extra, seen.changed)] if seen.compared else ["-"] * 4
        )
        said = f"behind a fast edge: {seen.may_lose}" if seen.may_lose else seen.why
        rows.append((name, str(seen.messages), str(seen.rows), *compared, str(seen.again), said))
    return table(rows)
