"""Give fields other names: ``{rename: {t1: temp, lbl: label}}``."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from nodes.operator import Context, Flow
from nodes.steps._fields import full, known, pick
from nodes.steps._step import READINGS, RefusedError, StepOptions
from nodes.steps._table import RowStep, Table
from schemas.errors import ConfigError, Problem


class Config(StepOptions):
    """Options of ``rename``."""

    takes: ClassVar[frozenset[str]] = READINGS
    bare: ClassVar[dict[str, Any] | None] = {"type": "object", "additionalProperties": {"type": "string"}}

    fields: dict[str, str] = Field(min_length=1, description="name as it comes in: name as it goes on")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return value if full(value, "fields") else {"fields": value}

    @field_validator("fields")
    @classmethod
    def _distinct(cls, fields: dict[str, str]) -> dict[str, str]:
        twice = [new for new in fields.values() if list(fields.values()).count(new) > 1]
        if twice:
            raise ValueError(f"two fields would be named {twice[0]!r}")
        return fields

    def flow(self, flow: Flow) -> Flow:
        known(flow.fields, self.fields, "fields", keys=True)
        if flow.fields is None:
            return flow
        stay = flow.fields - set(self.fields)
        for old, new in self.fields.items():
            if new in stay:
                raise ConfigError(Problem(("fields", old), f"there is a field {new!r} already"))
        return Flow(flow.type, stay | set(self.fields.values()))


class Rename(RowStep):
    """Other names, same columns; each field keeps its place."""

    def __init__(self, config: Config) -> None:
        self.names = config.fields

    def apply(self, table: Table, ports: list[tuple[str, Table]]) -> Table:
        for old in self.names:
            pick(table.columns, old)
        columns = {self.names.get(name, name): column for name, column in table.columns.items()}
        if len(columns) < len(table.columns):
            twice = next(new for old, new in self.names.items() if new in table.columns and new not in self.names)
            raise RefusedError("duplicate-field", f"there is a field {twice!r} already")
        return table.with_columns(columns)


def build(config: Config, context: Context) -> RowStep:
    """The step."""
    return Rename(config)
