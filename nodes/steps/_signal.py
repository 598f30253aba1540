"""What fft and spectrogram share: tapers and scaled spectra."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from nodes.steps._step import RefusedError
from schemas.messages import Array, Frame

Taper = Literal["hann", "hamming", "blackman", "none"]
Output = Literal["amplitude", "power", "db"]


@lru_cache(maxsize=64)
def taper(name: Taper, n: int) -> Array:
    """The periodic window of n points, float64 (Harris 1978, DFT-even form); ``none`` is all ones."""
    if name == "none" or n == 1:
        return np.ones(n)
    shapes = {"hann": np.hanning, "hamming": np.hamming, "blackman": np.blackman}
    shape: Array = shapes[name](n + 1)[:-1]
    return shape


def signal(frame: Frame) -> Array:
    """The samples of a frame, float64 [n, channels].

    :raises RefusedError: it is no signal.
    """
    data = frame.data
    if not isinstance(data, np.ndarray) or frame.layout not in ("T", "TC"):
        raise RefusedError("wrong-layout", f"expected samples (T or TC), got layout {frame.layout} ({frame.encoding})")
    if data.shape[0] == 0:
        raise RefusedError("wrong-shape", "there are no samples")
    return data.astype(np.float64).reshape(data.shape[0], -1)


def spectra(blocks: Array, name: Taper, output: Output, *, centre: bool, floor: float) -> Array:
    """One-sided spectra of real samples along the last axis, float32 [..., n // 2 + 1].

    ``amplitude`` is a sine's peak, ``power`` its mean square, ``db`` 10·log10 of the power, not below ``floor``.

    :param centre: take the mean off first.
    """
    n = blocks.shape[-1]
    if centre:
        blocks = blocks - blocks.mean(axis=-1, keepdims=True)
    weights = taper(name, n)
    with np.errstate(all="ignore"):
        amplitude = np.abs(np.fft.rfft(blocks * weights, axis=-1)) / weights.sum()
        inner = slice(1, (n + 1) // 2)  # all but 0 Hz and, for even n, half the rate, which have no mirror image
        if output == "amplitude":
            amplitude[..., inner] *= 2
            return np.asarray(amplitude, np.float32)
        power = amplitude**2
        power[..., inner] *= 2
        if output == "power":
            return np.asarray(power, np.float32)
        return np.asarray(np.maximum(10 * np.log10(power), floor), np.float32)
