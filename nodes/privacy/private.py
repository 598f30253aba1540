"""A strategy under differential privacy: it sees one noised sum instead of updates, and stops where the budget does.

Central privacy clips the updates that came, adds them up with noise, and gives the strategy the mean as if it were one
client's. Local privacy comes with the noise in it; here it is only counted. What was spent is the strategy's state, so it is
committed with the model that it paid for, before that one is published.

Every round counts as if all clients had been asked: no part of the budget is saved by asking only some, because who was
asked is said aloud.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nodes.federated.weights import Shape, Weights
from nodes.privacy.accountant import Accountant, noise_of
from nodes.privacy.dp import Chance, Privacy, central
from nodes.strategies._strategy import ClientUpdate, Strategy


class Private(Strategy):
    """``inner`` with the noise that ``privacy`` asks for.

    :param rounds: of the job, over which an epsilon without a noise is spread.
    :param chance: where the noise comes from; seeded in tests only.
    :raises ConfigError: no noise is enough for that epsilon, or ``inner`` has to see each update.
    :raises MissingError: dp-accounting is not installed.
    """

    sums = True

    def __init__(self, inner: Strategy, privacy: Privacy, rounds: int, chance: Chance | None = None) -> None:
        self.inner, self.privacy = inner, privacy
        self.noise = noise_of(privacy, rounds)
        self._chance = chance or Chance()
        self._accountant = Accountant(privacy.delta, privacy.epsilon, local=privacy.where == "local")

    @property
    def epsilon(self) -> float:
        """Of all rounds so far."""
        return self._accountant.cost()

    def aggregate(self, model: Weights, updates: Sequence[ClientUpdate]) -> Weights:
        """The next model.

        :raises BudgetError: the budget does not allow another round; nothing was spent.
        """
        self._accountant.spend(self.noise)
        if self.privacy.where == "central":
            by_tensor = self.privacy.clipping == "tensor"
            mean = central(
                updates,
                clip=self.privacy.clip,
                noise=self.noise,
                expected=max(self.places, sum(update.clients for update in updates)),
                chance=self._chance,
                by_tensor=by_tensor,
            )
            updates = [mean]
        return self.inner.aggregate(model, updates)

    def asked(self) -> dict[str, Any]:
        """What each client is to do to its update before it leaves: nothing that is not in it tells more than the update."""
        said = {"where": self.privacy.where, "clip": self.privacy.clip, "by_tensor": self.privacy.clipping == "tensor"}
        return said if self.privacy.where == "central" else {**said, "noise": self.noise}

    def over(self) -> str:
        return "" if self._accountant.allows(self.noise) else "budget"

    def told(self) -> dict[str, float]:
        return {"epsilon": self.epsilon}

    def fault(self, delta: Weights) -> str:
        return self.inner.fault(delta) if self.privacy.where == "central" else ""  # local noise makes anything of it

    def answers(self) -> dict[str, list[float]]:
        return self.inner.answers()

    def extras(self, wanted: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return self.inner.extras(wanted)

    def least(self) -> int:
        return self.inner.least()

    def task(self) -> dict[str, Any]:
        return self.inner.task()

    def shared(self) -> Weights:
        return self.inner.shared()

    def snapshot(self) -> Any:
        return {"inner": self.inner.snapshot(), "spent": self._accountant.snapshot()}

    def restore(self, state: Any) -> None:
        if state["inner"] is not None:
            self.inner.restore(state["inner"])
        self._accountant.restore(state["spent"])

    def revert(self, state: Any) -> None:
        if state["inner"] is not None:
            self.inner.revert(state["inner"])
