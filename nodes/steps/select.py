"""Keep some fields: ``{select: [temp, label]}``; or all but some: ``{select: {but: [debug]}}``."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from nodes.operator import Context, Flow
from nodes.steps._fields import known, pick
from nodes.steps._step import READINGS, StepOptions
from nodes.steps._table import RowStep, Table


class Config(StepOptions):
    """Options of ``select``."""

    takes: ClassVar[frozenset[str]] = READINGS
    bare: ClassVar[dict[str, Any] | None] = {"type": "array", "items": {"type": "string"}}

    fields: list[str] = Field(
        default=[], description="fields to keep, in this order; a message without one is rejected"
    )
    but: list[str] = Field(default=[], description="fields to leave out; those that are not there are ignored")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"fields": value}

    @model_validator(mode="after")
    def _one(self) -> Config:
        if bool(self.fields) == bool(self.but):
            raise ValueError("expected either the fields to keep or, under 'but', those to leave out")
        return self

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.fields, "fields")
        known(flow.fields, self.but, "but")
        if self.fields:
            return Flow(flow.type, frozenset(self.fields))
        return Flow(flow.type, None if flow.fields is None else flow.fields - set(self.but))


class Select(RowStep):
    """Other columns, same rows."""

    def __init__(self, config: Config) -> None:
        self.fields = config.fields
        self.but = frozenset(config.but)

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        if self.fields:
            return table.with_columns({name: pick(table.columns, name) for name in self.fields})
        return table.with_columns({k: c for k, c in table.columns.items() if k not in self.but})


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Select(config)
