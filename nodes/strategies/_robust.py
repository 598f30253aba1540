"""What the strategies share that outvote clients who send nonsense: all updates side by side, and how far each is from each.

They count every client the same: how many rows it was trained on is a client's own word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nodes.federated.weights import Weights
from nodes.strategies._strategy import ClientUpdate, TooFewError
from schemas.messages import Array

WIDE = 1 << 14
"""Numbers of a tensor looked at in one go: a stack of 100 clients' is 13 MB, and of 10 clients' stays in the cache."""


def across(updates: Sequence[ClientUpdate], combine: Callable[[Array], Array]) -> Weights:
    """One number of the clients' numbers, everywhere.

    :param combine: [k, clients] float64, its own to change → [k].
    """
    out: Weights = {}
    for name, first in updates[0].delta.items():
        rows = [update.delta[name].reshape(-1) for update in updates]
        made = np.empty(first.size)
        for at in range(0, first.size, WIDE):
            stack = np.empty((min(WIDE, first.size - at), len(rows)))
            for i, row in enumerate(rows):
                stack[:, i] = row[at : at + WIDE]
            made[at : at + WIDE] = combine(stack)
        out[name] = made.reshape(first.shape)
    return out


def products(updates: Sequence[ClientUpdate]) -> Array:
    """[clients, clients] inner products of the deltas, float64."""
    out = np.zeros((len(updates), len(updates)))
    for name, first in updates[0].delta.items():
        rows = [update.delta[name].reshape(-1) for update in updates]
        for at in range(0, first.size, WIDE):
            stack = np.stack([row[at : at + WIDE] for row in rows]).astype(np.float64)
            out += stack @ stack.T
    return out


def distances(updates: Sequence[ClientUpdate]) -> Array:
    """[clients, clients] squares of the distances between the deltas, float64."""
    inner = products(updates)
    squares = np.diag(inner)
    out: Array = np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0)
    return out


def ranked(squares: Array, faulty: int) -> list[int]:
    """The clients, best first, by Krum's score: the sum over the nearest n - faulty - 2 (one at least) others.

    Of two that are each other's only neighbour, which score the same, the one nearer to all others comes first.

    :param squares: :func:`distances`.
    """
    others = squares.copy()
    np.fill_diagonal(others, np.inf)
    others.sort(axis=1)
    near = others[:, : max(len(others) - faulty - 2, 1)].sum(axis=1)
    order: list[int] = np.lexsort((others[:, :-1].sum(axis=1), near)).tolist()
    return order


def enough(updates: Sequence[ClientUpdate], least: int) -> None:
    """Look whether there are enough.

    :raises TooFewError: there are not.
    """
    if len(updates) < least:
        raise TooFewError(f"{len(updates)} updates, this strategy needs {least}")


def equally(updates: Sequence[ClientUpdate]) -> Weights:
    """The plain mean in float64, in the order given."""
    return across(updates, lambda stack: stack.mean(axis=1))
