"""Coverage-guided fuzzing with atheris: ``python tests/fuzz/run_fuzz.py broker --seconds 120 [--keep]``.

Begins with the kept corpus. An input that fails is printed as base64 and ends the run with code 1; add it to the corpus with
the repair. ``--keep`` adds what was found to reach new code to the corpus, the short ones first.
"""

from __future__ import annotations

import argparse
import base64
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
MOST_KEPT, LONGEST_KEPT = 300, 600


def worker(name: str, arguments: list[str]) -> None:
    """Fuzz in this process; libFuzzer ends it."""
    atheris = import_module("atheris")  # not among the development tools: it has no wheels for every Python

    with atheris.instrument_imports(include=["broker", "schemas"]):
        import fuzz_targets

    atheris.Setup([sys.argv[0], *arguments], fuzz_targets.TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.target, given.worker)
    from fuzz_targets import CORPUS, TARGETS, read_corpus

    if given.target not in TARGETS:
        parser.error(f"unknown target {given.target!r}; there are {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        for number, data in enumerate(read_corpus(given.target)):
            (work / f"kept-{number:04}").write_bytes(data)
        common = [
            sys.executable,
            __file__,
            given.target,
            "--worker",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-max_len=2000",
        ]
        limit = [f"-max_total_time={given.seconds}", f"-artifact_prefix={folder}/fault-", "-print_final_stats=1"]
        code = subprocess.run([*common, *limit, str(work)], check=False, preexec_fn=_gently).returncode
        for fault in Path(folder).glob("fault-*"):
            print(f"{given.target}: {fault.name}: {base64.b64encode(fault.read_bytes()).decode()}")
        if given.keep:
            found = sorted((p.read_bytes() for p in work.iterdir()), key=lambda data: (len(data), data))
            lines = [base64.b64encode(data).decode() for data in found if len(data) <= LONGEST_KEPT]
            (CORPUS / f"{given.target}.txt").write_text("".join(line + "\n" for line in lines[:MOST_KEPT]))
            print(f"{given.target}: {min(len(lines), MOST_KEPT)} inputs kept")
    return 1 if code else 0


def _gently() -> None:
    os.nice(10)


if __name__ == "__main__":
    sys.exit(main())
