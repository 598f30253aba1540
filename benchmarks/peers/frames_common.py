"""What every contestant of ``frames`` does with a frame, and the frames: the same for all, so that only the way differs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH, COLOURS = 480, 640, 3
SIZE = HEIGHT * WIDTH * COLOURS
ROWS = 4
"""Each fourth row is looked at, as an exposure control would; a mean of all bytes costs NumPy more than shared memory does."""

_LOW = np.uint64(0x00FF00FF00FF00FF)
_EIGHT = np.uint64(8)
_WORDS = WIDTH * COLOURS // 8
_odd = np.empty((HEIGHT // ROWS, _WORDS), np.uint64)


def brightness(frame: NDArray[np.uint8]) -> float:
    """The mean of a frame's bytes, of each fourth row. Eight bytes at a time: several times as fast as ``mean()``.

    :param frame: C-contiguous, :data:`SIZE` bytes.
    """
    words = frame.reshape(-1).view(np.uint64).reshape(HEIGHT, _WORDS)[::ROWS]
    np.right_shift(words, _EIGHT, out=_odd)
    np.bitwise_and(_odd, _LOW, out=_odd)
    odd = np.add.reduce(_odd, axis=0)  # 120 rows of at most 255 in 16 bits each: no carry
    even = np.add.reduce(words, axis=0) - (odd << _EIGHT)
    both = np.add.reduce(odd.view(np.uint16), dtype=np.uint64) + np.add.reduce(even.view(np.uint16), dtype=np.uint64)
    return float(both) / (SIZE // ROWS)


def frames(count: int = 4) -> NDArray[np.uint8]:
    """A few frames of noise, [count, 480, 640, 3]."""
    return np.random.default_rng(1).integers(0, 256, (count, HEIGHT, WIDTH, COLOURS), dtype=np.uint8)
