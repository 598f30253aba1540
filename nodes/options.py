"""Base of everything that a user writes in a topology for a kind: pydantic models that forbid unknown keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from nodes.operator import Context, Flow


class Options(BaseModel):
    """Config of one kind (a source, step, backend, sink, or a node kind).

    A kind is one module. It has: a docstring whose first line describes it; ``class Config(Options)``; and
    ``def build(config: Config, context: Context) -> Source | Operator | Sink`` (or what its family builds). Heavy imports
    go inside functions. ``EXTRA = "name"`` names the extra of the distribution that it needs, if any.
    Each field has a description with its unit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    timed: ClassVar[bool] = False
    """It closes something by event time, so messages of several replicas are to be put in the order of their times."""

    def check(self, context: Context) -> None:
        """Find what can be known to be wrong before running: files that are not there, expressions, units.

        Fast (``penstock check`` answers in half a second) and without the kind's heavy imports.

        :raises ConfigError: with paths relative to this config.
        """

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        """What comes out, by port, given what comes in; raises ConfigError where the inputs do not fit.

        Called after :meth:`check`. Sinks answer ``{}``.
        """
        raise TypeError(f"{type(self).__module__} does not say what it emits")

    def accepts(self) -> frozenset[str] | None:
        """Body types that may come in; None: any. Sources answer the empty set."""
        return None

    def whole(self) -> str | None:
        """Why several replicas of it, each with a part of the sources, would not do what one does; None: they would."""
        return None

    def forget(self, context: Context) -> None:
        """Remove what the node keeps outside of its state folder (``penstock run --fresh``)."""

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        """What a bare value stands for (``{resize: [96, 96]}``), as the map of fields; as it is where there is none."""
        return value
