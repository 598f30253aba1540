"""What sources of files share: a name for their contents, natural order, labels."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath

from schemas.errors import ConfigError, MissingError, Problem

_WHOLE = 64 * 2**20
_PIECE = 2**20
_PIECES = 32


def digest(path: Path, size: int | None = None) -> str:
    """First eight hex digits of the digest of a file, or of its first ``size`` bytes.

    Up to 64 MiB all bytes count; of a longer file its length and 32 pieces of 1 MiB spread over it, so that a recording of
    many GB starts at once.

    :raises OSError: it cannot be read.
    """
    total = path.stat().st_size if size is None else size
    state = hashlib.sha256(f"{total}\n".encode())
    with path.open("rb") as file:
        if total <= _WHOLE:
            left = total
            while left and (block := file.read(min(_PIECE, left))):
                state.update(block)
                left -= len(block)
        else:
            for i in range(_PIECES):
                file.seek(i * (total - _PIECE) // (_PIECES - 1))
                state.update(file.read(_PIECE))
    return state.hexdigest()[:8]


def digest_listing(files: Iterable[Path], root: Path) -> str:
    """Eight hex digits for a folder of files: names, sizes and modification times, not contents."""
    state = hashlib.sha256()
    for path in files:
        stat = path.stat()
        state.update(f"{path.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return state.hexdigest()[:8]


def natural(path: PurePath) -> list[tuple[int, int, str]]:
    """Sort key: ``frame-9`` before ``frame-10``."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"([0-9]+)", path.as_posix()) if p]


def must_exist(path: Path, key: str, *, folder: bool = False) -> None:
    """:raises ConfigError: there is no such file (or folder), said of option ``key``."""
    if folder and not path.is_dir():
        raise ConfigError(Problem((key,), f"no such folder: {path}"))
    if not folder and not path.is_file():
        raise ConfigError(Problem((key,), f"no such file: {path}" if not path.exists() else f"not a file: {path}"))


def missing(path: Path) -> MissingError:
    """The error for a file that was there when the topology was checked and is not now."""
    return MissingError(f"the file {path}")


Labeller = Callable[[PurePath], str | None]


def labeller(label: str | None, resolve: Callable[[str], Path]) -> Labeller:
    """How the label of a file is known.

    :param label: ``folder`` (name of the folder it is in), a ``.csv`` file with the file's name in the first column and its
        label in the second, a regular expression searched in the file's name (its first group, or all of it), or None.
    :param resolve: path of a name in the config.
    :raises ConfigError: neither, or the file cannot be read.
    """
    if label is None:
        return lambda _: None
    if label == "folder":
        return lambda path: path.parent.name or None
    if label.endswith(".csv"):
        table = resolve(label)
        must_exist(table, "label")
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                known = {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}
        except (OSError, ValueError, csv.Error) as error:
            raise ConfigError(Problem(("label",), f"cannot read {table}: {error}")) from None
        return lambda path: known.get(path.as_posix(), known.get(path.name, known.get(path.stem)))
    try:
        pattern = re.compile(label)
    except re.error as error:
        problem = f"expected 'folder', a .csv file or a regular expression: {error}"
        raise ConfigError(Problem(("label",), problem, offset=error.pos or 0)) from None

    def search(path: PurePath) -> str | None:
        found = pattern.search(path.name)
        return None if found is None else found[1] if pattern.groups else found[0]

    return search
