"""Send rows by other ports: ``{split: {hot: temp > 80, cold: temp < 10}}``; the first condition that holds decides.

Rows for which none holds go on to the next step, and so to ``out``. A prediction with several boxes stays whole: it goes
by the first port whose condition holds for any box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from nodes.operator import Context, Flow
from nodes.steps._fields import full
from nodes.steps._step import ROWS, StepOptions
from nodes.steps._table import RowStep, Table
from nodes.steps.filter import check_condition
from schemas import topics
from schemas.errors import ConfigError, Problem
from schemas.expressions import ConditionText, Expression
from schemas.messages import Readings


class Config(StepOptions):
    """Options of ``split``."""

    takes: ClassVar[frozenset[str]] = ROWS
    bare: ClassVar[dict[str, Any] | None] = {"type": "object", "additionalProperties": {"type": ["string", "boolean"]}}

    ports: dict[str, ConditionText] = Field(min_length=1, description="port: condition of the rows that leave by it")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if full(value, "ports") else {"ports": value}

    @field_validator("ports")
    @classmethod
    def _names(cls, ports: dict[str, Expression]) -> dict[str, Expression]:
        for port in ports:
            if not topics.is_level(port):
                raise ValueError(f"{port!r} cannot name a port; take a-z, 0-9, - and _")
            if port == "out" or port in topics.RESERVED_PORTS:
                raise ValueError(f"{port!r} cannot name a port here: it is taken")
        return ports

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        out = super().emits(inputs, context)
        for flow in inputs:
            for port, condition in self.ports.items():
                check_condition(condition, flow.fields, "ports", port)
                if port in out and out[port].type != flow.type:
                    raise ConfigError(Problem(("ports", port), f"would send {flow.type} and {out[port].type}"))
                out[port] = flow
        return out


class Split(RowStep):
    """Rows by several ports."""

    def __init__(self, ports: dict[str, Expression]) -> None:
        self.ports = ports

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        left = np.ones(table.n, np.bool_)
        leaving: list[tuple[str, Table]] = []
        whole = not isinstance(table.messages[0].body, Readings)  # such a message has a table of its own
        for port, condition in self.ports.items():
            chosen = condition.mask(table.names, table.n) & left
            if whole:
                chosen = np.full(table.n, chosen.any())
            if chosen.any():
                left &= ~chosen
                leaving.append((port, table.pick(chosen).without_empty()))
        ports.extend(leaving)
        return table.pick(left)


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Split(config.ports)
