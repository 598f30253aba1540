"""Two halves beside their whole: the same answers? how long does each take?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nodes import kinds
from nodes.backends._backend import Backend, Signature
from nodes.operator import Context
from schemas.errors import ConfigError
from schemas.messages import Array

_RUNS = 7


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison gave.

    :param difference: largest between two outputs, in parts of the outputs' largest number; 0: equal bit for bit.
    :param whole: seconds of one item; ``head`` and ``tail`` likewise.
    """

    difference: float
    whole: float
    head: float
    tail: float


def compare(whole: Path, head: Path, tail: Path, items: int = 4) -> Compared:
    """Run the whole model and its halves on noise, one item at a time and several at once.

    :raises ConfigError: the runtime refuses a part.
    :raises MissingError: there is no runtime for them.
    """
    with ExitStack() as stack:
        models = []
        for path in (whole, head, tail):
            backend = _backend(path)
            stack.callback(backend.close)
            models.append((backend, backend.open()))
        size = models[0][1].batch or items
        noise = _noise(models[0][1], size)
        expected = models[0][0].infer(noise)
        got = _through(models[1:], noise)
        difference = max(_apart(a, b) for a, b in zip(expected.values(), got.values(), strict=True))
        one = {name: value[:1] for name, value in noise.items()} if models[0][1].batch is None else noise
        between = _renamed(models[1][0].infer(one), models[2][1])
        count = len(next(iter(one.values())))
        times = [_timed(model, given) / count for (model, _), given in zip(models, (one, one, between), strict=True)]
    return Compared(difference, *times)


def _backend(path: Path) -> Backend:
    for name in kinds.names("backend"):
        module = kinds.module("backend", name)
        if path.suffix in module.SUFFIXES:
            made: Backend = module.build(
                module.Config(), Context("model", path.stem, path.parent, path.parent), path, 1
            )
            return made
    raise ConfigError(f"no backend takes {path.name}")


def _noise(signature: Signature, n: int) -> dict[str, Array]:
    random = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for spec in signature.inputs:
        shape = (n, *spec.shape)
        if spec.dtype.kind == "f":
            made[spec.name] = random.random(shape).astype(spec.dtype)
        elif spec.quantisation is not None or spec.dtype == np.uint8:
            limits = np.iinfo(np.dtype(spec.type))
            made[spec.name] = random.integers(limits.min, limits.max, shape, endpoint=True).astype(spec.dtype)
        else:  # numbers that point into a table, perhaps
            made[spec.name] = np.zeros(shape, spec.dtype)
    return made


def _through(halves: Sequence[tuple[Backend, Signature]], given: dict[str, Array]) -> dict[str, Array]:
    for backend, signature in halves:
        given = backend.infer(_renamed(given, signature))
    return given


def _renamed(outputs: dict[str, Array], signature: Signature) -> dict[str, Array]:
    """What one half gives, by the names of what the next takes: a single tensor needs none."""
    if len(outputs) == 1 == len(signature.inputs):
        return {signature.inputs[0].name: next(iter(outputs.values()))}
    return outputs


def _apart(a: Array, b: Array) -> float:
    if a.shape != b.shape:
        return float("inf")
    if a.tobytes() == b.tobytes():
        return 0.0
    most = float(np.abs(a.astype(np.float64)).max()) or 1.0
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) / most, 5e-324)


def _timed(model: Backend, given: dict[str, Array]) -> float:
    """Seconds of one call, the median of some."""
    spent = []
    model.infer(given)
    for _ in range(_RUNS):
        start = time.perf_counter()
        model.infer(given)
        spent.append(time.perf_counter() - start)
    return sorted(spent)[_RUNS // 2]


def entry_bytes(path: Path) -> tuple[int, int, float]:
    """Bytes of one item that goes in, bytes of what comes out, and seconds of it."""
    backend = _backend(path)
    signature = backend.open()
    try:
        noise = _noise(signature, signature.batch or 1)
        count = signature.batch or 1
        sizes = [sum(v.nbytes for v in values.values()) // count for values in (noise, backend.infer(noise))]
        return sizes[0], sizes[1], _timed(backend, noise) / count
    finally:
        backend.close()
