"""Fields computed from others: ``{derive: {power: volt * ampere, hot: temp > 80}}``.

In the order written: a later expression may use an earlier field.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from nodes.operator import Context, Flow
from nodes.steps._fields import full
from nodes.steps._step import READINGS, StepOptions
from nodes.steps._table import RowStep, Table
from nodes.steps.filter import check_condition
from schemas.expressions import Expression, ExpressionText


class Config(StepOptions):
    """Options of ``derive``."""

    takes: ClassVar[frozenset[str]] = READINGS
    bare: ClassVar[dict[str, Any] | None] = {
        "type": "object",
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    }

    fields: dict[str, ExpressionText] = Field(min_length=1, description="name of the field: expression for its value")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if full(value, "fields") else {"fields": value}

    def flow(self, flow: Flow) -> Flow:
        fields = flow.fields
        for name, expression in self.fields.items():
            check_condition(expression, fields, "fields", name)
            fields = None if fields is None else fields | {name}
        return Flow(flow.type, fields)


class Derive(RowStep):
    """More columns, same rows."""

    def __init__(self, fields: dict[str, Expression]) -> None:
        self.fields = fields

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        for name, expression in self.fields.items():
            table = table.with_columns({**table.columns, name: expression(table.names, table.n)})
        return table


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Derive(config.fields)
