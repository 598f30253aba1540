"""What there is to know of a kind for ``penstock nodes`` and the reference in the documentation."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes import kinds
from nodes.options import Options
from schemas.errors import ConfigError, did_you_mean
from schemas.units import Duration, Size

if TYPE_CHECKING:
    from pydantic import BaseModel

FAMILIES = ("node", *kinds.FAMILIES)


@dataclass(frozen=True, slots=True)
class Option:
    """One key of a kind's config.

    :param type: what may be written there, in words.
    :param default: as JSON, or None where the key must be given.
    """

    name: str
    type: str
    required: bool
    default: Any
    description: str


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind, described.

    :param extra: extra of the distribution that brings what it needs, ``""`` for none.
    :param within: family whose options stand beside its own (``ingest`` takes those of its source), ``""`` for none.
    :param short: whether a bare value may stand for the map.
    """

    family: str
    name: str
    text: str
    extra: str = ""
    within: str = ""
    short: bool = False
    options: list[Option] = field(default_factory=list)


def summary(family: str, name: str) -> str:
    """What a kind does, in one sentence, from its file: nothing is imported."""
    folder = "nodes" if family == "node" else kinds.FAMILIES[family]
    spec = find_spec(f"{folder}.{name.replace('-', '_')}")
    if spec is None or spec.origin is None:
        raise ConfigError(f"the {family} {name!r} has no file")
    return _sentence(ast.get_docstring(ast.parse(Path(spec.origin).read_bytes())))


def find(name: str) -> list[tuple[str, str]]:
    """Every kind of that name as (family, name); ``sink/mqtt`` asks for one family's.

    :raises ConfigError: there is none; says which one may be meant.
    """
    wanted, _, rest = name.rpartition("/")
    if wanted and wanted not in FAMILIES:
        raise ConfigError(f"there is no family {wanted!r}{did_you_mean(wanted, FAMILIES)}")
    families = (wanted,) if wanted else FAMILIES
    found = [(family, rest) for family in families if rest in kinds.names(family)]
    if not found:
        known = [kind for family in families for kind in kinds.names(family)]
        raise ConfigError(f"there is no kind {rest!r}{did_you_mean(rest, known)}")
    return found


def describe(family: str, name: str) -> Kind:
    """All there is to know of one kind, from its config; imports it."""
    module = kinds.module(family, name)
    config: type[Options] = module.Config
    within = str(getattr(config, "family", ""))
    return Kind(
        family=family,
        name=name,
        text=inspect.getdoc(module) or "",
        extra=str(getattr(module, "EXTRA", "")),
        within=within,
        short=config.shorthand.__func__ is not Options.shorthand.__func__,  # type: ignore[attr-defined] # classmethods
        options=_options(config),
    )


def _options(config: type[BaseModel], prefix: str = "", outer: tuple[type, ...] = ()) -> list[Option]:
    """The keys of a config; those of a map within it follow it, as ``batch.max``."""
    from pydantic import BaseModel, TypeAdapter

    out = []
    for name, info in config.model_fields.items():
        # the field's own schema: a kind may show its whole as alternatives (ingest: one for each source)
        schema = TypeAdapter(_annotated(info)).json_schema()
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        inner = [(path, model) for path, model in _models(info.annotation, "") if model not in (*outer, config)]
        if isinstance(default, BaseModel) and inner:
            default = {}  # its keys say their defaults themselves
        default = _plain(default)
        if isinstance(default, int) and not isinstance(default, bool):
            default = _with_unit(default, schema)
        key = prefix + (info.alias or name)
        out.append(Option(key, type_text(schema), info.is_required(), default, info.description or ""))
        for path, model in inner:
            out += _options(model, f"{key}{path}.", (*outer, config))
    return out


def _models(annotation: Any, path: str) -> list[tuple[str, type[BaseModel]]]:
    """Models that may stand in a value of this type, with the way to them: ``.*`` through a map, ``[]`` through a list."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(path, annotation)]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return []
    arguments = typing.get_args(annotation)
    step = ""
    if origin is dict:
        step, arguments = ".*", arguments[1:]
    elif origin in {list, tuple, set, frozenset}:
        step = "[]"
    elif origin is typing.Annotated:
        arguments = arguments[:1]
    return [found for argument in arguments for found in _models(argument, path + step)]


def _annotated(info: Any) -> Any:
    from typing import Annotated

    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _plain(value: Any) -> Any:
    """A default as plain JSON values; of a config within it only what is not a default itself."""
    from pydantic import BaseModel
    from pydantic_core import to_jsonable_python

    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return to_jsonable_python(value, fallback=str)


def _with_unit(default: int, schema: Any) -> int | str:
    """A default as its writer would write it: durations are kept in ns and sizes in bytes."""
    from pydantic import TypeAdapter

    for quantity, units in ((Duration, _DURATIONS), (Size, _SIZES)):
        examples = TypeAdapter(quantity).json_schema()["examples"]
        if default and any(part.get("examples") == examples for part in (schema, *schema.get("anyOf", ()))):
            unit, factor = next((u, f) for u, f in units.items() if default % f == 0)
            return f"{default // factor}{unit}"
    return default


def type_text(schema: Any, defs: dict[str, Any] | None = None) -> str:
    """What a JSON Schema takes, in a few words."""
    if not isinstance(schema, dict) or not schema:
        return "anything"
    defs = schema.get("$defs", defs or {})
    if "$ref" in schema:
        name = str(schema["$ref"]).rsplit("/", 1)[-1]
        target = (defs or {}).get(name, {})
        return type_text(target, defs) if {"enum", "anyOf", "type"} & target.keys() else name
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return _some(list(map(str, schema["enum"])), " | ")
    for key in ("anyOf", "oneOf"):
        if key in schema:
            parts = [type_text(part, defs) for part in schema[key] if part != {"type": "null"}]
            if len(parts) > _MANY:
                parts = [re.sub(r"^map .*", "map", part) for part in parts]
            return _some(list(dict.fromkeys(parts)), " or ")
    kind: Any = schema.get("type", "anything")
    if isinstance(kind, list):
        text = " or ".join(_WORDS.get(str(k), str(k)) for k in kind)
    elif kind == "array":
        items = schema.get("prefixItems")
        inner = ", ".join(type_text(i, defs) for i in items) if items else type_text(schema.get("items"), defs)
        text = f"[{inner}]" if items else f"list of {inner}"
    elif kind == "object":
        if "properties" in schema:
            text = "map with " + ", ".join(schema["properties"])
        else:
            text = f"map of {type_text(schema.get('additionalProperties'), defs)}"
    else:
        text = _WORDS.get(str(kind), str(kind))
    if examples := schema.get("examples"):
        text = f"{text} ({', '.join(map(str, examples))})"
    return text + _bounds(schema)


def _some(parts: list[str], between: str) -> str:
    """All of them, or the first few of many."""
    return between.join(parts if len(parts) <= _MANY else [*parts[: _MANY - 1], "…"])


_MANY = 12
_DURATIONS = {"h": 3600 * 10**9, "min": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_SIZES = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
_WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true | false",
    "null": "nothing",
}
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _bounds(schema: dict[str, Any]) -> str:
    found = [f"{sign} {schema[key]:g}" for key, sign in _SIGNS.items() if isinstance(schema.get(key), (int, float))]
    return f" {', '.join(found)}" if found else ""


def _sentence(text: str | None) -> str:
    """The first line of a docstring as a sentence, without the example that may follow a colon in it."""
    line = (text or "").strip().split("\n", 1)[0]
    return re.split(r":\s+``", line)[0].replace("``", "").rstrip(".:; ") + "."
