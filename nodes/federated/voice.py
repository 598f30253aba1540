"""What a coordinator says, and how much."""

from __future__ import annotations

from typing import Any

from broker.blobs import Broadcast, offer
from nodes.federated import wire
from nodes.federated.identity import Leader
from nodes.federated.job import Job
from nodes.federated.machine import Answer, Say
from nodes.federated.rounds import Round
from nodes.federated.rules import SECOND, Rules
from nodes.federated.weights import Shape

ASIDE = SECOND // 2
"""A model that somebody lacks is said again at most so often, in ns."""
PUSH = 32
"""Chunks of a model that are sent unasked; the rest when somebody asks, as fast as he takes it."""


class Voice:
    """Puts messages into answers.

    :param inline: bytes of a model that still travels in its message.
    :param chunk: bytes of a chunk of a larger one.
    :ivar down: bytes said since it was set to 0.
    """

    def __init__(self, rules: Rules, wanted: tuple[Shape, ...], quorum: int, inline: int, chunk: int) -> None:
        self.rules, self.wanted, self.quorum = rules, wanted, quorum
        self.inline, self.chunk = inline, chunk
        self.task: dict[str, Any] = {}
        self.private: dict[str, Any] = {}
        self.down = 0
        self._said = 0
        self._due: int | None = None
        self.known = False
        """Whether there is anybody who hears."""
        self._broadcast: Broadcast | None = None
        self._digest = ""
        self.identity: Leader | None = None
        """Signs what is said; None: nobody does."""

    def say(self, out: Answer, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Anything."""
        if self.identity is not None:
            payload = self.identity.say(topic, payload)
        self.down += len(payload)
        out.say.append(Say(topic, payload, retain))

    def ack(
        self, job: Job, client: str, number: int, status: str, out: Answer, reason: str = "", detail: str = ""
    ) -> None:
        """What became of an update."""
        ack = wire.Ack(job.run, job.epoch, number, status, reason, detail)
        self.say(out, f"c/{client}/ack", wire.say(ack))

    def call(self, job: Job, held: Round | None, out: Answer) -> None:
        """What is asked of whom now."""
        rules = self.rules
        call = wire.Call(
            job=rules.job,
            run=job.run,
            epoch=job.epoch,
            round=job.number,
            phase=wire.OVER if job.outcome else wire.IDLE if held is None else wire.COLLECTING,
            base=job.digest if held is None else held.base,
            deadline=0 if held is None else held.deadline,
            quorum=self.quorum,
            cohort=() if held is None else tuple(held.asked),
            open=rules.buffer is not None,
            fit={**rules.fit, **self.task, "seed": rules.seed},
            compress=rules.compress,
            evaluate=rules.evaluate,
            private=self.private,
            aborted=tuple(job.aborted),
            why=job.outcome,
            seal=b"" if self.identity is None else self.identity.seal,
        )
        self.say(out, "round", wire.say(call), retain=True)

    # -- the model --------------------------------------------------------------------------------------------------

    def model(self, job: Job, now: int, out: Answer) -> None:
        """The model as it is now, with the first chunks of a large one."""
        self._said, self._due = now, None
        small = len(job.data) <= self.inline
        if small:
            self._broadcast = None
        elif self._broadcast is None or self._digest != job.digest:
            push = PUSH if self.known else 0
            self._broadcast = Broadcast(offer(job.data, self.chunk), job.data, now, push=push)
            self._digest = job.digest
        manifest = wire.Manifest(
            job=self.rules.job,
            run=job.run,
            epoch=job.epoch,
            round=job.made,
            version=job.version,
            digest=job.digest,
            blob="" if self._broadcast is None else self._broadcast.offer.digest,
            size=len(job.data),
            shapes=self.wanted,
            chunk=0 if small else self.chunk,
            data=job.data if small else b"",
            metrics=job.metrics,
        )
        self.say(out, "model", wire.say(manifest), retain=True)
        self.chunks(now, out)

    def again(self, job: Job, now: int, out: Answer) -> None:
        """Somebody lacks the model's manifest."""
        if now >= self._said + ASIDE:
            self.model(job, now, out)
        elif self._due is None:
            self._due = self._said + ASIDE

    def needed(self, payload: bytes, now: int, out: Answer) -> None:
        """Somebody lacks chunks of the model."""
        if self._broadcast is not None and self._broadcast.heard(payload, now):
            self.chunks(now, out)

    def chunks(self, now: int, out: Answer) -> None:
        """Those that are wanted; the carrier publishes them in this order, and comes back for more."""
        if self._broadcast is not None:
            for chunk in self._broadcast.send(now, PUSH):
                self.say(out, f"blob/{self._broadcast.offer.digest}", chunk)

    def linked(self, now: int) -> None:
        """The link was lost and is there again."""
        if self._broadcast is not None:
            self._broadcast.linked(now)

    def wake(self) -> int | None:
        """When :meth:`tick` is wanted; what is past: now."""
        if self._broadcast is not None and self._broadcast.waiting:
            return self._said
        return self._due

    def tick(self, job: Job, now: int, out: Answer) -> None:
        """What is due."""
        if self._due is not None and now >= self._due:
            self.model(job, now, out)
        else:
            self.chunks(now, out)
