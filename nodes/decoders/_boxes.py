"""Boxes: overlap and non-maximum suppression, on arrays."""

from __future__ import annotations

import numpy as np

from schemas.messages import Array


def overlap(box: Array, boxes: Array) -> Array:
    """Intersection over union of ``box`` [4] with each of ``boxes`` [n, 4], xyxy; 0 where both are empty."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    area = np.clip(box[2:] - box[:2], 0, None).prod()
    areas = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    union = area + areas - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)  # type: ignore[no-any-return]


def suppress(boxes: Array, scores: Array, classes: Array | None, limit: float, most: int) -> Array:
    """Greedy non-maximum suppression: indices of the boxes that stay, best first; of equal ones the earlier.

    A box goes when it overlaps a better one that stays by more than ``limit``. With ``classes`` only boxes of the same
    class suppress each other. At most ``most`` stay. Each pass looks at all that are left, so the cost is passes × boxes.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order) and len(kept) < most:
        best, order = order[0], order[1:]
        kept.append(int(best))
        gone = overlap(boxes[best], boxes[order]) > limit
        if classes is not None:
            gone &= classes[order] == classes[best]
        order = order[~gone]
    return np.array(kept, np.int64)


def corners(boxes: Array) -> Array:
    """Centre x, centre y, width, height [n, 4] → x0 y0 x1 y1."""
    half = boxes[:, 2:] / 2
    return np.hstack((boxes[:, :2] - half, boxes[:, :2] + half))
