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
from nodes.federated.intake import RefusedError, Taken, examine, read
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.roster import Roster
from nodes.federated.rounds import AGGREGATING, COLLECTING, Evaluate, Merged, Round, means, merge
from nodes.federated.rules import SECOND, Rules, ns
from nodes.federated.weights import Weights, digest, fit, norm, shapes
from nodes.strategies._strategy import Strategy
from schemas.errors import PayloadError

KEEP = 32
"""Aborted rounds that are told, and updates that are kept in quarantine."""
QUARANTINE_BYTES = 1 << 20
"""A refused update larger than this is kept as its first bytes."""
ASIDE = SECOND // 2
"""A model that somebody lacks is said again at most so often, in ns."""


class Coordinator(Machine):
    """One job's coordinator.

    :param model: what the job begins with; a resumed job continues from its own.
    :param compressor: what undoes the clients' compression; None: they send deltas as they are.
    :param evaluate: on held-out examples, if there are some; called in the thread that aggregates.
    :param strategy: used only there.
    """

    def __init__(
        self,
        rules: Rules,
        strategy: Strategy,
        model: Weights,
        *,
        compressor: Compressor | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.rules, self.strategy, self.compressor, self.evaluate = rules, strategy, compressor, evaluate
        self.model = model
        self.wanted = shapes(model)
        self.shared: Weights = {}
        self.roster = Roster(wire.form(self.wanted))
        self.run = self.epoch = self.number = self.version = 0
        self.outcome = ""
        """Why the job is over: ``rounds``, ``target``, ``stall``, ``time``, ``too-few``, ``aborted``, ``fenced``; empty: it is
        not."""
        self.round: Round | None = None
        self.taken: dict[tuple[str, int], Taken] = {}
        self.garbage = 0
        """Messages that were none."""
        self._answers: dict[str, tuple[int, str]] = {}
        self._bases: dict[int, tuple[str, int]] = {}
        self._aborted: list[int] = []
        self._quarantine: list[str] = []
        self._failures = self._since = 0
        self._best: float | None = None
        self._began = self._idle_since = 0
        self._digest = ""
        self._largest = 0.0
        self._data = b""
        self._made = 0
        self._metrics: dict[str, float] = {}
        self._state: Any = None
        self._task: dict[str, Any] = {}
        self._up = self._down = 0
        self._repeat: int | None = None
        self._model_said = 0
        self._model_due: int | None = None
        self._silent: frozenset[str] = frozenset()

    # -- the contract -----------------------------------------------------------------------------------------------

    def filters(self) -> tuple[str, ...]:
        return ("round", "c/+/state", "c/+/up", "c/+/need")

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        out = Answer()
        if (job := kept.get("job")) is None:
            self.epoch = self.run = max(1, now // 1_000_000)
            self._began = now
            self._state = self.strategy.snapshot()
            self.shared = self.strategy.shared()
            self._adopt(self.model, wire.pack_model(self.model, self.shared), digest(self.model))
            self._commit_model(out)
        else:
            self._resume(kept, job, now)
        self._idle_since = now
        self._task = self.strategy.task()
        self._commit_job(out)
        self._say_model(out, now)
        if (row := kept.get("row")) is not None:
            out.rows.append(row)  # its publication may not have happened; rows have their round's number
        if self.outcome:
            self._say_call(out)
            out.over = True
            return out
        for client, number in sorted(self.taken):
            self._ack(client, number, wire.TAKEN, out)  # likewise
        if self.round is None:
            self._say_call(out)
            self._idle(now, out)
        elif self.round.phase == AGGREGATING:
            self._aggregate(out)
        else:
            self._say_call(out)
            self._repeat = now + ns(self._interval())
            self._look(now, out)
        return out

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        parts = topic.split("/")
        try:
            match parts:
                case ["round"]:
                    self._heard_call(wire.hear(wire.Call, payload), out)
                case ["c", client, "up"]:
                    self._heard_update(client, payload, now, out)
                case ["c", client, "state"]:
                    self._heard_state(client, payload, now, out)
                case ["c", client, "need"]:
                    self._heard_need(client, wire.hear(wire.Need, payload), now, out)
        except PayloadError:
            self.garbage += 1
        return out

    def worked(self, name: str, result: Any, now: int) -> Answer:
        out = Answer()
        if self.outcome or self.round is None:
            return out
        if isinstance(result, Merged):
            self._merged(result, self.round, now, out)
        else:
            if self._state is not None:
                self.strategy.restore(self._state)
            self._end(self.round, "aborted", now, out, why=f"{type(result).__name__}: {result}")
        return out

    def linked(self, now: int) -> Answer:
        out = Answer()
        if not self.outcome:
            self._say_model(out, now)
            self._say_call(out)
        return out

    def wake(self) -> int | None:
        if self.outcome:
            return None
        times = [self._model_due, self._repeat, self._time_end()]
        if (held := self.round) is None:
            times += [self._begin_at(), self._idle_since + ns(self.rules.wait)]
        elif held.phase == COLLECTING:
            times.append(held.deadline)
            if held.enough is not None:
                times.append(held.enough + ns(self.rules.grace))
        return min((time for time in times if time is not None), default=None)

    def tick(self, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        if (end := self._time_end()) is not None and now >= end:
            if self.round is None:
                self._over("time", out)
            else:
                self._end(self.round, "aborted", now, out, why="time")
            return out
        if self._model_due is not None and now >= self._model_due:
            self._say_model(out, now)
        if self.round is None:
            self._idle(now, out)
        else:
            if self._repeat is not None and now >= self._repeat:
                self._say_call(out)
                self._repeat = now + ns(self._interval())
            if self.round.phase == COLLECTING:
                self._look(now, out)
        return out

    # -- beginning --------------------------------------------------------------------------------------------------

    def _adopt(self, model: Weights, data: bytes, name: str) -> None:
        self.model, self._data, self._digest = model, data, name
        self._largest = 100 * (1 + norm(model))

    def _resume(self, kept: Mapping[str, Any], job: Mapping[str, Any], now: int) -> None:
        self.run, self.epoch = job["run"], max(job["epoch"] + 1, now // 1_000_000)
        self.number, self.version, self._began = job["number"], job["version"], job["began"]
        self._failures, self._best, self._since = job["failures"], job["best"], job["since"]
        self._aborted, self.outcome = list(job["aborted"]), job["outcome"]
        self._bases = {number: (base, version) for number, base, version in job["bases"]}
        saved = kept["model"]
        model, self.shared = wire.unpack_model(saved["data"], self.wanted)
        fit(model, self.wanted)
        self._made, self._metrics, self._state = saved["round"], dict(saved["metrics"]), saved["strategy"]
        self._adopt(model, saved["data"], saved["digest"])
        if self._state is not None:
            self.strategy.restore(self._state)
        for key, value in kept.items():
            match key.split("/"):
                case ["client", name]:
                    self.roster.load({name: value})
                case ["answer", name]:
                    self._answers[name] = (value[0], value[1])
                case ["update", _, name]:
                    update = read(value, name, self.rules.job, self.run)
                    self.taken[name, update.round] = update
                case ["quarantine", *_]:
                    self._quarantine.append(key)
        if (saved_round := kept.get("round")) is not None:
            held = self.round = Round.of(saved_round)
            held.waiting = {
                name
                for name in held.asked
                if self.roster.able(name, held.number) and (name, held.number) not in self.taken
            }
            # the clients could not reach it while it was away
            held.deadline = max(held.deadline, now + ns(self.rules.deadline) // 2)

    def _begin_at(self) -> int | None:
        """When a round may begin with the clients there are; None: not with them."""
        rules, n = self.rules, len(self.roster.fit)
        if n >= max(rules.least, rules.quorum):
            return self._idle_since + ns(rules.gather) if self.number == 0 else self._idle_since
        if self.number and n >= (1 if rules.buffer is not None else rules.quorum):
            return self._idle_since + ns(rules.grace)
        return None

    def _idle(self, now: int, out: Answer) -> None:
        at = self._begin_at()
        if at is not None and now >= at:
            self._begin(now, out)
        elif now >= self._idle_since + ns(self.rules.wait):
            self._over("too-few", out)

    def _begin(self, now: int, out: Answer) -> None:
        rules = self.rules
        self.number += 1
        size = rules.asks(len(self.roster.fit))
        asked: list[str] = []
        if rules.buffer is None:
            asked = self.roster.choose(size, rules.seed, self.number, without=self._silent)
            if len(asked) < size:  # those who kept silent in the round before have another chance
                asked = self.roster.choose(size, rules.seed, self.number)
        ends = now + ns(rules.deadline)
        self.round = Round(self.number, self._digest, now, ends, size, asked, waiting=set(asked))
        self._bases[self.number] = (self._digest, self.version)
        for old in [number for number in self._bases if number < self.number - rules.stale]:
            del self._bases[old]
        self._repeat = now + ns(self._interval())
        self._commit_job(out)
        self._commit_round(out)
        self._say_call(out)
        self._look(now, out)  # asynchronously there may be enough in the buffer

    # -- what is heard ----------------------------------------------------------------------------------------------

    def _heard_call(self, call: wire.Call, out: Answer) -> None:
        if call.job != self.rules.job:
            self.garbage += 1
        elif call.epoch > self.epoch:
            self.outcome = "fenced"
            out.over = True
        elif call.epoch < self.epoch:
            self._say_call(out)  # an older one does not know yet; what is retained must be ours

    def _heard_state(self, client: str, payload: bytes, now: int, out: Answer) -> None:
        said = wire.hear(wire.Presence, payload) if payload else wire.Presence(here=False)
        if (kept := self.roster.hear(client, said)) is None:
            return
        out.commit[f"client/{client}"] = kept
        held = self.round
        if held is None:
            self._idle(now, out)
        elif held.phase == COLLECTING and self.rules.buffer is not None:
            self._look(now, out)
        elif held.phase == COLLECTING:
            if not self.roster.able(client, held.number):
                held.waiting.discard(client)
            elif client in held.asked and (client, held.number) not in self.taken and client not in held.refused:
                held.waiting.add(client)
            self._fill(held, out)
            self._look(now, out)

    def _fill(self, held: Round, out: Answer) -> None:
        """Others for the places of those that will not answer."""
        here = len(held.waiting) + len(self.taken)
        if here >= held.size or len(held.asked) >= len(self.roster.members):
            return
        more = self.roster.choose(held.size - here, self.rules.seed, held.number, without=held.asked)
        if more:
            held.asked += more
            held.waiting.update(more)
            self._commit_round(out)
            self._say_call(out)

    def _heard_update(self, client: str, payload: bytes, now: int, out: Answer) -> None:
        held = self.round
        self._up += len(payload)
        number = self.number
        try:
            update = read(payload, client, self.rules.job, self.run)
            number = update.round
            if self._answers.get(client) == (number, wire.TAKEN):
                self._ack(client, number, wire.TAKEN, out)
            elif number > self.number or number < 1:
                raise RefusedError("future", f"round {number}, the last one called is {self.number}")
            elif self._too_late(update):
                if held is not None:
                    held.stale += 1
                self._ack(client, number, wire.STALE, out)
            else:
                self._examine(update)
                self._take(update, now, out)
        except RefusedError as error:
            self._refuse(client, number, error, payload, now, out)

    def _too_late(self, update: Taken) -> bool:
        held, rules = self.round, self.rules
        if rules.buffer is None:
            return held is None or update.round != held.number or held.phase != COLLECTING
        newest = self._answers.get(update.client, (0, ""))[0]
        return update.round not in self._bases or update.round < newest

    def _examine(self, update: Taken) -> None:
        client = update.client
        if client not in self.roster.members:
            raise RefusedError("unknown-client", f"nobody of the name {client[:64]!r} has joined")
        if self.rules.buffer is None and (self.round is None or client not in self.round.asked):
            raise RefusedError("not-asked", f"{client} is not asked in round {update.round}")
        base = self._bases[update.round][0]
        examine(update, base, self.wanted, self.compressor, self.rules.limits, self._largest)

    def _take(self, update: Taken, now: int, out: Answer) -> None:
        client, number = update.client, update.round
        self.taken[client, number] = update
        self._answers[client] = (number, wire.TAKEN)
        out.commit[f"update/{number}/{client}"] = update.payload
        out.commit[f"answer/{client}"] = [number, wire.TAKEN]
        self._ack(client, number, wire.TAKEN, out)
        if (held := self.round) is not None and held.phase == COLLECTING:
            held.waiting.discard(client)
            held.refused.pop(client, None)
            self._look(now, out)

    def _refuse(self, client: str, number: int, why: RefusedError, payload: bytes, now: int, out: Answer) -> None:
        text = str(why)[:300]
        self._ack(client, number, wire.REFUSED, out, why.reason, text)
        if why.reason in {"not-asked", "unknown-client", "future"}:
            return  # out of step, not poisonous
        key = f"quarantine/{number}/{client}"
        if key not in self._quarantine:
            self._quarantine.append(key)
        if len(self._quarantine) > KEEP:
            out.commit[self._quarantine.pop(0)] = None
        kept = {"reason": why.reason, "detail": text, "time": now, "size": len(payload)}
        out.commit[key] = {**kept, "payload": bytes(payload[:QUARANTINE_BYTES])}
        held = self.round
        if held is None or held.phase != COLLECTING or number != held.number or (client, number) in self.taken:
            return
        held.refused[client] = why.reason
        held.waiting.discard(client)
        if self.rules.buffer is None:
            self._fill(held, out)
        self._look(now, out)

    def _heard_need(self, client: str, need: wire.Need, now: int, out: Answer) -> None:
        if need.answer:
            known = self._answers.get(client) == (need.answer, wire.TAKEN)
            self._ack(client, need.answer, wire.TAKEN if known else wire.STALE, out)
        if need.model:
            if now >= self._model_said + ASIDE:
                self._say_model(out, now)
            elif self._model_due is None:
                self._model_due = self._model_said + ASIDE

    # -- ending a round ---------------------------------------------------------------------------------------------

    def _look(self, now: int, out: Answer) -> None:
        """Close or abort the round if it is time."""
        held = self.round
        if held is None or held.phase != COLLECTING:
            return
        match held.verdict(len(self.taken), self.rules, len(self.roster.fit), now):
            case "close":
                held.phase = AGGREGATING
                held.counted = sorted(self.taken)
                self._repeat = None
                self._silent = frozenset(held.waiting)
                self._commit_round(out)
                self._aggregate(out)
            case "abort":
                self._silent = frozenset(held.waiting)
                self._end(held, "aborted", now, out, why="below quorum")

    def _busy(self) -> bool:
        return self.round is not None and self.round.phase == AGGREGATING

    def _aggregate(self, out: Answer) -> None:
        if (held := self.round) is None:
            return
        taken = [
            (update, max(0, self.version - self._bases.get(update.round, ("", self.version))[1]))
            for update in (self.taken[pair] for pair in held.counted)
        ]
        act = partial(merge, self.strategy, self.model, taken, self.wanted, self.compressor, self.evaluate)
        out.work = Work("aggregate", act)

    def _merged(self, merged: Merged, held: Round, now: int, out: Answer) -> None:
        metrics = {**means([self.taken[pair] for pair in held.counted]), **merged.metrics}
        watched = metrics.get(self.rules.watch, metrics.get(f"local_{self.rules.watch}", math.nan))
        if self._best is not None and self.rules.tolerance is not None:
            loss = -self.rules.better(watched, self._best)
            if not loss <= self.rules.tolerance:
                if self._state is not None:
                    self.strategy.restore(self._state)
                self._end(held, "rejected", now, out, metrics, why=f"{self.rules.watch} fell by {loss:.4g}")
                return
        self.version += 1
        self._failures = 0
        self._made, self._metrics, self._state = held.number, merged.metrics, merged.state
        self.shared, self._task = merged.shared, merged.task
        self._adopt(merged.weights, merged.data, merged.digest)
        if math.isfinite(watched) and (self._best is None or self.rules.better(watched, self._best) > 0):
            self._best, self._since = watched, 0
        else:
            self._since += 1
        self._end(held, "committed", now, out, metrics)

    def _end(
        self,
        held: Round,
        status: str,
        now: int,
        out: Answer,
        metrics: Mapping[str, float] | None = None,
        *,
        why: str = "",
    ) -> None:
        """The round is over, whatever became of it; begin the next if one can begin."""
        committed = status == "committed"
        if committed:
            self._commit_model(out)
        else:
            self._failures += 1
            self._aborted = [*self._aborted, held.number][-KEEP:]
        row = self._row(held, status, now, dict(metrics or {}), why)
        out.rows.append(row)
        out.commit["row"] = row
        gone = held.counted if self.rules.buffer is not None else list(self.taken)
        for client, number in gone:
            self.taken.pop((client, number), None)
            out.commit[f"update/{number}/{client}"] = None
        out.commit["round"] = None
        self.round, self._repeat, self._idle_since = None, None, now
        if committed:
            self._say_model(out, now)
        if (reason := self._enough(metrics or {}, now)) is not None:
            self._over(reason, out)
            return
        self._idle(now, out)
        if self.round is None:
            self._commit_job(out)
            self._say_call(out)

    def _enough(self, metrics: Mapping[str, float], now: int) -> str | None:
        rules = self.rules
        if self.version >= rules.rounds:
            return "rounds"
        if rules.reached(metrics):
            return "target"
        if rules.stall is not None and self._since >= rules.stall:
            return "stall"
        if self._failures > rules.retries:
            return "aborted"
        end = self._time_end()
        return "time" if end is not None and now >= end else None

    def _time_end(self) -> int | None:
        return None if self.rules.time is None or self._busy() else self._began + ns(self.rules.time)

    def _over(self, reason: str, out: Answer) -> None:
        self.outcome = reason
        self.round = None
        self._commit_job(out)
        out.commit["round"] = None
        self._say_call(out)
        out.over = True

    def _row(self, held: Round, status: str, now: int, metrics: dict[str, float], why: str) -> dict[str, Any]:
        up, down, self._up, self._down = self._up, self._down, 0, 0
        used = [self.taken[pair] for pair in held.counted] if status == "committed" else []
        names = ("accuracy", "loss", "local_accuracy", "local_loss", "train_loss")
        return {
            "round": held.number,
            "status": status,
            "why": why,
            "version": self.version,
            **{name: metrics.get(name, math.nan) for name in names},
            **{name: value for name, value in metrics.items() if name not in names},
            "clients": len(used),
            "asked": len(held.asked) or len(self.roster.fit),
            "samples": sum(update.samples for update in used),
            "refused": len(held.refused),
            "stale": held.stale,
            "seconds": (now - held.began) / SECOND,
            "bytes_up": up,
            "bytes_down": down,
        }

    # -- what is said and kept --------------------------------------------------------------------------------------

    def _interval(self) -> float:
        return max(0.5, min(self.rules.repeat, self.rules.deadline / 4))

    def _say(self, out: Answer, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._down += len(payload)
        out.say.append(Say(topic, payload, retain))

    def _ack(self, client: str, number: int, status: str, out: Answer, reason: str = "", detail: str = "") -> None:
        ack = wire.Ack(self.run, self.epoch, number, status, reason, detail)
        self._say(out, f"c/{client}/ack", wire.say(ack))

    def _say_model(self, out: Answer, now: int) -> None:
        self._model_said, self._model_due = now, None
        manifest = wire.Manifest(
            job=self.rules.job,
            run=self.run,
            epoch=self.epoch,
            round=self._made,
            version=self.version,
            digest=self._digest,
            blob="",
            size=len(self._data),
            shapes=self.wanted,
            data=self._data,
            metrics=self._metrics,
        )
        self._say(out, "model", wire.say(manifest), retain=True)

    def _say_call(self, out: Answer) -> None:
        rules, held = self.rules, self.round
        call = wire.Call(
            job=rules.job,
            run=self.run,
            epoch=self.epoch,
            round=self.number,
            phase=wire.OVER if self.outcome else wire.IDLE if held is None else wire.COLLECTING,
            base=self._digest if held is None else held.base,
            deadline=0 if held is None else held.deadline,
            quorum=rules.quorum,
            cohort=() if held is None else tuple(held.asked),
            open=rules.buffer is not None,
            fit={**rules.fit, **self._task, "seed": rules.seed},
            compress=rules.compress,
            evaluate=rules.evaluate,
            aborted=tuple(self._aborted),
            why=self.outcome,
        )
        self._say(out, "round", wire.say(call), retain=True)

    def _commit_job(self, out: Answer) -> None:
        out.commit["job"] = {
            "run": self.run,
            "epoch": self.epoch,
            "began": self._began,
            "number": self.number,
            "version": self.version,
            "failures": self._failures,
            "best": self._best,
            "since": self._since,
            "aborted": self._aborted,
            "outcome": self.outcome,
            "bases": [[number, base, version] for number, (base, version) in self._bases.items()],
        }

    def _commit_round(self, out: Answer) -> None:
        out.commit["round"] = None if self.round is None else self.round.kept()

    def _commit_model(self, out: Answer) -> None:
        out.commit["model"] = {
            "round": self._made,
            "digest": self._digest,
            "data": self._data,
            "metrics": self._metrics,
            "strategy": self._state,
        }
