"""Runs: QoS 0 messages of one client that came one after the other and go the same way, handed on together."""

from __future__ import annotations

from typing import TypeAlias

from broker.embedded.messages import Kind, Message, head
from broker.embedded.topics import Route

Piece: TypeAlias = tuple[Kind, int, int]
"""One packet of a run: its kind, where its payload starts, and where it ends (as :class:`Run` was given it)."""


class Run:
    """PUBLISH packets with QoS 0, not retained, as they came.

    Subscribers of the publisher's version get the very bytes that came in, the others packets that are written once for
    all of them.

    :param data: the packets.
    :param begin: where they began in what was received, which is what ``pieces`` speak of.
    :param pieces: each of them.
    :param route: where they go.
    :param version: of MQTT that they are in.
    """

    __slots__ = ("_begin", "_forms", "_messages", "count", "data", "pieces", "route", "same", "version")

    def __init__(self, data: bytes, begin: int, pieces: list[Piece], route: Route, version: int) -> None:
        self.data = data
        self._begin = begin
        self.pieces = pieces
        self.count = len(pieces)
        self.route = route
        self.version = version
        self.same = not any(kind.properties.alias for kind, _, _ in pieces) if version == 5 else True
        self._forms: dict[tuple[int, bytes], bytes] = {}
        self._messages: list[Message] | None = None

    def form(self, version: int, extra: bytes) -> bytes:
        """All packets for a subscriber.

        :param version: that it speaks.
        :param extra: its subscription identifiers, as properties.
        """
        if self.same and version == self.version and not extra:
            return self.data
        known = self._forms.get((version, extra))
        if known is None:
            known = self._forms[version, extra] = b"".join(self._written(version, extra))
        return known

    def packets(self, version: int, extra: bytes) -> list[bytes]:
        """The same, one by one."""
        parts = self._written(version, extra)
        return [b"".join(parts[at : at + 3]) for at in range(0, len(parts), 3)]

    def messages(self, now: float) -> list[Message]:
        """The same one by one, for those who cannot take the packets as they are."""
        if self._messages is None:
            data, begin = self.data, self._begin
            self._messages = [
                Message(kind, data[payload - len(kind.block) - begin : stop - begin], 0, False, now)
                for kind, payload, stop in self.pieces
            ]
        return self._messages

    def _written(self, version: int, extra: bytes) -> list[bytes]:
        """Three pieces for each packet: the fixed header, what stands before the payload, the payload."""
        parts: list[bytes] = []
        data, begin, last = self.data, self._begin, None
        before = b""
        for kind, payload, stop in self.pieces:
            if kind is not last:
                last, before = kind, kind.name + kind.written(version, extra)
            parts += (head(0x30, len(before) + stop - payload), before, data[payload - begin : stop - begin])
        return parts
