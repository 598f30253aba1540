"""``penstock bench``: measure Penstock on this machine, beside its peers; from a checkout, which has the benchmarks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ConfigError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Which; all if left out.", show_default=False)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often each is measured; 5 if left out.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="File for the figures as JSON lines; appended to.")] = Path(
        "benchmarks.jsonl"
    ),
    listed: Annotated[bool, typer.Option("--list", help="Tell the names; run nothing.")] = False,
) -> None:
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
        return
    for name in names or ():
        if name not in workloads:
            raise ConfigError(f"there is no benchmark {name!r}{did_you_mean(name, workloads)}")
    arguments = [*(names or ()), "--output", str(output.resolve())]
    arguments += [] if rounds is None else ["--rounds", str(rounds)]
    sys.stdout.flush()
    os.chdir(ROOT)  # where the package of that name is
    # in our place, so that a signal reaches those who have to end what they started
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *arguments])  # noqa: S606 - our own module
