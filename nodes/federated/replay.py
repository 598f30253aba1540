"""Replay against forgetting: some of what was learned before is learned again with what is new.

After Rolnick et al., "Experience Replay for Continual Learning", NeurIPS 2019. Which old examples are kept is the store's policy.
"""

from __future__ import annotations

import numpy as np

from nodes.trainers._trainer import Examples
from schemas.messages import Array


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
