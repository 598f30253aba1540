"""What a drill found: the disturbed run against the undisturbed one, and its books against what was promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from nodes.drill.faults.flood import FLOOD
from nodes.drill.performance import Result
from nodes.drill.probes import Arrival, Key
from nodes.plan import Plan

_SAID = frozenset({"queue-full", "overrun"})
"""Reasons of drops that a fast edge or a camera may have; each is counted."""


@dataclass
class Seen:
    """One probe's part of the verdict, in messages.

    :ivar compared: with the undisturbed run; False: the data are not the same in each run, ``why`` says so.
    :ivar lost: in the undisturbed run and not in this one; ``extra``: the other way round; ``changed``: in both, with
        other content; ``again``: delivered more than once, by identity.
    :ivar may_lose: why it may (a fast edge on the way), or ``""``.
    """

    sink: str
    messages: int = 0
    rows: int = 0
    expected: int = 0
    compared: bool = False
    why: str = ""
    may_lose: str = ""
    lost: int = 0
    extra: int = 0
    changed: int = 0
    again: int = 0
    example: str = ""


@dataclass
class Verdict:
    """The end of a drill.

    :ivar broken: promises that were not kept, and blows that were not struck, a line each; empty: everything was kept.
    :ivar allowed: what was lost, dropped or refused as it may be, a line each.
    :ivar seen: by sink.
    """

    broken: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    seen: dict[str, Seen] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether everything promised was kept."""
        return not self.broken


def fast_edges(plan: Plan) -> dict[str, str]:
    """Node → the first ``fast`` edge on the way from the sources to it; only nodes that have one."""
    out: dict[str, str] = {}
    for name, node in plan.nodes.items():  # every node after those that it reads
        for edge in node.inputs:
            if edge.delivery == "fast":
                out.setdefault(name, f"{edge.name} → {name}")
            elif edge.producer in out:
                out.setdefault(name, out[edge.producer])
    return out


def differs(one: Mapping[Key, Arrival], other: Mapping[Key, Arrival]) -> bool:
    """Whether two runs gave a probe other messages."""
    return one.keys() != other.keys() or any(one[key].digest != other[key].digest for key in one)


def compare(seen: Seen, wanted: Mapping[Key, Arrival], found: Mapping[Key, Arrival]) -> None:
    """Enter into ``seen`` how the disturbed run differs."""
    lost = wanted.keys() - found.keys()
    extra = found.keys() - wanted.keys()
    changed = {key for key in wanted.keys() & found.keys() if wanted[key].digest != found[key].digest}
    seen.compared = True
    seen.expected = len(wanted)
    seen.lost, seen.extra, seen.changed = len(lost), len(extra), len(changed)
    if any_of := lost or extra or changed:
        seen.example = min(any_of)[0]


def judge(
    result: Result,
    baseline: Result | None,
    unsteady: Mapping[str, str],
    stands_for: Mapping[str, str],
    brokers: set[str],
    *,
    live: bool,
) -> Verdict:
    """The verdict.

    :param baseline: the undisturbed run; None: there is none, the data are live.
    :param unsteady: probes that differ from one undisturbed run to the next, and how that shows.
    :param stands_for: what each probe stands for, by its node.
    :param brokers: that were killed and forget what they hold.
    :param live: some source is the world as it is, where rows may be late by themselves.
    """
    verdict = Verdict()
    fast = fast_edges(result.plan)
    for name, sink in stands_for.items():
        seen = verdict.seen[sink] = _seen(result, baseline, name, sink, unsteady, fast)
        _judge_probe(verdict, seen, result.restarts.get(name, 0))
    _judge_run(verdict, result)
    _judge_books(verdict, result, baseline, {*fast} if not live else {*result.plan.nodes})
    _judge_feeds(verdict, result, brokers)
    return verdict


def _seen(
    result: Result, baseline: Result | None, name: str, sink: str, unsteady: Mapping[str, str], fast: Mapping[str, str]
) -> Seen:
    found = {key: one for key, one in result.probes.arrivals(name).items() if not key[0].startswith(FLOOD)}
    seen = Seen(sink, len(found), sum(one.rows for one in found.values()), may_lose=fast.get(name, ""))
    seen.again = sum(one.deliveries > 1 for one in found.values())
    if baseline is None:
        seen.why = "live data: no run is like another"
    elif result.interrupted or result.failure:
        seen.why = "the run was not complete"
    elif name in unsteady:
        seen.why = unsteady[name]
    else:
        compare(seen, baseline.probes.arrivals(name), found)
    return seen


def _judge_probe(verdict: Verdict, seen: Seen, restarts: int) -> None:
    differences = []
    if seen.lost:
        differences.append(f"{seen.lost} of {seen.expected} messages lost")
    if seen.extra:
        differences.append(f"{seen.extra} messages that the undisturbed run does not have")
    if seen.changed:
        differences.append(f"{seen.changed} messages with other content")
    if differences:
        line = f"{seen.sink}: {', '.join(differences)}, e.g. {seen.example}"
        if seen.may_lose:
            verdict.allowed.append(f"{line}; behind the fast edge {seen.may_lose}")
        else:
            verdict.broken.append(line)
    if seen.again and not restarts and not seen.may_lose:
        verdict.broken.append(f"{seen.sink}: {seen.again} messages came twice, though its process was not restarted")


def _judge_run(verdict: Verdict, result: Result) -> None:
    if result.failure:
        verdict.broken.append(f"the run failed: {result.failure}")
    elif result.outcome is not None and not result.outcome.complete:
        verdict.broken.append("the run did not complete")
    if result.outcome is not None:
        verdict.broken += [f"the ledger does not balance: {finding}" for finding in result.outcome.findings]
        verdict.allowed += [f"{edge}: {n} messages lost on a fast edge" for edge, n in result.outcome.lost.items()]
    missed = [struck for struck in result.struck if struck.missed]
    for struck in missed:
        if not result.interrupted:
            verdict.broken.append(f"not struck: {struck.blow} ({struck.missed}); a longer --for gives it time")


def _judge_books(verdict: Verdict, result: Result, baseline: Result | None, lossy: set[str]) -> None:
    for name, book in result.books.items():
        before = baseline.books.get(name) if baseline is not None else None
        dead = Counter(book.dead) - Counter(before.dead if before is not None else {})
        sent = result.injected.get(name, 0)
        count = sum(dead.values())
        if count < sent:
            verdict.broken.append(f"{name}: {sent} bad payloads were sent, {count} became dead letters")
        elif count > sent:
            reasons = ", ".join(f"{n} {reason}" for reason, n in dead.items())
            verdict.broken.append(
                f"{name}: {count - sent} dead letters beyond the {sent} that were provoked ({reasons})"
            )
        elif sent:
            verdict.allowed.append(f"{name}: {sent} bad payloads, each a dead letter")
        dropped = Counter(book.dropped) - Counter(before.dropped if before is not None else {})
        for reason, rows in dropped.items():
            line = f"{name}: {rows} rows dropped: {reason}"
            (verdict.allowed if reason in _SAID or name in lossy else verdict.broken).append(line)


def _judge_feeds(verdict: Verdict, result: Result, forgetful: set[str]) -> None:
    for name, feed in result.feeds.items():
        book = result.books.get(name)
        if book is None:
            continue
        taken = sum(flow.rows for flow in book.emitted.values())
        lost = feed.sent - taken
        if lost > 0:
            line = f"{name}: {lost} of {feed.sent} messages that its broker had acknowledged were not taken in"
            broker = result.plan.nodes[name].broker
            if broker in forgetful:
                verdict.allowed.append(f"{line}; the broker {broker!r} was killed and keeps nothing on disk")
            else:
                verdict.broken.append(line)
        elif lost < 0:
            verdict.allowed.append(f"{name}: {-lost} messages came to it twice (QoS 1 says at least once)")
