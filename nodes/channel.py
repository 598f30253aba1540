"""A numbered stream out of a node's port, and what a step's effect waits for."""

from __future__ import annotations

from broker.bus import Receipt
from broker.window import SendWindow


class Channel:
    """What goes out numbered: on a port's own topics for all who read them, or on the lane of one replica.

    :ivar key: the port's name, or ``<port>/<replica>``; the journal and acknowledgements know it by that.
    :ivar lane: the topic; None: the port's own.
    :ivar debts: where messages went that were taken from here: (channel, its last number of them).
    """

    __slots__ = ("_floor", "debts", "key", "lane", "port", "released", "window")

    def __init__(self, key: str, port: str, window: SendWindow, lane: str | None = None) -> None:
        self.key = key
        self.port = port
        self.window = window
        self.lane = lane
        self.debts: list[tuple[Channel, int]] = []
        self.released = window.floor
        """Floor as of the last commit of a durable outbox."""
        self._floor = 0

    @property
    def floor(self) -> int:
        """Every number up to here is done, here or where it was taken to."""
        if self.debts:
            if not all(other.floor >= seq for other, seq in self.debts):
                return self._floor
            self.debts = []
        return self.window.floor

    @property
    def clear(self) -> bool:
        """Nothing is under way."""
        return not self.window.kept and self.floor == self.window.floor

    def owe(self, debts: dict[str, tuple[Channel, int]], floor: int) -> None:
        """What was kept above ``floor`` is done when it is done elsewhere."""
        self._floor = floor
        self.debts = list(debts.values())


class Mark:
    """What has to be acknowledged before the effect of one step is done: numbers on channels, receipts of the local bus."""

    __slots__ = ("_numbers", "_receipts")

    def __init__(self) -> None:
        self._numbers: dict[str, tuple[Channel, int]] = {}
        self._receipts: list[Receipt] = []

    def number(self, channel: Channel, seq: int) -> None:
        """Wait for ``seq`` of ``channel``."""
        self._numbers[channel.key] = (channel, seq)

    def receipt(self, receipt: Receipt) -> None:
        """Wait for the local bus."""
        self._receipts.append(receipt)

    @property
    def done(self) -> bool:
        """Whether everything is acknowledged."""
        if not self._numbers and not self._receipts:
            return True
        return all(channel.floor >= seq for channel, seq in self._numbers.values()) and all(
            receipt.done() for receipt in self._receipts
        )
