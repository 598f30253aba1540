"""What makes predictions of a model's outputs. A decoder is one file beside this one; its name is the kind's name.

Such a module has, beside the docstring, ``Config(Options)`` of every kind and
``def build(config: Config, labels: Sequence[str], top: int) -> Decoder``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from nodes.backends._backend import Spec
from schemas.errors import ConfigError, did_you_mean
from schemas.messages import Array


class Answer(msgspec.Struct, gc=False):
    """What a model says of one item; the fields are those of :class:`schemas.messages.Predictions`."""

    labels: list[str]
    scores: Array
    boxes: Array | None = None
    values: dict[str, Array] | None = None


class Decoder(ABC):
    """Outputs of a batch in, one answer for each item out. No state from call to call: an item's answer does not depend
    on what it was batched with."""

    stored: ClassVar[bool] = False
    """True: :meth:`decode` wants int8 and uint8 outputs as stored; else it gets the real numbers they stand for."""

    passes: ClassVar[bool] = False
    """True: the answers' ``values`` go on as ``tensors/1`` for another model, not as a prediction; the module has
    ``EMITS = "tensors/1"`` then."""

    @abstractmethod
    def check(self, outputs: Sequence[Spec]) -> None:
        """See that the model's outputs fit, before anything runs and again when the model is open. Axes of -1 are not
        known yet.

        :raises ConfigError: they do not; paths are relative to the decoder's config.
        """

    def tune(self, trial: dict[str, Array]) -> None:
        """Learn from the outputs of a trial run (on zeros and on noise) what the file does not say. Called once, when
        the model is open, before :meth:`decode`; float32 where :attr:`stored` is False."""

    @abstractmethod
    def decode(self, outputs: dict[str, Array], sizes: Sequence[tuple[int, int]]) -> list[Answer]:
        """The answers.

        :param outputs: by name, each [n, *shape].
        :param sizes: (width, height) in pixels of each frame; (1, 1) where no frame was seen.
        """


def pick(outputs: Sequence[Spec], name: str | None, decoder: str) -> Spec:
    """The one output that a decoder reads: the named one, or the only one.

    :raises ConfigError: there is none of that name, or several and no name.
    """
    names = [spec.name for spec in outputs]
    if name is None:
        if len(outputs) != 1:
            raise ConfigError(
                f"the model has {len(outputs)} outputs; say which one {decoder} reads: output: {names[0]}"
            )
        return outputs[0]
    for spec in outputs:
        if spec.name == name:
            return spec
    raise ConfigError(f"the model has no output {name!r}{did_you_mean(name, names)}")


def size(spec: Spec) -> int | None:
    """Numbers in one item; None: not known yet."""
    return None if -1 in spec.shape else math.prod(spec.shape)
