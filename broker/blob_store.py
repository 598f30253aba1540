"""Blobs on a disk: a folder of files named by their digests, within a budget, and those that have arrived in part.

=======================  ============================================================================================
``<digest>``             a blob; it was verified before it got this name
``<digest>-<size>-<chunk>.part``  one that arrives, with holes
``….map``                which chunks of it are there: eight a byte, lowest bit first
``<digest>.damaged``     was a blob, and has other bytes now
``lock``                 one process at a time
=======================  ============================================================================================
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from broker.blob_files import Blob, Partial, write_all
from broker.blob_format import BlobError, Buffer, Held, Offer
from broker.spool_figures import NoRoomError
from schemas.errors import BusError

_BLOB = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PART = re.compile(r"([0-9a-f]{64})-(\d+)-(\d+)\.part", re.ASCII)
_READ = 1 << 20


@dataclass(slots=True)
class _Entry:
    """A file. ``users``: who has it open or pinned; 0: it may be evicted. ``used``: ns; the least goes first."""

    size: int
    used: int
    users: int = 0
    verified: bool = False


class BlobStore:
    """The blobs in ``folder``, made if it is not there. One process at a time may have it open; its threads share it.

    :param budget: bytes that blobs, and those that arrive with their full size, may have together. What is not pinned, not open
        and was not used for longest makes room.
    :param durable: a blob that is whole survives a power cut.
    :raises BusError: another process has it open, or the folder cannot be used.
    """

    def __init__(self, folder: Path, budget: int, *, durable: bool = True) -> None:
        self.folder = folder
        self.budget = budget
        self.durable = durable
        self._entries: dict[str, _Entry] = {}  # by the file's name
        self._partials: dict[str, Partial] = {}
        self._guard = threading.RLock()
        self._uses = 0
        self._lock = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError:
            self.close()
            raise BusError(f"the blobs in {folder} are in use by another process") from None
        except OSError as error:
            self.close()
            raise BusError(f"the folder of blobs {folder} cannot be used: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have it. What is open stays readable."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def used(self) -> int:
        """Bytes of the budget that are taken."""
        with self._guard:
            return sum(entry.size for entry in self._entries.values())

    def digests(self) -> list[str]:
        """Of all blobs that are whole, the least recently used first."""
        with self._guard:
            found = [(e.used, name) for name, e in self._entries.items() if _BLOB.fullmatch(name)]
        return [name for _, name in sorted(found)]

    def __contains__(self, digest: str) -> bool:
        """Whether it is here; what its file has is looked at when it is opened."""
        return digest in self._entries

    def put(self, data: Buffer) -> str:
        """Keep what is in memory; gives its digest.

        :raises BlobError: ``no-room``: the budget has none, or ``too-big``: it never has.
        :raises NoRoomError: the disk has none.
        """
        view = memoryview(data).cast("B")
        digest = hashlib.sha256(view).hexdigest()
        with self._guard:
            if digest in self._entries:
                self._touch(digest)
                return digest
            self._make_room(view.nbytes)
            used = self._now()
            name = f"{digest}.{used}.new"
            self._entries[name] = _Entry(view.nbytes, used, users=1)
        try:
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, view, 0)
                if self.durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            self._name(name, digest)
        except OSError as error:
            self._drop(name)
            raise NoRoomError(f"{self.folder}: {error.strerror or error}") from error
        return digest

    def open(self, digest: str) -> Blob:
        """A blob to read. Its file is verified when this process opens it first: takes the time of a SHA-256.

        :raises BlobError: ``absent``, or ``damaged``: its file has other bytes, and was set aside.
        """
        with self._guard:
            entry = self._entries.get(digest) if _BLOB.fullmatch(digest) else None
            if entry is None:
                raise BlobError("absent", f"there is no blob {digest[:80]}")
            entry.users += 1
            self._touch(digest)
        fd = -1
        try:
            fd = os.open(self.folder / digest, os.O_RDONLY | os.O_CLOEXEC)
            if not entry.verified:
                found = hashlib.sha256()
                for at in range(0, max(entry.size, 1), _READ):
                    found.update(os.pread(fd, _READ, at))
                if found.hexdigest() != digest or os.fstat(fd).st_size != entry.size:
                    raise BlobError("damaged", f"the file of blob {digest} is damaged")
                entry.verified = True
            return Blob(digest, fd, entry.size, functools.partial(self._left, entry))
        except (OSError, BlobError) as error:
            if fd >= 0:
                os.close(fd)
            self._left(entry)
            if isinstance(error, FileNotFoundError):
                self._set_aside(digest, entry)
                raise BlobError("absent", f"the file of blob {digest} is gone") from error
            self._set_aside(digest, entry)
            if isinstance(error, BlobError):
                raise
            raise BlobError("damaged", f"the file of blob {digest}: {error.strerror or error}") from error

    def audit(self) -> list[str]:
        """Verify all blobs; gives the digests of those that are damaged, or gone."""
        wrong = []
        for digest in self.digests():
            with self._guard:
                if (entry := self._entries.get(digest)) is not None:
                    entry.verified = False
            try:
                self.open(digest).close()
            except BlobError:
                wrong.append(digest)
        return wrong

    def pin(self, digest: str) -> None:
        """It is not evicted until it was unpinned as often. Not remembered across restarts.

        :raises BlobError: ``absent``.
        """
        with self._guard:
            if digest not in self._entries:
                raise BlobError("absent", f"there is no blob {digest[:80]}")
            self._entries[digest].users += 1

    def unpin(self, digest: str) -> None:
        """The opposite of :meth:`pin`."""
        with self._guard:
            if (entry := self._entries.get(digest)) is not None:
                self._left(entry)

    def remove(self, digest: str) -> None:
        """Delete a blob, pinned or not; who has it open can read on."""
        if _BLOB.fullmatch(digest):
            self._drop(digest)

    def partial(self, offer: Offer, most: int | None = None) -> Partial:
        """Where an offered blob is to be received: with what is here of it. Close it when it is not wanted any more.

        :param most: largest blob taken; by default the budget.
        :raises BlobError: ``bad-offer``, ``too-big``, or ``no-room``: the rest of the budget is in use.
        """
        offer.check(self.budget if most is None else min(most, self.budget))
        name = f"{offer.digest}-{offer.size}-{offer.chunk}.part"
        with self._guard:
            if offer.digest in self._entries:
                self._touch(offer.digest)
                return Partial(self, offer, "", Held(offer.count), whole=True)
            partial = self._partials.get(name)
            if partial is None:
                self._convert(offer, name)
                if name not in self._entries:
                    self._make_room(offer.size)
                    self._entries[name] = _Entry(offer.size, 0)
                bits = b""
                with suppress(OSError):
                    bits = (self.folder / name).with_suffix(".map").read_bytes()
                partial = self._partials[name] = Partial(self, offer, name, Held(offer.count, bits), whole=False)
            self._entries[name].users += 1
            self._touch(name)
            return partial

    # called by partials

    def finished(self, partial: Partial) -> None:
        """It is whole: give it its name.

        :raises OSError: the disk fails.
        """
        with self._guard:
            self._name(partial.name, partial.offer.digest)
            self._partials.pop(partial.name, None)
        with suppress(OSError):
            (self.folder / partial.name).with_suffix(".map").unlink()

    def left(self, partial: Partial) -> bool:
        """One user less; whether it was the last."""
        with self._guard:
            if self._partials.get(partial.name) is not partial:
                return True  # it is a blob by now
            entry = self._entries[partial.name]
            entry.users -= 1
            if entry.users:
                return False
            del self._partials[partial.name]
            if partial.offer.digest in self._entries:  # it came another way
                self._drop(partial.name)
            return True

    # files

    def _load(self) -> None:
        found: list[tuple[int, str, int]] = []
        for path in self.folder.iterdir():
            if path.suffix == ".new" or (path.suffix == ".map" and not path.with_suffix(".part").exists()):
                path.unlink(missing_ok=True)
            elif _BLOB.fullmatch(path.name) or path.suffix == ".damaged":
                stat = path.stat()
                found.append((0 if path.suffix else stat.st_mtime_ns, path.name, stat.st_size))
            elif part := _PART.fullmatch(path.name):
                found.append((path.stat().st_mtime_ns, path.name, int(part[2])))
        for used, name, size in found:
            self._entries[name] = _Entry(size, used)
            self._uses = max(self._uses, used)
        self._make_room(0)

    def _now(self) -> int:
        """A time for the order of use: grows, also where the clock goes back."""
        self._uses = max(self._uses + 1, time.time_ns())
        return self._uses

    def _touch(self, name: str) -> None:
        used = self._entries[name].used = self._now()
        with suppress(OSError):  # no file yet
            os.utime(self.folder / name, ns=(used, used))

    def _make_room(self, size: int) -> None:
        if size > self.budget:
            raise BlobError("too-big", f"{size} bytes do not fit into a budget of {self.budget}")
        while (used := self.used) + size > self.budget:
            idle = [(entry.used, name) for name, entry in self._entries.items() if not entry.users]
            if not idle:
                raise BlobError("no-room", f"{size} bytes beside {used} that are in use do not fit into {self.budget}")
            self._drop(min(idle)[1])

    def _drop(self, name: str) -> None:
        with self._guard:
            path = self.folder / name
            for each in (path, path.with_suffix(".map")) if path.suffix == ".part" else (path,):
                with suppress(OSError):
                    each.unlink()
            self._entries.pop(name, None)

    def _name(self, name: str, digest: str) -> None:
        """What was written under another name, and is verified, is a blob from now on."""
        with self._guard:
            os.replace(self.folder / name, self.folder / digest)
            entry = self._entries.pop(name)
            known = self._entries.setdefault(digest, _Entry(entry.size, 0))
            known.size, known.verified = entry.size, True
            self._touch(digest)
        if self.durable:
            with _opened(self.folder) as fd:
                os.fsync(fd)

    def _left(self, entry: _Entry) -> None:
        with self._guard:
            entry.users = max(0, entry.users - 1)

    def _set_aside(self, digest: str, entry: _Entry) -> None:
        """Its file is damaged, or gone; unless another one has taken its place meanwhile."""
        with self._guard:
            if self._entries.get(digest) is not entry:
                return
            aside = f"{digest}.damaged"
            del self._entries[digest]
            with suppress(OSError):
                os.replace(self.folder / digest, self.folder / aside)
                self._entries[aside] = _Entry(entry.size, 0)

    def _convert(self, offer: Offer, name: str) -> None:
        """What is here in chunks of another size is taken over, where nobody writes it."""
        for other, entry in tuple(self._entries.items()):
            part = _PART.fullmatch(other)
            if part is None or other == name or (part[1], int(part[2])) != (offer.digest, offer.size) or entry.users:
                continue
            old, path = Offer(offer.digest, offer.size, int(part[3])), self.folder / other
            with suppress(OSError, BlobError):
                old.check(offer.size)
                bits = path.with_suffix(".map").read_bytes()
                held = Held(old.count, bits).in_chunks(old, offer)
                (self.folder / name).with_suffix(".map").write_bytes(held.bits)
                os.replace(path, self.folder / name)
                self._entries[name] = self._entries.pop(other)
                path.with_suffix(".map").unlink()
                return


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
