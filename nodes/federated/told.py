"""A coordinator that calls rounds when it is told to: the half of a site that leads the gateways below it.

For each round of the job above it gets a :class:`Task`: the model to begin with, and how many rounds of its own. What the task
has come to is committed with the round that brought it there, so a site that was killed goes on with the task that it was at. Its
job never ends by itself: where another coordinator would say ``over``, the task is given up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nodes.federated import wire
from nodes.federated.coordinator import Coordinator
from nodes.federated.machine import Answer
from nodes.federated.rounds import AGGREGATING, Round
from nodes.federated.rules import SECOND, Rules, ns
from nodes.federated.weights import Shape, UnfitError, Weights, digest, fit

DONE = "done"
ENDLESS = 10**9
"""Rounds of a job, and seconds that it waits for clients: the job above says when it ends."""
_TOLD = ("train_loss", "local_accuracy", "local_loss")


@dataclass(slots=True)
class Task:
    """What a round of the job above asks of the site.

    :param run: of the job above, ``round`` its number, ``base`` the digest of the model that it begins with.
    :param rounds: to commit for it.
    :param end: ns; after it no further round is begun.
    :param fit: how the call above trains; the site's own ``fit`` goes before it.
    :param evaluate: the call above asks how that model does on the clients' own examples.
    :param done: rounds committed so far; ``samples``: of all of them together.
    :param metrics: of these rounds, as a client reports its own.
    :param over: empty: under way; ``done``: the model is what came of it; else why nothing did.
    """

    run: int
    round: int
    base: str
    rounds: int
    end: int
    fit: dict[str, Any] = field(default_factory=dict)
    evaluate: bool = False
    done: int = 0
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    over: str = ""

    def answers(self, call: wire.Call) -> bool:
        """Whether it is what that call asks for."""
        return (self.run, self.round, self.base) == (call.run, call.round, call.base)

    def counts(self) -> int:
        """Rows that the update counts by: of one round, on average."""
        return max(1, round(self.samples / max(self.done, 1)))

    def add(self, row: Mapping[str, Any]) -> None:
        """A round was committed."""
        self.samples += row["samples"]
        told = {name: row[name] for name in _TOLD if math.isfinite(row.get(name, math.nan))}
        if self.metrics:  # the model that came from above is the one that the clients of the first round reported on
            told = {name: value for name, value in told.items() if not name.startswith("local_")}
        steps = self.metrics.get("steps", 0.0) + row.get("steps", 0.0)
        self.metrics = {**self.metrics, **told, "steps": steps}


@dataclass(frozen=True, slots=True)
class Base:
    """A model from above, as the site's own is kept.

    :param data: its bytes, with what the site's strategy shares.
    """

    model: Weights
    shared: Weights
    digest: str
    data: bytes


def read_base(data: bytes | memoryview, name: str, wanted: tuple[Shape, ...], shared: Weights) -> Base:
    """A model from its bytes as they came from above. Called in a thread.

    :param name: its digest as the call has it.
    :raises PayloadError: they are no model.
    :raises UnfitError: it is not of this form, or not the one that was named.
    """
    model, _ = wire.unpack_model(data, wanted)
    fit(model, wanted)
    if digest(model) != name:
        raise UnfitError("base", "the model that came is not the one that the round begins with")
    return Base(model, shared, name, wire.pack_model(model, shared))


def endless(rules: Rules, fit: Mapping[str, Any]) -> Rules:
    """The same, of a job that does not end by itself.

    :param fit: what the site says itself of how its clients train; the rest is said by the job above.
    """
    far = float(ENDLESS)
    return replace(rules, fit=fit, rounds=ENDLESS, wait=far, time=None, target=None, stall=None, tolerance=None, keep=0)


class Told(Coordinator):
    """See :class:`nodes.federated.coordinator.Coordinator`; ``rules`` as :func:`endless` gives them.

    :param rules: ``fit`` has only what the site says itself.
    :param seed: the site's own; None: that of the call above.
    :ivar rules: those of the task under way; ``own``: those that it was made with.
    """

    def __init__(self, rules: Rules, *arguments: Any, seed: int | None = None, **options: Any) -> None:
        super().__init__(rules, *arguments, **options)
        self.own, self.seed = rules, seed
        self.task: Task | None = None

    # -- what the site asks of it -----------------------------------------------------------------------------------

    def begin(self, task: Task, base: Base, now: int) -> Answer:
        """Do that, from that model. No round may be under way."""
        out, job = Answer(), self.job
        self.task, job.failures, self._idle_since = task, 0, now
        self._take_rules(task)
        self._adopt(base, now, out)
        out.commit.update(job=job.kept(), task=asdict(task))
        self._idle(now, out)
        if self.round is None:
            self._voice.call(job, None, out)
        return out

    def stop(self, why: str) -> None:
        """Nobody waits for it any more: no round is begun after the one that is under way."""
        if self.task is not None and not self.task.over:
            self.task.over = why

    def drop(self, why: str, now: int) -> Answer:
        """Stop, and end the round under way. What is being added up has to be there before (:meth:`worked`)."""
        out, held = Answer(), self.round
        self.stop(why)
        if held is not None:
            self._undo()
            self._end(held, "aborted", now, out, why=why)
        out.commit["task"] = self.task = None
        return out

    def finish(self, outcome: str, base: Base | None, now: int) -> Answer:
        """The job above is over: so is this one, with that model."""
        out = self.drop("the job above is over", now)
        if base is not None:
            self._adopt(base, now, out)
        super()._over(outcome, out)
        return out

    def samples(self) -> int:
        """Rows that the clients have that are here, together; 0: they are too few for a round."""
        least = self.quorum if self.job.number else max(self.rules.least, self.quorum)
        if len(self.roster.fit) < least:
            return 0
        return sum(self.roster.members[name].samples for name in self.roster.fit)

    @property
    def adding(self) -> bool:
        """Whether updates are being added up."""
        return self.round is not None and self.round.phase == AGGREGATING

    def _adopt(self, base: Base, now: int, out: Answer) -> None:
        job = self.job
        if job.digest != base.digest:
            job.version += 1
            job.made, job.metrics = 0, {}
            job.adopt(base.model, base.shared, base.data, base.digest)
            out.commit["model"] = job.kept_model()
        self._voice.model(job, now, out)

    def _take_rules(self, task: Task) -> None:
        own = self.own
        seed = int(task.fit.get("seed", 0)) if self.seed is None else self.seed
        plan = {name: value for name, value in {**task.fit, **own.fit}.items() if name != "seed"}
        rules = replace(own, fit=plan, seed=seed, evaluate=own.evaluate or task.evaluate)
        self.rules = self._voice.rules = self.desk.rules = rules

    # -- what is otherwise than where rounds begin by themselves ----------------------------------------------------

    def _resume(self, kept: Mapping[str, Any], job: Mapping[str, Any], now: int) -> None:
        if (task := kept.get("task")) is not None:
            self.task = Task(**task)
            self._take_rules(self.task)
        super()._resume(kept, job, now)
        if self.round is not None and self.task is not None:
            self.round.deadline = min(self.round.deadline, max(self.task.end, now))

    def _begin_at(self) -> int | None:
        return None if self.task is None or self.task.over else super()._begin_at()

    def _idle(self, now: int, out: Answer) -> None:
        if (task := self.task) is None or task.over:
            return
        if now >= task.end:
            self._over("below quorum", out)
        else:
            super()._idle(now, out)

    def _begin(self, now: int, out: Answer) -> None:
        if self.task is not None:
            left = (self.task.end - now) / SECOND
            self.rules = replace(self.rules, deadline=min(self.own.deadline, max(left, 0.001)))
        super()._begin(now, out)

    def _end(self, held: Round, status: str, now: int, out: Answer, *arguments: Any, **options: Any) -> None:
        task = self.task
        if task is not None and status == "committed" and not task.over:
            task.done += 1
            task.over = DONE if task.done >= task.rounds or now >= task.end else ""
        super()._end(held, status, now, out, *arguments, **options)
        if task is None:
            return
        row = out.commit["row"]
        row["above"] = task.round
        if status == "committed":
            task.add(row)
        out.commit["task"] = asdict(task)

    def _over(self, reason: str, out: Answer) -> None:
        """The task is, not the job; with what there is of it."""
        self.job.failures, self.round = 0, None
        if (task := self.task) is not None and not task.over:
            task.over = DONE if task.done else reason
            out.commit["task"] = asdict(task)
        out.commit.update(job=self.job.kept(), round=None)
        self._voice.call(self.job, None, out)

    def wake(self) -> int | None:
        due = super().wake()
        if self.job.outcome or self.task is None or self.task.over or self.round is not None:
            return due
        return self.task.end if due is None else min(due, self.task.end)


def deadline(call: wire.Call, own: float, rounds: int, now: int) -> int:
    """When a site has to be done with what a call asks: a tenth of the time is left for the way up.

    A deadline that is over by our clock is not believed, and where late updates are welcome there is none: then the site's own
    holds.

    :param own: of one round of the site, seconds.
    """
    left = call.deadline - now
    return now + (left * 9 // 10 if left > 0 and not call.open else ns(own * rounds))
