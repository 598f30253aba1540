"""The user's own function or operator, from a file or an installed package.

``{custom: {path: my_node.py, function: clean, options: {limit: 5}}, from: sensors}``. docs/custom.md shows what a function
may take and answer. ``penstock check`` reads the code without running it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from nodes.operator import Context, Flow, Operator
from nodes.usercode.function import Function
from nodes.usercode.load import explain, load_file, load_module, pick, where
from nodes.usercode.options import CodeOptions
from nodes.usercode.survey import BODIES, Survey, check_options, survey
from schemas.errors import ConfigError, MissingError, Problem, did_you_mean
from schemas.messages import TYPE_OF, Message
from schemas.topics import LEVEL, RESERVED_PORTS

_TYPES = frozenset({"readings/1", "frame/1", "tensors/1", "predictions/1", "aggregate/1", "event/1"})


class Config(CodeOptions):
    """Options of ``custom``."""

    gives: str | dict[str, str] | None = Field(
        None,
        alias="emits",
        description="type of what comes out, e.g. readings/1, or port → type; without it the return annotation says it",
    )
    takes: list[str] | None = Field(None, description="types of messages that may come in; without it any")
    blocking: bool = Field(False, description="true: the function is slow and runs in a thread")

    def accepts(self) -> frozenset[str] | None:
        return None if self.takes is None else frozenset(self.takes)

    def _survey(self, context: Context) -> Survey:
        file, name = self.where(context)
        return survey(file, name, ("path", "function") if self.path is not None else ("call", "call"))

    def check(self, context: Context) -> None:
        found = self._survey(context)
        problems: list[Problem] = []
        try:
            check_options(self.options, found)
        except ConfigError as error:
            problems += error.problems
        if isinstance(self.gives, dict) and not self.gives:
            problems.append(Problem(("emits",), "expected at least one port"))
        problems += _types(("emits",), self.gives) + _types(("takes",), self.takes)
        for port in self.gives if isinstance(self.gives, dict) else ():
            if not LEVEL.fullmatch(port) or port in RESERVED_PORTS:
                problems.append(Problem(("emits", port), f"a port cannot be called {port!r}", on_key=True))
        if problems:
            raise ConfigError(*problems)

    def ports(self, found: Survey) -> dict[str, str]:
        """Port → type of what comes out.

        :raises ConfigError: nobody says it.
        """
        if isinstance(self.gives, dict):
            return self.gives
        if gives := self.gives or found.gives:
            return {"out": gives}
        raise ConfigError(
            "say what comes out, e.g. emits: readings/1"
            + ("" if found.is_class else ", or annotate what the function returns, e.g. -> Readings")
        )

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        found = self._survey(context)
        if found.takes is not None:
            for flow in inputs:
                if flow.type != found.takes:
                    raise ConfigError(f"the function takes {found.takes} and would be sent {flow.type}")
        return {port: Flow(kind) for port, kind in self.ports(found).items()}


def _types(path: tuple[str, ...], value: Any) -> list[Problem]:
    if isinstance(value, dict):
        return [p for port, kind in value.items() for p in _types((*path, port), kind)]
    if isinstance(value, list):
        return [Problem((*path, i), _unknown(kind)) for i, kind in enumerate(value) if kind not in _TYPES]
    return [] if value is None or value in _TYPES else [Problem(path, _unknown(value))]


def _unknown(kind: str) -> str:
    return f"unknown type {kind!r}{did_you_mean(kind, _TYPES)}"


def build(config: Config, context: Context) -> Operator:
    """Import the user's code and make the operator.

    :raises ConfigError: the code cannot be loaded, or is neither a plain function nor an operator.
    :raises MissingError: it imports what is not installed.
    """
    file, name = config.where(context)
    key = "function" if config.path is not None else "call"
    if config.path is not None:
        module = load_file(file, f"penstock_custom_{context.topology}_{context.node}".replace("-", "_"))
    else:
        module = load_module((config.call or "").partition(":")[0], file)
    found = pick(module, name, key, file)
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        raise ConfigError(Problem((key,), f"{name} is async; a custom node does no I/O and is a plain function"))
    if isinstance(found, type):
        return _operator(found, config, file, key)
    return _function(found, config, file, name, key)


def _operator(found: type, config: Config, file: Path, key: str) -> Operator:
    if not issubclass(found, Operator):
        raise ConfigError(Problem((key,), f"{found.__name__} is a class but does not derive nodes.operator.Operator"))
    try:
        made: Operator = found(**config.options)
    except (ConfigError, MissingError):
        raise
    except Exception as error:
        raise ConfigError(Problem(("options",), f"{where(error, file)}: {explain(error)}")) from error
    if config.blocking:
        made.blocking = True
    return made


def _function(found: Callable[..., Any], config: Config, file: Path, name: str, key: str) -> Operator:
    try:
        signature = inspect.signature(found)
        signature.bind(None, **config.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            Problem((key,), f"{name}() cannot be called with a message and these options: {error}")
        ) from None
    try:
        hints = typing.get_type_hints(found)
    except Exception:  # noqa: BLE001 - annotations may name anything; then the message is given as it is
        hints = {}
    first = hints.get(next(iter(signature.parameters)))
    args = typing.get_args(first)
    many = typing.get_origin(first) is not None and Message in args and type(None) not in args
    takes = first if isinstance(first, type) and first in TYPE_OF else None
    known = Survey(gives=_gives(hints.get("return")))
    return Function(
        partial(found, **config.options) if config.options else found,
        takes=takes,
        many=many,
        ports=config.ports(known),
        file=file,
        name=name,
        blocking=config.blocking,
    )


def _gives(hint: Any) -> str | None:
    """Type of the one body that a return annotation names."""
    named: set[str] = set()

    def walk(part: Any) -> None:
        if isinstance(part, type) and part.__name__ in BODIES and part in TYPE_OF:
            named.add(TYPE_OF[part])
        for inner in typing.get_args(part):
            walk(inner)

    walk(hint)
    return named.pop() if len(named) == 1 else None
