"""Loading the user's code from where it lies, and its errors in his own file and line."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from schemas.errors import ConfigError, MissingError, Problem


def where(error: BaseException, file: Path) -> str:
    """``my_node.py:12``: the deepest line of the user's file that an exception came through; its name alone if none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    return f"{file.name}:{lines[-1]}" if lines else file.name


def explain(error: BaseException) -> str:
    """``ValueError: no such line``, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load_file(file: Path, name: str) -> ModuleType:
    """The module of a file, new for every call, under ``name``; ``sys.path`` stays as it is.

    :raises ConfigError: it cannot be loaded.
    :raises MissingError: it imports what is not installed.
    """
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(Problem(("path",), f"{file} is no Python file"))
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the user's classes look here
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _translated(error, file, "path") from error
    return module


def load_module(dotted: str, file: Path) -> ModuleType:
    """An installed module.

    :param file: its file, for errors.
    :raises ConfigError: it cannot be loaded.
    :raises MissingError: it imports what is not installed.
    """
    try:
        return import_module(dotted)
    except BaseException as error:
        raise _translated(error, file, "call") from error


def _translated(error: BaseException, file: Path, key: str) -> BaseException:
    if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name:
        return MissingError(f"{error.name}, which {where(error, file)} imports,")
    if isinstance(error, FileNotFoundError) and error.filename == str(file):
        return ConfigError(Problem((key,), f"there is no file {file}"))
    what = error.msg if isinstance(error, SyntaxError) else explain(error)
    return ConfigError(Problem((key,), f"{where(error, file)}: {what}"))


def pick(module: ModuleType, name: str, key: str, file: Path) -> Any:
    """``name`` of a module.

    :raises ConfigError: it has none, or it cannot be called.
    """
    found = getattr(module, name, None)
    if not callable(found):
        what = "has no" if found is None else "has no function or class"
        raise ConfigError(Problem((key,), f"{file.name} {what} {name!r}"))
    return found
