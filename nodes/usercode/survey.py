"""What can be known of a user's function or class from its text alone: ``penstock check`` runs no user code."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from schemas.errors import ConfigError, Problem, did_you_mean
from schemas.messages import TYPE_OF

BODIES = {body.__name__: name for body, name in TYPE_OF.items()}
"""Name of a body's class → its type on the wire."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the text says.

    :param known: False: the name is there but made in a way that text alone does not tell (imported, assigned).
    :param is_class: it is a class.
    :param parameters: names that options may have; None: any.
    :param required: options that must be given.
    :param takes: type of the body that it wants, e.g. ``readings/1``; None: whole messages.
    :param gives: type of what it answers with; None: not said.
    """

    known: bool = False
    is_class: bool = False
    parameters: frozenset[str] | None = None
    required: frozenset[str] = frozenset()
    takes: str | None = None
    gives: str | None = None


def find_module(dotted: str) -> Path | None:
    """The file of a module, found without importing anything; None: there is none, or it has no file."""
    where: list[str] | None = None
    origin: str | None = None
    name = ""
    for part in dotted.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, where)
        if spec is None:
            return None
        origin = spec.origin
        where = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else []
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def survey(file: Path, name: str, keys: tuple[str, str]) -> Survey:
    """Look at ``name`` in ``file``.

    :param keys: keys of the config that name the file and the function, for problems.
    :raises ConfigError: the file cannot be read or is no Python, or has nothing of that name, or it is async.
    """
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except OSError as error:
        raise ConfigError(Problem((keys[0],), f"cannot read {file}: {error.strerror}")) from None
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(Problem((keys[0],), f"{file.name}{line}: {what}")) from None
    found: ast.stmt | None = None
    names: set[str] = set()
    for node in tree.body:
        made = _names(node)
        names |= made
        if name in made or "*" in made:
            found = node
    if found is None:
        public = [n for n in names if not n.startswith("_")]
        raise ConfigError(Problem((keys[1],), f"{file.name} has no {name!r}{did_you_mean(name, public)}"))
    if isinstance(found, ast.AsyncFunctionDef):
        raise ConfigError(
            Problem(
                (keys[1],),
                f"{file.name}:{found.lineno}: {name} is async; a custom node does no I/O and is a plain function"
                " (blocking: true runs a slow one in a thread)",
            )
        )
    if isinstance(found, ast.ClassDef):
        return _class(found)
    if isinstance(found, ast.FunctionDef):
        return _function(found, file, keys)
    return Survey()


def _names(node: ast.stmt) -> set[str]:
    """Names that a statement at the top of a module makes; anything nested (if, try, with) counts too."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    out = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            out |= _names(child)
    return out


def _function(node: ast.FunctionDef, file: Path, keys: tuple[str, str]) -> Survey:
    positional = [*node.args.posonlyargs, *node.args.args]
    if not positional:
        raise ConfigError(
            Problem((keys[1],), f"{file.name}:{node.lineno}: {node.name}() takes no message; give it one parameter")
        )
    parameters, required = _options(node.args, skip=1)
    return Survey(True, False, parameters, required, _body(positional[0].annotation), _gives(node.returns))


def _class(node: ast.ClassDef) -> Survey:
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            parameters, required = _options(child.args, skip=1)
            return Survey(True, True, parameters, required)
    return Survey(True, True)  # made by a base class or a decorator: not known


def _options(args: ast.arguments, skip: int) -> tuple[frozenset[str] | None, frozenset[str]]:
    positional = [*args.posonlyargs, *args.args]
    free = [a.arg for a in positional[skip:]]
    needed = positional[skip : max(len(positional) - len(args.defaults), skip)]
    required = {a.arg for a in needed}
    required |= {a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None}
    names = frozenset(free) | frozenset(a.arg for a in args.kwonlyargs)
    return (None if args.kwarg else names), frozenset(required)


def _words(annotation: ast.expr | None) -> Iterable[str]:
    if annotation is None:
        return
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            annotation = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _body(annotation: ast.expr | None) -> str | None:
    """Type of the one body that an annotation names."""
    if annotation is None or isinstance(annotation, ast.Subscript):
        return None
    named = {BODIES[word] for word in _words(annotation) if word in BODIES}
    return named.pop() if len(named) == 1 else None


def _gives(annotation: ast.expr | None) -> str | None:
    """Type of the one body that a return annotation names, alone or in a container, with or without None."""
    words = set(_words(annotation))
    named = {BODIES[word] for word in words if word in BODIES}
    return named.pop() if len(named) == 1 and "Message" not in words else None


def check_options(options: Iterable[str], found: Survey) -> None:
    """Refuse options that the function does not take, and missing ones.

    :raises ConfigError: with a problem for each, under ``options``.
    """
    given = set(options)
    problems = []
    if found.parameters is not None:
        problems += [
            Problem(("options", name), f"unknown option {name!r}{did_you_mean(name, found.parameters)}", on_key=True)
            for name in sorted(given - found.parameters)
        ]
    problems += [Problem(("options",), f"option {name!r} is missing") for name in sorted(found.required - given)]
    if problems:
        raise ConfigError(*problems)
