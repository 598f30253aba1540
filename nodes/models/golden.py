"""A model's golden vector: inputs with the answers that its maker's runtime gave, beside its file.

A runtime may load a file that it does not understand and answer garbage without an error (tflite-runtime 2.14 does so with the
dynamic int8 of newer tools). ``infer`` compares before the first message, and refuses.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from schemas.errors import ConfigError
from schemas.messages import Array

TOLERANCE = 0.05
"""Difference, in parts of the largest number of an output, within which two runtimes of quantised models stay."""
ITEMS = 8


def beside(model: Path) -> Path:
    """Where a model's golden vector is: ``m.tflite`` has ``m.tflite.golden.npz``."""
    return model.with_name(f"{model.name}.golden.npz")


def write(path: Path, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Keep it.

    :param inputs: as the model takes them, [n, …] each.
    :param outputs: the real numbers that it answers, [n, …] each.
    """
    arrays = {f"in/{name}": value for name, value in inputs.items()}
    arrays |= {f"out/{name}": value for name, value in outputs.items()}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def compare(path: Path, infer: Callable[[dict[str, Array], int], Mapping[str, Array]], most: int) -> float:
    """The largest difference, in parts of the largest number of that output.

    :param infer: inputs and how many items → the real numbers that the runtime at hand answers; at most ``most`` items at once.
    :raises ConfigError: the file is none, or of another model; or the difference is beyond :data:`TOLERANCE`.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path.name} is no golden vector: {error}") from None
    inputs = {name[3:]: value for name, value in arrays.items() if name.startswith("in/")}
    expected = {name[4:]: value for name, value in arrays.items() if name.startswith("out/")}
    sizes = {len(value) for value in arrays.values() if value.ndim}
    if not inputs or not expected or len(sizes) != 1:
        raise ConfigError(f"{path.name} is no golden vector: it has {', '.join(arrays) or 'nothing in it'}")
    n, worst = sizes.pop(), 0.0
    for start in range(0, n, most):
        part = slice(start, start + most)
        try:
            got = infer({name: value[part] for name, value in inputs.items()}, min(most, n - start))
        except KeyError as error:
            raise ConfigError(f"{path.name} is of another model: it knows nothing of {error}") from None
        for name, value in expected.items():
            if name not in got or got[name].shape != value[part].shape:
                raise ConfigError(f"{path.name} is of another model: {name!r} is not what this one answers")
            largest = float(np.abs(value).max()) or 1.0
            apart = float(np.abs(got[name].astype(np.float64) - value[part]).max()) / largest
            worst = max(worst, apart if apart == apart else float("inf"))
    if worst > TOLERANCE:
        raise ConfigError(
            f"the runtime does not answer as {path.name} has it, but off by {worst:.2g} of the largest number: it does not "
            "understand this model"
        )
    return worst
