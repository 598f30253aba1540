"""Field names in the options of steps: what is known before running, and the error for a message that lacks one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.expressions import MissingFieldError
from schemas.messages import Column


def known(fields: frozenset[str] | None, wanted: Iterable[str], *path: str, keys: bool = False) -> None:
    """Refuse names that are not among ``fields`` (None: not known).

    :param path: of the list or map that has the names.
    :param keys: it is a map, and the names are its keys.
    :raises ConfigError: with every unknown name.
    """
    if fields is None:
        return
    problems = [
        Problem((*path, name if keys else i), f"unknown field {name!r}{did_you_mean(name, fields)}", on_key=keys)
        for i, name in enumerate(wanted)
        if name not in fields
    ]
    if problems:
        raise ConfigError(*problems)


def pick(columns: Mapping[str, Column], name: str) -> Column:
    """The column of this name.

    :raises MissingFieldError: there is none.
    """
    try:
        return columns[name]
    except KeyError:
        raise MissingFieldError(name) from None


def full(value: Any, *options: str) -> bool:
    """Whether a map in a topology is the full form of a step (its keys are options) and not a map of field names."""
    return (
        isinstance(value, dict)
        and bool(value)
        and set(value) <= set(options)
        and isinstance(value.get(options[0], {}), (dict, list))
    )
