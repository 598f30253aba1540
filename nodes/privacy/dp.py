"""Differential privacy of whole clients: no update can move the model by more than ``clip``, and noise hides which way one did.

Dwork et al. 2006; McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models",
https://arxiv.org/abs/1710.06963. *Central*: the coordinator (which sees the updates, or only their secure sum) adds noise to the
sum. *Local*: each client adds noise to its own before it leaves, and far more noise is in the model. What they guarantee
is counted by :mod:`nodes.privacy.accountant`.

Whoever is not noised is not private: under ``privacy`` a client's metrics and sample counts must not be told beside its update.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from nodes.federated.weights import Weights
from nodes.options import Options
from nodes.strategies._strategy import ClientUpdate
from schemas.messages import Array


class Privacy(Options):
    """What a job promises. ``noise`` alone: the epsilon is only told. ``epsilon`` alone: the noise is found for the job's rounds.
    Both: the job ends where the budget does."""

    where: Literal["central", "local"] = Field(
        default="central", description="who adds the noise: the coordinator to the sum, or each client to its update"
    )
    clip: float = Field(gt=0, description="largest Euclidean norm of an update; longer ones are shortened to it")
    clipping: Literal["update", "tensor"] = Field(
        default="update", description="what is shortened: the update as a whole, or each tensor to its part of clip"
    )
    noise: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="standard deviation of the noise on the sum (or one's own), in parts of clip",
    )
    epsilon: float | None = Field(
        default=None, gt=0, le=1000, description="the budget: what all rounds together may cost"
    )
    delta: float = Field(
        default=1e-5, gt=0, lt=1, description="chance with which epsilon may not hold; well below 1 / number of clients"
    )

    @model_validator(mode="after")
    def _bounded(self) -> Privacy:
        if self.noise is None and self.epsilon is None:
            raise ValueError("privacy needs noise, or an epsilon to find it by")
        return self


class Chance:
    """Where noise and cohorts come from: the operating system's entropy, or a seed for tests and simulations.

    Four independent draws are summed for one from the operating system: the bits of a floating point number are then of no
    use to tell what was added (Holohan and Braghin 2021, https://arxiv.org/abs/2107.10138).
    """

    def __init__(self, seed: int | None = None) -> None:
        self.generator = None if seed is None else np.random.default_rng(seed)

    def uniform(self, count: int) -> Array:
        """So many numbers in [0, 1), float64."""
        if self.generator is not None:
            return self.generator.random(count)
        return (np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)) * 2.0**-53

    def normal(self, count: int) -> Array:
        """So many numbers of mean 0 and standard deviation 1, float64."""
        if self.generator is not None:
            return self.generator.standard_normal(count)
        out = np.zeros(count)
        for _ in range(4):
            out += self._box_muller(count)
        return out / 2

    def _box_muller(self, count: int) -> Array:
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log1p(-self.uniform(half)))  # of 1 - u, which is never 0
        angle = 2 * math.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def clipped(delta: Mapping[str, Array], most: float, *, by_tensor: bool = False) -> Weights:
    """The delta shortened to the Euclidean norm ``most``, float64; as it is where it is not longer.

    :param delta: finite.
    :param by_tensor: each of k tensors to most / √k, so that a long one does not shorten the others.
    """
    wide = {name: np.asarray(array, np.float64) for name, array in delta.items()}
    lengths = {name: float(np.linalg.norm(array)) for name, array in wide.items()}
    if by_tensor:
        part = most / math.sqrt(max(len(wide), 1))
        return {name: array * _factor(lengths[name], part) for name, array in wide.items()}
    factor = _factor(math.hypot(*lengths.values()), most)
    return {name: array * factor for name, array in wide.items()}


def _factor(length: float, most: float) -> float:
    # a hair less, so that it is not longer after it was rounded to float32
    return 1.0 if length <= most else most / length * (1 - 1e-6)


def noised(total: Mapping[str, Array], deviation: float, chance: Chance) -> Weights:
    """Gaussian noise on every number, float64."""
    return {
        name: np.asarray(array, np.float64) + deviation * chance.normal(array.size).reshape(array.shape)
        for name, array in total.items()
    }


def central(
    updates: Sequence[ClientUpdate],
    *,
    clip: float,
    noise: float,
    expected: float,
    chance: Chance,
    by_tensor: bool = False,
) -> ClientUpdate:
    """(Σ clipped(deltaᵢ) + N(0, (noise · clip)²)) / expected, as one client's update, for a strategy that ``sums``.

    Every client counts the same. The divisor is how many were expected, not how many came: that is told by nobody's presence.

    :param updates: at least one. One of several clients, from a secure sum, is taken as it is: each has shortened its own.
    :param noise: of standard deviation in parts of clip.
    :param expected: clients · chance of each to be drawn.
    """
    total: Weights = {}
    for update in updates:
        many = update.clients > 1
        own = update.delta if many else clipped(update.delta, clip, by_tensor=by_tensor)
        for name, array in own.items():
            array = array * update.clients if many else array
            total[name] = total[name] + array if name in total else array
    mean = {name: array / expected for name, array in noised(total, noise * clip, chance).items()}
    return ClientUpdate("all", mean, max(round(expected), 1))


def local(delta: Mapping[str, Array], *, clip: float, noise: float, chance: Chance, by_tensor: bool = False) -> Weights:
    """What a client sends in the place of its delta, in that one's dtypes."""
    own = noised(clipped(delta, clip, by_tensor=by_tensor), noise * clip, chance)
    return {name: array.astype(delta[name].dtype) for name, array in own.items()}


def drawn(clients: Sequence[str], rate: float, chance: Chance) -> list[str]:
    """A cohort: each client with the chance ``rate``, whatever becomes of the others (the accountant reckons with just that).

    It may have nobody in it. Who is in a cohort is not to be told before the model is.
    """
    return [client for client, u in zip(clients, chance.uniform(len(clients)).tolist(), strict=True) if u < rate]
