"""What the rounds of a job have cost in privacy, and whether the next one is still within the budget.

By ``dp-accounting`` (extra ``privacy``), for clients that are there or not (neighbours differ in all of one client's data): Rényi
differential privacy of the subsampled Gaussian mechanism (Mironov et al. 2019, https://arxiv.org/abs/1908.10530), or privacy loss
distributions (Koskela et al. 2020, https://arxiv.org/abs/1906.03049), which are tighter and take longer. Its import takes a
second and scipy, so only the coordinator of a private job pays for it.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from nodes.privacy.dp import Privacy
from schemas.errors import ConfigError, MissingError, RunError

Method: TypeAlias = Literal["rdp", "pld"]
HIGHEST = 1e6
"""Noise above which nothing is looked for."""


class BudgetError(RunError):
    """Another round would cost more than the budget has left. The model of the last round stands."""


class Accountant:
    """Counts rounds of a noise and a sampling rate. Lives at the coordinator; its :meth:`snapshot` is committed with the model.

    :param epsilon: the budget; None: only counts.
    :param delta: chance with which epsilon may not hold.
    :param local: each client adds its own noise. Then one client's data may be replaced by any others', which moves its update by
        2 · clip, not by clip; and nothing is gained by sampling, because an update is seen together with its sender.
    :raises MissingError: dp-accounting is not installed.
    """

    def __init__(
        self, delta: float, epsilon: float | None = None, *, local: bool = False, method: Method = "rdp"
    ) -> None:
        _library()
        self.delta = delta
        self.epsilon = epsilon
        self.local = local
        self.method: Method = method
        self.spent: dict[tuple[float, float], int] = {}

    def cost(self) -> float:
        """Epsilon of all rounds so far."""
        return self._cost(self.spent)

    def allows(self, noise: float, rate: float = 1.0) -> bool:
        """Whether one more round is within the budget."""
        return self.epsilon is None or self._cost(self._with(noise, rate, 1)) <= self.epsilon

    def spend(self, noise: float, rate: float = 1.0) -> float:
        """Count one more round; to be called, and its snapshot committed, before anything of the round's sum is published.

        :param noise: the round's, in parts of clip.
        :param rate: the chance of each client to be drawn into it (:func:`nodes.privacy.dp.drawn`); 1: all were asked.
        :return: epsilon of all rounds, this one included.
        :raises BudgetError: it would exceed the budget; it is not counted.
        """
        after = self._with(noise, rate, 1)
        cost = self._cost(after)
        if self.epsilon is not None and cost > self.epsilon:
            raise BudgetError(
                f"the privacy budget is spent: epsilon {self.cost():.3g} of {self.epsilon:g} after "
                f"{sum(self.spent.values())} rounds, another one would make it {cost:.3g}"
            )
        self.spent = after
        return cost

    def rounds_left(self, noise: float, rate: float = 1.0, most: int = 1_000_000) -> int:
        """How many more rounds like this the budget allows, at most ``most``."""
        if self.epsilon is None:
            return most
        few, many = 0, 1
        while many <= most and self._cost(self._with(noise, rate, many)) <= self.epsilon:
            few, many = many, 2 * many
        many = min(many, most + 1)
        while many - few > 1:
            middle = (few + many) // 2
            if self._cost(self._with(noise, rate, middle)) <= self.epsilon:
                few = middle
            else:
                many = middle
        return few

    def snapshot(self) -> list[list[float]]:
        """State as plain msgpack types: [noise, rate, rounds] of each kind of round."""
        return [[noise, rate, rounds] for (noise, rate), rounds in self.spent.items()]

    def restore(self, state: list[list[float]]) -> None:
        """Continue from a :meth:`snapshot`; what was spent under another noise, or another budget, stays spent."""
        self.spent = {(noise, rate): int(rounds) for noise, rate, rounds in state}

    def _with(self, noise: float, rate: float, rounds: int) -> dict[tuple[float, float], int]:
        return {**self.spent, (noise, rate): self.spent.get((noise, rate), 0) + rounds}

    def _cost(self, spent: dict[tuple[float, float], int]) -> float:
        rounds = tuple((*_effective(*kind, self.local), count) for kind, count in sorted(spent.items()))
        return epsilon_of(rounds, self.delta, self.method)


def _effective(noise: float, rate: float, local: bool) -> tuple[float, float]:
    return (noise / 2, 1.0) if local else (noise, rate)


@lru_cache(maxsize=256)
def epsilon_of(rounds: tuple[tuple[float, float, int], ...], delta: float, method: Method = "rdp") -> float:
    """Epsilon of rounds of the subsampled Gaussian mechanism.

    :param rounds: (noise in parts of the sensitivity, chance of each client to be drawn, how many) of each kind.
    :raises MissingError: dp-accounting is not installed.
    """
    library = _library()
    if method == "pld":
        from dp_accounting import pld  # type: ignore[import-untyped] # has no types

        accountant: Any = pld.PLDAccountant()
    else:
        from dp_accounting import rdp

        accountant = rdp.RdpAccountant()
    for noise, rate, count in rounds:
        event = library.GaussianDpEvent(noise)
        if rate < 1:
            event = library.PoissonSampledDpEvent(rate, event)
        if count:
            accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def noise_for(
    epsilon: float, delta: float, rounds: int, rate: float = 1.0, *, local: bool = False, method: Method = "rdp"
) -> float:
    """The least noise, to a thousandth, with which ``rounds`` rounds cost no more than ``epsilon``.

    :raises ConfigError: no noise does.
    :raises MissingError: dp-accounting is not installed.
    """

    def fits(noise: float) -> bool:
        return epsilon_of(((*_effective(noise, rate, local), rounds),), delta, method) <= epsilon

    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > HIGHEST:
            raise ConfigError(
                f"no noise makes {rounds} rounds cost an epsilon of {epsilon:g} with a delta of {delta:g}"
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def noise_of(privacy: Privacy, rounds: int, rate: float = 1.0) -> float:
    """The noise that a job is run with: what its ``privacy`` says, or what its epsilon needs over ``rounds`` rounds.

    :raises ConfigError: no noise does.
    :raises MissingError: dp-accounting is not installed.
    """
    if privacy.noise is not None:
        return privacy.noise
    return noise_for(privacy.epsilon or math.inf, privacy.delta, rounds, rate, local=privacy.where == "local")


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise MissingError("dp-accounting", extra="privacy") from None
    # it warns of each order that it leaves out, which costs tightness and never makes epsilon too small
    logging.getLogger("absl").setLevel(logging.ERROR)
    return dp_accounting
