"""What a node with a durable outbox gives to readers in its own process, kept until they are done with it.

It commits before it hands over, so between the two there is nothing but the outbox that a restart could give them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from broker.bus import Publication, Receipt
from schemas import codec


class Handover:
    """One port's part of the outbox.

    :param key: the journal knows it by that; no port and no channel has this name.
    :param kept: (number, topic, encoded message) of what an earlier life left, in order.
    :param following: the next number, where nothing is kept.
    """

    def __init__(self, key: str, kept: Sequence[tuple[int, str, bytes]], following: int) -> None:
        self.key = key
        self.next = kept[-1][0] + 1 if kept else following
        self.left = [Publication(topic, codec.decode(payload), qos=1) for _, topic, payload in kept]
        """To be handed over first."""
        self.released = self._floor = (kept[0][0] if kept else following) - 1
        self._flights: deque[tuple[int, Receipt]] = deque()

    @staticmethod
    def key_of(port: str) -> str:
        """The key for a port."""
        return f"{port}//"

    def row(self, publication: Publication) -> tuple[str, int, str, bytes]:
        """Number what is to be handed over: its row for the journal."""
        number, self.next = self.next, self.next + 1
        return self.key, number, publication.topic, codec.encode(publication.payload)

    def flew(self, last: int, receipt: Receipt) -> None:
        """Everything up to ``last`` was handed over; ``receipt`` is done when its readers are."""
        self._flights.append((last, receipt))

    @property
    def floor(self) -> int:
        """Every number up to here is done."""
        flights = self._flights
        while flights and flights[0][1].done() and not flights[0][1].cancelled():
            if flights[0][1].exception() is not None:  # closed: nobody was done with it
                break
            self._floor = max(self._floor, flights.popleft()[0])
        return self._floor
