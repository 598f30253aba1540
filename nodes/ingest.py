"""Read the world: files, cameras, brokers, generators.

``{ingest: {source: csv, path: line.csv}}``: the kind of source, and beside it that source's own options.
"""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field

from nodes.operator import Context, Source
from nodes.options import Options
from nodes.variants import VariantConfig
from nodes.variants import variants as _variants


class Config(VariantConfig):
    """Options of ``ingest``: ``source`` and the options of that source."""

    family: ClassVar[str] = "source"
    source: str = Field(description="kind of source; its own options stand beside it")

    def whole(self) -> str | None:
        return "each would read all of it"


def variants() -> dict[str, type[Options]]:
    """Every kind of source with its options."""
    return _variants("source")


def build(config: Config, context: Context) -> Source:
    """The source that was asked for.

    :raises MissingError: a library that it needs is not installed.
    """
    return cast("Source", config.build(context))
