"""The sending halves of :mod:`broker.blobs`: to one receiver, and to many."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import TypeAlias

from broker.blob_format import MOST_TURN, Ack, Buffer, Chunk, Held, Need, NotAMessageError, Offer
from broker.blob_pace import FIRST_TIMEOUT, MS, Pace, Steady

Source: TypeAlias = Callable[[int, int], Buffer]
"""Where a sender reads: (offset, size) → that many bytes."""
LATER = 3
"""A chunk is lost when one that was sent so many turns after it has arrived."""
_REMEMBERED = 8192  # chunks whose sending a broadcast remembers
_TURNS = 256  # sendings of which it remembers when they were
_ASKS = 64  # chunks of one Need
_UNKNOWN = 1_000 * MS  # a round trip, as long as none was seen


def _reader(source: Buffer | Source, wanted: Offer) -> Source:
    if callable(source):
        return source
    view = memoryview(source).cast("B")
    if view.nbytes != wanted.size:
        raise ValueError(f"{view.nbytes} bytes for an offer of {wanted.size}")
    return lambda at, size: view[at : at + size]


class Sender:
    """What both kinds of senders have.

    :ivar sent: chunks given out so far, repeats included.
    """

    def __init__(self, offer: Offer, source: Buffer | Source, now: int, pace: Pace | None) -> None:
        self.offer = offer
        self.pace = Pace() if pace is None else pace
        self.sent = 0
        self._read = _reader(source, offer)
        self._clock = Steady(now)
        self._first = self._turn = now >> 10 & MOST_TURN  # one a µs: beyond those of a sender before us
        self._turns: dict[int, int] = {}  # the last ones that no receiver has named: when
        self._named = 0  # the last one that was

    def _chunk(self, index: int, now: int) -> bytes:
        data = memoryview(self._read(index * self.offer.chunk, self.offer.length(index)))
        self.sent += 1
        self._turn += 1
        self._turns[self._turn] = now
        if len(self._turns) > _TURNS:
            del self._turns[next(iter(self._turns))]
        return Chunk(self.offer.digest, index, data, self._turn).encode()

    def _echo(self, last: int, now: int) -> int:
        """A receiver says which chunk of ours came last: a round trip. Gives 0 where it was not one of ours."""
        if not self._first < last <= self._turn:
            return 0
        if last > self._named:
            self._named = last
            if (when := self._turns.pop(last, None)) is not None:
                self.pace.measured(now - when)
            while self._turns and next(iter(self._turns)) < last:
                del self._turns[next(iter(self._turns))]
        return last


class Outgoing(Sender):
    """A blob on its way to one receiver.

    Nothing is sent before the receiver was heard, unless ``eager``: it may have some of it already. Until then who carries this
    repeats the offer.

    :param source: the bytes, or who reads them. What it raises comes out of :meth:`send`.
    :param pace: of the way there, where earlier blobs took it.
    :ivar done: the receiver has it, verified.
    :ivar refused: why the receiver does not want it; empty: it does.
    :ivar begun: the receiver was heard.
    """

    def __init__(
        self, offer: Offer, source: Buffer | Source, now: int, *, pace: Pace | None = None, eager: bool = False
    ) -> None:
        super().__init__(offer, source, now, pace)
        self.done = False
        self.refused = ""
        self.begun = eager
        self._held = Held(offer.count)
        self._life = self._seq = -1
        self._flight: dict[int, tuple[int, int]] = {}  # index → when, and its turn; in the order of sending
        self._again: list[int] = []  # a heap
        self._next = 0  # all before it were sent, or need not be
        self._cut = 0  # the window was halved at this turn
        self._more = False  # there was more to send than was asked for
        self._moved = now  # when the receiver got on, or was taken to be away

    @property
    def over(self) -> bool:
        """Nothing more is to be done."""
        return self.done or bool(self.refused)

    @property
    def acknowledged(self) -> int:
        """Chunks that the receiver has."""
        return self.offer.count if self.done else self._held.total

    def heard(self, payload: Buffer | Ack, now: int) -> bool:
        """The receiver said something: perhaps late, repeated, out of order, or garbage. Never raises.

        :returns: whether it was about this blob.
        """
        now = self._clock(now)
        try:
            ack = payload if isinstance(payload, Ack) else Ack.decode(payload)
        except NotAMessageError:
            return False
        if ack.digest != self.offer.digest or ack.upto > self.offer.count:
            return False
        if ack.life == self._life and ack.seq <= self._seq:
            return True  # overtaken by a later one
        self.begun = True
        if ack.whole or ack.refused:
            self.done, self.refused = self.done or ack.whole, "" if ack.whole else ack.refused
            self._flight.clear()
            return True
        if ack.life != self._life:  # another incarnation, which has what it says and nothing else
            self._held.clear()
            self._again.clear()
            self._next, self._life = 0, ack.life
        self._seq = ack.seq
        self._learn(ack, now)
        if ack.ask:
            self.pace.heard()
            usual = self.pace.usual
            self._lose([i for i, (at, _) in self._flight.items() if now - at >= usual])
        return True

    def send(self, now: int, most: int = 64) -> list[bytes]:
        """Chunks to be published now, encoded: as many as the window leaves room for, and at most ``most``.

        Call it after :meth:`heard`, and at :meth:`wake`.
        """
        now = self._clock(now)
        out: list[bytes] = []
        if self.over or not self.begun:
            return out
        self._expire(now)
        flight = self._flight
        while len(flight) < self.pace.window and len(out) < most:
            index = self._pick(now)
            if index is None:
                break
            try:
                out.append(self._chunk(index, now))
            except BaseException:
                heappush(self._again, index)
                raise
            flight[index] = now, self._turn
        self._more = len(out) == most
        return out

    def wake(self) -> int | None:
        """When :meth:`send` has something, if nothing is heard until then; None: it has nothing."""
        if self.over or not self.begun:
            return None
        if self._more:
            return self._clock.outside(self._moved)
        if self._flight or self._held.full:
            return self._clock.outside(self._moved_or_sent() + self.pace.timeout)
        return self._clock.outside(self._moved)

    def linked(self, now: int) -> None:
        """The link was lost and is there again: what was under way is taken for lost, and time begins anew."""
        now = self._clock(now)
        self._lose(list(self._flight))
        self._moved = now
        self.pace.heard()

    def _moved_or_sent(self) -> int:
        first = next(iter(self._flight.values()), None)
        return self._moved if first is None else max(self._moved, first[0])

    def _learn(self, ack: Ack, now: int) -> None:
        held, before = self._held, self._held.total
        for index in range(held.edge, ack.upto):
            held.add(index)
        for byte, bits in enumerate(ack.bits):
            while bits:
                low = bits & -bits
                bits ^= low
                index = ack.upto + 8 * byte + low.bit_length() - 1
                if index < self.offer.count:
                    held.add(index)
        flight = self._flight
        arrived = [index for index in flight if index in held]
        for index in arrived:
            del flight[index]
        if held.total > before:
            self._moved = now
        self._echo(ack.last, now)
        gone = [index for index, (_, turn) in flight.items() if turn + LATER <= self._named]
        if gone:
            if flight[gone[-1]][1] > self._cut:  # not of the window that was halved already
                self.pace.lost()
                self._cut = self._turn
            self._lose(gone)
        elif arrived:
            self.pace.arrived(len(arrived))

    def _lose(self, gone: list[int]) -> None:
        for index in gone:
            del self._flight[index]
            heappush(self._again, index)

    def _expire(self, now: int) -> None:
        if self._flight and now >= self._moved_or_sent() + self.pace.timeout:
            self._lose(list(self._flight))
            self.pace.silent()
            self._moved = now

    def _pick(self, now: int) -> int | None:
        """The next chunk to send."""
        held, flight = self._held, self._flight
        while self._again:
            index = heappop(self._again)
            if index not in held and index not in flight:
                return index
        self._next = max(self._next, held.edge)
        while self._next < self.offer.count:
            index = self._next
            self._next += 1
            if index not in held and index not in flight:
                return index
        if held.full and not flight and now >= self._moved + self.pace.timeout:
            self.pace.silent()
            self._moved = now
            return self.offer.count - 1  # it has all and does not say that it is done: that was lost; it says it again
        return None


class Broadcast(Sender):
    """A blob that is published once for many receivers, whom it does not know. It is over when its carrier says so.

    :param push: how many chunks are sent unasked at the beginning: receivers are there, as a rule.
    """

    def __init__(
        self, offer: Offer, source: Buffer | Source, now: int, *, push: int = 0, pace: Pace | None = None
    ) -> None:
        super().__init__(offer, source, now, pace)
        self._wanted: dict[int, None] = dict.fromkeys(range(min(push, offer.count)))
        self._sendings: dict[int, tuple[int, int]] = {}  # index → when it was sent last, and its turn

    def heard(self, payload: Buffer | Need, now: int) -> bool:
        """A receiver said what it needs: perhaps late, repeated, or garbage. Never raises.

        :returns: whether it was about this blob.
        """
        now = self._clock(now)
        try:
            need = payload if isinstance(payload, Need) else Need.decode(payload)
        except NotAMessageError:
            return False
        if need.digest != self.offer.digest:
            return False
        last = self._echo(need.last, now)
        asked = 0
        for first, count in need.ranges:
            for index in range(first, min(first + min(count, _ASKS), self.offer.count)):
                if asked >= _ASKS:
                    return True
                asked += 1
                if index not in self._wanted and not self._under_way(index, last, now, need.since, again=need.again):
                    self._wanted[index] = None
        return True

    def send(self, now: int, most: int = 8) -> list[bytes]:
        """At most ``most`` chunks to be published now, encoded. Publish them and come back, as long as there are some."""
        now = self._clock(now)
        out: list[bytes] = []
        while self._wanted and len(out) < most:
            index = next(iter(self._wanted))
            out.append(self._chunk(index, now))
            del self._wanted[index]
            self._sendings.pop(index, None)
            self._sendings[index] = now, self._turn
            if len(self._sendings) > _REMEMBERED:
                del self._sendings[next(iter(self._sendings))]
        return out

    @property
    def waiting(self) -> bool:
        """Whether :meth:`send` has something."""
        return bool(self._wanted)

    def linked(self, now: int) -> None:
        """The link was lost and is there again: what was sent may not have arrived anywhere."""
        self._clock(now)
        self._sendings.clear()

    def _under_way(self, index: int, last: int, now: int, since: int, *, again: bool) -> bool:
        """Whether what was sent already may still arrive: it was sent later than what the receiver has heard last, or since it
        listens; for one that waited long, within a round trip.
        """
        sending = self._sendings.get(index)
        if sending is None:
            return False
        at, turn = sending
        if again:
            return now - at < (self.pace.rtt or _UNKNOWN)
        return turn > last if last else now - at < min(since, FIRST_TIMEOUT)
