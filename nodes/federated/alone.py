"""Who learns alone: coordinator and only client in one. Trains when there is something new, and publishes each model as a
coordinator does, so that those who follow the job see no difference.

A training is done in a thread, and committed with its number, its model, its row and the mark of what it has learned, as one
transaction: killed before that, the same training is done again, and gives the same bytes; after it, nothing of it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nodes.federated import wire
from nodes.federated.identity import Leader
from nodes.federated.job import Job
from nodes.federated.local import NothingToLearnError
from nodes.federated.machine import Answer, Machine, Work
from nodes.federated.replay import Stock
from nodes.federated.rounds import Evaluate, Merged, Round, row
from nodes.federated.rules import Rules, ns
from nodes.federated.trust import COORDINATOR, CoordinatorTrust
from nodes.federated.voice import Voice
from nodes.federated.weights import Weights, digest, fit, shapes
from nodes.trainers._trainer import Fit, Trainer
from schemas.errors import PayloadError

ENDED = "ended"
"""Why it is over when there will be nothing more to learn from; it goes on when it is started again."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of a training.

    :param mark: of the examples, up to which they are learned now.
    """

    merged: Merged
    samples: int
    mark: int


class Solo(Machine):
    """One job without clients.

    :param rules: of them count: job, rounds, fit, seed, target, stall, watch, tolerance, time, retries.
    :param trainer: opened; used only in the thread that learns.
    :param every: seconds after which it learns again what is new, if anything is.
    :param fresh: new examples with which it learns at once; None: it waits in any case.
    :param least: examples that must be there before it learns for the first time.
    :param evaluate: each model, on held-out examples; called in the thread. None: on what the stock has set aside, if it has.
    :param inline: bytes of a model that still travels in one message; ``chunk``: of a larger one's pieces.
    :param trust: of it only its own key counts, with which models are signed.
    """

    def __init__(
        self,
        rules: Rules,
        trainer: Trainer,
        stock: Stock,
        *,
        every: float,
        fresh: int | None = None,
        least: int = 1,
        evaluate: Evaluate | None = None,
        inline: int = wire.INLINE,
        chunk: int = wire.CHUNK,
        trust: CoordinatorTrust = COORDINATOR,
    ) -> None:
        self.rules, self.trainer, self.stock, self.evaluate = rules, trainer, stock, evaluate
        self.every, self.many, self.least = ns(every), fresh, least
        model = trainer.weights()
        self.wanted = shapes(model)
        self.job = Job(0, 0, 0, model)
        self.outcome = ""
        """Why it is over."""
        self.blocked = ""
        """Why it may not learn now; empty: it may."""
        self.mark = 0
        self.garbage = 0
        """Messages that were none."""
        self._voice = Voice(rules, self.wanted, 1, inline, chunk)
        self._voice.known = True
        self._identity = self._voice.identity = Leader(rules.job, CoordinatorTrust(trust.signer))
        self._busy: Round | None = None
        self._new = 0
        self._at = 0  # when it learned last
        self._not_before = 0
        self._ends = False

    @property
    def model(self) -> Weights:
        """As it is now."""
        return self.job.model

    # -- the contract -----------------------------------------------------------------------------------------------

    def filters(self) -> tuple[str, ...]:
        return ("round", "c/+/need", "c/+/ask")

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        out = Answer()
        self._at = now
        if (job := kept.get("job")) is None:
            model, life = self.job.model, max(1, now // 1_000_000)
            self.job = Job(life, life, now, model)
            self.job.adopt(model, {}, wire.pack_model(model, {}), digest(model))
            out.commit.update(model=self.job.kept_model(), alone={"mark": 0, "at": now})
        else:
            self.job = Job.of(job, kept["model"], self.wanted, now)
            if (mine := kept.get("alone")) is not None:
                self.mark, self._at = mine["mark"], min(mine["at"], now)
        out.commit.update(job=self.job.kept(), round=None)
        self._voice.model(self.job, now, out)
        if (last := kept.get("row")) is not None:
            out.rows.append(last)  # its publication may not have happened
        self.outcome = self.job.outcome
        self._voice.call(self.job, None, out)
        if self.outcome:
            out.over = True
        else:
            self._look(now, out)
        return out

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        if (message := self._identity.heard(topic, payload, out)) is None:
            if topic == "round":  # what is retained must be ours
                self._voice.call(self.job, self._busy, out)
            return out
        payload = message
        try:
            match topic.split("/"):
                case ["round"]:
                    self._heard_call(wire.hear(wire.Call, payload), out)
                case ["c", _, "need"]:
                    self._voice.needed(payload, now, out)
                case ["c", _, "ask"]:
                    if wire.hear(wire.Ask, payload).model:
                        self._voice.again(self.job, now, out)
        except PayloadError:
            self.garbage += 1
        return out

    def worked(self, name: str, result: Any, now: int) -> Answer:
        out = Answer()
        held, self._busy = self._busy, None
        if held is None or self.outcome:
            return out
        if isinstance(result, Learned):
            self._learned(result, held, now, out)
        else:
            self._end(held, "aborted", f"{type(result).__name__}: {result}"[:300], {}, 0, now, out)
        return out

    def linked(self, now: int) -> Answer:
        out = Answer()
        if not self.outcome:
            self._voice.linked(now)
            self._voice.model(self.job, now, out)
            self._voice.call(self.job, self._busy, out)
        return out

    def wake(self) -> int | None:
        if self.outcome:
            return None
        times = [self._voice.wake(), self._due(), self._time_end()]
        return min((time for time in times if time is not None), default=None)

    def tick(self, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        if (end := self._time_end()) is not None and now >= end:
            self._over("time", out)
            return out
        self._voice.tick(self.job, now, out)
        self._look(now, out)
        return out

    # -- what the node says -----------------------------------------------------------------------------------------

    def permit(self, why_not: str, now: int) -> Answer:
        """It may learn from now on (empty), or not, and why. What is under way ends."""
        out = Answer()
        if not self.outcome:
            self.blocked = why_not
            self._look(now, out)
        return out

    def fed(self, now: int) -> Answer:
        """There are other examples than before. To be called seldom (seconds)."""
        out = Answer()
        if not self.outcome:
            self._look(now, out)
        return out

    def ended(self, now: int) -> Answer:
        """There will be no more examples: what is new is learned now, and then it is over."""
        self._ends = True
        return self.fed(now)

    # -- learning ---------------------------------------------------------------------------------------------------

    def _due(self) -> int | None:
        """When it is to learn, with the examples that there are."""
        if self._busy is not None or self.blocked or not self._new or len(self.stock) < self.least:
            return None
        if self._ends or (self.many is not None and self._new >= self.many):
            return self._not_before
        return max(self._at + self.every, self._not_before)

    def _look(self, now: int, out: Answer) -> None:
        """Begin to learn if it is time; end if there is nothing to come."""
        self._new = self.stock.fresh(self.mark)
        due = self._due()
        if due is not None and now >= due:
            self._begin(now, out)
        elif self._ends and self._busy is None and (not self._new or len(self.stock) < self.least):
            self.outcome, out.over = ENDED, True

    def _begin(self, now: int, out: Answer) -> None:
        number = self.job.call(self.rules.stale)
        held = self._busy = Round(number, self.job.digest, now, 0, 1, [])
        self._voice.call(self.job, held, out)
        seed = wire.seed_of(self.rules.seed, number, "alone")
        out.work = Work("learn", partial(self._learn, self.job.model, self.mark, seed))

    def _learn(self, model: Weights, mark: int, seed: int) -> Learned:
        """In the thread.

        :raises NothingToLearnError: all examples are gone.
        :raises UnfitError: training gave no numbers.
        """
        trainer = self.trainer
        known, mark = self.stock.learn(mark, seed)
        if not len(known):
            raise NothingToLearnError("there are no examples")
        trainer.load(model)
        done = trainer.fit(known, Fit(**self.rules.fit, seed=seed))
        new = trainer.weights()
        fit(new, self.wanted)
        metrics: dict[str, float] = {}
        if self.evaluate is not None:
            metrics.update(self.evaluate(new))
        elif len(aside := self.stock.held_out()):
            metrics.update(trainer.evaluate(aside))
        if not math.isnan(done.loss):
            metrics["train_loss"] = done.loss
        metrics = {name: float(value) for name, value in metrics.items()}
        return Learned(Merged(new, {}, digest(new), wire.pack_model(new, {}), None, {}, metrics), len(known), mark)

    def _learned(self, result: Learned, held: Round, now: int, out: Answer) -> None:
        rules, best, metrics = self.rules, self.job.best, result.merged.metrics
        watched = metrics.get(rules.watch, math.nan)
        self.mark = result.mark
        if (
            best is not None
            and rules.tolerance is not None
            and not (fall := rules.better(best, watched)) <= rules.tolerance
        ):
            why = f"{rules.watch} fell by {fall:.4g}"
            self._end(held, "rejected", why, metrics, result.samples, now, out)
            return
        self.job.advance(result.merged, held.number, watched, rules)
        out.commit["model"] = self.job.kept_model()
        self._end(held, "committed", "", metrics, result.samples, now, out)

    def _end(
        self,
        held: Round,
        status: str,
        why: str,
        metrics: Mapping[str, float],
        samples: int,
        now: int,
        out: Answer,
    ) -> None:
        """The training is over, whatever became of it."""
        job, self._at = self.job, now
        if status == "committed":
            self._voice.model(job, now, out)
        elif status == "aborted":
            job.fail(held.number)
            self._not_before = now + self.every
        ended = row(held, status, why, job.version, metrics, [], 1, now)
        ended.update(clients=1, samples=samples, bytes_up=0, bytes_down=self._voice.down)
        self._voice.down = 0
        out.rows.append(ended)
        out.commit.update(row=ended, job=job.kept(), alone={"mark": self.mark, "at": now})
        if reason := job.ended(self.rules, metrics):
            self._over(reason, out)
            return
        self._voice.call(job, None, out)
        self._look(now, out)

    def _heard_call(self, call: wire.Call, out: Answer) -> None:
        """Of somebody who leads the same job."""
        if call.job != self.rules.job:
            self.garbage += 1
        elif call.epoch > self.job.epoch:
            self.outcome, out.over = "fenced", True
        elif call.epoch < self.job.epoch:
            self._voice.call(self.job, self._busy, out)

    def _time_end(self) -> int | None:
        return None if self.rules.time is None or self._busy is not None else self.job.began + ns(self.rules.time)

    def _over(self, reason: str, out: Answer) -> None:
        self.outcome = self.job.outcome = reason
        out.commit["job"] = self.job.kept()
        self._voice.call(self.job, None, out)
        out.over = True
