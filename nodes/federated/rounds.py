"""One round as the coordinator keeps it, when it ends, and how its updates become a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nodes.federated.intake import Form, Recall, Taken, client_updates
from nodes.federated.rules import SECOND, Rules, ns
from nodes.federated.weights import Shape, Weights, digest, fit
from nodes.federated.wire import pack_model
from nodes.strategies._strategy import ClientUpdate, Strategy

COLLECTING, AGGREGATING = "collecting", "aggregating"
"""Phases of a round; one with a secure sum has those of :mod:`nodes.federated.secure_round` too."""

Evaluate = Callable[[Weights], Mapping[str, float]]
"""Metrics of a model on held-out examples."""


@dataclass(slots=True)
class Round:
    """A round that is under way.

    :param number: never used again, whatever becomes of it.
    :param base: digest of the model that it begins with.
    :param size: places: clients that it would like to have.
    :param asked: clients that it asked, those that took another's place at the end; empty when asynchronous.
    :param waiting: those of them that may still answer.
    :param refused: client → reason.
    :param stale: updates that came too late, while it was open.
    :param counted: (client, round) of the updates that are being added up.
    :param enough: when there was a quorum, ns; None: not yet.
    :param secure: the terms of its secure sum, as they are in the call; empty: it has none.
    :param token: stands for these terms.
    :param boxed: whose masked numbers may come.
    """

    number: int
    base: str
    began: int
    deadline: int
    size: int
    asked: list[str]
    phase: str = COLLECTING
    waiting: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    stale: int = 0
    counted: list[tuple[str, int]] = field(default_factory=list)
    enough: int | None = None
    secure: dict[str, Any] = field(default_factory=dict)
    token: str = ""
    boxed: list[str] = field(default_factory=list)

    def may_send(self, client: str) -> bool:
        """Whether an update of that client's is wanted."""
        return client in (self.boxed if self.secure else self.asked)

    def seen(self, client: str, *, able: bool, taken: Container[tuple[str, int]]) -> None:
        """A client said how it is: wait for it, or not."""
        if not able:
            self.waiting.discard(client)
        elif client in self.asked and (client, self.number) not in taken and client not in self.refused:
            self.waiting.add(client)

    def kept(self) -> dict[str, Any]:
        """What of it is committed."""
        secure = {"secure": self.secure, "token": self.token, "boxed": self.boxed} if self.secure else {}
        return {
            "number": self.number,
            "base": self.base,
            "began": self.began,
            "deadline": self.deadline,
            "size": self.size,
            "asked": self.asked,
            "phase": self.phase,
            "counted": [list(pair) for pair in self.counted],
            **secure,
        }

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Round:
        """From :meth:`kept`."""
        counted = [(client, number) for client, number in kept["counted"]]
        rest = {name: value for name, value in kept.items() if name not in {"counted", "asked"}}
        return cls(**rest, asked=list(kept["asked"]), counted=counted)

    def verdict(self, taken: int, quorum: int, rules: Rules, here: int, now: int) -> str:
        """``wait``, ``close`` or ``abort``.

        :param taken: updates that there are.
        :param quorum: that of the rules, or what the strategy needs.
        :param here: clients that may be asked (asynchronous: more updates than that will not come).
        """
        late = now >= self.deadline
        if rules.buffer is not None:
            enough = max(min(rules.buffer, here), quorum)
            if taken >= enough or (late and taken >= quorum):
                return "close"
            return "abort" if late else "wait"
        if taken < quorum:
            return "abort" if late else "wait"
        if self.enough is None:
            self.enough = now
        done = late or not self.waiting or now >= self.enough + ns(rules.grace)
        return "close" if done else "wait"


@dataclass(frozen=True, slots=True)
class Merged:
    """What aggregating gave.

    :param data: the bytes of the model and what is shared with it.
    :param state: the strategy's snapshot; ``task`` is what it asks of the clients from now on.
    :param over: why the strategy makes no further round; empty: it does.
    :param answers: what it found out beside the model, for the round's row.
    :param samples: of all updates together, where they do not say it themselves.
    """

    weights: Weights
    shared: Weights
    digest: str
    data: bytes
    state: Any
    task: dict[str, Any]
    metrics: dict[str, float]
    over: str = ""
    answers: dict[str, list[float]] = field(default_factory=dict)
    samples: int | None = None


def merge(
    strategy: Strategy,
    model: Weights,
    taken: Sequence[tuple[Taken, int]],
    form: Form,
    recall: Recall,
    evaluate: Evaluate | None,
    places: int = 0,
) -> Merged:
    """The next model; the same bytes from the same updates.

    :param taken: the updates with their staleness, at least one, in client order.
    :param places: how many clients were asked.
    :raises UnfitError: what came out is no model.
    """
    updates = client_updates(taken, form, recall, one_by_one=strategy.sums)
    return made(strategy, model, updates, form.wanted, evaluate, places)


def made(
    strategy: Strategy,
    model: Weights,
    updates: Sequence[ClientUpdate],
    wanted: tuple[Shape, ...],
    evaluate: Evaluate | None,
    places: int,
) -> Merged:
    """What the strategy makes of the updates, evaluated; parameters and errors as of :func:`merge`."""
    strategy.places = places
    new = strategy.aggregate(model, updates)
    fit(new, wanted)
    shared = strategy.shared()
    metrics = {} if evaluate is None else {name: float(value) for name, value in evaluate(new).items()}
    metrics |= strategy.told()
    state, task = strategy.snapshot(), strategy.task()
    data, over = pack_model(new, shared), strategy.over()
    return Merged(new, shared, digest(new), data, state, task, metrics, over, strategy.answers())


def means(taken: Sequence[Taken]) -> dict[str, float]:
    """The clients' metrics, weighted by samples: ``local_`` before those of the model that they received, on their own data."""
    out: dict[str, float] = {}
    for name in ("accuracy", "loss", "train_loss", "steps"):  # others would make columns of whatever somebody sends
        if not (having := [update for update in taken if name in update.metrics]):
            continue
        total = math.fsum(update.samples * update.metrics[name] for update in having)
        out[name if name in {"train_loss", "steps"} else f"local_{name}"] = total / sum(
            update.samples for update in having
        )
    return out


METRICS = ("accuracy", "loss", "local_accuracy", "local_loss", "train_loss", "epsilon")
"""Columns that every row has, NaN where a round has none."""


def row(
    held: Round,
    status: str,
    why: str,
    version: int,
    metrics: Mapping[str, float],
    used: Sequence[Taken],
    here: int,
    now: int,
) -> dict[str, Any]:
    """What a round was, for people and curves.

    :param status: ``committed``, ``aborted`` or ``rejected``.
    :param used: the updates in it.
    :param here: clients that are asked when all are.
    """
    return {
        "round": held.number,
        "status": status,
        "why": why,
        "version": version,
        **dict.fromkeys(METRICS, math.nan),
        **metrics,
        "clients": len(used),
        "asked": len(held.asked) or here,
        "samples": sum(update.samples for update in used),
        "refused": len(held.refused),
        "stale": held.stale,
        "seconds": (now - held.began) / SECOND,
    }
