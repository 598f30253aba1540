"""``penstock new``: a folder with a topology that runs as it stands, to be changed into one's own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ConfigError, did_you_mean
from schemas.topics import level

STARTERS = {
    "readings": "made-up readings, filtered and averaged, into files",
    "camera": "a video, a model that looks at it, and the counts of what it saw, into SQLite",
    "telemetry": "JSON from devices on an MQTT broker, averaged, into SQLite",
    "custom": "a node of your own in Python between a source and a sink",
}
"""Name → what it shows. Each is a folder beside this file; ``NAME`` in its topology becomes the new topology's name."""

_HERE = Path(__file__).parent / "starters"
_SHARED = {"camera": ("digits.mkv", "digits-int8.tflite", "labels.txt")}
"""Files that a starter shares with the demo."""


def topology_name(folder: Path) -> str:
    """The folder's name as a topology's name: one that YAML takes for a text."""
    name = level(folder.resolve().name).strip("-_")
    plain = re.fullmatch(r"[a-z][a-z0-9_-]*", name) is not None and name not in {"null", "true", "false"}
    return (name if plain else f"line-{name}".rstrip("-"))[:64].rstrip("-_")


def write(folder: Path, starter: str) -> list[Path]:
    """Write a starter into ``folder``, which is made if it is not there; gives the files written.

    :raises ConfigError: there is no such starter, a file is there already (nothing is written then), or it cannot be
        written.
    """
    if starter not in STARTERS:
        raise ConfigError(f"there is no starter {starter!r}{did_you_mean(starter, STARTERS)}")
    sources = {path.name: path for path in sorted((_HERE / starter).iterdir()) if path.is_file()}
    demo = Path(__file__).parent.parent / "demo"
    sources.update({name: demo / name for name in _SHARED.get(starter, ())})
    for name in sources:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} is there already; nothing was written")
    named = topology_name(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in sources.items():
            target = folder / name
            if source.suffix == ".yaml":
                text = source.read_text("utf-8").replace("topology: NAME", f"topology: {named}")
                target.write_text(text, "utf-8")
            else:
                shutil.copyfile(source, target)
            written.append(target)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return written


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to write into; its name names the topology.")],
    starter: Annotated[
        str,
        typer.Option("--starter", "-s", help="; ".join(f"{name}: {text}" for name, text in STARTERS.items())),
    ] = "readings",
) -> None:
    """Write a starter topology, which runs as it stands. Files that are there are left alone."""
    written = write(folder, starter)
    for path in written:
        print(f"wrote {path}")
    topology = next(path for path in written if path.suffix == ".yaml")
    print(f"next: penstock check {topology}\n      penstock run {topology}")
