"""Keep the rows for which a condition holds: ``{filter: temp > 80 and line == 'a'}``.

On predictions with boxes each box is a row; a message of which no row is left is filtered whole.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from nodes.operator import Context, Flow
from nodes.steps._step import ROW_NAMES, ROWS, StepOptions
from nodes.steps._table import RowStep, Table
from schemas.errors import ConfigError
from schemas.expressions import ConditionText, Expression
from schemas.messages import Readings


def check_condition(expression: Expression, fields: frozenset[str] | None, *path: str) -> None:
    """Refuse a condition on fields that are known not to be there.

    :raises ConfigError: at the name, under ``path``.
    """
    try:
        expression.check(None if fields is None else fields | ROW_NAMES)
    except ConfigError as error:
        raise error.under(*path) from None


class Config(StepOptions):
    """Options of ``filter``."""

    takes: ClassVar[frozenset[str]] = ROWS
    bare: ClassVar[dict[str, Any] | None] = {"type": ["string", "boolean"]}

    where: ConditionText = Field(description="condition that a row must meet to go on")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"where": value}

    def flow(self, flow: Flow) -> Flow:
        check_condition(self.where, flow.fields, "where")
        return flow


class Filter(RowStep):
    """Fewer rows."""

    def __init__(self, where: Expression) -> None:
        self.where = where

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        kept = table.pick(self.where.mask(table.names, table.n))
        return kept if isinstance(table.messages[0].body, Readings) else kept.without_empty()


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Filter(config.where)
