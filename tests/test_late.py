"""Libraries that are loaded at their first use, in a process of its own each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def runs(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"from nodes.cli._late import late; late('numpy')\nimport sys, numpy\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_import_alone_loads_nothing() -> None:
    assert runs("print('numpy._core' in sys.modules)").strip() == "False"


@pytest.mark.parametrize(
    "first",
    [
        "numpy.zeros(1)",
        "import numpy.linalg",
        "from numpy import random",
        "from numpy.linalg import inv",
        "import importlib; importlib.import_module('numpy._core._multiarray_umath')",  # as C extensions begin
        "import numpy.testing",
    ],
)
def test_it_is_loaded_whole_and_once(first: str) -> None:
    code = """
before = {name: module for name, module in sys.modules.items() if name.startswith('numpy.')}
import numpy.testing, numpy.linalg, numpy.random
assert numpy._core is sys.modules['numpy._core']
assert numpy._core._multiarray_umath is sys.modules['numpy._core._multiarray_umath']
assert all(sys.modules[name] is module for name, module in before.items())
assert numpy.__spec__.name == 'numpy' and numpy._core.__spec__.name == 'numpy._core'
assert numpy._core.__spec__.loader is numpy._core.__loader__, numpy._core.__spec__
print(float(numpy.linalg.inv(numpy.eye(2)).sum()))
"""
    assert runs(first + code).strip() == "2.0"


def test_what_is_not_there_is_told_as_usual() -> None:
    with pytest.raises(AssertionError, match=r"No module named 'numpy\.nothing'"):
        runs("import numpy.nothing")
