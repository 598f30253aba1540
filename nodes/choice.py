"""A kind chosen by its name within a config: ``mlp``, ``{mlp: {layers: [64, 10]}}``, or a bare value that stands for its options.

``preprocess`` has a list of steps written so, ``train`` a trainer, ``federate`` a strategy and a compressor. What is wrong in the
options has the path that the user wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, cast, get_args

from pydantic import GetJsonSchemaHandler, PlainSerializer, PlainValidator, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from nodes import kinds
from nodes.options import Options
from schemas.errors import ConfigError, Problem, did_you_mean

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """One kind with its options.

    :param inner: field that the shorthand stands for; it is not in what the user wrote, so not in paths either.
    """

    family: str
    name: str
    options: Options
    bare: bool
    inner: str | None

    def path(self, path: Path) -> Path:
        """Where ``path`` of the options stands in the entry as it was written."""
        if self.inner is not None and path[:1] == (self.inner,):
            path = path[1:]
        return path if self.bare else (self.name, *path)

    def plain(self) -> dict[str, Any]:
        """The name and all options, also those that were left out, as plain values: equal where the choices are."""
        return {self.name: self.options.model_dump(mode="json")}

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Problems that its options raise inside are those of the entry at ``path``."""
        try:
            yield
        except ConfigError as error:
            problems = (Problem((*path, *self.path(p.path)), p.message, p.offset, p.on_key) for p in error.problems)
            raise ConfigError(*problems) from None


def read(family: str, value: Any) -> Chosen:
    """``"decode"``, ``{"resize": [96, 96]}`` or ``{"resize": {"size": [96, 96]}}`` → the kind and its options.

    :raises ValidationError: as pydantic's validators do.
    """
    if isinstance(value, Chosen):
        return value
    name: Any
    raw: Any
    bare = isinstance(value, str)
    if bare:
        name, raw = value, {}
    elif isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value)), str):
        name, raw = next(iter(value.items()))
    else:
        raise PydanticCustomError(
            family, "expected a {family}: its name, or one name with its options", {"family": family}
        )
    try:
        config: type[Options] = kinds.module(family, name).Config
    except ConfigError as error:
        unknown = PydanticCustomError("unknown_kind", "{why}", {"why": str(error)})
        raise _invalid(family, [InitErrorDetails(type=unknown, loc=() if bare else (name,), input=name)]) from None
    fields = {} if raw is None else config.shorthand(raw)
    inner = None
    if isinstance(fields, dict) and fields is not raw and len(fields) == 1:
        inner = next((key for key, held in fields.items() if held is raw), None)
    frame = Chosen(family, name, config.model_construct(), bare, inner)
    try:
        options = config.model_validate(fields)
    except ValidationError as error:
        known = [info.alias or key for key, info in config.model_fields.items()]
        found = [_moved(e, frame.path, known) for e in error.errors(include_url=False)]
        raise _invalid(family, found) from None
    return Chosen(family, name, options, bare, inner)


def _moved(error: Any, path: Callable[[Path], Path], known: Iterable[str]) -> InitErrorDetails:
    """A problem of the options, as one of the entry."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden" and len(error["loc"]) == 1:
        key = str(error["loc"][0])
        why = {"why": f"unknown key {key!r}{did_you_mean(key, known)}"}
        return InitErrorDetails(
            type=PydanticCustomError("unknown_kind", "{why}", why), loc=path(error["loc"]), input=key
        )
    if kind not in _KNOWN:
        kind = PydanticCustomError(kind, "{reason}", {**context, "reason": error["msg"]})
    return InitErrorDetails(type=kind, loc=path(error["loc"]), input=error["input"], ctx=context)


_KNOWN = frozenset(get_args(ErrorType))


def _invalid(family: str, errors: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data(family, errors)


_within: set[str] = set()
"""Families whose schema is being made."""


class _Schema:
    """JSON Schema of a choice: a name, or one of the kinds with its options."""

    def __init__(self, family: str) -> None:
        self._family = family

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        del core
        alternatives: list[JsonSchemaValue] = [{"enum": list(kinds.names(self._family))}]
        if self._family in _within:  # a trainer that has a trainer: its schema would have no end
            return {"anyOf": [*alternatives, {"type": "object", "minProperties": 1, "maxProperties": 1}]}
        _within.add(self._family)
        try:
            return {"anyOf": [*alternatives, *self._kinds(handler)]}
        finally:
            _within.discard(self._family)

    def _kinds(self, handler: GetJsonSchemaHandler) -> list[JsonSchemaValue]:
        alternatives: list[JsonSchemaValue] = []
        for name in kinds.names(self._family):
            options = cast("type[Options]", kinds.module(self._family, name).Config)
            full = handler.resolve_ref_schema(handler(options.__pydantic_core_schema__))
            bare = getattr(options, "bare", None)
            alternatives.append(
                {
                    "type": "object",
                    "properties": {name: full if bare is None else {"anyOf": [bare, full]}},
                    "required": [name],
                    "additionalProperties": False,
                }
            )
        return alternatives


def choice(family: str) -> Any:
    """The type of a field that takes one kind of a family; its values are :class:`Chosen`."""
    return Annotated[
        Chosen,
        PlainValidator(lambda value: read(family, value)),
        PlainSerializer(lambda chosen: {chosen.name: chosen.options.model_dump()}),
        _Schema(family),
    ]
