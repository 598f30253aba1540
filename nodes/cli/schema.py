"""``penstock schema``: JSON Schema (2020-12) of a topology, and of every message on the wire."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pydantic.json_schema import GenerateJsonSchema

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def topology_schema() -> dict[str, Any]:
    """The schema of a topology file, with the options of every kind: an editor completes and checks with it.

    Short forms (a bare value where a map may stand) are let through unchecked; ``penstock check`` knows more than any
    schema.
    """
    from pydantic.json_schema import models_json_schema

    from nodes import kinds
    from nodes.options import Options
    from schemas.topology_parts import Document, EdgeOptions

    configs: dict[str, type[Options]] = {name: kinds.module("node", name).Config for name in kinds.names("node")}
    refs, schema = models_json_schema(
        [(Document, "validation"), (EdgeOptions, "validation"), *((c, "validation") for c in configs.values())],
        ref_template="#/$defs/{model}",
        schema_generator=_generator(),
    )
    defs: dict[str, Any] = schema["$defs"]
    document = defs.pop(refs[Document, "validation"]["$ref"].rsplit("/", 1)[-1])
    node = defs["NodeSettings"]
    for name, config in configs.items():
        options: dict[str, Any] = dict(refs[config, "validation"])
        if config.shorthand.__func__ is not Options.shorthand.__func__:  # type: ignore[attr-defined] # classmethods
            options = _or_short(options)
        node["properties"][name] = {**options, "description": f"makes this a node of kind {name}"}
    node["oneOf"] = [{"required": [name]} for name in configs]
    return {"$schema": DIALECT, **document, "title": "Penstock topology", "$defs": defs}


def _generator() -> type[GenerateJsonSchema]:
    """A generator that knows that what stands before a validator may have a short form that the validator expands."""
    from pydantic.json_schema import GenerateJsonSchema

    class Lenient(GenerateJsonSchema):
        def function_before_schema(self, schema: Any) -> dict[str, Any]:
            return _or_short(super().function_before_schema(schema))

    return Lenient


def _or_short(full: dict[str, Any]) -> dict[str, Any]:
    """``full``, or anything of another type; what is named by a reference is a map."""
    kind = "object" if "$ref" in full else full.get("type")
    return {"anyOf": [full, {"not": {"type": kind}}]} if isinstance(kind, str) else full


def message_schema(kind: str | None = None) -> dict[str, Any]:
    """The schema of all messages, or of those of one type (``readings/1``; ``readings`` for its newest version).

    :raises ConfigError: there is no such type.
    """
    from schemas.wire import json_schemas

    everything = json_schemas()
    if kind is None:
        return everything
    defs: dict[str, Any] = everything["$defs"]
    by_type = {}
    for member in everything["oneOf"]:
        name = member["$ref"].rsplit("/", 1)[-1]
        by_type[str(_constant(defs[name]["properties"]["type"]))] = name
    full = kind if "/" in kind else max((t for t in by_type if t.startswith(f"{kind}/")), default=kind)
    if full not in by_type:
        raise ConfigError(f"there is no message type {kind!r}{did_you_mean(kind, by_type)}")
    used = _reached(defs, by_type[full])
    return {
        "$schema": DIALECT,
        "$ref": f"#/$defs/{by_type[full]}",
        "$defs": {name: value for name, value in defs.items() if name in used},
    }


def _constant(schema: dict[str, Any]) -> Any:
    return schema["const"] if "const" in schema else schema["enum"][0]


def _reached(defs: dict[str, Any], start: str) -> set[str]:
    """Names of the definitions that one leads to, itself included."""
    seen, waiting = {start}, [start]
    while waiting:
        text = json.dumps(defs[waiting.pop()])
        for name in defs:
            if name not in seen and f'"#/$defs/{name}"' in text:
                seen.add(name)
                waiting.append(name)
    return seen


def command(
    what: Annotated[
        str, typer.Argument(help="topology, messages, or one message type, e.g. readings/1.", metavar="WHAT")
    ] = "topology",
) -> None:
    """Print the JSON Schema of a topology file or of the messages on the wire."""
    schema = topology_schema() if what == "topology" else message_schema(None if what == "messages" else what)
    print(json.dumps(schema, ensure_ascii=False, indent=2))
