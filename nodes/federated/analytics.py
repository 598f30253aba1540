"""Federated analytics: counts, histograms and quantiles over all clients' rows, from sums alone.

A question (:class:`Question`) goes to the clients; each answers with a vector of counts (:func:`answer`), and only the sum of the
vectors is looked at (:func:`total`, or a secure sum of them). With noise on the sum nobody's rows can be told from it; that costs
as much privacy as a round of the same noise (:class:`nodes.privacy.accountant.Accountant`). Pure functions; who carries the
vectors sends them as an update's arrays: ``{"counts": vector}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import msgspec
import numpy as np

from nodes.privacy.dp import Chance, clipped, noised
from schemas.messages import Array, Column

MOST = 65_536
"""Longest vector that is asked for."""


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is counted: either texts (or whole numbers) by ``categories``, or numbers by ``edges``. Plain msgpack on the wire.

    :param field: a column of the clients' rows; rows where it is missing are not counted.
    :param categories: the values that are counted, each; all others together are the last count.
    :param edges: of bins, increasing: bin i has edges[i] ≤ x < edges[i + 1]; what is below the first and what is at or above the
        last are the first and the last count.
    :param weigh: ``rows``: each row counts 1. ``clients``: each client's counts are divided by their sum, so all clients count
        the same and no vector is longer than 1, which makes 1 the clip that distorts nothing.
    :raises ValueError: it asks nothing, or both, or too much.
    """

    field: str
    categories: tuple[str | int, ...] = ()
    edges: tuple[float, ...] = ()
    weigh: Literal["rows", "clients"] = "rows"

    def __post_init__(self) -> None:
        if bool(self.categories) == bool(self.edges):
            raise ValueError("a question has either categories or edges")
        if max(len(self.categories), len(self.edges)) >= MOST:
            raise ValueError(f"a question has fewer than {MOST} categories or edges")
        if len(set(self.categories)) != len(self.categories):
            raise ValueError("a category is there twice")
        if self.edges and not all(map(math.isfinite, self.edges)):
            raise ValueError("edges are finite")
        if any(a >= b for a, b in pairwise(self.edges)):
            raise ValueError("edges increase")

    @property
    def size(self) -> int:
        """Numbers of an answer."""
        return len(self.edges or self.categories) + 1


def places(question: Question, column: Column) -> Array:
    """Which count each row is part of, int32, [rows]; -1: none, its value is missing.

    :param column: its values: an array, or a list of texts; None and NaN are missing.
    :raises ValueError: there are texts where numbers are counted.
    """
    found = _by_edges(question, column) if question.edges else _by_categories(question, column)
    return found.astype(np.int32)


def gathered(question: Question, found: Array) -> Array:
    """A client's counts, float64, [question.size], of what :func:`places` gave."""
    counts = np.bincount(found[found >= 0], minlength=question.size).astype(np.float64)
    rows = counts.sum()
    return counts / rows if question.weigh == "clients" and rows else counts


def answer(question: Question, column: Column) -> Array:
    """A client's counts, float64, [question.size], of a column as :func:`places` takes it."""
    return gathered(question, places(question, column))


def total(
    answers: Sequence[Array],
    question: Question,
    *,
    clip: float = math.inf,
    noise: float = 0.0,
    chance: Chance | None = None,
) -> Array:
    """The sum of the answers, each clipped to the Euclidean norm ``clip``, plus noise of standard deviation noise · clip.

    :param answers: in the order of the clients' names; those of a wrong length, or with numbers that no counts are, are left out.
    :param noise: in parts of clip, which must then be finite; ``chance`` draws it.
    """
    whole = np.zeros(question.size)
    for vector in answers:
        if (
            vector.shape == whole.shape
            and vector.dtype.kind == "f"
            and np.isfinite(vector).all()
            and (vector >= 0).all()
        ):
            whole += vector if clip == math.inf else clipped({"": vector}, clip)[""]
    if noise:
        whole = noised({"": whole}, noise * clip, chance or Chance())[""]
    return whole


def counted(question: Question, summed: Array) -> list[tuple[str, float]]:
    """The counts with what they are of, in order; noise may have made some negative."""
    if question.categories:
        labels = [*map(str, question.categories), "other"]
    else:
        edges = [f"{edge:g}" for edge in question.edges]
        between = [f"{a} to {b}" for a, b in pairwise(edges)]
        labels = [f"below {edges[0]}", *between, f"{edges[-1]} and above"]
    return list(zip(labels, summed.tolist(), strict=True))


def quantile(question: Question, summed: Array, share: float) -> float:
    """The number below which ``share`` of all rows lie, to within its bin: straight between the bin's edges.

    Counts that noise made negative are taken for 0. Beyond the edges it is the first or the last one; NaN where nothing was
    counted.

    :param share: 0 to 1; 0.5 is the median.
    :raises ValueError: the question has no edges.
    """
    if not question.edges:
        raise ValueError("quantiles are of numbers: the question has categories")
    up_to = np.cumsum(np.maximum(summed, 0))[:-1]  # rows below each edge
    rows = up_to[-1] + max(float(summed[-1]), 0.0)
    if not rows > 0:
        return math.nan
    wanted = min(max(share, 0.0), 1.0) * rows
    at = int(np.searchsorted(up_to, wanted))
    if at == 0:
        return question.edges[0]
    if at == len(up_to):
        return question.edges[-1]
    inside = (wanted - up_to[at - 1]) / (up_to[at] - up_to[at - 1])
    return float(question.edges[at - 1] + inside * (question.edges[at] - question.edges[at - 1]))


def _by_edges(question: Question, column: Column) -> Array:
    values = np.array(
        [math.nan if v is None else v for v in column] if isinstance(column, list) else column, np.float64
    )
    return np.where(np.isnan(values), -1, np.searchsorted(question.edges, values, side="right"))


def _by_categories(question: Question, column: Column) -> Array:
    place = {category: i for i, category in enumerate(question.categories)}
    other = len(place)
    if isinstance(column, list):
        return np.array([-1 if value is None else place.get(value, other) for value in column], np.int64)
    values, inverse = np.unique(column, return_inverse=True)  # many rows, few values
    known = [-1 if value != value else place.get(value, other) for value in values.tolist()]
    return np.array(known, np.int64)[inverse.reshape(-1)] if known else np.zeros(0, np.int64)
