"""The outputs as they are, by name: features, embeddings, what another program decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from nodes.backends._backend import Spec, dequantise
from nodes.decoders._decoder import Answer, Decoder
from nodes.options import Options
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.messages import Array, no_scores


class Config(Options):
    """Which outputs, and in which form."""

    outputs: list[str] | None = Field(None, description="Names of the outputs to pass on; left out: all.", min_length=1)
    quantised: bool = Field(
        False, description="Pass int8 and uint8 outputs on as stored, not as the real numbers that they stand for."
    )


def build(config: Config, labels: Sequence[str], top: int) -> Decoder:
    """The decoder; ``labels`` and ``top`` say nothing here."""
    del labels, top
    return Raw(config)


class Raw(Decoder):
    """Every output, one array for each item, in the shape that the model gives it."""

    stored: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._specs: list[Spec] = []

    def check(self, outputs: Sequence[Spec]) -> None:
        """Every output that is named is there."""
        by_name = {spec.name: spec for spec in outputs}
        for i, name in enumerate(self._config.outputs or ()):
            if name not in by_name:
                raise ConfigError(
                    Problem(("outputs", i), f"the model has no output {name!r}{did_you_mean(name, by_name)}")
                )
        self._specs = [by_name[name] for name in self._config.outputs or by_name]

    def decode(self, outputs: dict[str, Array], sizes: Sequence[tuple[int, int]]) -> list[Answer]:
        """One array for each output and item."""
        arrays = {
            spec.name: outputs[spec.name] if self._config.quantised else dequantise(outputs[spec.name], spec)
            for spec in self._specs
        }
        return [
            Answer([], no_scores(), values={name: array[i] for name, array in arrays.items()})
            for i in range(len(sizes))
        ]
