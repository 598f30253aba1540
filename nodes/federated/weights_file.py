"""A model's weights as one file: an .npz of named arrays in their order, with a few words about them; never a pickle.

Any numpy reads it (``numpy.load``). The same weights give the same bytes, so the file's digest is the model's.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy

from nodes.federated.weights import Weights
from schemas.errors import ConfigError

ABOUT = "about.json"
"""Name in the file of what is said about the weights: a JSON map of texts."""
_BEGAN = (1980, 1, 1, 0, 0, 0)
_MOST = 2**31
_ENDING = ".npy"


def write(weights: Mapping[str, Any], about: Mapping[str, str] | None = None) -> bytes:
    """The file's bytes.

    :param about: what a reader must know beside the numbers: ``{"model": "mlp", "activation": "relu"}``.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        if about:
            file.writestr(zipfile.ZipInfo(ABOUT, _BEGAN), json.dumps(dict(about), sort_keys=True))
        for name, array in weights.items():
            with file.open(zipfile.ZipInfo(name + _ENDING, _BEGAN), "w", force_zip64=True) as entry:
                npy.write_array(entry, np.asarray(array, order="C"), allow_pickle=False)
    return out.getvalue()


def read(data: bytes, most: int = _MOST) -> tuple[Weights, dict[str, str]]:
    """The weights and what is said about them.

    :param most: bytes that all arrays together may have.
    :raises ConfigError: it is no such file, is damaged, holds objects, or is too large.
    """
    weights: Weights = {}
    about: dict[str, str] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = file.infolist()
            if sum(entry.file_size for entry in entries) > most:
                raise ConfigError(f"its arrays have more than {most:,} bytes")
            for entry in entries:
                content = file.read(entry)
                if entry.filename == ABOUT:
                    about = _texts(content)
                elif entry.filename.endswith(_ENDING):
                    array = npy.read_array(io.BytesIO(content), allow_pickle=False)
                    weights[entry.filename.removesuffix(_ENDING)] = np.asarray(array, order="C")
    except ConfigError:
        raise
    # zipfile and numpy raise whatever a damaged file leads them to, MemoryError for a header that lies
    except (
        zipfile.BadZipFile,
        ValueError,
        EOFError,
        OSError,
        KeyError,
        RuntimeError,
        MemoryError,
        NotImplementedError,
    ) as error:
        raise ConfigError(f"no file of weights, or a damaged one: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:
        raise ConfigError(f"a damaged file of weights ({type(error).__name__})") from error
    if not weights:
        raise ConfigError("a file without weights")
    return weights, about


def _texts(content: bytes) -> dict[str, str]:
    found = json.loads(content)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"its {ABOUT} is no map of texts")
    return found
