"""The side of a pool that gives: sends one batch after the other to the trainer, each until it is acknowledged; or withdraws.

What is sent is committed before, sealed as it will travel, so that a gateway that was killed says the same bytes again, and a
large one goes on with the chunks that are missing. The trainer counts a batch once, however often it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from broker.blobs import Pace
from nodes.federated import pool_wire, wire
from nodes.federated.identity import Ear
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.outbox import Outbox
from nodes.federated.pool_wire import REFUSED, TAKEN, WITHDRAWN, Batch, Opened
from nodes.federated.rules import SECOND, ns
from nodes.federated.uploads import Upload
from schemas.errors import PayloadError

if TYPE_CHECKING:
    from nodes.privacy.keys import Signer

_FIRST, _LAST = SECOND, 30 * SECOND
"""Pauses between repetitions of what was not answered: doubled from the first to the last."""
HELD = frozenset({"unknown", "plain", "seal", "job", "withdrawn"})
"""Reasons of a refusal that say nothing against the examples: they wait until somebody has put it right."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch as it travels.

    :param seal: the key that it is sealed to; empty: it is not.
    """

    life: int
    number: int
    seal: bytes
    payload: bytes


class Giver(Machine):
    """One gateway's.

    :param name: stable, one topic level; the name of its key at the trainer.
    :param signer: the device's identity; None: nothing is signed or sealed, which ``plain`` must allow.
    :param trainer: the trainer's public key (Ed25519); None: everybody is believed.
    :param plain: batches may go as they are.
    :param gives: False: the consent is withdrawn, and that is said until it is acknowledged.
    :param batch: bytes of examples with which a batch is sent at once; fewer wait ``linger`` seconds for more.
    :param inline: bytes of a batch that still travels in one message; ``chunk``: of a larger one's pieces.
    """

    def __init__(
        self,
        job: str,
        name: str,
        outbox: Outbox,
        *,
        signer: Signer | None = None,
        trainer: bytes | None = None,
        plain: bool = False,
        gives: bool = True,
        batch: int = 256 * 1024,
        linger: float = 10.0,
        inline: int = wire.INLINE,
        chunk: int = wire.CHUNK,
    ) -> None:
        self.job, self.name, self.outbox, self.gives = job, name, outbox, gives
        self.signer, self.trainer, self.plain = signer, trainer, plain
        self.batch, self.linger = batch, ns(linger)
        self.garbage = 0
        """Messages that were none, or not the trainer's."""
        self.outcome = ""
        """Why it is over: ``given``, ``withdrawn``, or ``closed``: the job is over, and what waits was not taken."""
        self.trouble = ""
        """Why nothing is taken, or what was refused last; empty: no such reason is known."""
        self._inline, self._chunk = inline, chunk
        self._ear = Ear(job, trainer)
        self._seal: bytes | None = None  # None: nobody takes anything, as far as is known
        self._sent: Packed | None = None
        self._busy = False
        self._done = 0
        self._upload: Upload | None = None
        self._pace: Pace | None = None
        self._again: int | None = None
        self._pause = _FIRST
        self._since: int | None = None  # when the oldest that waits came
        self._ends = self._told = self._closed = False

    # -- the contract -----------------------------------------------------------------------------------------------

    def filters(self) -> tuple[str, ...]:
        return ("pool", f"p/{self.name}/ack", f"p/{self.name}/have")

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        out = Answer()
        if not self.gives:
            out.commit["sent"] = None
            self._told = kept.get("withdrawn") == self.outbox.until
            self._withdraw(now, out)
            if self._told and self._ends:
                self._over("withdrawn", out)
            return out
        if (sent := kept.get("sent")) is not None and sent["life"] == self.outbox.life:
            self._sent = Packed(**sent)
        self._since = now if self.outbox.count else None
        return out

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        try:
            if topic.endswith("/have"):
                if self._upload is not None:
                    self._upload.heard(payload, now)
                    self._chunks(now, out)
            elif (message := self._ear.hear(topic, payload)) is None:
                self.garbage += 1
            elif topic == "pool":
                self._opened(pool_wire.hear(Opened, message), now, out)
            else:
                self._answered(pool_wire.hear(pool_wire.Answer, message), now, out)
        except PayloadError:
            self.garbage += 1
        return out

    def worked(self, name: str, result: Any, now: int) -> Answer:
        out = Answer()
        self._busy = False
        if isinstance(result, Packed):
            self._done = 0
            if result.seal == self._seal:
                self._sent = result
                self._upload = None
                out.commit["sent"] = {
                    "life": result.life,
                    "number": result.number,
                    "seal": result.seal,
                    "payload": result.payload,
                }
                self._say_batch(now, out)
        elif isinstance(result, Exception):
            self._again = now + _LAST
            self._tell(f"no batch was made: {type(result).__name__}: {result}", out)
        elif result is None:
            self._done = 0
            self._since = now if self.outbox.count else None
        self._go(now, out)
        return out

    def linked(self, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        if not self.gives:
            self._withdraw(now, out)
        elif self._sent is not None:
            if self._upload is not None:
                self._upload.linked(now)
            self._say_batch(now, out)
        return out

    def wake(self) -> int | None:
        if self.outcome:
            return None
        times = [self._again, None if self._upload is None else self._upload.wake(), self._due()]
        return min((time for time in times if time is not None), default=None)

    def tick(self, now: int) -> Answer:
        out = Answer()
        if self.outcome:
            return out
        if self._again is not None and now >= self._again:
            self._again = None
            if not self.gives:
                self._withdraw(now, out, first=False)
            elif self._sent is not None and self._seal is not None:
                self._say_batch(now, out, first=False)
        if self.gives:
            self._chunks(now, out)
            self._go(now, out)
        return out

    # -- what the node says -----------------------------------------------------------------------------------------

    def fed(self, now: int) -> Answer:
        """There are other examples than before."""
        out = Answer()
        if not self.outcome:
            if self._since is None and self.outbox.count:
                self._since = now
            self._go(now, out)
        return out

    def ended(self, now: int) -> Answer:
        """There will be no more: what waits is sent, and then it is over."""
        self._ends = True
        out = self.fed(now)
        if not self.gives and self._told:
            self._over("withdrawn", out)
        return out

    # -- what is heard ----------------------------------------------------------------------------------------------

    def _opened(self, opened: Opened, now: int, out: Answer) -> None:
        if opened.job != self.job:
            self.garbage += 1
            return
        if not self.gives:
            if not self._told:
                self._withdraw(now, out)
            return
        self._closed = opened.closed
        if opened.closed:
            self._seal = None
            self._go(now, out)
            return
        if not opened.seal and not self.plain:
            self._seal = None
            self._tell("nothing is given: the trainer has no key to seal to, and 'plain' is not allowed here", out)
            return
        if opened.seal and self.signer is None:
            self._seal = None
            self._tell("nothing is given: the trainer takes only what is sealed, and there is no key here", out)
            return
        self.trouble = ""
        self._seal = opened.seal
        if self._sent is not None and self._sent.seal != opened.seal:
            self._sent, self._upload = None, None  # it could not be opened: another is made of the same examples
            out.commit["sent"] = None
        if self._sent is not None:
            self._say_batch(now, out)
        self._go(now, out)

    def _answered(self, answer: pool_wire.Answer, now: int, out: Answer) -> None:
        if not self.gives:
            if answer.status == WITHDRAWN and answer.life == self.outbox.until:
                self._told, self._again = True, None
                out.commit["withdrawn"] = self.outbox.until
                if self._ends:
                    self._over("withdrawn", out)
            return
        sent = self._sent
        if sent is None or (answer.life, answer.number) != (sent.life, sent.number):
            return
        if answer.status == REFUSED and answer.reason in HELD:
            self._tell(f"the trainer does not take it, {answer.reason}: {answer.detail}", out)
            self._upload, self._again = None, now + _LAST
            return
        if answer.status not in {TAKEN, REFUSED}:
            return
        said = "" if answer.status == TAKEN else f"a batch was refused, {answer.reason}: {answer.detail}"
        self._tell(said, out)
        self._sent, self._upload, self._again = None, None, None
        self._done = sent.number
        out.commit["sent"] = None
        self._since = now if self.outbox.count else None
        self._go(now, out)

    @property
    def _full(self) -> bool:
        """Whether there is enough for a batch, or there will not be more."""
        return self.outbox.count > 0 and (self._ends or self.outbox.bytes >= self.batch)

    # -- batches ----------------------------------------------------------------------------------------------------

    def _due(self) -> int | None:
        """When the next batch is to be made."""
        if not self.gives or self._busy or self._sent is not None or self._seal is None or self._again is not None:
            return None
        if self._done or self._full:
            return 0
        return None if self._since is None else self._since + self.linger

    def _go(self, now: int, out: Answer) -> None:
        due = self._due()
        if due is not None and now >= due and self._seal is not None:
            self._busy = True
            bind = not self._done  # else first look what is left when that is gone
            out.work = Work("pack", partial(self._pack, self._done, self._seal, bind=bind))
        elif self._ends and not (self._busy or self._sent or self._done or self.outbox.count) and self.gives:
            self._over("given", out)
        elif self._ends and self._closed and not self._busy:
            self._over("closed", out)

    def _pack(self, done: int, seal: bytes, *, bind: bool) -> Packed | None:
        """In the thread: the next batch, as it travels.

        :raises SinkAwayError: the disk is full or away.
        :raises SealError: the trainer's key is none.
        """
        bundle = self.outbox.next(done, self.batch, bind=bind)
        if bundle is None:
            return None
        life, data = self.outbox.life, bundle.pack()
        if seal and self.signer is not None:
            from nodes.privacy.sealing import seal_for

            data = seal_for(seal, data, pool_wire.about(self.job, self.name, life, bundle.number), self.signer)
        batch = Batch(self.job, life, bundle.number, data, sealed=bool(seal))
        return Packed(life, bundle.number, seal, pool_wire.say(batch))

    def _say(self, topic: str, payload: bytes, out: Answer) -> None:
        out.say.append(Say(f"p/{self.name}/{topic}", payload))

    def _say_batch(self, now: int, out: Answer, *, first: bool = True) -> None:
        sent = self._sent
        if sent is None or self._seal is None:
            return
        self._pause = _FIRST if first else min(self._pause * 2, _LAST)
        self._again = now + self._pause
        if len(sent.payload) <= self._inline:
            self._say("up", sent.payload, out)
            return
        if self._upload is None:
            self._upload = Upload(sent.life, sent.number, sent.payload, self._chunk, now, self._pace)
            self._pace = self._upload.pace
        else:
            self._upload.again(now)
        self._say("offer", wire.say(self._upload.parcel), out)
        self._chunks(now, out)

    def _chunks(self, now: int, out: Answer) -> None:
        if self._upload is not None:
            for chunk in self._upload.chunks(now):
                self._say("blob", chunk, out)

    def _tell(self, trouble: str, out: Answer) -> None:
        """For the log, once."""
        if trouble and trouble != self.trouble:
            out.tell.append(trouble)
        self.trouble = trouble

    # -- withdrawing ------------------------------------------------------------------------------------------------

    def _withdraw(self, now: int, out: Answer, *, first: bool = True) -> None:
        if self._told:
            return
        self._pause = _FIRST if first else min(self._pause * 2, _LAST)
        self._again = now + self._pause
        said = pool_wire.say(pool_wire.Withdrawal(self.job, self.outbox.until))
        self._say("withdraw", pool_wire.sign(self.signer, self.job, f"p/{self.name}/withdraw", said), out)

    def _over(self, outcome: str, out: Answer) -> None:
        self.outcome, out.over = outcome, True
