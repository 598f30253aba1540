"""Who can be measured: Penstock and what a user would take instead, as commands; compiled or installed where that is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import blake2s
from pathlib import Path

from benchmarks.figures import OURS

HERE = Path(__file__).resolve().parent
NODE_RED = "node-red@4.1"
"""As npm knows it."""
Command = tuple[list[str], dict[str, str]]
"""A command line, and what it needs in its environment."""


class CannotError(Exception):
    """A program or broker is not to be had here; the text says why."""


def cache_folder() -> Path:
    """Where compiled and installed programs stay from one run to the next."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def compiled(source: Path) -> Path:
    """The program made of a C file; made once for each of its versions.

    :raises CannotError: there is no compiler, or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotError("no C compiler (Debian package gcc)")
    program = cache_folder() / f"{source.stem}-{blake2s(source.read_bytes(), digest_size=8).hexdigest()}"
    if not program.exists():
        new = program.with_suffix(f".{os.getpid()}")  # others may compile it now, too
        command = [compiler, "-O2", "-o", str(new), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotError(f"{compiler} fails: {done.stderr[-500:]}")
        new.rename(program)
    return program


@cache
def node_red() -> Path:
    """Node-RED's main file, installed by npm into the cache the first time.

    :raises CannotError: there is no node or npm, or npm cannot install it.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise CannotError("no node or npm (Debian packages nodejs, npm)")
    folder = cache_folder() / NODE_RED
    main = folder / "node_modules/node-red/red.js"
    if not (folder / "whole").exists():
        print(f"  installing {NODE_RED} into {folder} (once)", file=sys.stderr)
        folder.mkdir(exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--omit=dev", NODE_RED]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=folder)
        except subprocess.TimeoutExpired:
            raise CannotError("npm does not end") from None
        if done.returncode or not main.exists():
            raise CannotError(f"npm cannot install {NODE_RED}: {done.stderr[-300:]}")
        (folder / "whole").touch()
    return main


def _c(work: str, qos: int, port: int, folder: Path) -> Command:
    del folder
    return [str(compiled(HERE / "peers/program.c")), f"port={port}", f"work={work}", f"qos={qos}"], {}


def _python(name: str) -> Callable[[str, int, int, Path], Command]:
    def command(work: str, qos: int, port: int, folder: Path) -> Command:
        del folder
        return [sys.executable, str(HERE / f"peers/{name}.py"), str(port), work, str(qos)], {}

    return command


def _node_red(work: str, qos: int, port: int, folder: Path) -> Command:
    main, peer = node_red(), HERE / "peers/node_red"
    shutil.copy(peer / f"{work}.json", folder / "flow.json")  # it writes beside the flow
    command = ["node", "--require", str(peer / "no_delay.js"), str(main), "--userDir", str(folder)]
    command += ["--settings", str(peer / "settings.js"), str(folder / "flow.json")]
    return command, {"BENCH_PORT": str(port), "BENCH_QOS": str(qos)}


def _penstock(work: str, qos: int, port: int, folder: Path) -> Command:
    name = work if qos == 0 else f"{work}-safe"
    text = (HERE / f"topologies/{name}.yaml").read_text()
    (folder / "topology.yaml").write_text(text.replace("127.0.0.1:1883", f"127.0.0.1:{port}"))
    run = [sys.executable, "-m", "nodes.cli.main", "run", str(folder / "topology.yaml"), "--log-level", "error"]
    return run, {}


PROGRAMS: Mapping[str, Callable[[str, int, int, Path], Command]] = {
    OURS: _penstock,
    "c": _c,
    "paho": _python("with_paho"),
    "aiomqtt": _python("with_aiomqtt"),
    "node-red": _node_red,
}
"""Contestant → its command for a work, a QoS and a port, in a folder of its own; raises :class:`CannotError`."""
