"""Write to the world: files, databases, web services, other brokers.

``{uplink: {sink: sqlite, path: results.db}}``: the kind of sink, and beside it that sink's own options.
"""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field

from nodes.operator import Context, Sink
from nodes.options import Options
from nodes.variants import VariantConfig
from nodes.variants import variants as _variants


class Config(VariantConfig):
    """Options of ``uplink``: ``sink`` and the options of that sink."""

    family: ClassVar[str] = "sink"
    sink: str = Field(description="kind of sink; its own options stand beside it")


def variants() -> dict[str, type[Options]]:
    """Every kind of sink with its options."""
    return _variants("sink")


def build(config: Config, context: Context) -> Sink:
    """The sink that was asked for.

    :raises MissingError: a library that it needs is not installed.
    :raises ConfigError: a secret that it takes from the environment is not there.
    """
    return cast("Sink", config.build(context))
