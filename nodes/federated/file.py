"""A file of weights on a disk: written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nodes.federated import weights_file
from nodes.federated.weights import Weights
from schemas.errors import ConfigError
from schemas.messages import Array


def write(path: Path, weights: Mapping[str, Array], about: Mapping[str, str] | None = None) -> None:
    """Write the file (:mod:`nodes.federated.weights_file`), or leave it as it was.

    :raises OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(weights_file.write(weights, about))
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
        return weights_file.read(path.read_bytes())[0]
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
