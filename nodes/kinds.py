"""Finding kinds by name: a kind's name is its file's name, and it is imported only when a topology names it."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from schemas.errors import ConfigError, did_you_mean

NODE_KINDS = (
    *("ingest", "preprocess", "infer", "aggregate", "join", "uplink", "custom"),
    *("train", "federate", "pool", "answer", "ask"),
)
"""Node kinds, each a module of this package."""

FAMILIES = {
    "source": "nodes.sources",
    "step": "nodes.steps",
    "backend": "nodes.backends",
    "decoder": "nodes.decoders",
    "sink": "nodes.sinks",
    "trainer": "nodes.trainers",
    "strategy": "nodes.strategies",
    "compressor": "nodes.compressors",
}
"""Families of kinds within a node, each a folder: adding a file there adds the kind."""


@cache
def names(family: str) -> tuple[str, ...]:
    """Names of all kinds of a family, without importing them. ``node`` is the family of node kinds."""
    if family == "node":
        return NODE_KINDS
    spec = find_spec(FAMILIES[family])
    found = pkgutil.iter_modules(spec.submodule_search_locations if spec else None)
    return tuple(sorted(m.name.replace("_", "-") for m in found if not m.name.startswith("_")))


def module(family: str, name: str) -> ModuleType:
    """The module of kind ``name``.

    :raises ConfigError: there is none of that name; says which one may be meant.
    """
    if name not in names(family):
        raise ConfigError(f"unknown {family} {name!r}{did_you_mean(name, names(family))}")
    folder = "nodes" if family == "node" else FAMILIES[family]
    return import_module(f"{folder}.{name.replace('-', '_')}")
