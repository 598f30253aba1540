"""``penstock version``: versions of Penstock and of what it runs on, as a report of a fault wants them."""

from __future__ import annotations

import json
import platform
from typing import Annotated

import typer

from nodes.cli._version import VERSION


def versions() -> dict[str, str | None]:
    """Name → version of everything that Penstock says it needs or can use; None: not installed."""
    import re
    from importlib.metadata import PackageNotFoundError, requires, version

    found: dict[str, str | None] = {
        "penstock": VERSION,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    try:
        wanted = requires("penstock") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        wanted = []
    for requirement in wanted:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        if name == "penstock" or "extra == 'dev'" in requirement.replace('"', "'"):
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def command(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """Print the versions of Penstock and of what it runs on."""
    found = versions()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, number in found.items():
        print(f"{name:<{width}}  {number or 'not installed'}")
