"""What a model runtime is to ``infer``. A backend is one file beside this one; its name is the kind's name.

Such a module has, beside the docstring, ``Config(Options)`` and ``EXTRA`` of every kind:

- ``SUFFIXES``: endings of the model files that it takes, e.g. ``(".tflite",)``;
- ``def inspect(model: Path) -> Signature | None``: what the file says of itself without the runtime, fast; None where it
  does not say. Raises ConfigError when the file is none of this kind or is damaged;
- ``def build(config: Config, context: Context, model: Path, threads: int) -> Backend``;
- ``def parts(model: Path) -> Sequence[Path]``, where a model is more than one file: all of them, so that its digest covers them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from schemas.errors import ConfigError, RunError
from schemas.messages import Array

Tensor: TypeAlias = tuple[str, str, Sequence[int]]
"""Name, numpy's name of its numbers, and all axes (-1: open) of an input or output as a model's file has them."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """real = scale × (stored − zero_point), for the whole tensor."""

    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True)
class Spec:
    """One input or output of a model.

    :param shape: without the leading batch axis. -1: an output's axis that only a run can tell.
    :param type: numpy's name of its numbers as stored, e.g. ``float32``; int8 or uint8 with a ``quantisation`` stands for
        real numbers.
    :param flat: it takes any array of so many numbers, whatever its axes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    quantisation: Quantisation | None = None
    flat: bool = False

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Its numbers as stored."""
        return np.dtype(self.type)

    @property
    def real(self) -> bool:
        """Whether it takes or gives real numbers, as floats or as what stands for them."""
        return self.type.startswith("float") or self.quantisation is not None

    def __str__(self) -> str:
        return f"{self.name!r} {self.type}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Scaling:
    """What unsigned whole numbers (a camera's pixels) stand for: value · ``factor`` + ``offset``, in float32."""

    factor: float
    offset: float = 0.0

    def real(self, values: Array, out: Array | None = None) -> Array:
        """The real numbers, float32; written to ``out`` if there is one."""
        made = np.multiply(values, np.float32(self.factor), dtype=np.float32, out=out)
        if self.offset:
            made += np.float32(self.offset)
        return np.asarray(made)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives.

    :param batch: items that one call takes; None: any number.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    batch: int | None


class Backend(ABC):
    """One model, loaded. Used by one thread at a time."""

    @abstractmethod
    def open(self) -> Signature:
        """Load the model. Called once, before everything else.

        :raises MissingError: the runtime, or a library that the config names, is not installed.
        :raises ConfigError: the runtime refuses the file.
        """

    @abstractmethod
    def infer(self, inputs: dict[str, Array], scaling: Scaling | None = None) -> dict[str, Array]:
        """Run the model on n items: every array [n, *shape] of its spec's dtype, C order, as are the answers.

        :param scaling: float inputs that are given as unsigned whole numbers are to be scaled so, best into the model's memory.

        ``infer`` (the node) calls it with few different n (powers of two), so a backend may keep something for each n.
        The answers are the caller's own: the next call does not change them.

        :raises RunError: the runtime failed.
        """

    def close(self) -> None:
        """Free the model."""


def quantise(values: Array, spec: Spec) -> Array:
    """Real numbers as the stored integers of ``spec``, rounded to even and clipped to the dtype's range."""
    assert spec.quantisation is not None  # noqa: S101 - for the type checker; callers have looked
    limits = np.iinfo(np.dtype(spec.dtype.str))
    scaled = np.multiply(values, np.float32(1 / spec.quantisation.scale), dtype=np.float32)
    np.rint(scaled, out=scaled)
    scaled += spec.quantisation.zero_point
    np.maximum(scaled, limits.min, out=scaled)  # np.clip takes five times as long on a few numbers
    return np.minimum(scaled, limits.max, out=scaled).astype(spec.dtype)


def dequantise(stored: Array, spec: Spec) -> Array:
    """The real numbers (float32) that the stored integers of ``spec`` stand for; as they are without quantisation."""
    if spec.quantisation is None:
        return stored
    return (stored.astype(np.float32) - spec.quantisation.zero_point) * np.float32(spec.quantisation.scale)


def given(value: Array, spec: Spec, scaling: Scaling | None) -> Array:
    """One input as the model takes it: unsigned whole numbers that stand for real ones (a camera's pixels) are scaled."""
    if scaling is None or value.dtype.kind != "u" or spec.dtype.kind != "f":
        return value
    real = scaling.real(value)
    return real if spec.dtype == np.float32 else real.astype(spec.dtype)


def signature(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Signature:
    """What a file says of its tensors, as a signature: the first axis is the batch where it is open, or the same everywhere.

    A plain vector or number of fixed length (sound, often) is one item.

    :raises ConfigError: an input has another axis that is open, or there are none.
    """
    if not inputs or not outputs:
        raise ConfigError("a model without inputs or outputs")
    fixed = [axes[0] if len(axes) > 1 else 1 for _, _, axes in inputs if not axes or axes[0] >= 0]
    batch = fixed[0] if fixed else None

    def spec(name: str, kind: str, axes: Sequence[int]) -> Spec:
        return Spec(name, tuple(axes[1:] if axes and axes[0] in (-1, batch) else axes), kind)

    specs = tuple(spec(*tensor) for tensor in inputs)
    for one in specs:
        if any(n < 0 for n in one.shape):
            raise ConfigError(f"the model's input {one}: only the first axis (the batch) may be open")
    return Signature(specs, tuple(spec(*tensor) for tensor in outputs), batch)


def ranked(value: Array, rank: int) -> Array:
    """A batch of one without its axis, where the model has none (a plain vector is one item)."""
    return value if value.ndim == rank else value.reshape(value.shape[1:])


def items(name: str, answer: Array, n: int, model: str) -> Array:
    """One output as n items; of one item it may come without the batch's axis.

    :raises RunError: it has another number of items.
    """
    whole = answer if answer.ndim and len(answer) == n else answer[None]
    if len(whole) != n:
        raise RunError(f"{model}: output {name!r} has {len(whole)} items for a batch of {n}")
    return whole


def line(error: BaseException) -> str:
    """What a runtime complains of, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
