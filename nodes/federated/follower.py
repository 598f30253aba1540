"""Who listens to a job's model and takes no part in the job: what ``infer`` has beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nodes.federated import wire
from nodes.federated.download import Download
from nodes.federated.identity import Member
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.trust import ClientTrust
from nodes.federated.weights import Weights, digest, fit
from schemas.errors import PayloadError

LARGEST = 1 << 30
"""Bytes of a model; one that says that it has more is not fetched."""


class Follower(Machine):
    """Hands over each new global model, the latest first; what was replaced meanwhile is left out.

    :param coordinator: public key (Ed25519) of who leads the job; what it did not sign is passed over. None: all is believed.
    :param name: ours on the job's topics, as a client's.
    :param take: what is done with a model; called in a thread, one at a time. What it raises is for it to have said.
    """

    def __init__(
        self, job: str, name: str, take: Callable[[wire.Manifest, Weights], None], coordinator: bytes | None = None
    ) -> None:
        self.job, self.name = job, name
        self.garbage = 0
        """Messages that were none, and models that were not what their manifest says."""
        self._identity = Member(job, name, ClientTrust(coordinator=coordinator))
        self._take = take
        self._newest = (0, 0, -1)
        self._next: wire.Manifest | None = None
        self._model = Download(LARGEST)
        self._busy = False

    def filters(self) -> tuple[str, ...]:
        return ("model", "blob/+")

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        return Answer()

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if (message := self._identity.heard(topic, payload, out)) is None:
            return out
        payload = message
        if topic.startswith("blob/"):
            self._model.took(payload, now)
        elif payload:
            try:
                self._announced(wire.hear(wire.Manifest, payload), now)
            except PayloadError:
                self.garbage += 1
        self._go(now, out)
        return out

    def _announced(self, manifest: wire.Manifest, now: int) -> None:
        place = (manifest.run, manifest.epoch, manifest.version)
        if manifest.job == self.job and place > self._newest:
            self._newest, self._next = place, manifest
            self._model.heard(manifest, now)

    def worked(self, name: str, result: Any, now: int) -> Answer:
        self._busy = False
        if isinstance(result, Exception):
            self.garbage += 1
        out = Answer()
        self._go(now, out)
        return out

    def linked(self, now: int) -> Answer:
        self._model.linked(now)
        return self.tick(now)

    def wake(self) -> int | None:
        return self._model.wake()

    def tick(self, now: int) -> Answer:
        out = Answer()
        self._go(now, out)
        return out

    def _go(self, now: int, out: Answer) -> None:
        """Ask for what is missing, and begin what can be begun."""
        if (said := self._model.needs(now)) is not None:
            out.say.append(Say(f"c/{self.name}/need", said))
        if self._busy or self._next is None or (data := self._model.data(self._next.digest)) is None:
            return
        manifest, self._next, self._busy = self._next, None, True
        out.work = Work("take", partial(self._hand_over, manifest, data))

    def _hand_over(self, manifest: wire.Manifest, data: bytes) -> None:
        weights, _ = wire.unpack_model(data, manifest.shapes)
        fit(weights, manifest.shapes)
        if digest(weights) != manifest.digest:
            raise PayloadError("bad-digest", "the model's numbers are not those that its manifest names")
        self._take(manifest, weights)
