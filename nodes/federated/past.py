"""The last models of a job, and going back to one of them because somebody says so.

``order``: somebody wants an older model back, ``fl-order/1``; ``ordered``: what became of that, ``fl-ordered/1``. An order is
told again until it is answered, and done once. What it brings back is a new version with the old numbers, so whoever
follows the job takes it over like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from nodes.federated import wire
from nodes.federated.job import Job
from nodes.federated.rules import Rules
from nodes.federated.weights import Shape, UnfitError, fit

BEFORE = -1
"""As a version: the one before this."""


class Order(msgspec.Struct, frozen=True, tag_field="type", tag="fl-order/1"):
    """Go back.

    :param ident: of the order; a repeat has the same.
    :param run: of the job that is meant, as its manifest says.
    :param to: a version; :data:`BEFORE`.
    :param at: the version that there was when it was given: an order from before the last one that was done is a repeat.
    """

    ident: str
    run: int
    to: int = BEFORE
    at: int = 0


class Ordered(msgspec.Struct, frozen=True, tag_field="type", tag="fl-ordered/1"):
    """What became of it.

    :param version: the new version, if it was done; ``of``: the one whose numbers it has.
    :param refused: why it was not done; empty: it was.
    """

    ident: str
    version: int = 0
    of: int = 0
    refused: str = ""


T = TypeVar("T", Order, Ordered)


def heard(kind: type[T], payload: bytes) -> T:
    """A message of that kind.

    :raises PayloadError: it is none.
    """
    return wire.decoded(msgspec.msgpack.Decoder(kind), payload)


class Past:
    """The models that are kept, by version, and the last order that was done.

    :param keep: how many beside the one there is.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept: Mapping[str, Any] = {}
        self.versions: list[int] = []
        self._done: Ordered | None = None

    def begin(self, kept: Mapping[str, Any]) -> None:
        """Begin, or go on with what was committed; it is looked at later, too."""
        self._kept = kept
        self.versions = sorted(int(key.removeprefix("past/")) for key in kept if key.startswith("past/"))
        if (done := kept.get("ordered")) is not None:
            self._done = msgspec.convert(done, Ordered)

    def remember(self, job: Job, commit: dict[str, Any]) -> None:
        """This is the model now."""
        if not self._keep:
            return
        commit[f"past/{job.version}"] = job.kept_model()
        self.versions.append(job.version)
        while len(self.versions) > self._keep + 1:
            commit[f"past/{self.versions.pop(0)}"] = None

    def answer(self, order: Order) -> Ordered | None:
        """What was said of it, if it was done already."""
        return self._done if self._done is not None and self._done.ident == order.ident else None

    def refusal(self, order: Order, job: Job) -> str:
        """Why it cannot be done; empty: it can."""
        if order.run != job.run:
            return "it is about another run of the job"
        if self._done is not None and order.at < self._done.version:
            return f"it is from before version {self._done.version}, which an order made"
        older = [str(version) for version in self.versions if version < job.version]
        if not older:
            return "no older model is kept"
        if order.to != BEFORE and str(order.to) not in older:
            return f"version {order.to} is not kept; older ones that are: {', '.join(older)}"
        return ""

    def bring_back(
        self, order: Order, job: Job, wanted: tuple[Shape, ...], rules: Rules, commit: dict[str, Any]
    ) -> tuple[Ordered, Any]:
        """The job has the old model, as a new version; gives what is to be said, and the strategy's state that went with it.

        :raises PayloadError: what is kept is damaged; nothing was changed. :raises UnfitError: likewise.
        """
        of = order.to if order.to != BEFORE else max(version for version in self.versions if version < job.version)
        made = self._kept.get(f"past/{of}")
        if made is None:
            raise UnfitError("gone", "the disk has lost it")
        model, shared = wire.unpack_model(made["data"], wanted)
        fit(model, wanted)
        job.adopt(model, shared, made["data"], made["digest"])
        job.version += 1
        job.made, job.metrics = job.call(rules.stale), dict(made["metrics"])
        job.bases = {}  # what was trained from the models between is of no use
        watched = job.metrics.get(rules.watch, math.nan)
        job.best, job.since, job.failures = (watched if math.isfinite(watched) else None), 0, 0
        self._done = Ordered(order.ident, job.version, of)
        commit["ordered"] = msgspec.to_builtins(self._done)
        return self._done, made["strategy"]
