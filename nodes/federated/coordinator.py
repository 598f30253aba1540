"""The side of a job that leads: calls rounds, takes updates, makes models of them.

Idle → collecting → aggregating → idle, each step committed before anything is said of it. One transaction ends a round (the new
model, the strategy's state, the updates forgotten) and begins the next, so that a crash falls before both or after both. An
update is committed before its acknowledgement; a resumed round adds up the same updates in the same order: the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from nodes.compressors._compressor import Compressor
from nodes.federated import wire
from nodes.federated.desk import Desk, Settled
from nodes.federated.identity import UNPROVEN, Leader
from nodes.federated.intake import Form
from nodes.federated.job import Job
from nodes.federated.machine import Answer, Machine, Work
from nodes.federated.roster import Roster
from nodes.federated.rounds import AGGREGATING, COLLECTING, Evaluate, Merged, Round, means, merge, row
from nodes.federated.rules import Rules, ns
from nodes.federated.trust import COORDINATOR, CoordinatorTrust
from nodes.federated.uploads import Place
from nodes.federated.voice import Voice
from nodes.federated.weights import Weights, digest, shapes
from nodes.strategies._strategy import Strategy
from schemas.errors import PayloadError


class Coordinator(Machine):
    """One job's coordinator.

    :param model: what the job begins with; a resumed job continues from its own.
    :param compressor: what undoes the clients' compression; None: they send deltas as they are.
    :param evaluate: on held-out examples, if there are some; called in the thread that aggregates.
    :param strategy: used only there.
    :param inline: bytes of a model that still travels in one message; ``chunk``: of a larger one's pieces.
    :param place: where large updates grow; None: in memory.
    :param trust: whose updates it takes, and its own key.
    """

    def __init__(
        self,
        rules: Rules,
        strategy: Strategy,
        model: Weights,
        *,
        compressor: Compressor | None = None,
        evaluate: Evaluate | None = None,
        inline: int = wire.INLINE,
        chunk: int = wire.CHUNK,
        place: Place | None = None,
        trust: CoordinatorTrust = COORDINATOR,
    ) -> None:
        self.rules, self.strategy, self.compressor, self.evaluate = rules, strategy, compressor, evaluate
        self.wanted = shapes(model)
        self.quorum = max(strategy.least(), 1 if rules.buffer is not None else rules.quorum)
        self.roster = Roster(wire.form(self.wanted))
        self.job = Job(0, 0, 0, model)
        self.round: Round | None = None
        self.garbage = 0
        """Messages that were none."""
        self._voice = Voice(rules, self.wanted, self.quorum, inline, chunk)
        self._voice.private = strategy.asked()
        self.identity = self._voice.identity = Leader(rules.job, trust)
        form = Form(self.wanted, strategy.extras(self.wanted), compressor)
        self.desk = Desk(rules, form, self.roster, self._voice, Place() if place is None else place, self.identity)
        self._idle_since = 0
        self._repeat: int | None = None
        self._silent: frozenset[str] = frozenset()

    @property
    def outcome(self) -> str:
        """Why the job is over: ``rounds``, ``target``, ``stall``, ``time``, ``too-few``, ``aborted``, ``fenced``, or
        what the strategy says (``budget``); empty: it is not."""
        return self.job.outcome

    @property
    def model(self) -> Weights:
        """As it is now."""
        return self.job.model

    # -- the contract -----------------------------------------------------------------------------------------------

    def filters(self) -> tuple[str, ...]:
        return ("round", *(f"c/+/{what}" for what in ("state", "up", "offer", "blob", "need", "ask")))

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        out = Answer()
        if (job := kept.get("job")) is None:
            model, shared, life = self.job.model, self.strategy.shared(), max(1, now // 1_000_000)
            self.job = Job(life, life, now, model, state=self.strategy.snapshot())
            self.job.adopt(model, shared, wire.pack_model(model, shared), digest(model))
            out.commit["model"] = self.job.kept_model()
            self.desk.begin(kept, life)
        else:
            self._resume(kept, job, now)
        self._idle_since = now
        self._voice.known = bool(self.roster.fit)
        self._voice.task = self.strategy.task()
        out.commit["job"] = self.job.kept()
        self._voice.model(self.job, now, out)
        if (last := kept.get("row")) is not None:
            out.rows.append(last)  # its publication may not have happened; rows have their round's number
        if self.job.outcome:
            self._voice.call(self.job, None, out)
            out.over = True
            return out
        if self.round is None or self.round.phase == COLLECTING:
            self._call(now, out)
        for client, number in sorted(self.desk.taken):
            self._voice.ack(self.job, client, number, wire.TAKEN, out)  # after the call, which makes clients doubt it
        if over := self.strategy.over():  # the budget may be another than when the last round was made
            self._over(over, out)
            return out
        if self.round is None:
            self._repeat = None
            self._idle(now, out)
        elif self.round.phase == AGGREGATING:
            self._aggregate(self.round, out)
        else:
            self._look(now, out)
        return out

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if self.job.outcome:
            return out
        if (message := self.identity.heard(topic, payload, out)) is None:
            if topic == "round":  # what is retained must be ours
                self._voice.call(self.job, self.round, out)
            return out
        payload, parts = message, topic.split("/")
        try:
            match parts:
                case ["round"]:
                    self._heard_call(wire.hear(wire.Call, payload), out)
                case ["c", client, "up" | "blob" | "offer" as what]:
                    self._settle(self.desk.heard(client, what, payload, self.job, self.round, now, out), now, out)
                case ["c", client, "state"]:
                    self._heard_state(client, payload, now, out)
                case ["c", client, "ask"]:
                    self._heard_ask(client, wire.hear(wire.Ask, payload), now, out)
                case ["c", _, "need"]:
                    self._voice.needed(payload, now, out)
        except PayloadError:
            self.garbage += 1
        return out

    def worked(self, name: str, result: Any, now: int) -> Answer:
        out = Answer()
        if self.job.outcome or self.round is None:
            return out
        if isinstance(result, Merged):
            self._merged(result, self.round, now, out)
        else:
            self._undo()
            self._end(self.round, "aborted", now, out, why=f"{type(result).__name__}: {result}")
        return out

    def linked(self, now: int) -> Answer:
        out = Answer()
        if not self.job.outcome:
            self._voice.linked(now)
            self._voice.model(self.job, now, out)
            self._voice.call(self.job, self.round, out)
        return out

    def wake(self) -> int | None:
        if self.job.outcome:
            return None
        times = [self._voice.wake(), self.desk.wake(), self._repeat, self._time_end()]
        if (held := self.round) is None:
            times += [self._begin_at(), self._idle_since + ns(self.rules.wait)]
        elif held.phase == COLLECTING:
            times.append(held.deadline)
            if held.enough is not None:
                times.append(held.enough + ns(self.rules.grace))
        return min((time for time in times if time is not None), default=None)

    def tick(self, now: int) -> Answer:
        out = Answer()
        if self.job.outcome:
            return out
        if (end := self._time_end()) is not None and now >= end:
            if self.round is None:
                self._over("time", out)
            else:
                self._end(self.round, "aborted", now, out, why="time")
            return out
        self._voice.tick(self.job, now, out)
        self.desk.tick(now, out)
        if self.round is None:
            self._idle(now, out)
            return out
        if self._repeat is not None and now >= self._repeat:
            self._call(now, out)
        self._look(now, out)
        return out

    # -- beginning --------------------------------------------------------------------------------------------------

    def _resume(self, kept: Mapping[str, Any], job: Mapping[str, Any], now: int) -> None:
        self.job = Job.of(job, kept["model"], self.wanted, now)
        self._undo()
        self.desk.begin(kept, self.job.run)
        for key in list(kept):
            if key.startswith("client/") and self.identity.knows(key.removeprefix("client/")):
                self.roster.load(key.removeprefix("client/"), kept[key])
        if (saved := kept.get("round")) is not None:
            held = self.round = Round.of(saved)
            held.waiting = {
                name
                for name in held.asked
                if self.roster.able(name, held.number) and (name, held.number) not in self.desk.taken
            }
            # the clients could not reach it while it was away
            held.deadline = max(held.deadline, now + ns(self.rules.deadline) // 2)

    def _begin_at(self) -> int | None:
        """When a round may begin with the clients there are; None: not with them."""
        rules, n = self.rules, len(self.roster.fit)
        if n >= max(rules.least, self.quorum):
            return self._idle_since + (0 if self.job.number else ns(rules.gather))
        if self.job.number and n >= self.quorum:
            return self._idle_since + ns(rules.grace)
        return None

    def _idle(self, now: int, out: Answer) -> None:
        at = self._begin_at()
        if at is not None and now >= at:
            self._begin(now, out)
        elif now >= self._idle_since + ns(self.rules.wait):
            self._over("too-few", out)

    def _begin(self, now: int, out: Answer) -> None:
        rules, job = self.rules, self.job
        number = job.call(rules.stale)
        size = rules.asks(len(self.roster.fit), self.quorum)
        asked: list[str] = []
        if rules.buffer is None:
            asked = self.roster.choose(size, rules.seed, number, without=self._silent)
            if len(asked) < size:  # those who kept silent in the round before have another chance
                asked = self.roster.choose(size, rules.seed, number)
        self.round = Round(number, job.digest, now, now + ns(rules.deadline), size, asked, waiting=set(asked))
        out.commit.update(job=job.kept(), round=self.round.kept())
        self._call(now, out)
        self._look(now, out)  # asynchronously there may be enough in the buffer

    def _call(self, now: int, out: Answer) -> None:
        """Say what is asked; and again after a while, if somebody has not answered."""
        self._voice.call(self.job, self.round, out)
        self._repeat = now + ns(max(0.5, min(self.rules.repeat, self.rules.deadline / 4)))

    # -- what is heard ----------------------------------------------------------------------------------------------

    def _heard_call(self, call: wire.Call, out: Answer) -> None:
        if call.job != self.rules.job:
            self.garbage += 1
        elif call.epoch > self.job.epoch:
            self.job.outcome = "fenced"
            out.over = True
        elif call.epoch < self.job.epoch:
            self._voice.call(self.job, self.round, out)  # it does not know yet; what is retained must be ours

    def _heard_state(self, client: str, payload: bytes, now: int, out: Answer) -> None:
        said = wire.hear(wire.Presence, payload) if payload else wire.Presence(here=False)
        if (kept := self.roster.hear(client, said)) is None:
            return
        out.commit[f"client/{client}"] = kept
        self._voice.known = True
        held = self.round
        if held is None:
            self._idle(now, out)
            return
        if held.phase == COLLECTING and self.rules.buffer is None:
            if not self.roster.able(client, held.number):
                held.waiting.discard(client)
            elif client in held.asked and (client, held.number) not in self.desk.taken and client not in held.refused:
                held.waiting.add(client)
            self._fill(held, now, out)
        self._look(now, out)

    def _fill(self, held: Round, now: int, out: Answer) -> None:
        """Others for the places of those that will not answer."""
        here = len(held.waiting) + len(self.desk.taken)
        if here >= held.size or len(held.asked) >= len(self.roster.members):
            return
        more = self.roster.choose(held.size - here, self.rules.seed, held.number, without=held.asked)
        if more:
            held.asked += more
            held.waiting.update(more)
            out.commit["round"] = held.kept()
            self._call(now, out)

    def _settle(self, settled: Settled | None, now: int, out: Answer) -> None:
        """What an update means for the round."""
        held = self.round
        if settled is None or held is None:
            return
        client, number, reason = settled
        if reason == wire.STALE:
            held.stale += 1
            return
        if held.phase != COLLECTING:
            return
        if not reason and self.rules.buffer is None and number != held.number:
            return  # a repeat of one of an earlier round: its client's answer to this one is still waited for
        if not reason:
            held.waiting.discard(client)
            held.refused.pop(client, None)
        elif number != held.number or (client, number) in self.desk.taken:
            return
        else:
            held.refused[client] = reason
            if reason in UNPROVEN:  # anybody may have said it in this client's name
                return
            held.waiting.discard(client)
            if self.rules.buffer is None:
                self._fill(held, now, out)
        self._look(now, out)

    def _heard_ask(self, client: str, ask: wire.Ask, now: int, out: Answer) -> None:
        if ask.answer:
            status = wire.TAKEN if self.desk.answers.get(client) == ask.answer else wire.STALE
            self._voice.ack(self.job, client, ask.answer, status, out)
        if ask.model:
            self._voice.again(self.job, now, out)

    # -- ending a round ---------------------------------------------------------------------------------------------

    def _look(self, now: int, out: Answer) -> None:
        """Close or abort the round if it is time."""
        held = self.round
        if held is None or held.phase != COLLECTING:
            return
        match held.verdict(len(self.desk.taken), self.quorum, self.rules, len(self.roster.fit), now):
            case "close":
                held.phase, held.counted = AGGREGATING, sorted(self.desk.taken)
                self._silent, self._repeat = frozenset(held.waiting), None
                out.commit["round"] = held.kept()
                self._aggregate(held, out)
            case "abort":
                self._silent = frozenset(held.waiting)
                self._end(held, "aborted", now, out, why="below quorum")

    def _aggregate(self, held: Round, out: Answer) -> None:
        taken = self.desk.chosen(held.counted, self.job)
        desk, model = self.desk, self.job.model
        act = partial(merge, self.strategy, model, taken, desk.form, desk.recall, self.evaluate, held.size)
        out.work = Work("aggregate", act)

    def _undo(self) -> None:
        """The strategy is what it was with the model there is."""
        if self.job.state is not None:
            self.strategy.restore(self.job.state)

    def _merged(self, merged: Merged, held: Round, now: int, out: Answer) -> None:
        rules, best = self.rules, self.job.best
        metrics = {**means([self.desk.taken[pair] for pair in held.counted]), **merged.metrics}
        watched = metrics.get(rules.watch, metrics.get(f"local_{rules.watch}", math.nan))
        if (
            best is not None
            and rules.tolerance is not None
            and not (fall := rules.better(best, watched)) <= rules.tolerance
        ):
            self._undo()
            self._end(held, "rejected", now, out, metrics, why=f"{rules.watch} fell by {fall:.4g}")
            return
        self.job.advance(merged, held.number, watched, rules)
        self._voice.task = merged.task
        self._end(held, "committed", now, out, metrics, over=merged.over)

    def _end(
        self,
        held: Round,
        status: str,
        now: int,
        out: Answer,
        metrics: Mapping[str, float] | None = None,
        *,
        why: str = "",
        over: str = "",
    ) -> None:
        """The round is over, whatever became of it; begin the next if one can begin."""
        job, committed = self.job, status == "committed"
        used = [self.desk.taken[pair] for pair in held.counted] if committed else []
        if committed:
            out.commit["model"] = job.kept_model()
        else:
            job.fail(held.number)
        ended = row(held, status, why, job.version, metrics or {}, used, len(self.roster.fit), now)
        ended.update(bytes_up=self.desk.up, bytes_down=self._voice.down)
        self.desk.up = self._voice.down = 0
        out.rows.append(ended)
        out.commit.update(row=ended, round=None)
        self.desk.forget(held.counted if self.rules.buffer is not None else None, out)
        self.round, self._repeat, self._idle_since = None, None, now
        if committed:
            self._voice.model(job, now, out)
        end = self._time_end()
        if reason := job.ended(self.rules, metrics or {}) or over or ("time" if end is not None and now >= end else ""):
            self._over(reason, out)
            return
        self._idle(now, out)
        if self.round is None:
            out.commit["job"] = job.kept()
            self._voice.call(job, None, out)

    def _time_end(self) -> int | None:
        busy = self.round is not None and self.round.phase == AGGREGATING
        return None if self.rules.time is None or busy else self.job.began + ns(self.rules.time)

    def _over(self, reason: str, out: Answer) -> None:
        self.job.outcome, self.round = reason, None
        out.commit.update(job=self.job.kept(), round=None)
        self._voice.call(self.job, None, out)
        out.over = True
