"""Make a TFLite model small by ``ai-edge-quantizer``. TensorFlow is not needed."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, MissingError
from schemas.messages import Array

SUFFIX = ".tflite"
WAYS = {
    "int8": "static_wi8_ai8",
    "int16": "static_wi8_ai16",
    "int8-dynamic": "dynamic_wi8_afp32",
    "int8-weights": "weight_only_wi8_afp32",
    "int4-dynamic": "dynamic_wi4_afp32",
}
"""How → the tool's recipe."""


def compress(model: Path, way: str, inputs: Sequence[dict[str, Array]], out: Path) -> None:
    """Write the small model.

    :param inputs: of the model, one item each [1, …]: what it is calibrated on.
    :raises ConfigError: the tool refuses.
    :raises MissingError: it is not installed.
    """
    try:
        quantizer, recipe = (import_module(f"ai_edge_quantizer.{name}") for name in ("quantizer", "recipe"))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ai_edge_quantizer":
            raise
        raise MissingError("ai-edge-quantizer", extra="compress") from error
    quiet = io.StringIO()  # its bars would be written over our own lines
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        try:
            made = quantizer.Quantizer(str(model), getattr(recipe, WAYS[way])())
            seen = made.calibrate({_key(model): inputs}) if made.need_calibration else None
            small = made.quantize(seen).quantized_model
        except (ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"{model.name} cannot be made {way}: {' '.join(str(error).split())[:300]}") from error
    out.write_bytes(bytes(small))


def _key(model: Path) -> Any:
    """Of the signature that infer runs: the first."""
    interpreter = import_module("ai_edge_litert.interpreter").Interpreter(str(model))
    keys = list(interpreter.get_signature_list())
    return keys[0] if keys else None
