"""What pydantic finds wrong in a user's config, in plain words and with paths into what the user wrote."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from schemas.errors import ConfigError, Problem, did_you_mean

M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "decimal": "a number",
    "bool": "true or false",
    "string": "a text",
    "bytes": "a text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen_set": "a list",
    "iterable": "a list",
    "dict": "a map",
    "mapping": "a map",
    "model": "a map",
    "dataclass": "a map",
    "none": "nothing",
    "is_instance": "something else",
    "path": "a path",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def validated(model: type[M], value: Any) -> M:
    """``value`` as ``model``.

    :raises ConfigError: it does not fit; paths are relative to ``value``.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError(*problems_of(error, model, value)) from None


def problems_of(
    error: ValidationError,
    model: type[BaseModel],
    value: Any,
    inner: Mapping[tuple[str | int, ...], type[BaseModel]] | None = None,
) -> list[Problem]:
    """pydantic's errors as problems: one for each fault, not one for each member of a union that did not fit.

    :param model: what was validated against; its field names serve "did you mean".
    :param value: what was validated, as the user wrote it; a path is followed in it.
    :param inner: models that stand at paths below ``model`` where its annotations do not tell.
    """
    models = {(): model, **(inner or {})}
    findings = [finding for details in error.errors(include_url=False) for finding in _findings(details, models, value)]
    groups: dict[object, list[_Finding]] = {}
    for number, finding in enumerate(findings):
        groups.setdefault(number if finding.union is None else finding.union, []).append(finding)
    return without_consequences([problem for group in groups.values() for problem in _merged(group)])


def missing(path: tuple[str | int, ...]) -> Problem:
    """The key at the end of ``path`` is not there."""
    return Problem(path, f"the key {str(path[-1])!r} is missing")


def without_consequences(problems: Sequence[Problem]) -> list[Problem]:
    """A key that is missing because it was misspelt is one fault, not two."""
    meant = {(p.path[:-1], p.message.partition("; did you mean ")[2]) for p in problems if p.on_key}
    return [p for p in problems if p != missing(p.path or ("",)) or (p.path[:-1], f"{str(p.path[-1])!r}?") not in meant]


def shown(value: Any) -> str:
    """A value as its writer knows it: short, YAML's words."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a map"
        case list() | tuple():
            return "a list"
        case str() if len(value) > 48:
            return repr(value[:45] + "…")
    return repr(value)


@dataclass(slots=True)
class _Finding:
    """One of pydantic's errors.

    :param expected: for a value that does not fit: what would; such findings of one union are said together.
    :param union: path of the union whose member this was, if it was one.
    """

    problem: Problem
    expected: str
    got: str
    union: tuple[str | int, ...] | None


def _findings(details: Any, models: Mapping[tuple[str | int, ...], type[BaseModel]], value: Any) -> Iterator[_Finding]:
    kind: str = details["type"]
    context: dict[str, Any] = details.get("ctx", {})
    path, union, on_key, parent = _follow(details["loc"], value, missing=kind == "missing")
    got = shown(details["input"])
    inner = context.get("error")
    if kind == "value_error" and isinstance(inner, ValidationError):
        for deeper in inner.errors(include_url=False):
            for finding in _findings(deeper, models, details["input"]):
                at = finding.problem
                finding.problem = Problem((*path, *at.path), at.message, at.offset, at.on_key)
                yield finding
        return
    expected, message = "", ""
    stem = kind.removesuffix("_parsing").removesuffix("_type")
    if kind == "missing":
        message = missing(path).message
    elif kind == "extra_forbidden":
        known = _fields(_model_at(models, parent))
        on_key, message = True, f"unknown key {str(path[-1])!r}{did_you_mean(str(path[-1]), known)}"
    elif kind in {"value_error", "assertion_error"}:
        message = str(inner)
    elif kind in {"literal_error", "enum"}:
        wrong = details["input"]
        expected = str(context["expected"])
        choices = [e.strip("'") for e in expected.replace(" or ", ", ").split(", ")]
        hint = did_you_mean(wrong, choices) if isinstance(wrong, str) else ""
        message = f"expected {expected}, got {got}" + (hint if "did you mean" in hint else "")
        expected = "" if "did you mean" in hint else expected
    elif kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        expected = f"{words} {context[key]:g}" if isinstance(context[key], float) else f"{words} {context[key]}"
    elif kind in {"too_short", "too_long"}:
        message = f"expected {_bound(context, 'item')}, got {context['actual_length']}"
    elif kind in {"string_too_short", "string_too_long"}:
        message = f"expected {_bound(context, 'character')}, got {got}"
    elif kind == "string_pattern_mismatch":
        message = f"{got} does not match {context['pattern']}"
    elif kind == "int_from_float":
        expected = "a whole number"
    elif kind == "finite_number":
        expected = "a finite number"
    elif stem in _EXPECTED:
        expected = _EXPECTED[stem]
    else:
        message = str(details["msg"])
    if expected and not message:
        message = f"expected {expected}, got {got}"
    on_key = on_key or (kind == "unknown_kind" and path[-1:] == (details["input"],))
    offset = context.get("offset", 0)  # the expression compiler's
    yield _Finding(Problem(path, message, offset, on_key), expected, got, union)


def _bound(context: Mapping[str, Any], thing: str) -> str:
    """``at least 1 item``, ``at most 3 items``."""
    words, limit = (
        ("at least", context["min_length"]) if "min_length" in context else ("at most", context["max_length"])
    )
    return f"{words} {limit} {thing}{'' if limit == 1 else 's'}"


def _follow(
    loc: Sequence[str | int], value: Any, *, missing: bool
) -> tuple[tuple[str | int, ...], tuple[str | int, ...] | None, bool, tuple[str | int, ...]]:
    """pydantic's location as a path in ``value``: names of union members are left out, as they are not in the text."""
    path: list[str | int] = []
    union: tuple[str | int, ...] | None = None
    on_key = False
    for i, step in enumerate(loc):
        if step == "[key]":
            on_key = True
        elif isinstance(value, dict) and step in value:
            path.append(step)
            value = value[step]
        elif isinstance(value, dict) and isinstance(step, str) and step.isdecimal() and int(step) in value:
            path.append(int(step))
            value = value[int(step)]
        elif isinstance(value, (list, tuple)) and isinstance(step, int) and step < len(value):
            path.append(step)
            value = value[step]
        elif missing and i == len(loc) - 1:
            path.append(step)
        elif union is None:
            union = tuple(path)
    return tuple(path), union, on_key, tuple(path[:-1])


def _merged(group: list[_Finding]) -> Iterator[Problem]:
    """The faults of one union: those that got furthest say most; of equal ones, what each would have taken."""
    if len(group) == 1:
        yield group[0].problem
        return
    deepest = max(len(f.problem.path) for f in group)
    by_path: dict[tuple[str | int, ...], list[_Finding]] = {}
    for finding in group:
        if len(finding.problem.path) == deepest:
            by_path.setdefault(finding.problem.path, []).append(finding)
    for path, findings in by_path.items():
        plain = [f for f in findings if not f.expected]
        if plain:
            yield plain[0].problem
        else:
            choices = list(dict.fromkeys(f.expected for f in findings))
            yield Problem(path, f"expected {' or '.join(choices)}, got {findings[0].got}")


def _fields(model: type[BaseModel] | None) -> list[str]:
    if model is None:
        return []
    return [info.alias or name for name, info in model.model_fields.items()]


def _model_at(
    models: Mapping[tuple[str | int, ...], type[BaseModel]], path: tuple[str | int, ...]
) -> type[BaseModel] | None:
    """The model that stands at ``path``, as far as annotations tell, from the nearest of ``models`` on."""
    start = max((at for at in models if path[: len(at)] == at), key=len)
    current: list[Any] = [models[start]]
    for step in path[len(start) :]:
        following: list[Any] = []
        for annotation in current:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                fields = annotation.model_fields
                named = [info.annotation for name, info in fields.items() if step in {name, info.alias}]
                following += [part for a in named for part in _parts(a)]
            else:  # a list's or map's element
                following += [part for a in typing.get_args(annotation) for part in _parts(a)]
        current = following
    return next((a for a in current if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _parts(annotation: Any) -> list[Any]:
    """Members of a union, through Annotated."""
    if typing.get_origin(annotation) in {typing.Union, UnionType, typing.Annotated}:
        return [part for a in typing.get_args(annotation) for part in _parts(a)]
    return [annotation]
