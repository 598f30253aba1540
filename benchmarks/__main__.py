"""``python -m benchmarks [NAME …]``: run the named benchmarks, or all; a table on the screen, JSON lines in a file."""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import platform
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks import figures, workloads
from benchmarks.contestants import CannotError
from benchmarks.figures import Comparison, Figure, table

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(workloads.__path__)))
"""The workloads, one file each."""


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; all if left out: {', '.join(NAMES)}")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.jsonl"), help="file for the JSON lines")
    parser.add_argument("--rounds", type=int, default=figures.ROUNDS, help="how often each contestant is measured")
    parser.add_argument(
        "--only", default="", help="rows with this in their names, where a workload can leave out others"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    figures.ROUNDS, figures.ONLY = options.rounds, options.only
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing that was started stays
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    # an installation's modules are compiled; so are these from the second start
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, Python {where['python']}")
    measured: list[Figure | Comparison] = []
    try:
        with options.output.open("a") as file:
            for name in options.names or NAMES:
                print(f"{name} …", file=sys.stderr)
                try:
                    found = import_module(f"benchmarks.workloads.{name}").measure()
                except CannotError as why:
                    print(f"  not measured: {why}", file=sys.stderr)
                    continue
                measured += found
                for figure in found:
                    file.write(json.dumps({"time": time.time(), **where, **figure.plain()}) + "\n")
                file.flush()
    finally:  # also of what was measured before something failed or Ctrl-C
        if measured:
            print("\n".join(table(measured)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
