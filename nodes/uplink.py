"""Write to the world: files, databases, web services, other brokers.

``{uplink: {sink: sqlite, path: results.db}}``: the kind of sink, and beside it that sink's own options. With ``spool: 20MB``
beside them, what arrives while the far end is away is kept on disk, and the nodes before go on.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from nodes.operator import Context, Sink
from nodes.options import Options
from nodes.variants import VariantConfig
from nodes.variants import variants as _variants
from schemas.errors import ConfigError, Problem
from schemas.keeping import LEAST, Order, Overflow
from schemas.problems import shown
from schemas.units import Rate, Size


class Spool(BaseModel):
    """What is kept on disk for a far end that is away."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Size = Field(description=f"bytes that its files may take, at least {LEAST // 1024}KiB")
    overflow: Overflow = Field(
        "block",
        description="what a full spool does. block: takes no more, and the nodes before wait; drop-oldest: makes room by files"
        " of a 32nd of the size; drop-newest: drops what arrives. A drop is counted as spool-full",
    )
    order: Order = Field(
        "oldest", description="what goes to the far end first; oldest keeps the order in which messages came"
    )
    rate: Rate | None = Field(None, description="messages a second that go to the far end at most; left out: no limit")
    path: str | None = Field(
        None, description="folder in which the node gets one for its spool; left out: the run's state folder"
    )

    @field_validator("size")
    @classmethod
    def _enough(cls, size: int) -> int:
        if size < LEAST:
            raise ValueError(f"expected at least {LEAST // 1024}KiB, got {size} bytes")
        return size


def _bare_size(value: Any) -> Any:
    if isinstance(value, (dict, Spool)):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float, NoneType)):
        raise ValueError(f"expected a size, e.g. 20MB, or a map, got {shown(value)}")
    return {} if value is None else {"size": value}


class Config(VariantConfig):
    """Options of ``uplink``: ``sink`` and the options of that sink."""

    family: ClassVar[str] = "sink"
    sink: str = Field(description="kind of sink; its own options stand beside it")
    spool: Annotated[Spool | None, BeforeValidator(_bare_size, json_schema_input_type=Spool | Size | None)] = Field(
        None, description="keeps on disk what the far end cannot take yet; a size, or a map; left out: nothing is kept"
    )

    def check(self, context: Context) -> None:
        problems = []
        if self.spool is not None and self.spool.path is not None and context.path(self.spool.path).is_file():
            path = context.path(self.spool.path)
            problems.append(Problem(("spool", "path"), f"expected a folder, and {path} is a file"))
        try:
            super().check(context)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(*problems)

    def folder(self, context: Context) -> Path:
        """Where the spool is, if there is one."""
        if self.spool is None or self.spool.path is None:
            return context.state / "spool"
        return context.path(self.spool.path) / f"{context.topology}-{context.node}"

    def forget(self, context: Context) -> None:
        from broker.spool import Spool as Store

        if self.spool is not None and (folder := self.folder(context)).is_dir():
            Store(folder, self.spool.size).erase()


def variants() -> dict[str, type[Options]]:
    """Every kind of sink with its options."""
    return _variants("sink")


def build(config: Config, context: Context) -> Sink:
    """The sink that was asked for.

    :raises MissingError: a library that it needs is not installed.
    :raises ConfigError: a secret that it takes from the environment is not there.
    """
    return cast("Sink", config.build(context))
