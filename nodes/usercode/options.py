"""Where in a topology a user's code is named: a file and a name in it, or ``package.module:name`` of what is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from nodes.operator import Context
from nodes.options import Options
from nodes.usercode.survey import find_module
from schemas.errors import ConfigError, Problem

_CALL = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


class CodeOptions(Options):
    """The keys that every kind with a user's code has."""

    path: str | None = Field(None, description="Python file with the function or class, from the topology's folder")
    function: str | None = Field(None, description="name of the function, or of the class, in that file")
    call: str | None = Field(None, description="instead of path and function: package.module:name of what is installed")
    options: dict[str, Any] = Field({}, description="keyword arguments for the function or the class")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.path is None) == (self.call is None):
            raise ValueError("expected either path (with function) or call")
        if (self.path is None) != (self.function is None):
            raise ValueError("path and function go together: the file, and the name in it")
        return self

    def where(self, context: Context) -> tuple[Path, str]:
        """File and name of the code.

        :raises ConfigError: there is no such file or module.
        """
        if self.path is not None and self.function is not None:
            file = context.path(self.path)
            if not file.is_file():
                raise ConfigError(Problem(("path",), f"there is no file {file}"))
            return file, self.function
        match = _CALL.fullmatch(self.call or "")
        if match is None:
            raise ConfigError(Problem(("call",), f"expected package.module:name, got {self.call!r}"))
        found = find_module(match[1])
        if found is None:
            raise ConfigError(Problem(("call",), f"there is no module {match[1]!r} here; is its package installed?"))
        return found, match[2]
