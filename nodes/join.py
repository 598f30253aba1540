"""Put rows of two or more inputs together that have one key and lie close in time.

``{join: {within: 1s, by: source}, from: [weight, camera]}``: the first input leads, each of its rows gets the nearest row of
every other. Times are event times. docs/aggregate.md has a section on joins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from nodes.operator import Context, Flow
from nodes.options import Options
from nodes.windowing.pairing import Pairing, prefixes
from nodes.windowing.spec import limited
from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.rows import ROW_TYPES
from schemas.units import Duration


def _names(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Config(Options):
    """Options of ``join``."""

    timed: ClassVar[bool] = True

    within: Annotated[Duration, AfterValidator(limited)] = Field(
        description="most time between two rows that belong together"
    )
    by: Annotated[list[str], BeforeValidator(_names)] = Field(
        ["source"], description="field or fields that must be equal; source is the device; []: time alone decides"
    )
    type: Literal["inner", "left", "outer"] = Field(
        "inner",
        description="inner: only rows with a partner in every input; left: all rows of the first input; outer: all rows",
    )
    match: Literal["nearest", "all"] = Field(
        "nearest", description="the partner nearest in time, or an answer for each partner (two inputs only)"
    )
    prefix: dict[str, str] = Field(
        {}, description="input → prefix of its fields; left out: none for the first input, <node>_ for the others"
    )
    delay: Annotated[Duration, AfterValidator(limited)] = Field(
        0, description="how far the event times of one input may be out of order"
    )
    idle: Annotated[Duration, AfterValidator(limited)] | None = Field(
        None, description="silence by the clock after which waiting rows are answered as they are; left out: they wait"
    )
    limit: PositiveInt = Field(
        100_000, description="most rows that wait of one input; the oldest are dropped", le=10_000_000
    )

    def whole(self) -> str | None:
        return None if "source" in self.by else "partners may be of different sources; join by source"

    def accepts(self) -> frozenset[str] | None:
        return ROW_TYPES

    def check(self, context: Context) -> None:
        problems = [
            Problem(("by", i), f"{name!r} is there twice") for i, name in enumerate(self.by) if name in self.by[:i]
        ]
        if self.idle == 0:
            problems.append(Problem(("idle",), "expected a duration above 0"))
        if problems:
            raise ConfigError(*problems)

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        self._inputs(context, len(inputs))
        made: dict[str, int] = {}
        problems: list[Problem] = []
        whole = True
        chosen = prefixes(context.inputs, self.prefix)
        for i, (flow, edge) in enumerate(zip(inputs, context.inputs, strict=True)):
            if flow.fields is None:
                whole = False
                continue
            for name in self.by:
                if name not in flow.fields | {"source"}:
                    hint = did_you_mean(name, flow.fields | {"source"})
                    problems.append(Problem(("by", self.by.index(name)), f"{edge} has no field {name!r}{hint}"))
            for name in sorted(flow.fields):
                if (full := chosen[edge] + name) in made and full not in self.by:
                    problems.append(
                        Problem(("prefix",), f"two inputs bring a field {full!r}; give one of them a prefix")
                    )
                made[full] = i
        if problems:
            raise ConfigError(*problems)
        return {"out": Flow("readings/1", frozenset(made) if whole else None)}

    def _inputs(self, context: Context, count: int) -> None:
        """Refuse inputs that cannot be joined.

        :raises ConfigError: fewer than two, more than two for ``all``, or a prefix for none of them.
        """
        if count < 2:
            raise ConfigError("a join needs at least two inputs, e.g. from: [weight, camera]")
        if count > 2 and self.match == "all":
            raise ConfigError(Problem(("match",), "match: all joins two inputs; use nearest, or two joins"))
        known = set(context.inputs) | {edge.partition(".")[0] for edge in context.inputs}
        problems = [
            Problem(("prefix", name), f"{name!r} is no input of this node{did_you_mean(name, known)}", on_key=True)
            for name in self.prefix
            if name not in known
        ]
        if problems:
            raise ConfigError(*problems)


def build(config: Config, context: Context) -> Pairing:
    """The operator.

    :raises ConfigError: the inputs do not fit.
    """
    config._inputs(context, len(context.inputs))
    return Pairing(
        prefixes=prefixes(context.inputs, config.prefix),
        within=config.within,
        by=tuple(config.by),
        keep_left=config.type != "inner",
        keep_right=config.type == "outer",
        every=config.match == "all",
        delay=config.delay,
        idle=config.idle,
        limit=config.limit,
        clock=time.time_ns,
    )
