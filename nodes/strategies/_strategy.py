"""What a strategy of ``federate`` is. A strategy is one file beside this one; its name is the kind's name.

Such a module has, beside the docstring (with its source: the paper), ``Config(Options)`` and
``def build(config: Config) -> Strategy``. Strategies do no I/O and know no bus; all sums are in float64 and in the order of
the clients' names, so that the same updates give the same bytes on any machine, whenever they arrived.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nodes.federated.weights import Shape, Weights
from schemas.errors import PenstockError


class TooFewError(PenstockError):
    """Fewer updates than :meth:`Strategy.least`. The coordinator sees to it that this does not happen."""


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """One client's answer to one round, decoded and validated.

    :param delta: what the client's training added to the model it began with; that model's form.
    :param samples: rows trained on, ≥ 1.
    :param extra: further arrays that the strategy's clients send (SCAFFOLD: the change of the control variate), float32.
    :param staleness: rounds committed between the model it began with and the one it is applied to (0: none).
    :param clients: above 1: this is the mean of so many updates, weighted by samples, from a secure sum; ``samples`` are theirs.
    """

    client: str
    delta: Weights
    samples: int
    extra: Weights = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    staleness: int = 0
    clients: int = 1


class Strategy(ABC):
    """The coordinator's side of an algorithm. Used by one thread at a time."""

    sums: ClassVar[bool] = False
    """True: it needs no more of the updates than their sum weighted by samples (and the samples' sum), so it may run under
    secure aggregation, and in levels (gateway, site, cloud). False (median, Krum): it looks at each."""

    places: int = 0
    """How many clients were asked; set before each :meth:`aggregate`."""

    @abstractmethod
    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        """The next model.

        :param model: the one that the round began with; not changed.
        :param updates: :meth:`least` or more, sorted by client.
        :raises TooFewError: there are fewer.
        """

    def least(self) -> int:
        """The fewest updates of which it can make a model; a round with fewer is below its quorum, whatever the quorum is."""
        return 1

    def task(self) -> dict[str, Any]:
        """What the clients must know beside the model, as plain msgpack types: ``{"proximal": 0.01}``. Sent with every round;
        handed to :meth:`nodes.trainers._trainer.Trainer.fit` as fields of its plan; but ``control`` is the name of what the
        client itself does beside training (``scaffold``: :mod:`nodes.strategies.scaffold`)."""
        return {}

    def extras(self, model: tuple[Shape, ...]) -> tuple[Shape, ...]:
        """The form of :attr:`ClientUpdate.extra`, which the coordinator holds every update to; empty: none."""
        return ()

    def shared(self) -> Weights:
        """Arrays that go to the clients beside the model (SCAFFOLD: the control variate ``c``). Empty
        before the first round: the client takes zeros."""
        return {}

    def asked(self) -> dict[str, Any]:
        """What clients are to do to their updates for the sake of privacy (:class:`nodes.privacy.private.Private`)."""
        return {}

    def over(self) -> str:
        """Why no further round may be made, a short stable word (``budget``); empty: one may."""
        return ""

    def fault(self, delta: Weights) -> str:
        """Why this delta, finite and of the model's form, is none of ours, so that it is refused; empty: it may be one."""
        return ""

    def answers(self) -> dict[str, list[float]]:
        """What the last :meth:`aggregate` found out beside the model; it goes into the round's row and nowhere else."""
        return {}

    def told(self) -> dict[str, float]:
        """What it adds to a round's metrics (``epsilon``)."""
        return {}

    def snapshot(self) -> Any:
        """State (moments, control variates) as plain msgpack types, arrays as ``{"dtype", "shape", "data"}`` maps
        (:func:`nodes.federated.weights` has no opinion; see :mod:`schemas.codec`), or None. Committed with the model."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from a :meth:`snapshot`."""

    def revert(self, state: Any) -> None:
        """The model is an older one again, that had this :meth:`snapshot`. What was spent since stays spent."""
        self.restore(state)


def mean(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Weights:
    """The weighted mean of the deltas in float64, added up in the order given."""
    total = sum(weights)
    out: Weights = {name: array.astype("<f8") * (weights[0] / total) for name, array in updates[0].delta.items()}
    for update, weight in zip(updates[1:], weights[1:], strict=True):
        for name, array in update.delta.items():
            out[name] += array.astype("<f8") * (weight / total)
    return out
