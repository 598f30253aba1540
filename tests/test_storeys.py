"""The storeys hold: a folder imports only what is below it, anywhere in its files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {"schemas": {"broker", "nodes"}, "broker": {"nodes"}, "nodes": set[str]()}
OUTSIDE = {"tests", "examples", "benchmarks", "deploy"}
DEV_ONLY = {"msgpack", "pytest", "hypothesis"}
"""What the product must run without."""


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, first part of the module's name) of every import, also within functions and by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "find_spec"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.split(".")[0]


@pytest.mark.parametrize("storey", ABOVE)
def test_a_storey_imports_only_those_below_it(storey: str) -> None:
    files = sorted((ROOT / storey).rglob("*.py"))
    assert files
    forbidden = ABOVE[storey] | OUTSIDE | DEV_ONLY
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path.read_text(encoding="utf-8"), storey)
        if name in forbidden
    ]
    assert wrong == []


def test_imports_are_seen_wherever_they_hide() -> None:
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g\nfrom . import h\nimport_module('i.j')\n"
    assert [name for _, name in sorted(imports(source, "own"))] == ["a", "c", "g", "own", "i"]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("schemas.codec", {"pydantic", "ruamel", "broker", "nodes", "asyncio"}),
        ("schemas.topology", {"broker", "nodes", "numpy", "asyncio"}),
        ("broker.bus", {"pydantic", "ruamel", "nodes"}),
        ("nodes.plan", {"av", "PIL", "ai_edge_litert", "httpx", "rich", "typer", "aiomqtt", "mqtt5"}),
    ],
)
def test_what_is_imported_is_light(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert forbidden & set(ran.stdout.split()) == set()
