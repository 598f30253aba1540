"""Masks of a secure sum: streams of numbers modulo 2³² that whoever has a key can make again."""

from __future__ import annotations

import numpy as np

from nodes.privacy.keys import Pair, derive, stream
from schemas.messages import Array


class Masks:
    """Adds masks to one vector: AES-CTR streams as numbers modulo 2³²; memory for one of them."""

    def __init__(self, size: int) -> None:
        self._zeros = bytes(4 * size)
        self._room = bytearray(4 * size + 16)
        self._numbers = np.frombuffer(self._room, "<u4", size)

    def add(self, key: bytes, to: Array, sign: int) -> None:
        """Add (1) or subtract (-1) the mask of this key."""
        stream(key, self._zeros, self._room)
        if sign > 0:
            np.add(to, self._numbers, out=to)
        else:
            np.subtract(to, self._numbers, out=to)


def self_mask(secret: bytes, context: bytes) -> bytes:
    """The key of a client's own mask."""
    return derive(secret, b"self|" + context)


def commitment(secret: bytes, context: bytes) -> bytes:
    """By which a secret is recognised that nobody knows yet."""
    return derive(secret, b"commitment|" + context)


def pair_mask(mine: Pair, other: bytes, context: bytes) -> bytes:
    """The key of the mask that two clients have together."""
    return mine.agree(other, b"mask|" + context)
