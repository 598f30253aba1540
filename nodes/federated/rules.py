"""What the user of ``federate`` decides, as the coordinator takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SECOND = 1_000_000_000
FOREVER = 10**9
"""More rounds than there will be."""


def ns(seconds: float) -> int:
    """A duration in ns. Times are never floats: those of today are 256 ns apart."""
    return int(seconds * SECOND)


LESS_IS_BETTER = ("loss", "error")
"""Metrics of these names, or ending so, are better when smaller."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an update may be at most; beyond it is refused and quarantined.

    :param norm: Euclidean norm of the delta; None: a hundred times that of the model and one more.
    :param samples: rows that a client may claim: the weight of its update.
    """

    norm: float | None = None
    samples: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Secure:
    """How the rounds' secure sums are made; see :class:`nodes.privacy.secure_sum.Terms`.

    :param clip: largest absolute value of one number of an update.
    :param equal: each client counts the same, whatever it was trained on.
    """

    clip: float = 8.0
    threshold: float = 2 / 3
    least: int = 3
    degree: int = 0
    agreed: bool = False
    equal: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """One job. All durations are in seconds.

    :param rounds: to commit; then the job is over.
    :param least: clients that must be here before the first round; later ones go on with ``quorum`` of them after ``grace``.
    :param share: of the clients here that are asked, in (0, 1]; never fewer than ``quorum``.
    :param most: clients asked in one round; None: no limit.
    :param quorum: updates that a round needs; a strategy may need more.
    :param deadline: for one round; at it the round is closed with what is there, or aborted below quorum.
    :param grace: what is waited for the rest once there is a quorum.
    :param gather: what is waited for more clients when ``least`` are here, before the first round.
    :param wait: for clients while no round can begin; then the job ends.
    :param retries: aborted rounds in a row after which the job ends.
    :param fit: fields of :class:`nodes.trainers._trainer.Fit` but ``seed``, ``correction``.
    :param seed: of the choice of clients and of their trainings.
    :param compress: for the clients' compressor; None: none.
    :param evaluate: clients report metrics of the model that they received, on their own data.
    :param buffer: asynchronous (FedBuff, Nguyen et al. 2022): the model moves on each time that so many updates are there;
        None: synchronous rounds.
    :param stale: rounds that an update may be behind, asynchronously.
    :param target: (metric, value): ends the job when the coordinator's metric, or else the clients', reaches it.
    :param stall: committed rounds without a better ``watch`` after which the job ends.
    :param watch: the metric that ``stall`` and ``tolerance`` look at.
    :param tolerance: a new model is thrown away if ``watch`` is worse than the best by more than this; None: never.
    :param time: for the whole job.
    :param keep: older models that are kept to go back to.
    :param every: rounds begin at multiples of it since the epoch, one after an aborted one at once; 0: as soon as they can.
    :param repeat: the call is said again at least so often while somebody has not answered.
    :param secure: only sums of updates are seen; None: each update is.
    """

    job: str
    rounds: int = 10
    least: int = 1
    share: float = 1.0
    most: int | None = None
    quorum: int = 1
    deadline: float = 60.0
    grace: float = 2.0
    gather: float = 0.0
    wait: float = 600.0
    retries: int = 5
    fit: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    compress: Any = None
    evaluate: bool = False
    buffer: int | None = None
    stale: int = 20
    target: tuple[str, float] | None = None
    stall: int | None = None
    watch: str = "accuracy"
    tolerance: float | None = None
    time: float | None = None
    repeat: float = 15.0
    every: float = 0.0
    keep: int = 3
    limits: Limits = Limits()
    secure: Secure | None = None

    def asks(self, here: int, quorum: int) -> int:
        """How many of so many clients are asked."""
        wanted = max(quorum, math.ceil(self.share * here - 1e-9))
        return min(here, wanted if self.most is None else min(wanted, max(self.most, quorum)))

    def pause(self, here: int, quorum: int, *, first: bool) -> float | None:
        """Seconds until a round may begin with so many clients; None: not with them."""
        if here >= max(self.least, quorum):
            return self.gather if first else 0.0
        return self.grace if here >= quorum and not first else None

    def again(self) -> float:
        """Seconds after which a call is said again."""
        return max(0.5, min(self.repeat, self.deadline / 4))

    def better(self, one: float, other: float) -> float:
        """By how much ``one`` is better than ``other`` as the metric watched."""
        return other - one if self.watch.endswith(LESS_IS_BETTER) else one - other

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether the target is reached."""
        if self.target is None:
            return False
        name, value = self.target
        if (seen := metrics.get(name, metrics.get(f"local_{name}", math.nan))) != seen:
            return False
        return seen <= value if name.endswith(LESS_IS_BETTER) else seen >= value
