"""``penstock bench``: measure Penstock on this machine, beside its peers; from a checkout, which has the benchmarks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which; all if left out.", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often each is measured; 5 if left out.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="File for the figures as JSON lines; appended to.")] = Path(
        "benchmarks.jsonl"
    ),
    listed: Annotated[bool, typer.Option("--list", help="Tell the names; run nothing.")] = False,
) -> int:
    """Measure Penstock here, beside what one would take instead and what the machine can do. Only in a checkout: the
    benchmarks are not installed. Run it on a machine that does nothing else.
    """
    folder = ROOT / "benchmarks"
    if not (folder / "__main__.py").is_file():
        raise ConfigError(
            "the benchmarks are not installed with Penstock; they run in a checkout of its repository, there also by 'make bench'"
        )
    workloads = sorted(path.stem for path in (folder / "workloads").glob("*.py") if path.stem != "__init__")
    if listed:
        print("\n".join(workloads))
        return 0
    for name in names or ():
        if name not in workloads:
            raise ConfigError(f"there is no benchmark {name!r}{did_you_mean(name, workloads)}; --list tells all")
    arguments = [*(names or ()), "--output", str(output.resolve())]
    arguments += [] if rounds is None else ["--rounds", str(rounds)]
    run = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(run, cwd=ROOT, check=False).returncode  # noqa: S603 - our own module
