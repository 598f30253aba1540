"""Make an ONNX model small by ONNX Runtime's own tools."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, MissingError
from schemas.messages import Array

SUFFIX = ".onnx"
WAYS = {"int8": "static", "int8-dynamic": "dynamic"}


def compress(model: Path, way: str, inputs: Sequence[dict[str, Array]], out: Path) -> None:
    """Write the small model.

    :param inputs: of the model, one item each [1, …]: what it is calibrated on.
    :raises ConfigError: the tool refuses.
    :raises MissingError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tool = import_module("onnxruntime.quantization")
            prepare = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"onnx", "onnxruntime"}:
            raise
        raise MissingError("onnxruntime and onnx", extra="compress") from error
    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.ERROR)  # it gives advice by the root logger
        with tempfile.TemporaryDirectory(prefix="penstock-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ready = Path(folder) / model.name
            prepare(str(model), str(ready), skip_symbolic_shape=True)
            if way == "int8":
                options: dict[str, Any] = {"quant_format": tool.QuantFormat.QDQ, "per_channel": True}
                tool.quantize_static(str(ready), str(out), _Reader(inputs), **options)
            else:
                tool.quantize_dynamic(str(ready), str(out), weight_type=tool.QuantType.QInt8)
    except Exception as error:
        raise ConfigError(f"{model.name} cannot be made {way}: {' '.join(str(error).split())[:300]}") from error
    finally:
        root.setLevel(level)


class _Reader:
    """Gives the tool one item after the other; duck-typed as its CalibrationDataReader."""

    def __init__(self, inputs: Sequence[dict[str, Array]]) -> None:
        self._left = iter(inputs)

    def get_next(self) -> dict[str, Array] | None:
        """The next item, or None."""
        return next(self._left, None)
