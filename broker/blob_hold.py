"""Where a received blob grows: here in memory, in :mod:`broker.blob_store` on a disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from broker.blob_format import BlobError, Buffer, Held, Offer

_CATCH_UP = 3
"""Chunks that are hashed beside the one that has just come, so that none of this takes long."""


class Hold(ABC):
    """Where a receiver puts the chunks: :class:`Memory`, or a file of a :class:`~broker.blob_store.BlobStore`.

    The digest is computed as far as the chunks lie without a gap, so that nothing has to be read again where they come in order.

    :ivar held: which chunks are there.
    :ivar whole: all of them, and the digest is that of the offer.
    """

    blocking: ClassVar[bool] = False
    """Whether writing waits for a disk: then not in an event loop."""

    def __init__(self, offer: Offer, held: Held) -> None:
        self.offer = offer
        self.held = held
        self.whole = False
        self._hash = hashlib.sha256()
        self._hashed = 0

    @abstractmethod
    def write(self, index: int, data: memoryview) -> bool:
        """Put one chunk there, of the right length; False: it was there.

        :raises NoRoomError: there is no room for it now.
        """

    @abstractmethod
    def finish(self) -> bool:
        """All chunks are there: make :attr:`whole` true if it is what was offered, else forget all chunks and give False.

        Takes the time of a SHA-256 of what did not come in order, and on a disk that of making it durable.

        :raises NoRoomError: it could not be made durable now.
        """

    def close(self) -> None:
        """It is not used any more: what is on a disk stays there."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def _piece(self, index: int) -> Buffer:
        """A chunk that was written."""

    def _follow(self, index: int, data: Buffer) -> None:
        """This chunk was written: take it into the digest, with some of those that came earlier or were there."""
        if index == self._hashed:
            self._hash.update(data)
            self._hashed += 1
        for _ in range(_CATCH_UP):
            if self._hashed >= self.offer.count or self._hashed not in self.held:
                break
            self._hash.update(self._piece(self._hashed))
            self._hashed += 1

    def _verified(self) -> bool:
        while self._hashed < self.offer.count:
            self._hash.update(self._piece(self._hashed))
            self._hashed += 1
        return self._hash.hexdigest() == self.offer.digest

    def _forget(self) -> None:
        self.held.clear()
        self._hash = hashlib.sha256()
        self._hashed = 0


class Memory(Hold):
    """A blob received into memory, which is allocated when the offer was found to be at most ``most`` bytes.

    :raises BlobError: the offer is none, or too big.
    """

    def __init__(self, offer: Offer, most: int) -> None:
        offer.check(most)
        super().__init__(offer, Held(offer.count))
        self._data = bytearray(offer.size)

    @property
    def data(self) -> memoryview:
        """The bytes, when :attr:`whole`.

        :raises BlobError: it is not.
        """
        if not self.whole:
            raise BlobError("damaged", "the blob is not whole")
        return memoryview(self._data).toreadonly()

    def write(self, index: int, data: memoryview) -> bool:
        if index in self.held:
            return False
        at = index * self.offer.chunk
        self._data[at : at + len(data)] = data
        self.held.add(index)
        self._follow(index, data)
        return True

    def finish(self) -> bool:
        self.whole = self._verified()
        if not self.whole:
            self._forget()
        return self.whole

    def _piece(self, index: int) -> Buffer:
        at = index * self.offer.chunk
        return memoryview(self._data)[at : at + self.offer.length(index)]
