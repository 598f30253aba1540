"""Updates too large for one message, on their way: chunk by chunk on the client's own topics."""

from __future__ import annotations

from collections.abc import Callable

from broker.blobs import Hold, Incoming, Memory, Offer, Outgoing, Pace, offer
from nodes.federated import wire

Holds = Callable[[Offer, int], Hold]
"""Where a blob of at most so many bytes grows. Raises :class:`BlobError`."""


class Uploads:
    """The coordinator's side: at most one upload of each client.

    :param most: bytes of one update.
    :param holds: where they grow; a coordinator that is killed asks for those in memory again.
    """

    def __init__(self, most: int, holds: Holds = Memory) -> None:
        self.most, self.holds = most, holds
        self._coming: dict[str, tuple[wire.Parcel, Incoming]] = {}

    def offered(self, client: str, parcel: wire.Parcel, now: int) -> bytes | None:
        """A client has an update; what to say to it now.

        :raises BlobError: it cannot be taken.
        """
        known = self._coming.get(client)
        if known is not None and known[0] == parcel:
            known[1].linked(now)  # it asks, so it did not hear
            return known[1].say(now)
        hold = self.holds(Offer(parcel.digest, parcel.size, parcel.chunk), self.most)
        coming = Incoming(hold, now)
        self._coming[client] = (parcel, coming)
        return coming.say(now)

    def took(self, client: str, payload: bytes, now: int) -> tuple[bytes | None, bytes | None]:
        """A chunk arrived: what to say, and the update if it is whole now."""
        if (known := self._coming.get(client)) is None:
            return None, None
        coming = known[1]
        coming.take(payload, now)
        if not coming.whole:
            said = coming.say(now)
            if coming.refused:
                del self._coming[client]
            return said, None
        del self._coming[client]
        hold = coming.hold
        return coming.say(now), bytes(hold.data) if isinstance(hold, Memory) else b""

    def forget(self, client: str | None = None) -> None:
        """Nothing more is wanted of this client, or of all."""
        if client is None:
            self._coming.clear()
        else:
            self._coming.pop(client, None)

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
