"""What a compressor of updates is. A compressor is one file beside this one; its name is the kind's name.

Such a module has, beside the docstring (with its source), ``Config(Options)`` and ``def build(config: Config) -> Compressor``.
What it makes are named arrays again, so that ``update/1`` stays plain msgpack that any language reads; ``docs/federated.md``
says what each is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from nodes.federated.weights import Shape, Weights


class Compressor(ABC):
    """Makes a delta small and large again. Keeps nothing from call to call: what must be remembered is the residual."""

    feeds_back: ClassVar[bool] = False
    """True: what was not sent is to be added to the next delta (error feedback, Seide et al. 2014; Karimireddy et al. 2019)."""

    @abstractmethod
    def pack(self, delta: Weights, seed: int = 0) -> Weights:
        """The arrays that travel. ``seed``: of what is drawn (stochastic rounding).

        The caller that feeds back hands in delta + residual, and keeps (delta + residual) - unpack(pack(…)) as the next residual.
        """

    @abstractmethod
    def unpack(self, packed: Weights, wanted: tuple[Shape, ...]) -> Weights:
        """The delta, float32, of the form ``wanted``.

        What comes from outside is not trusted: indices out of range, counts that do not fit, numbers that are not finite.

        :raises UnfitError: see :mod:`nodes.federated.weights`.
        """
