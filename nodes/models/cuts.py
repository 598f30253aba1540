"""Where a model can be cut in two so that one tensor travels: the places, and the choice among them by name or number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schemas.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Cut:
    """One place.

    :param number: from 1, in the model's order.
    :param tensor: name of what travels.
    :param shape: of one item, without the batch; -1: known only when it runs.
    :param type: numpy's name of its numbers.
    :param head: operators before it; ``tail``: behind it.
    """

    number: int
    tensor: str
    shape: tuple[int, ...]
    type: str
    head: int
    tail: int

    @property
    def bytes(self) -> int | None:
        """Of one item; None: not known."""
        return None if -1 in self.shape else math.prod(self.shape) * np.dtype(self.type).itemsize


def crossing(
    inputs: Sequence[Sequence[int | str]], outputs: Sequence[Sequence[int | str]], ends: Sequence[int | str]
) -> list[tuple[int, int | str]]:
    """The places between operators where a single tensor crosses, as (operators before it, tensor).

    :param inputs: of each operator in its order: the tensors that are computed or come from outside, no constants.
    :param outputs: of each operator.
    :param ends: the model's outputs.
    """
    last: dict[int | str, int] = {}
    for at, names in enumerate(inputs):
        for name in names:
            last[name] = at
    for name in ends:
        last[name] = len(inputs)
    places = []
    live: set[int | str] = set()
    begun = {name for names in inputs for name in names} - {name for names in outputs for name in names}
    live |= begun  # the model's own inputs
    for at, names in enumerate(outputs[:-1]):
        live |= {name for name in names if last.get(name, -1) > at}
        live = {name for name in live if last[name] > at}
        if len(live) == 1 and (crossed := next(iter(live))) not in begun and crossed not in ends:
            places.append((at + 1, crossed))
    # one tensor may cross at several places, with operators between that lead nowhere: the first of them counts
    return [place for i, place in enumerate(places) if place[1] not in {tensor for _, tensor in places[:i]}]


def chosen(cuts: Sequence[Cut], at: str, model: Path) -> Cut:
    """The cut of that number or tensor.

    :raises ConfigError: there is none.
    """
    if not cuts:
        raise ConfigError(f"{model.name} cannot be cut: nowhere does a single tensor go from one part to the other")
    if at.isdecimal() and 1 <= int(at) <= len(cuts):
        return cuts[int(at) - 1]
    for cut in cuts:
        if cut.tensor == at:
            return cut
    if at.isdecimal():
        raise ConfigError(f"there is no cut {at} of {model.name}: there are 1 to {len(cuts)}")
    raise ConfigError(f"{model.name} cannot be cut at {at!r}{did_you_mean(at, [cut.tensor for cut in cuts])}")
