"""Libraries that are loaded when something of them is first used.

Every kind imports numpy, and a command that only reads a topology uses none of it: that was a sixth of its time. The
standard library's ``LazyLoader`` does not serve here: the ``import`` statement itself looks at the module's ``__spec__``, and
that loads it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


class _Late(ModuleType):
    """Stands for a module until something that is not there yet is asked of it, its ``__path__`` included: then it becomes it."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None  # noqa: S101 - for the type checker; it was made of one
        assert spec.loader is not None  # noqa: S101 - likewise
        self.__class__ = ModuleType  # type: ignore[assignment] # as in importlib.util: the object stays, what it is changes
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        return getattr(self, name)


def late(name: str) -> None:
    """Have the module ``name`` loaded at its first use instead of its first import. Before anything imports it."""
    spec = find_spec(name)
    if spec is None or spec.loader is None or name in sys.modules:
        return
    module = module_from_spec(spec)
    vars(module).pop("__path__", None)
    module.__class__ = _Late
    sys.modules[name] = module
