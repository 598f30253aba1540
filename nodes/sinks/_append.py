"""A text file that lines are appended to for years: durable, mended after a crash, rotated, never with a line twice.

Used by ``jsonl`` and ``csv``. All calls block and come from one thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import RunError, SinkAwayError

TAIL = 4 * 2**20
"""Bytes at the end of what is there that are read when the file is opened, to know the newest lines."""


class AppendFile:
    """Lines in ``path``; full parts stand beside it as ``<name>.<number><suffix>``, oldest with the lowest number.

    :param sync: whether :meth:`append` returns only when the disk has the lines.
    :param max_size: bytes after which a new part begins; None: never.
    :param max_age: ns after which a new part begins; None: never.
    :param keep: most full parts that stay; None: all.
    """

    def __init__(
        self,
        path: Path,
        *,
        sync: bool = True,
        max_size: int | None = None,
        max_age: int | None = None,
        keep: int | None = None,
    ) -> None:
        self.path = path
        self._sync = sync
        self._max_size = max_size
        self._max_age = max_age
        self._keep = keep
        self._fd = -1
        self._size = 0
        self._since = 0

    def open(self) -> list[bytes]:
        """Open and mend: a line that a crash cut off is removed (its message was never said to be safe).

        :returns: the newest lines that are there, oldest first, from the full part before this one too, within
            :data:`TAIL` bytes of each.
        :raises RunError: another process writes to it.
        :raises SinkAwayError: its folder or disk is not there.
        """
        self.close()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._lock()
            stat = os.fstat(self._fd)
            self._since = int(stat.st_mtime_ns) if stat.st_size else time.time_ns()
            self._size = stat.st_size
            begin = max(0, self._size - TAIL)
            tail = os.pread(self._fd, TAIL, begin)
            end = tail.rfind(b"\n") + 1
            if end < len(tail):
                if not end and begin:
                    raise RunError(f"{self.path} does not end in lines: it is no file of ours")
                os.ftruncate(self._fd, begin + end)
                self._size = begin + end
                tail = tail[:end]
            older = b""
            if begin == 0 and (parts := self.parts()):
                with parts[-1].open("rb") as file:
                    file.seek(max(0, parts[-1].stat().st_size - TAIL))
                    older = file.read(TAIL)
            self._sync_folder()
        except OSError as error:
            self.close()
            raise SinkAwayError(f"{self.path}: {error.strerror}") from error
        except RunError:
            self.close()
            raise
        lines = [*self._whole(older, cut=len(older) == TAIL), *self._whole(tail, cut=begin > 0)]
        self.empty = self._size == 0
        return lines

    @staticmethod
    def _whole(data: bytes, *, cut: bool) -> list[bytes]:
        return data.splitlines()[1 if cut else 0 :]

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process writes to {self.path}") from None

    def append(self, lines: Sequence[bytes]) -> None:
        """Write lines (each ending in a line break); on return they are there to stay, on an error none of them is.

        :raises SinkAwayError: the disk is full or gone.
        """
        if not lines:
            return
        try:
            if self._fd < 0:
                raise OSError(0, "not open")
            data = memoryview(b"".join(lines))
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            if self._sync:
                os.fdatasync(self._fd)
        except OSError as error:
            self._undo()
            raise SinkAwayError(f"{self.path}: {error.strerror}") from error
        self._size += len(data)
        self.empty = False

    def _undo(self) -> None:
        """Remove what a failed write left. If that fails too the file is mended when it is opened next."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self.close()

    @property
    def usable(self) -> bool:
        """Whether it is open; after some errors it must be opened again."""
        return self._fd >= 0

    def due(self) -> bool:
        """Whether it is time for a new part."""
        if not self._size:
            return False
        old = self._max_age is not None and time.time_ns() - self._since >= self._max_age
        return old or (self._max_size is not None and self._size >= self._max_size)

    def rotate(self) -> None:
        """Put the present part aside under the next number and begin an empty one; remove parts beyond ``keep``.

        :raises SinkAwayError: the disk is full or gone.
        """
        try:
            parts = self.parts()
            number = self._number(parts[-1]) + 1 if parts else 1
            os.replace(self.path, self.path.with_name(f"{self.path.stem}.{number:06}{self.path.suffix}"))
            self.close()
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._lock()
            self._size, self._since, self.empty = 0, time.time_ns(), True
            if self._keep is not None:
                for part in self.parts()[: -self._keep or None]:
                    part.unlink()
            self._sync_folder()
        except OSError as error:
            self.close()
            raise SinkAwayError(f"{self.path}: {error.strerror}") from error

    def parts(self) -> list[Path]:
        """Full parts, oldest first."""
        found = self.path.parent.glob("*")
        return sorted((p for p in found if self._number(p)), key=self._number)

    def _number(self, part: Path) -> int:
        stem, _, number = part.stem.rpartition(".")
        mine = stem == self.path.stem and part.suffix == self.path.suffix
        return int(number) if mine and number.isdecimal() else 0

    def _sync_folder(self) -> None:
        if not self._sync:
            return
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close the file; its lock goes with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Recent:
    """Which rows of the newest messages are there already: a repeat after a crash is recognised.

    :param limit: messages that are remembered.
    """

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._rows: dict[str, int] = {}

    def count(self, ident: str) -> int:
        """Lines of a message that are there, from its first on."""
        return self._rows.get(ident, 0)

    def add(self, ident: str) -> None:
        """One more line of a message is there."""
        rows = self._rows
        rows[ident] = rows.get(ident, 0) + 1
        if len(rows) > self._limit:
            del rows[next(iter(rows))]

    def new(self, lines: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        """Those of ``lines`` (message id, line) that are not there yet."""
        out, seen = [], dict[str, int]()
        for ident, line in lines:
            place = seen.get(ident, 0)
            seen[ident] = place + 1
            if place >= self.count(ident):
                out.append((ident, line))
        return out
