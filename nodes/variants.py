"""Node kinds that are a family of kinds: ``{ingest: {source: csv, …}}`` is flat, its options those of the source named.

Shared by :mod:`nodes.ingest` and :mod:`nodes.uplink`. Nothing here knows a kind by name: adding one is adding its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

from pydantic import ConfigDict, GetJsonSchemaHandler, PrivateAttr, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, ValidationError

from nodes import kinds
from nodes.operator import Context, Flow
from nodes.options import Options
from schemas.errors import ConfigError


def variants(family: str) -> dict[str, type[Options]]:
    """Every kind of a family with the options that it takes; imports them all (for ``penstock nodes`` and ``schema``)."""
    return {name: cast("type[Options]", kinds.module(family, name).Config) for name in kinds.names(family)}


class VariantConfig(Options):
    """Options that begin with the name of a kind; all others are that kind's own.

    A subclass says the ``family`` and has a text field of that name. Errors of the kind's options have the paths that
    the user wrote.
    """

    model_config = ConfigDict(extra="allow", frozen=True, arbitrary_types_allowed=True)

    family: ClassVar[str]
    _options: Options = PrivateAttr()

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        name = self.kind
        try:
            module = kinds.module(self.family, name)
        except ConfigError as error:
            problem = PydanticCustomError("unknown_kind", "{why}", {"why": str(error)})
            where = InitErrorDetails(type=problem, loc=(self.family,), input=name)
            raise ValidationError.from_exception_data(type(self).__name__, [where]) from None
        self._options = module.Config.model_validate(self.model_extra or {})
        return self

    @property
    def kind(self) -> str:
        """Name of the kind that was chosen."""
        return cast("str", getattr(self, self.family))

    @property
    def options(self) -> Options:
        """The options of the kind that was chosen."""
        return self._options

    @classmethod
    def together(cls, name: str) -> type[Options]:
        """The options of one kind together with those that stand beside all kinds of the family, as one model."""
        fields: dict[str, Any] = {key: (info.annotation, info) for key, info in cls._common().items()}
        return create_model(name, __base__=cast("type[Options]", kinds.module(cls.family, name).Config), **fields)

    @classmethod
    def _common(cls) -> dict[str, FieldInfo]:
        return {key: info for key, info in cls.model_fields.items() if key != cls.family}

    def check(self, context: Context) -> None:
        self._options.check(context)

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        return self._options.emits(inputs, context)

    def accepts(self) -> frozenset[str] | None:
        return self._options.accepts()

    def whole(self) -> str | None:
        return self._options.whole()

    def build(self, context: Context) -> Any:
        """What the kind builds."""
        return kinds.module(self.family, self.kind).build(self._options, context)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """One alternative for each kind, told apart by its name."""
        del core
        alternatives = []
        for name, options in variants(cls.family).items():
            options = cls.together(name) if cls._common() else options
            schema = handler.resolve_ref_schema(handler(options.__pydantic_core_schema__))
            chosen = {cls.family: {"const": name, "title": cls.family.capitalize()}}
            alternatives.append(
                {
                    **schema,
                    "title": f"{cls.family} {name}",
                    "properties": {**chosen, **schema.get("properties", {})},
                    "required": [cls.family, *schema.get("required", [])],
                }
            )
        return {"oneOf": alternatives}
