"""Updates too large for one message, on their way: chunk by chunk on the client's own topics."""

from __future__ import annotations

from broker.blob_files import Partial
from broker.blob_store import BlobStore
from broker.blobs import Hold, Incoming, Memory, Offer, Outgoing, Pace, offer
from nodes.federated import wire


class Place:
    """Where uploads grow: here in memory; a coordinator that is killed asks for those anew."""

    def hold(self, wanted: Offer, most: int) -> Hold:
        """Room for a blob.

        :raises BlobError: it is larger than ``most``, or there is no room.
        """
        return Memory(wanted, most)

    def data(self, hold: Hold) -> bytes:
        """The bytes of one that is whole.

        :raises BlobError: they are not there any more.
        """
        return bytes(hold.data) if isinstance(hold, Memory) else b""

    def close(self, hold: Hold) -> None:
        """It is not wanted any more."""


class OnDisk(Place):
    """In a store of blobs: what has arrived of an upload outlives the coordinator, and nothing of it is in memory. What is done
    with gives way to the next when the store's budget is used up; the budget is for all uploads of a round.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def hold(self, wanted: Offer, most: int) -> Hold:
        return self._store.partial(wanted, most)

    def data(self, hold: Hold) -> bytes:
        with self._store.open(hold.offer.digest) as blob:
            return bytes(blob.view())

    def close(self, hold: Hold) -> None:
        if isinstance(hold, Partial):
            hold.close()
            self._store.remove(
                hold.offer.digest
            )  # one that was whole was taken or refused; a part stays to be continued


class Uploads:
    """The coordinator's side: at most one upload of each client.

    :param most: bytes of one update.
    :param place: where they grow.
    """

    def __init__(self, most: int, place: Place) -> None:
        self.most, self.place = most, place
        self._coming: dict[str, tuple[wire.Parcel, Incoming]] = {}

    def offered(self, client: str, parcel: wire.Parcel, now: int) -> tuple[bytes | None, bytes | None]:
        """A client has an update: what to say to it now, and the update if it is here already.

        :raises BlobError: it cannot be taken.
        """
        known = self._coming.get(client)
        if known is not None and known[0] == parcel:
            known[1].linked(now)  # it asks, so it did not hear
            return known[1].say(now), None
        self.forget(client)
        hold = self.place.hold(Offer(parcel.digest, parcel.size, parcel.chunk), self.most)
        self._coming[client] = (parcel, Incoming(hold, now))
        return self._said(client, now)

    def took(self, client: str, payload: bytes, now: int) -> tuple[bytes | None, bytes | None]:
        """A chunk arrived: what to say, and the update if it is whole now.

        :raises BlobError: it cannot be read.
        """
        if (known := self._coming.get(client)) is None:
            return None, None
        known[1].take(payload, now)
        return self._said(client, now)

    def _said(self, client: str, now: int) -> tuple[bytes | None, bytes | None]:
        coming = self._coming[client][1]
        said = coming.say(now)
        try:
            return said, self.place.data(coming.hold) if coming.whole else None
        finally:
            if coming.over:
                self.forget(client)

    def forget(self, client: str | None = None) -> None:
        """Nothing more is wanted of this client, or of all."""
        for name in [client] if client is not None else list(self._coming):
            if (known := self._coming.pop(name, None)) is not None:
                self.place.close(known[1].hold)

    def wake(self) -> int | None:
        """When :meth:`due` has something."""
        return min((at for _, coming in self._coming.values() if (at := coming.wake()) is not None), default=None)

    def due(self, now: int) -> list[tuple[str, bytes]]:
        """What to say to whom, because nothing came for a while."""
        out = []
        for client, (_, coming) in self._coming.items():
            at = coming.wake()
            if at is not None and now >= at and (said := coming.say(now)) is not None:
                out.append((client, said))
        return out


class Upload:
    """A client's side: one update on its way.

    :param pace: of the way there, where an earlier one took it.
    """

    def __init__(self, run: int, number: int, payload: bytes, chunk: int, now: int, pace: Pace | None) -> None:
        wanted = offer(payload, chunk)
        self.parcel = wire.Parcel(run, number, wanted.digest, wanted.size, wanted.chunk)
        self._payload, self._offer = payload, wanted
        self.pace = Pace() if pace is None else pace
        self._out = self._begin(now)

    def _begin(self, now: int) -> Outgoing:
        return Outgoing(self._offer, self._payload, now, pace=self.pace, eager=True)

    def again(self, now: int) -> None:
        """No answer came: if all was sent, send it anew; who took it was killed before it was on the disk."""
        if self._out.over:
            self._out = self._begin(now)

    def heard(self, payload: bytes, now: int) -> None:
        """The coordinator said what it has."""
        self._out.heard(payload, now)

    def linked(self, now: int) -> None:
        """The link was lost and is there again."""
        self._out.linked(now)

    def chunks(self, now: int) -> list[bytes]:
        """What to send now."""
        return self._out.send(now)

    def wake(self) -> int | None:
        """When there is something to send."""
        return self._out.wake()
