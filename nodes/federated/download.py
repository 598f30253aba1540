"""A client's side of the model: in its manifest, or as a blob that all clients get at once."""

from __future__ import annotations

from broker.blobs import BlobError, Fetching, Memory, Offer
from nodes.federated import wire


class Download:
    """The newest model that was announced.

    :param most: bytes of one; a manifest that says more is passed over.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._manifest: wire.Manifest | None = None
        self._coming: Fetching | None = None
        self._whole: bytes | memoryview = b""

    @property
    def digest(self) -> str:
        """Which one it is; empty: none was announced."""
        return "" if self._manifest is None else self._manifest.digest

    def heard(self, manifest: wire.Manifest, now: int) -> None:
        """A model was announced."""
        before, self._manifest = self._manifest, manifest
        if manifest.chunk == 0:
            self._coming, self._whole = None, manifest.data
        elif before is None or (before.blob, before.chunk) != (manifest.blob, manifest.chunk):
            self._coming, self._whole = None, b""
            try:
                self._coming = Fetching(Memory(Offer(manifest.blob, manifest.size, manifest.chunk), self.most), now)
            except BlobError:
                self._manifest = None

    def follow(self, run: int) -> None:
        """Of another run nothing is wanted."""
        if self._manifest is not None and self._manifest.run != run:
            self._manifest = self._coming = None

    def data(self, digest: str) -> bytes | memoryview | None:
        """The bytes of that model, if it is the newest and all there."""
        if self._manifest is None or self._manifest.digest != digest or self._coming is not None:
            return None
        return self._whole

    def lacks(self, digest: str) -> bool:
        """Whether that model was not announced."""
        return self._manifest is None or self._manifest.digest != digest

    def took(self, payload: bytes, now: int) -> bool:
        """A chunk of some model arrived; True: with it the model is whole."""
        coming = self._coming
        if coming is None:
            return False
        coming.take(payload, now)
        if coming.refused:
            self._manifest = self._coming = None
        elif coming.whole and isinstance(coming.hold, Memory):
            self._whole, self._coming = coming.hold.data, None
            return True
        return False

    def needs(self, now: int) -> bytes | None:
        """What to ask for now."""
        return None if self._coming is None else self._coming.say(now)

    def linked(self, now: int) -> None:
        """The link was lost and is there again."""
        if self._coming is not None:
            self._coming.linked(now)

    def wake(self) -> int | None:
        """When :meth:`needs` has something."""
        return None if self._coming is None else self._coming.wake()
