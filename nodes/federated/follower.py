"""Who listens to a job's model and takes no part in the job: what ``infer`` has beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nodes.federated import wire
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.weights import Weights, digest, fit
from schemas.errors import PayloadError

AGAIN = 5 * 1_000_000_000
"""ns after which a model that we know of and lack is asked for again."""


class Follower(Machine):
    """Hands over each new global model, the latest first; what was replaced meanwhile is left out.

    :param name: ours on the job's topics, as a client's.
    :param take: what is done with a model; called in a thread, one at a time. What it raises is for it to have said.
    """

    def __init__(self, job: str, name: str, take: Callable[[wire.Manifest, Weights], None]) -> None:
        self.job, self.name = job, name
        self.garbage = 0
        """Messages that were none, and models that were not what their manifest says."""
        self._take = take
        self._newest = (0, 0, -1)
        self._next: wire.Manifest | None = None
        self._busy = False
        self._again: int | None = None

    def filters(self) -> tuple[str, ...]:
        return ("model",)

    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        return Answer()

    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        out = Answer()
        if not payload:
            return out
        try:
            manifest = wire.hear(wire.Manifest, payload)
        except PayloadError:
            self.garbage += 1
            return out
        place = (manifest.run, manifest.epoch, manifest.version)
        if manifest.job != self.job or place < self._newest or (place == self._newest and self._again is None):
            return out
        self._newest, self._again = place, None
        self._next = manifest
        self._go(now, out)
        return out

    def worked(self, name: str, result: Any, now: int) -> Answer:
        self._busy = False
        if isinstance(result, Exception):
            self.garbage += 1
        out = Answer()
        self._go(now, out)
        return out

    def wake(self) -> int | None:
        return self._again

    def tick(self, now: int) -> Answer:
        out = Answer()
        if self._again is not None and now >= self._again and self._next is not None:
            self._ask(self._next, now, out)
        return out

    def _go(self, now: int, out: Answer) -> None:
        if self._busy or self._next is None:
            return
        if not self._next.data:
            self._ask(self._next, now, out)
            return
        manifest, self._next, self._busy = self._next, None, True
        out.work = Work("take", partial(self._hand_over, manifest))

    def _ask(self, manifest: wire.Manifest, now: int, out: Answer) -> None:
        self._again = now + AGAIN
        out.say.append(Say(f"c/{self.name}/need", wire.say(wire.Need(model=manifest.digest))))

    def _hand_over(self, manifest: wire.Manifest) -> None:
        weights, _ = wire.unpack_model(manifest.data, manifest.shapes)
        fit(weights, manifest.shapes)
        if digest(weights) != manifest.digest:
            raise PayloadError("bad-digest", "the model's numbers are not those that its manifest names")
        self._take(manifest, weights)
