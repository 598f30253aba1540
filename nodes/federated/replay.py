"""Replay against forgetting: some of what was learned before is learned again with what is new.

After Rolnick et al., "Experience Replay for Continual Learning", NeurIPS 2019. Which old examples are kept is the store's policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nodes.trainers._trainer import Examples
from schemas.messages import Array

if TYPE_CHECKING:
    from nodes.federated.examples import ExampleStore


class Stock:
    """What a node learns from: all that is kept, or what is new and a share of what is not.

    :param share: of what was learned before, in each training; None: each training has all.
    """

    def __init__(self, store: ExampleStore, share: float | None = None) -> None:
        self._store, self._share = store, share

    @property
    def marks(self) -> bool:
        """Whether it matters what was learned already."""
        return self._share is not None

    def learn(self, learned: int, seed: int) -> tuple[Examples, int]:
        """What the next training has, and the mark to be remembered if its outcome is used.

        :param learned: the mark of the training before; 0: there was none.
        :param seed: of the choice of what is replayed.
        """
        whole, numbers = self._store.numbered()
        newest = int(numbers.max(initial=0))
        if self._share is None:
            return whole, newest
        fresh = numbers > learned
        old = Examples(whole.x[~fresh], whole.y[~fresh])
        return replayed(Examples(whole.x[fresh], whole.y[fresh]), old, self._share, seed), newest

    def fresh(self, learned: int) -> int:
        """How many examples came after that mark."""
        return self._store.came_after(learned)

    def held_out(self) -> Examples:
        """What is set aside for evaluating."""
        return self._store.held_out()

    def __call__(self) -> Examples:
        """All."""
        return self._store.to_learn()

    def __len__(self) -> int:
        """How many may be learned from, cheaply."""
        return self._store.learnable


def replayed(fresh: Examples, stored: Examples, share: float, seed: int) -> Examples:
    """All fresh examples, and so many stored ones that they are ``share`` of the whole.

    Classes have equal parts of what is replayed, as far as there are examples of them; numbers (a regression) are drawn evenly.
    Fewer where the store has fewer; with nothing fresh, all that is stored.

    :param share: in [0, 1).
    :param seed: of the drawing; the same gives the same rows.
    :returns: new arrays, the fresh rows first.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a share of {share}; expected 0 or more, and less than 1")
    if not len(fresh):
        return stored
    count = min(round(share / (1 - share) * len(fresh)), len(stored))
    if not count:
        return fresh
    drawn = np.random.default_rng(seed).permutation(len(stored))
    rows = np.sort((_balanced(stored.y[drawn], drawn) if stored.y.dtype.kind in "iu" else drawn)[:count])
    return Examples(np.concatenate([fresh.x, stored.x[rows]]), np.concatenate([fresh.y, stored.y[rows]]))


def _balanced(labels: Array, rows: Array) -> Array:
    """``rows`` in an order in which the classes take turns."""
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        mine = labels == label
        turn[mine] = np.arange(np.count_nonzero(mine))
    return np.asarray(rows[np.argsort(turn, kind="stable")])
