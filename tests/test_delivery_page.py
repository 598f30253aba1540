"""docs/delivery.md names a test for each promise, and each of them exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "delivery.md").read_text()
NAME = re.compile(r"`(tests/[^`]*?)::(\w+)`")
NAMED = NAME.findall(PAGE)


@cache
def functions_of(file: str) -> set[str]:
    """Functions of a file that pytest runs."""
    path = ROOT / file
    if not path.is_file():
        return set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, functions)}


def test_every_test_that_the_page_names_exists() -> None:
    assert len(NAMED) >= 30
    assert [f"{file}::{name}" for file, name in NAMED if name not in functions_of(file)] == []


def test_every_promise_has_a_test() -> None:
    promised, _, _ = PAGE.partition("## Under construction")
    tables = re.findall(r"^\| promise \| shown by \|\n\|---\|---\|\n((?:\|.*\n)+)", promised, re.MULTILINE)
    assert len(tables) == promised.count("| promise |") >= 4
    rows = [row for table in tables for row in table.splitlines()]
    assert [row for row in rows if not NAME.search(row.split(" | ")[-1])] == []


def test_what_does_not_exist_would_be_noticed() -> None:
    assert functions_of("tests/test_kill.py") >= {"test_every_node_is_killed_and_nothing_is_lost_or_repeated"}
    assert functions_of("tests/test_not_there.py") == set()
