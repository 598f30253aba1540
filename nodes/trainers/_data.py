"""What trainers share: is the plan one that can be done, do the examples fit the model, in which order are they seen."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from nodes.federated.weights import Shape, Weights, fit
from nodes.trainers._trainer import Examples, Fit
from schemas.errors import ConfigError
from schemas.messages import Array


def checked(plan: Fit, wanted: tuple[Shape, ...]) -> Weights:
    """Look at a plan that came from outside.

    :param wanted: the model's form.
    :returns: the correction, ``{}`` for none.
    :raises ConfigError: its numbers are no plan.
    :raises UnfitError: its correction is not of the model's form.
    """
    if plan.epochs < 0:
        raise ConfigError(f"fit.epochs is {plan.epochs}; expected 0 or more")
    if plan.batch < 1:
        raise ConfigError(f"fit.batch is {plan.batch}; expected 1 or more")
    if not (plan.rate > 0 and math.isfinite(plan.rate)):
        raise ConfigError(f"fit.rate is {plan.rate}; expected a number above 0")
    if not 0 <= plan.momentum < 1:
        raise ConfigError(f"fit.momentum is {plan.momentum}; expected 0 or more, and less than 1")
    if plan.seed < 0:
        raise ConfigError(f"fit.seed is {plan.seed}; expected 0 or more")
    if not (plan.proximal >= 0 and math.isfinite(plan.proximal)):
        raise ConfigError(f"fit.proximal is {plan.proximal}; expected 0 or more")
    if plan.correction:
        fit(plan.correction, wanted)
    return plan.correction


def unable(
    trainer: str, plan: Fit, *, momentum: bool = False, proximal: bool = False, correction: bool = False
) -> None:
    """Refuse what ``trainer`` cannot do; True: it can.

    :raises ConfigError: the plan wants such a thing.
    """
    for able, wanted, what in (
        (momentum, plan.momentum, f"momentum (fit.momentum: {plan.momentum:g})"),
        (proximal, plan.proximal, f"a proximal term (FedProx; fit.proximal: {plan.proximal:g})"),
        (correction, plan.correction, "a correction of its gradients (SCAFFOLD)"),
    ):
        if wanted and not able:
            raise ConfigError(f"the trainer {trainer} cannot do {what}")


def table(x: Array, width: int) -> Array:
    """The inputs as [n, width] float32, whatever shape one example has.

    :raises ConfigError: they have another number of values each.
    """
    found = math.prod(x.shape[1:])
    if x.ndim < 1 or found != width:
        raise ConfigError(f"examples of shape {list(x.shape[1:])} have {found} values each; the model takes {width}")
    return np.ascontiguousarray(x.reshape(len(x), width), np.float32)


def classes(y: Array, count: int) -> Array:
    """The labels, int64 [n].

    :raises ConfigError: they are no whole numbers in [0, count).
    """
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ConfigError(f"labels of {y.dtype.name}{list(y.shape[1:])}; a classifier learns from whole numbers")
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < count):
        raise ConfigError(f"labels from {int(y.min())} to {int(y.max())}; the model knows the classes 0 to {count - 1}")
    return y.astype(np.int64, copy=False)


def wanted(y: Array, count: int) -> Array:
    """What a classifier is to answer, float32 [n, count]: 1 for the class of a label, or the probabilities of soft labels.

    :raises ConfigError: they are neither.
    """
    if y.ndim == 2 and y.dtype.kind == "f":
        soft = numbers(y, count)
        if len(soft) and not (soft.min() >= 0 and abs(soft.sum(1) - 1).max() <= 1e-3):
            raise ConfigError(
                "labels that are no probabilities; a classifier learns from whole numbers, or probabilities"
            )
        return soft
    out = np.zeros((len(y), count), np.float32)
    out[np.arange(len(y)), classes(y, count)] = 1
    return out


def numbers(y: Array, width: int) -> Array:
    """The targets of a regression as [n, width] float32.

    :raises ConfigError: they are of another width.
    """
    if y.dtype.kind != "f" or math.prod(y.shape[1:]) != width:
        raise ConfigError(f"targets of {y.dtype.name}{list(y.shape[1:])}; the model gives {width} real numbers")
    return np.ascontiguousarray(y.reshape(len(y), width), np.float32)


def orders(plan: Fit, n: int) -> Iterator[Array]:
    """The order of the rows in each epoch, int64 [n]; the same for every trainer."""
    drawn = np.random.default_rng(plan.seed)
    for _ in range(plan.epochs if n else 0):
        yield drawn.permutation(n)


def alike(examples: Examples) -> None:
    """As many labels as inputs.

    :raises ConfigError: no.
    """
    if len(examples.x) != len(examples.y):
        raise ConfigError(f"{len(examples.x)} inputs and {len(examples.y)} labels")
