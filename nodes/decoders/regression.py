"""Numbers: each with a name, in the units that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from nodes.backends._backend import Spec
from nodes.decoders._decoder import Answer, Decoder, pick, size
from nodes.options import Options
from schemas.errors import ConfigError
from schemas.messages import Array, no_scores


class Config(Options):
    """How numbers are named and scaled. Their names are the node's ``labels``; a single one is ``value`` without."""

    scale: float = Field(1.0, description="Factor from the model's number to the unit wanted.")
    offset: float = Field(0.0, description="Added after the factor, in the unit wanted.")
    output: str | None = Field(None, description="Name of the output, where the model has several.")


def build(config: Config, labels: Sequence[str], top: int) -> Decoder:
    """The decoder; ``top`` says nothing here."""
    del top
    return Regression(config, labels)


class Regression(Decoder):
    """Output [n, numbers]; value i of an item is float32 [1], named by label i."""

    def __init__(self, config: Config, labels: Sequence[str]) -> None:
        self._config = config
        self._names = list(labels)
        self._name = ""

    def check(self, outputs: Sequence[Spec]) -> None:
        """There is one output, and a name for each number in it."""
        spec = pick(outputs, self._config.output, "regression")
        self._name = spec.name
        numbers = size(spec)
        if numbers == 1 and not self._names:
            self._names = ["value"]
        if numbers is not None and numbers != len(self._names):
            have = f"{len(self._names)} names" if self._names else "no names for them"
            raise ConfigError(f"the model answers {numbers} numbers, but there are {have}; say labels: [name, …]")

    def decode(self, outputs: dict[str, Array], sizes: Sequence[tuple[int, int]]) -> list[Answer]:
        """The numbers by name."""
        values = outputs[self._name].astype(np.float32, copy=False)
        numbers = values.reshape(len(values), -1) * np.float32(self._config.scale) + np.float32(self._config.offset)
        return [
            Answer([], no_scores(), values={name: row[i : i + 1] for i, name in enumerate(self._names)})
            for row in numbers
        ]
