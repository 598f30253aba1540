"""Weights as a file: an ``.npz`` of numpy's, one array each, in the model's order; nothing in it is code."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nodes.federated.weights import Weights
from schemas.errors import ConfigError
from schemas.messages import Array


def write(path: Path, weights: Mapping[str, Array]) -> None:
    """Write the file, or leave it as it was; equal weights make equal bytes.

    :raises OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            # zip's names are bounded by 64 KiB and may have slashes; numpy gives every member the same date
            np.savez(file, allow_pickle=False, **dict(weights))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> Weights:
    """The weights, in the order in which they were written.

    :raises ConfigError: the file is not there, or is none of these.
    """
    try:
        if not zipfile.is_zipfile(path):
            path.stat()
            raise ConfigError(f"{path} is no .npz file")
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as weights: {error}") from None
