"""The files of a :class:`~broker.blob_store.BlobStore` as they are used: a blob that is read, and one that arrives."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol, Self

from broker.blob_format import CHUNK, Buffer, Held, Offer
from broker.blob_hold import Hold
from broker.spool_figures import NoRoomError


class Keeper(Protocol):
    """The store, as far as its files know it."""

    folder: Path
    durable: bool

    def __contains__(self, digest: str) -> bool:
        """Whether that blob is here."""

    def finished(self, partial: Partial) -> None:
        """It is whole and verified: give it its name."""

    def left(self, partial: Partial) -> bool:
        """One user less; whether it was the last."""


def write_all(fd: int, data: Buffer, at: int) -> None:
    """All of it. :raises OSError: not all of it was taken."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


class Blob:
    """A blob of the store, open for reading, verified. It is not evicted until it is closed; used as ``with``."""

    def __init__(self, digest: str, fd: int, size: int, closed: Callable[[], None]) -> None:
        self.digest = digest
        self.size = size
        self._closed = closed
        self._fd = fd

    def read(self, offset: int, size: int) -> bytes:
        """That many bytes; fewer at the end. For a sender: ``Outgoing(offer, blob.read, now)``. Any thread."""
        return os.pread(self._fd, size, offset)

    def view(self) -> memoryview:
        """All of it without a copy, mapped into memory; stays valid when this is closed, or the blob removed."""
        if not self.size:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ))

    def offer(self, chunk: int = CHUNK) -> Offer:
        """Its offer, in chunks of that size."""
        return Offer(self.digest, self.size, chunk)

    def close(self) -> None:
        """It may be evicted. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Partial(Hold):
    """A blob that arrives in a file of the store. What it has outlives the process; made by :meth:`BlobStore.partial`.

    Shared by all who receive the same offer, in any thread.
    """

    blocking: ClassVar[bool] = True

    def __init__(self, store: Keeper, offer: Offer, name: str, held: Held, *, whole: bool) -> None:
        super().__init__(offer, held)
        self.whole = whole
        self.name = name
        self._store = store
        self._lock = threading.Lock()
        self._fds: tuple[int, int] | None = None
        self._closed = False

    def write(self, index: int, data: memoryview) -> bool:
        with self._lock:
            if self.whole or index in self.held:
                return False
            if self.offer.digest in self._store:  # it came another way
                self.whole = True
                return False
            try:
                file, bits = self._files()
                write_all(file, data, index * self.offer.chunk)
                byte = self.held.bits[index >> 3] | 1 << (index & 7)
                write_all(
                    bits, bytes((byte,)), index >> 3
                )  # behind the data: a process that is killed has no chunk too many
            except OSError as error:
                raise NoRoomError(f"{self._store.folder}: {error.strerror or error}") from error
            self.held.add(index)
            self._follow(index, data)
            return True

    def finish(self) -> bool:
        with self._lock:
            if self.whole:
                return True
            if not self.held.full:
                return False
            try:
                file, bits = self._files()
                if self._verified():
                    if self._store.durable:
                        os.fsync(file)
                    self._store.finished(self)
                    self.whole = True
                    return True
                os.ftruncate(bits, 0)
            except OSError as error:
                raise NoRoomError(f"{self._store.folder}: {error.strerror or error}") from error
            self._forget()
            return False

    def close(self) -> None:
        """One user less: call it as often as it was given. What has arrived stays for the next time, unless it is evicted."""
        with self._lock:
            if self._store.left(self):
                self._closed = True
                for fd in self._fds or ():
                    os.close(fd)
                self._fds = None

    def _piece(self, index: int) -> Buffer:
        file, _ = self._files()
        return os.pread(file, self.offer.length(index), index * self.offer.chunk)

    def _files(self) -> tuple[int, int]:
        if self._closed:
            raise ValueError("the partial blob is closed")
        if self._fds is None:
            path = self._store.folder / self.name
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                bits = os.open(path.with_suffix(".map"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                os.close(file)
                raise
            self._fds = file, bits
        return self._fds
