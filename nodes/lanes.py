"""Which replica of a consumer gets which source's messages, and who takes over from one that is away.

Each source belongs to one replica: that with the highest hash of source and replica among those that are there (rendezvous
hashing, Thaler and Ravishankar 1998), so that every producer decides the same, and a replica that leaves moves none but
its own sources. A replica that is away for longer than :data:`TAKEOVER` loses its part to the others: what it had not
acknowledged goes to them first, so that each source's order is kept. When it is back, the producer waits until all that is under
way is done, and gives it its part again.

One whose state is on its disk (a window, a durable outbox) is waited for, whatever happens: nobody else has its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from nodes import log
from nodes.channel import Channel
from nodes.merge import FLOOR
from schemas.messages import Message, Readings
from schemas.rows import take

TAKEOVER = 5.0
"""Seconds that a replica may be away before the others take its part over."""
_MOST_SOURCES = 65536
"""Sources whose replica is remembered; others are computed anew."""
_GONE = frozenset({"offline", "stopped"})


class Member:
    """One replica as a producer sees it.

    :ivar away: since when (``time.monotonic``) it says that it is not there; None: it is.
    :ivar taken: the others have its part.
    :ivar rooted: its state is on its disk.
    """

    __slots__ = ("away", "back", "channel", "name", "rooted", "taken", "told")

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self.channel = channel
        self.away: float | None = None
        self.back = False
        self.taken = False
        self.rooted = False
        self.told = FLOOR
        """Event time that it knows the port to have come to."""


class Lanes:
    """The lanes of one port to the replicas of one consumer.

    :param node: the producer, for the log.
    :param target: the consumer as the user named it.
    :ivar moved: messages that were taken from one replica and given to another.
    """

    def __init__(self, node: str, target: str, members: Sequence[Member]) -> None:
        self.target = target
        self.members = {member.name: member for member in members}
        self.moved = 0
        self.newest = FLOOR
        """Greatest event time sent to any of them."""
        self._node = node
        self._known: dict[str, Channel] = {}

    def of(self, source: str) -> Channel:
        """The channel that messages of this source take now."""
        channel = self._known.get(source)
        if channel is None:
            there = [member for member in self.members.values() if not member.taken]
            channel = max(there, key=lambda member: _weight(member.name, source)).channel
            if len(self._known) >= _MOST_SOURCES:
                self._known.clear()
            self._known[source] = channel
        return channel

    def behind(self) -> list[Member]:
        """Replicas that do not know yet how far the port has come; they are taken as told now.

        One that is back is told too: readers that merge wait for it, and we for them.
        """
        found = [m for m in self.members.values() if m.told < self.newest and (m.back or not m.taken)]
        for member in found:
            member.told = self.newest
        return found

    @property
    def settling(self) -> bool:
        """A replica is back: nothing new may be sent until all that is under way is done."""
        return any(member.back for member in self.members.values())

    def told(self, name: str, status: str, now: float) -> None:
        """A replica's state was published. Nothing else tells that it is there: what it sent may arrive after it left."""
        member = self.members.get(name)
        if member is None:
            return
        if status not in _GONE:
            member.away = None
            member.back = member.taken
        elif member.away is None:
            member.away = now

    def rooted(self, name: str, *, rooted: bool) -> None:
        """Whether a replica's state is on its disk."""
        if (member := self.members.get(name)) is not None:
            member.rooted = rooted

    def lost(self, now: float) -> list[Member]:
        """Replicas whose part the others are to take over now; at least one is always left."""
        there = [member for member in self.members.values() if not member.taken]
        gone = [m for m in there if m.away is not None and now - m.away >= TAKEOVER and not m.rooted]
        if not gone or len(gone) == len(there):
            return []
        for member in gone:
            member.taken = True
        self._known.clear()
        return gone

    def settled(self) -> bool:
        """Give those that are back their part again, if nothing is under way any more; whether that was done."""
        if not self.settling or not all(member.channel.clear for member in self.members.values()):
            return False
        for member in self.members.values():
            if member.back:
                member.back = member.taken = False
                log.info("replica is back", node=self._node, replica=member.name)
        self._known.clear()
        return True


def newest(message: Message) -> int:
    """Greatest event time in a message, ns."""
    body = message.body
    if isinstance(body, Readings) and body.time is not None and len(body.time):
        return int(body.time.max())
    return message.time


def by_source(message: Message) -> list[Message]:
    """A message whose rows are of several devices as one for each; any other as it is.

    The parts' identities do not depend on who is there to take them, so that repeats are known.
    """
    body = message.body
    if not isinstance(body, Readings) or body.source is None or not body.n:
        return [message]
    rows: dict[str, list[int]] = {}
    for i, source in enumerate(body.source):
        rows.setdefault(source, []).append(i)
    parts = []
    for source, index in rows.items():
        at = np.array(index)
        columns = {name: take(column, at) for name, column in body.columns.items()}
        time = None if body.time is None else body.time[at]
        part = Readings(n=len(index), columns=columns, time=time)
        ident = f"{message.id}~{source}"
        parts.append(Message(ident, source, message.time, part, message.trace, message.born))
    return parts


def _weight(member: str, source: str) -> bytes:
    return blake2b(f"{member}\0{source}".encode(), digest_size=8).digest()
