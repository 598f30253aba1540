"""Big tensors between processes of one host: the two ends of an edge that shares memory.

The readers of such a port that are on its host have it from a topic of their own. There a message with a big tensor is a few
bytes that say where the tensor is (:mod:`schemas.detached`, :mod:`broker.shared_memory`); a small one is as it always is.
The port's public topic carries the real bytes as before, to whoever is elsewhere, or as soon as anybody listens there.
What is sent again is always real bytes. Imported by nodes that have such an edge, and by no other.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from broker.shared_memory import ALIGNMENT, OverwrittenError, Reader, Ring, UnreachableError, working
from nodes import log
from schemas import codec, detached
from schemas.messages import Frame, Message, Tensors, tensor_bytes

if TYPE_CHECKING:
    from broker.bus import Delivery
    from nodes.channel import Channel
    from nodes.edge import Edge
    from schemas.detached import Detached, Place

LEAST = 64 * 1024
"""Bytes from which a tensor goes by shared memory: below, two hops over sockets cost less than two leases and a handle
(17.6 against 22.8 µs at 32 KiB, 30.2 against 25.4 at 64)."""
BUDGET = 32 * 1024 * 1024
"""Bytes of a ring's slots. A quarter is used where readers keep up: 0.9 MB were copied in 29 µs there, into one of 35 slots in
turn in 107; the rest is for those that keep what they have for long."""
_SLOTS = (8, 256)
"""Fewest and most slots."""
AT_ONCE = 16
"""Most messages that are staged before the ring is asked for room again; at most half of its slots."""
_GROW = 0.5
"""Seconds for which no slot gets free until more of them are used, from then on. A reader that lost its core for a moment is not
to cost the cache for ever."""
_STUCK = 2.0
"""Seconds for which no slot gets free until messages go by MQTT instead."""
_REST = 64 * 1024
"""Bytes that a message may have beside its tensors before it is measured exactly, where the broker has a limit."""
_AGAIN = 30.0
"""Seconds after which memory that was full is asked for again."""
_LISTEN = 1.0
"""Seconds between looks whether anybody listens to the public topic."""


class Audience:
    """Whether anybody listens to a port's public topic: the broker says it in its PUBACK (MQTT 5, 3.4.2.1).

    Until it has said that nobody does, and while it says nothing of the kind, everything is published.

    :param always: somebody does, whatever the broker says.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._there = True
        self._due = 0.0

    def wants(self, now: float) -> Callable[[bool], None] | bool:
        """Whether a message is to be published; a function, where the broker's answer is to be told to it."""
        if self._always:
            return True
        if now >= self._due:
            self._due = now + _LISTEN
            return self._heard
        return self._there

    def _heard(self, there: bool) -> None:
        self._there = there


class Writing:
    """The producer's end of a port.

    :param readers: what each does when it is too slow: ``block``, ``sample``, ``latest``, or ``safe`` for a safe edge.
    :param always: the public topic carries everything.
    :param whole: send everything whole: what is kept is to outlive this process.
    """

    def __init__(
        self, node: str, port: str, channel: Channel, *, readers: list[str], always: bool, whole: bool
    ) -> None:
        self.channel = channel
        self.audience = Audience(always=always)
        self._name = f"{node}.{port}"
        self._waits = [each in {"block", "sample"} for each in readers]
        self._blocks = "block" in readers
        self._together = {"block"}.issuperset(readers)
        self._keeps = "safe" in readers
        self._whole = whole
        self._ring: Ring | None = None
        self._old: list[Ring] = []
        self._off_until = 0.0
        self._stuck_since: float | None = None
        self._claimed = 0
        self.at_once = sys.maxsize if whole else AT_ONCE
        self._deafen: Callable[[], object] | None = None

    @property
    def room(self) -> bool:
        """Whether slots are free for :attr:`at_once` messages, or are not to be waited for."""
        ring = self._ring
        if ring is None or not (self._blocks or ring.pinned):
            return True
        ring.release(self.channel.floor)
        claimed = ring.claim(self.at_once)
        if claimed >= min(self.at_once, ring.reach):
            self._stuck_since = None
            return True
        now = time.monotonic()
        if self._stuck_since is None or claimed > self._claimed:
            self._stuck_since = now
        self._claimed = claimed
        if now - self._stuck_since > _GROW:
            ring.reach = min(ring.slots, ring.reach + self.at_once)
        return now - self._stuck_since > _STUCK

    def call(self, free: Callable[[], None]) -> None:
        """Have ``free`` called by the running loop once :attr:`room` may be there.

        It may be there before a reader could see that we wait, and one that was killed calls nobody: look again at once, and
        from time to time.
        """
        if (ring := self._ring) is None:
            return
        if self._deafen is None:
            loop = asyncio.get_running_loop()

            def rung() -> None:
                ring.hush()
                free()

            loop.add_reader(ring.bell, rung)
            self._deafen = partial(loop.remove_reader, ring.bell)
        ring.call(self.at_once)

    def too_large(self, message: Message, topic: str, limit: int | None) -> str:
        """Why a message cannot travel, if it cannot: what is sent again goes by the broker, so its limit holds here too."""
        if limit is None:
            return ""
        least = tensor_bytes(message.body) if isinstance(message.body, Frame | Tensors) else limit
        if least + _REST < limit:
            return ""
        size = len(codec.encode(message, epoch=2**62, seq=2**31)) + len(topic)
        return f"{size} bytes, the broker takes at most {limit}" if size > limit else ""

    def encode(self, message: Message, epoch: int = 0, seq: int = 0) -> bytes:
        """What the readers of this host are sent: a few bytes if what is big could be put into shared memory."""
        if not self._whole and (found := detached.take_out(message, LEAST)) is not None:
            wire, big = found
            if (put := self._put(big, seq)) is not None:
                return detached.encode([detached.leave(wire, *put, epoch=epoch, seq=seq)])
        return codec.encode(message, epoch=epoch, seq=seq)

    def encode_all(self, messages: Sequence[Message]) -> list[bytes]:
        """What the readers are sent for messages without numbers: those in a row that could be put there are told at once.

        Not where a reader may miss what comes too fast for it: it is to miss one, not several. First all copies are made, then
        the rest: each takes from the processor's cache what the other needs there.
        """
        if self._whole or not self._together:
            return [self.encode(message) for message in messages]
        found = [detached.take_out(message, LEAST) for message in messages]
        put = [None if each is None else self._put(each[1]) for each in found]
        payloads: list[bytes] = []
        told: list[Detached] = []
        for message, each, where in zip(messages, found, put, strict=True):
            if each is not None and where is not None:
                told.append(detached.leave(each[0], *where))
                continue
            if told:
                payloads.append(detached.encode(told))
                told = []
            payloads.append(codec.encode(message))
        if told:
            payloads.append(detached.encode(told))
        return payloads

    def _put(self, big: dict[str, memoryview], number: int = 0) -> tuple[Place, list[tuple[str, int, int]]] | None:
        """Put tensors into a slot; where each is. None: there is no room."""
        ring = self._ring_for(sum([data.nbytes + ALIGNMENT for data in big.values()]))
        if ring is None or (put := ring.put([*big.values()], number)) is None:
            return None
        place, starts = put
        return place, [(name, at, data.nbytes) for (name, data), at in zip(big.items(), starts, strict=True)]

    def real(self, payload: bytes) -> bytes:
        """The whole message, of what is kept to be sent again."""
        if not detached.is_detached(payload):
            return payload
        (found,) = detached.read(payload)
        for ring in (*self._old, self._ring):
            if ring is not None and ring.mark == found.place.mark:
                message, epoch, seq = detached.decode(found, ring.view(found.place))
                return codec.encode(message, epoch=epoch, seq=seq)
        raise OverwrittenError(found.place.slot)

    def close(self) -> None:
        """Give the memory up."""
        self._forsake()
        for ring in (*self._old, self._ring):
            if ring is not None:
                ring.close()
        self._old, self._ring, self._whole = [], None, True

    def _forsake(self) -> None:
        """Listen to the ring's bell no more."""
        if self._deafen is not None:
            self._deafen()
            self._deafen = None

    def _ring_for(self, size: int) -> Ring | None:
        """The ring, made or made anew for larger messages; None while there is no memory for it."""
        ring = self._ring
        for old in [old for old in self._old if not old.pinned]:
            old.close()
            self._old.remove(old)
        for old in self._old:
            old.release(self.channel.floor)
        if ring is not None:
            ring.release(self.channel.floor)
            if size <= ring.size:
                return ring
        now = time.monotonic()
        if now < self._off_until:
            return None
        slots = min(max(BUDGET // size, _SLOTS[0]), _SLOTS[1])
        try:
            made = Ring(slots, size, self._waits)
            try:
                made.claim()
            except OSError:
                made.close()
                raise
        except OSError as error:
            self._off_until = now + _AGAIN
            reason = error.strerror or str(error)
            log.warning("no shared memory, big messages go by MQTT", port=self._name, bytes=size, reason=reason)
            return None
        if ring is not None:
            self._forsake()
            self._old.append(ring)
        if self._keeps or not self._blocks:
            made.reach = slots  # a slot is not free before its acknowledgement; or nobody waits until there are more
        self._ring = made
        self.at_once = min(AT_ONCE, working(slots) // 2)
        log.debug("shared memory", port=self._name, slots=slots, bytes=made.size)
        return made


class Reading:
    """A consumer's end of an edge.

    :param number: its number among the readers of the port.
    :param give_up: called once when the producer's memory cannot be reached: the edge is to be read from the public topic.
    """

    def __init__(self, node: str, edge: Edge, number: int, give_up: Callable[[], None]) -> None:
        self._node = node
        self._edge = edge
        self._reader = Reader(number)
        self._give_up = give_up
        self.given_up = False

    @property
    def at_once(self) -> int:
        """Messages that are to be taken at once: while they are worked on, the producer is to have slots for the next."""
        return max(1, self._reader.slots // 2) if self._reader.slots else sys.maxsize

    def lost(self, delivery: Delivery) -> None:
        """A full queue dropped it; see :meth:`nodes.inputs.Edge.lost`."""
        if detached.is_detached(delivery.payload):
            for _ in detached.read(delivery.payload):
                self._edge.dropped.drop("queue-full", 1)
        else:
            self._edge.lost(delivery)

    def decode(self, payload: bytes, trace: str | None = None) -> list[tuple[Message, int, int]]:
        """As :func:`schemas.codec.decode_sequenced`, for each message; big tensors are views on the producer's memory.

        What cannot be reached is left out: overwritten, which is booked on a ``fast`` edge and sent again on a ``safe`` one;
        or of no use, as it comes by the public topic too.

        :raises PayloadError: it is no message.
        """
        if self.given_up:
            return []
        if not detached.is_detached(payload):
            return [codec.decode_sequenced(payload, trace=trace)]
        messages = []
        told = detached.read(payload)
        for i, found in enumerate(told):
            try:
                memory = self._reader.lease(found.place)
            except OverwrittenError:
                self._missed(1)
            except UnreachableError as error:
                self._give_up_on(error)
                self._missed(len(told) - i)
                break
            else:
                messages.append(detached.decode(found, memory, trace=trace))
        return messages

    def _missed(self, messages: int) -> None:
        if not self._edge.spec.safe:
            for _ in range(messages):
                self._edge.dropped.drop("overwritten", 1)

    def _give_up_on(self, error: UnreachableError) -> None:
        self.given_up = True
        log.warning(
            "the producer's shared memory is out of reach, reading by MQTT",
            node=self._node,
            edge=self._edge.name,
            reason=str(error),
        )
        self._give_up()
