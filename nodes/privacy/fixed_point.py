"""Real numbers as whole ones modulo 2³², so that masks cancel exactly and a sum of clients never overflows.

With n clients every client's numbers are clipped to ±clip, weighted by samples / most, and scaled to ±⌊(2³¹ - 1) / n⌋; so their
sum stays within ±(2³¹ - 1), and modulo 2³² it is known exactly. One step of the scale is clip / ⌊(2³¹ - 1) / n⌋: for a clip of 1
and 10 clients 4.7e-9, for 1,000 clients 4.7e-7. Rounding errs by half a step for each client.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from schemas.errors import ConfigError
from schemas.messages import Array

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How a round's numbers are written.

    :param clients: most clients whose numbers are added up.
    :param clip: largest absolute value of one number.
    :param most: largest number of samples that counts; more count as so many.
    """

    clients: int
    clip: float
    most: int

    def __post_init__(self) -> None:
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise ConfigError(f"clip is {self.clip}; expected a number above 0")
        if self.clients < 1 or not 1 <= self.most <= _MOST // self.clients:
            raise ConfigError(f"{self.clients} clients with up to {self.most} samples each do not fit into 32 bits")

    @property
    def reach(self) -> int:
        """Largest absolute whole number of one client."""
        return _MOST // self.clients

    @property
    def step(self) -> float:
        """What one is worth, in the weighted numbers."""
        return self.clip / self.reach

    def write(self, values: Array, samples: int) -> tuple[Array, int]:
        """A client's numbers and their weight.

        :param values: [n], real.
        :param samples: ≥ 1; what the client's numbers count in the mean.
        :returns: uint32 [n + 1], the samples at the end; and how many of the values were clipped.
        :raises ConfigError: a value is not finite, or there are no samples.
        """
        if samples < 1:
            raise ConfigError(f"{samples} samples; a client that has none takes no part")
        exact = values.astype(np.float64)
        if not np.isfinite(exact).all():
            raise ConfigError("values that are infinite or none have no sum")
        clipped = int(np.count_nonzero(np.abs(exact) > self.clip))
        counted = min(samples, self.most)
        np.clip(exact, -self.clip, self.clip, out=exact)
        exact *= counted / self.most / self.clip * self.reach
        np.rint(exact, out=exact)
        out = np.empty(len(exact) + 1, np.uint32)
        out[:-1] = exact.astype(np.int64).astype(np.uint32)  # two's complement
        out[-1] = counted
        return out, clipped

    def read(self, total: Array) -> tuple[Array, int]:
        """The weighted sum Σ samples · values of all who wrote, float64 [n], and the sum of their samples."""
        samples = int(total[-1])
        return total[:-1].view(np.int32).astype(np.float64) * (self.step * self.most), samples
