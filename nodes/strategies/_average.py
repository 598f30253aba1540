"""What the strategies share that average: how much each update counts, and the keeping of moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from nodes.federated.weights import UnfitError, Weights
from nodes.options import Options
from nodes.strategies._strategy import ClientUpdate, mean
from schemas.codec import from_tensor, to_tensor
from schemas.errors import PayloadError
from schemas.messages import Array
from schemas.wire import Tensor


class Averaging(Options):
    """Options of every strategy that averages."""

    weigh: Literal["samples", "clients"] = Field(
        default="samples", description="what an update counts by: the rows it was trained on, or each client the same"
    )
    stale: float = Field(
        default=0.5,
        ge=0,
        le=10,
        description="how fast a late update fades: one trained from a model s rounds old counts (1 + s)^-stale",
    )


def average(updates: Sequence[ClientUpdate], config: Averaging) -> Weights:
    """The mean of the deltas in float64, in the order given.

    A stale update counts less and makes the step smaller, as in FedBuff (Nguyen et al. 2022, https://arxiv.org/abs/2106.06639):
    the weights are not made to add up to 1 again. Without staleness it is the plain weighted mean.
    """
    weights = [float(update.samples) if config.weigh == "samples" else 1.0 for update in updates]
    if not any(update.staleness for update in updates):
        return mean(updates, weights)
    faded = [w * (1.0 + u.staleness) ** -config.stale for w, u in zip(weights, updates, strict=True)]
    share = sum(faded) / sum(weights)
    return {name: array * share for name, array in mean(updates, faded).items()}


def keep(arrays: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Arrays as plain msgpack types, in the wire's form of a tensor; bytes, so that they are the writer's own."""
    out = {}
    for name, array in arrays.items():
        tensor = to_tensor(array)
        out[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data": bytes(tensor.data)}
    return out


def kept(state: Mapping[str, Mapping[str, Any]]) -> Weights:
    """What :func:`keep` was given; writable.

    :raises UnfitError: it is not of that form.
    """
    try:
        return {
            name: from_tensor(Tensor(of["dtype"], list(of["shape"]), memoryview(of["data"]))).copy()
            for name, of in state.items()
        }
    except (AttributeError, KeyError, TypeError, PayloadError) as error:
        raise UnfitError("packed", f"the state of a strategy cannot be read: {error}") from None


def like(state: Weights, model: Mapping[str, Array], value: float = 0.0) -> Weights:
    """The arrays of ``state``, float64, or as many of ``value`` where there are none yet.

    :raises UnfitError: they are of another model.
    """
    if not state:
        return {name: np.full(array.shape, value, np.float64) for name, array in model.items()}
    if [(n, a.shape) for n, a in state.items()] != [(n, a.shape) for n, a in model.items()]:
        raise UnfitError("shape", "the strategy's state is of another model; begin anew, or give the job another name")
    return state
