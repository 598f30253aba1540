"""Libraries that are loaded when something of them is first used.

Every kind imports numpy, and a command that only reads a topology uses none of it: that was a sixth of its time. The
standard library's ``LazyLoader`` does not serve here: the ``import`` statement itself looks at the module's ``__spec__``, and
that loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any


class _Late(ModuleType):
    """Stands for a module until something that is not there yet is asked of it: then it becomes it."""

    def __getattr__(self, name: str) -> Any:
        _become(self)
        return getattr(self, name)


def _become(module: _Late) -> None:
    spec = module.__spec__
    assert spec is not None  # noqa: S101 - for the type checker; it was made of one
    assert spec.loader is not None  # noqa: S101 - likewise
    module.__class__ = ModuleType  # type: ignore[assignment] # as in importlib.util: the object stays, what it is changes
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise


class _Within(MetaPathFinder):
    """Asked for a part of a module that is still late: has the whole loaded first.

    C extensions begin so, with ``numpy._core._multiarray_umath``. The part is then there as a rule, and must not be loaded twice.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        whole = sys.modules.get(fullname.partition(".")[0])
        if not isinstance(whole, _Late):
            return None
        _become(whole)
        if (there := sys.modules.get(fullname)) is None:
            return None
        spec = spec_from_loader(fullname, _There(there))
        there.__spec__ = None  # with a spec of its own the import system would take that one, and load it again
        return spec


class _There(Loader):
    """Gives a module that is loaded already, as it is."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def late(name: str) -> None:
    """Have the module ``name`` loaded at its first use instead of its first import. Before anything imports it."""
    spec = find_spec(name)
    if spec is None or spec.loader is None or name in sys.modules:
        return
    module = module_from_spec(spec)
    module.__class__ = _Late
    sys.modules[name] = module
    if not any(isinstance(finder, _Within) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Within())
