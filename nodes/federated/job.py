"""What a coordinator must not forget of its job, and how it is committed; a round under way is in :mod:`.rounds`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nodes.federated import wire
from nodes.federated.rounds import Merged
from nodes.federated.rules import Rules
from nodes.federated.weights import Shape, Weights, fit, norm

KEEP = 32
"""Aborted rounds that are told."""


@dataclass(slots=True)
class Job:
    """One job in one run.

    :param run: one life of the job, from its first model on.
    :param epoch: grows at each start of a coordinator.
    :param began: ns.
    :param number: of the last round that was called; ``version``: rounds committed.
    :param failures: rounds that came to nothing since the last one committed.
    :param best: of the metric watched; ``since``: rounds committed since then.
    :param bases: round → (digest of the model that it began with, its version), of the last rounds.
    :param made: number of the round that made the model; 0: none did.
    :param state: the strategy's, that goes with the model.
    :param largest: norm that a delta may have where the rules say nothing.
    """

    run: int
    epoch: int
    began: int
    model: Weights
    number: int = 0
    version: int = 0
    failures: int = 0
    best: float | None = None
    since: int = 0
    outcome: str = ""
    aborted: list[int] = field(default_factory=list)
    bases: dict[int, tuple[str, int]] = field(default_factory=dict)
    digest: str = ""
    data: bytes = b""
    made: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    shared: Weights = field(default_factory=dict)
    state: Any = None
    largest: float = 0.0

    def adopt(self, model: Weights, shared: Weights, data: bytes, name: str) -> None:
        """This is the model from now on."""
        self.model, self.shared, self.data, self.digest = model, shared, data, name
        self.largest = 100 * (1 + norm(model))

    def advance(self, merged: Merged, number: int, watched: float, rules: Rules) -> None:
        """A round was committed."""
        self.version += 1
        self.failures = 0
        self.made, self.metrics, self.state = number, merged.metrics, merged.state
        self.adopt(merged.weights, merged.shared, merged.data, merged.digest)
        if math.isfinite(watched) and (self.best is None or rules.better(watched, self.best) > 0):
            self.best, self.since = watched, 0
        else:
            self.since += 1

    def fail(self, number: int) -> None:
        """A round came to nothing."""
        self.failures += 1
        self.aborted = [*self.aborted, number][-KEEP:]

    def call(self, keep: int) -> int:
        """The number of a new round."""
        self.number += 1
        self.bases[self.number] = (self.digest, self.version)
        for old in [number for number in self.bases if number < self.number - keep]:
            del self.bases[old]
        return self.number

    def ended(self, rules: Rules, metrics: Mapping[str, float]) -> str:
        """Why the job is over after the round that ended now; empty: it is not."""
        if self.version >= rules.rounds:
            return "rounds"
        if rules.reached(metrics):
            return "target"
        if rules.stall is not None and self.since >= rules.stall:
            return "stall"
        return "aborted" if self.failures > rules.retries else ""

    # -- kept -------------------------------------------------------------------------------------------------------

    def kept(self) -> dict[str, Any]:
        """What changes with each round."""
        return {
            "run": self.run,
            "epoch": self.epoch,
            "began": self.began,
            "number": self.number,
            "version": self.version,
            "failures": self.failures,
            "best": self.best,
            "since": self.since,
            "aborted": self.aborted,
            "outcome": self.outcome,
            "bases": [[number, base, version] for number, (base, version) in self.bases.items()],
        }

    def kept_model(self) -> dict[str, Any]:
        """What changes with each round that is committed."""
        return {
            "round": self.made,
            "digest": self.digest,
            "data": self.data,
            "metrics": self.metrics,
            "strategy": self.state,
        }

    @classmethod
    def of(cls, kept: Mapping[str, Any], made: Mapping[str, Any], wanted: tuple[Shape, ...], now: int) -> Job:
        """From both, with an epoch of its own.

        :raises PayloadError: what is kept is no model.
        :raises UnfitError: what is kept is not of this model.
        """
        model, shared = wire.unpack_model(made["data"], wanted)
        fit(model, wanted)
        job = cls(kept["run"], max(kept["epoch"] + 1, now // 1_000_000), kept["began"], model)
        for name in ("number", "version", "failures", "best", "since", "outcome"):
            setattr(job, name, kept[name])
        job.aborted = list(kept["aborted"])
        job.bases = {number: (base, version) for number, base, version in kept["bases"]}
        job.made, job.metrics, job.state = made["round"], dict(made["metrics"]), made["strategy"]
        job.adopt(model, shared, made["data"], made["digest"])
        return job
