"""The side of a job that trains: hears what is asked, trains once for it, and says the update until it is answered.

An update and what the client carries on if it is used are committed together, before anything of it is said; a client that was
killed says that update again and does not train again. Which of the two memories counts, the one before the round or the one
after, is decided by what became of the update: taken and its round not aborted, or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nodes.federated import wire
from nodes.federated.download import Download
from nodes.federated.identity import Member
from nodes.federated.local import Compressors, Trained, train
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.post import Post
from nodes.federated.rules import SECOND, ns
from nodes.federated.trust import CLIENT, ClientTrust
from nodes.federated.weights import shapes
from nodes.trainers._trainer import Examples, Trainer
from schemas.errors import PayloadError

_FIRST, _LAST = SECOND, 30 * SECOND
"""Pauses between repetitions of what was not answered: doubled from the first to the last."""


class Client(Machine):
    """One client of one job.

    :param name: stable, one topic level; its data and its name belong together.
    :param trainer: opened.
    :param examples: what there is to learn from, read at each training, in its thread.
    :param count: how many that are, cheaply.
    :param compressors: makes what the calls name.
    :param pulse: seconds after which it says anew that it is here.
    :param inline: bytes of an update that still travels in one message; ``chunk``: of a larger one's pieces.
    :param patience: seconds that a client that took part in nothing waits for a new run when it finds the job over.
    :param trust: the device's key, and the coordinator's.
    """

    def __init__(
        self,
        job: str,
        name: str,
        trainer: Trainer,
        examples: Callable[[], Examples],
        count: Callable[[], int],
        *,
        compressors: Compressors = lambda _: None,
        pulse: float = 60.0,
        patience: float = 60.0,
        inline: int = wire.INLINE,
        chunk: int = wire.CHUNK,
        trust: ClientTrust = CLIENT,
    ) -> None:
        self.identity = Member(job, name, trust)
        self.job, self.name = job, name
        self.trainer, self.examples, self.count, self.compressors = trainer, examples, count, compressors
        self.wanted = shapes(trainer.weights())
        self.form = wire.form(self.wanted)
        self.run = self.epoch = self.trained = 0
        """The run followed, its highest epoch, and the last round that it made an update for (or gave up)."""
        self.call: wire.Call | None = None
        self.outcome = ""
        """Why the job is over."""
        self.garbage = 0
        self.refused: list[wire.Ack] = []
        """Refusals, the last few, for a person to see."""
        self.blocked = ""
        """Why it may not train now; empty: it may."""
        self._pulse, self._patience = ns(pulse), ns(patience)
        self._model = Download(wire.room(self.wanted))
        self._post = Post(name, inline, chunk, self.identity.say)
        self._busy: wire.Call | None = None
        self._began = 0
        self._took = 0.0
        self._skips, self._why = 0, ""
        self._said: wire.Presence | None = None
        self._said_at = 0
        self._again: int | None = None
        self._pause = _FIRST
        self._ends: int | None = None

    # -- the contract -----------------------------------------------------------------------------------------------

    def filters(self) -> tuple[str, ...]:
        return ("model", "round", "blob/+", *(f"c/{self.name}/{what}" for what in ("ack", "have", "state")))

    def will(self) -> Say:
        topic = f"c/{self.name}/state"
        return Say(topic, self.identity.say(topic, wire.say(wire.Presence(here=False))), retain=True)

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        out = Answer()
        if (job := kept.get("job")) is not None:
            self.run, self.epoch, self.trained = job
        self._post.resume(kept)
        if self._post.open:
            self._say_update(out, now)
        self._present(now, out, always=True)
        return out

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if self.outcome or (message := self.identity.heard(topic, payload, out)) is None:
            return out
        payload = message
        try:
            if topic == "round":
                self._heard_call(wire.hear(wire.Call, payload), now, out)
            elif topic == "model":
                self._heard_model(wire.hear(wire.Manifest, payload), now, out)
            elif topic.startswith("blob/"):
                if self._model.took(payload, now):
                    self._go(now, out)
                self._need(now, out)
            elif topic == f"c/{self.name}/ack":
                self._heard_ack(wire.hear(wire.Ack, payload), now, out)
            elif topic == f"c/{self.name}/state":
                self._heard_state(payload, now)
            elif topic == f"c/{self.name}/have":
                self._post.have(payload, now, out)
        except PayloadError:
            self.garbage += 1
        return out

    def worked(self, name: str, result: Any, now: int) -> Answer:
        out = Answer()
        call, self._busy = self._busy, None
        if call is None or self.outcome:
            return out
        if call.run == self.run and call.round > self.trained:
            self.trained = call.round
            self._commit_job(out)
            if isinstance(result, Trained):
                self._took = (now - self._began) / SECOND
                self._made(call, result, now, out)
            else:
                self._give_up(call, f"{type(result).__name__}: {result}"[:200], now, out)
        self._go(now, out)
        return out

    def linked(self, now: int) -> Answer:
        out = Answer()
        if not self.outcome:
            self._present(now, out, always=True)
            self._post.linked(now)
            if self._post.open:
                self._say_update(out, now)
            self._model.linked(now)
            self._need(now, out)
        return out

    def wake(self) -> int | None:
        if self.outcome:
            return None
        times = [self._said_at + self._pulse, self._again, self._ends, self._post.wake()]
        if self._wanting:
            times.append(self._model.wake())
        return min(time for time in times if time is not None)

    def tick(self, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        if self._ends is not None and now >= self._ends:
            self.outcome, out.over = "over", True
            return out
        if now >= self._said_at + self._pulse:
            self._present(now, out, always=True)
        if self._again is not None and now >= self._again:
            self._remind(now, out)
        self._post.chunks(now, out)
        self._need(now, out)
        return out

    # -- what the node says -----------------------------------------------------------------------------------------

    def permit(self, why_not: str, now: int) -> Answer:
        """It may train from now on (empty), or not, and why (a schedule, a load, a metered link). What is under way ends."""
        out = Answer()
        if self.blocked != why_not and not self.outcome:
            self.blocked = why_not
            self._present(now, out)
            self._go(now, out)
        return out

    def fed(self, now: int) -> Answer:
        """There are other examples than before. To be called seldom (seconds)."""
        out = Answer()
        if not self.outcome:
            self._present(now, out)
            self._go(now, out)
        return out

    # -- what is heard ----------------------------------------------------------------------------------------------

    def _follow(self, run: int, epoch: int, out: Answer) -> bool:
        """Whether that coordinator is the one to listen to."""
        if epoch < self.epoch:
            return False
        if run != self.run:
            if self.run and epoch == self.epoch:
                return False
            self.run, self.epoch, self.trained = run, epoch, 0
            self.call, self._skips = None, 0
            self._model.follow(run)
            self._post.forget(out)
            self._commit_job(out)
        elif epoch > self.epoch:
            self.epoch = epoch  # committed with the next thing that is: an older one is stopped by its own hearing
        return True

    def _heard_call(self, call: wire.Call, now: int, out: Answer) -> None:
        if call.job != self.job:
            self.garbage += 1
            return
        stranger = call.run != self.run
        if call.phase == wire.OVER and stranger:
            if call.epoch >= self.epoch and self._ends is None:
                self._ends = now + self._patience  # perhaps what is left of yesterday's run, and today's begins soon
            return
        before = self.epoch
        if not self._follow(call.run, call.epoch, out):
            return
        self._ends = None
        newer = call.epoch > before
        if newer and call.round < max(self.trained, 0 if self.call is None else self.call.round):
            self._go_back(call, out)
        elif self.call is not None and call.round < self.call.round:
            return
        self.call = call
        if call.phase == wire.OVER:
            self.outcome, out.over = call.why or "over", True
            return
        if newer and self._post.number and (call.open or call.round == self._post.number):
            if self._post.doubt():
                self._say_update(out, now)  # the coordinator was away: it has little time left
            else:
                self._wait(now, first=True)
        self._go(now, out)

    def _go_back(self, call: wire.Call, out: Answer) -> None:
        """A newer coordinator calls a round that we had already: its machine lost power, and its disk the last moments."""
        if self._post.number != call.round:
            self.trained = call.round - 1
            self._commit_job(out)
        if self._post.number > call.round:
            self._post.drop(out)

    def _heard_model(self, manifest: wire.Manifest, now: int, out: Answer) -> None:
        if manifest.job != self.job:
            self.garbage += 1
        elif manifest.epoch >= self.epoch and (self.run == manifest.run or manifest.epoch > self.epoch):
            self._model.heard(manifest, now)  # it may be of a run whose call comes next
            self._go(now, out)
            self._need(now, out)

    def _heard_state(self, payload: bytes, now: int) -> None:
        """What is said of us: if it is that we are gone, by an earlier connection's will, we say otherwise, a little later."""
        if not payload or not wire.hear(wire.Presence, payload).here:
            self._said_at = min(self._said_at, now + SECOND - self._pulse)

    def _heard_ack(self, ack: wire.Ack, now: int, out: Answer) -> None:
        if ack.run != self.run or ack.epoch < self.epoch:
            return
        if ack.reason == "unknown-client":  # it did not hear that we are here; the update is said again in a while
            self._present(now, out, always=True)
            return
        if self.identity.doubted(ack, out) or not self._post.heard(ack):
            return
        self._again = None
        if ack.status == wire.REFUSED:
            self.refused = [*self.refused, ack][-8:]
        self._go(now, out)

    # -- training ---------------------------------------------------------------------------------------------------

    def _asked(self, call: wire.Call | None) -> bool:
        return (
            call is not None
            and call.phase == wire.COLLECTING
            and call.round > self.trained
            and (call.open or self.name in call.cohort)
        )

    def _go(self, now: int, out: Answer) -> None:
        """Begin what is to be begun."""
        call = self.call
        if self._busy is not None or call is None or not self._asked(call) or self.blocked:
            return
        if self.count() == 0:
            self._present(now, out)
            return
        if not self._post.settled(call, out):
            if not call.open and self._post.ask(out):
                self._wait(now, first=True)
            return
        data = self._model.data(call.base)
        if data is None:
            if self._again is None:
                self._wait(now, first=True)  # it may be a moment behind its call
            self._need(now, out)
            return
        self._again = None
        self._busy, self._began = call, now
        act = partial(
            train,
            call,
            self.name,
            data,
            self.wanted,
            self.trainer,
            self.examples,
            self.compressors,
            self._post.memory,
            now,
        )
        out.work = Work("fit", self.identity.closed(call, act))

    def _made(self, call: wire.Call, result: Trained, now: int, out: Answer) -> None:
        if self.call is not None and self.call.round > call.round and not self.call.open:
            return  # too late, and nobody waits for it
        self._post.put(call.round, result, out)
        self._say_update(out, now)

    def _give_up(self, call: wire.Call, why: str, now: int, out: Answer) -> None:
        """Say that there will be no update, so that nobody waits for it."""
        self._skips, self._why = call.round, why
        self._present(now, out)

    # -- what is said -----------------------------------------------------------------------------------------------

    def _say(self, out: Answer, topic: str, payload: bytes, *, retain: bool = False) -> None:
        topic = f"c/{self.name}/{topic}"
        out.say.append(Say(topic, self.identity.say(topic, payload), retain))

    @property
    def _wanting(self) -> bool:
        """Whether chunks of the model are to be asked for: of those that are sent unasked it takes what comes."""
        return self._asked(self.call) and self._busy is None and not self.blocked

    def _need(self, now: int, out: Answer) -> None:
        if self._wanting and (said := self._model.needs(now)) is not None:
            self._say(out, "need", said)

    def _say_update(self, out: Answer, now: int) -> None:
        self._post.say(self.run, now, out)
        self._wait(now, first=True)

    def _wait(self, now: int, *, first: bool = False) -> None:
        self._pause = _FIRST if first else min(self._pause * 2, _LAST)
        self._again = now + self._pause

    def _remind(self, now: int, out: Answer) -> None:
        """Something was not answered: say it again, with growing pauses."""
        call = self.call
        self._again = None
        if self._post.open:
            if call is None or call.round <= self._post.number or call.open:
                self._post.say(self.run, now, out)
            elif not self._post.ask(out, again=True):
                return
        elif call is not None and self._wanting:
            if self._model.lacks(call.base):  # its chunks are asked for in their own time
                self._say(out, "ask", wire.say(wire.Ask(model=call.base)))
        else:
            return
        self._wait(now)

    def _present(self, now: int, out: Answer, *, always: bool = False) -> None:
        samples = 0 if self.blocked else self.count()
        why = self.blocked or self._why
        said = wire.Presence(
            here=True, form=self.form, samples=samples, pace=round(self._took, 3), skips=self._skips, why=why
        )
        if (
            always
            or self._said is None
            or (said.samples > 0) != (self._said.samples > 0)
            or said.skips != self._said.skips
            or said.why != self._said.why
        ):
            self._said, self._said_at = said, now
            self._say(out, "state", wire.say(said), retain=True)

    def _commit_job(self, out: Answer) -> None:
        out.commit["job"] = [self.run, self.epoch, self.trained]
