"""Delivery over any bus: what is sent is kept until its effect is done, and what arrives is handed on once, in order.

Two sans-I/O halves of one selective-repeat protocol over numbered messages (the runtime does the sending):

- :class:`SendWindow`, one for each port of a producer, keeps payloads until every ``safe`` consumer said *done*. Its size is
  the back-pressure.
- :class:`ReceiveWindow`, one for each edge of a consumer, puts arrivals in order, recognises repeats and says what has
  *arrived* and what is *done* (:class:`Ack`).

An *epoch* is one incarnation of a producer's numbering; a restarted producer without a durable outbox begins a higher one.
A consumer that finds itself behind the producer's numbering is told where it begins (:class:`Knock`). Since a producer's
restart gives the same messages new numbers, the consumer also remembers the identities of what it took last
(:class:`RecentIds`).

The design follows the selective-repeat ARQ of the textbooks, with two floors (arrived, done) where TCP has one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec

ASK_AFTER = 1_000_000_000
"""ns without progress after which a consumer is asked where it stands."""
ASK_AGAIN = 2_000_000_000
"""ns between two such questions: they are small, and the one before may have been lost."""
RESEND_AT_MOST = 16_000_000_000
"""ns, at most, between two answers that are met with all that is lacking, while that does not help; begins with ASK_AFTER and
doubles."""
REPEAT_GUARD = 100_000_000
"""ns within which a number that was asked for is not sent a second time."""
MOST_MISSING = 256


class Ack(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What a consumer says of one edge.

    :param epoch: the numbering that the other figures speak of; 0: none seen yet.
    :param received: every number up to here has arrived.
    :param done: every number up to here has had its effect.
    :param missing: numbers after ``received`` that are lacking while later ones are there.
    :param hello: the consumer has just subscribed: what was sent before may not have reached it.
    :param ended: the stream's end is done and the consumer is gone for good.
    :param rooted: its state is on its disk: nobody can take its part over while it is away.
    :param answer: to a :class:`Knock`, and nothing that has come to the consumer waits there to be looked at: what lies
        after ``received`` is not with it.
    """

    epoch: int
    received: int
    done: int
    missing: tuple[int, ...] = ()
    hello: bool = False
    ended: bool = False
    rooted: bool = False
    answer: bool = False


class Knock(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What a producer tells a consumer: my numbering is ``epoch``, and the first that I still have is ``base``.

    :param rooted: as in :class:`Ack`, of the producer.
    """

    epoch: int
    base: int
    rooted: bool = False


_encode = msgspec.msgpack.Encoder().encode
_decode_ack = msgspec.msgpack.Decoder(Ack).decode
_decode_knock = msgspec.msgpack.Decoder(Knock).decode


def pack(control: Ack | Knock) -> bytes:
    """Bytes of a control message."""
    return _encode(control)


def unpack_ack(payload: bytes | memoryview) -> Ack | None:
    """The acknowledgement in ``payload``, or None if it is none (somebody else's message on our topic)."""
    try:
        return _decode_ack(payload)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


def unpack_knock(payload: bytes | memoryview) -> Knock | None:
    """The knock in ``payload``, or None if it is something else (a message sent again)."""
    try:
        return _decode_knock(payload)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


class Kept(msgspec.Struct, gc=False):
    """One message in the window. ``final``: the stream's end, which ``fast`` consumers too must have."""

    seq: int
    topic: str
    payload: bytes
    final: bool = False
    resent: int = 0


class Peer(msgspec.Struct):
    """What a producer knows of one consumer. ``fast``: only the end of the stream waits for it.

    :param progress: ns, when it last got on, or was asked.
    :param patience: ns from then on until it is asked.
    :param hold: ns, until when an answer is not met with what is lacking: it was sent just now, and in vain before.
    :param pause: ns, how long the next such time is.
    """

    name: str
    fast: bool = False
    heard: bool = False
    ended: bool = False
    received: int = 0
    done: int = 0
    progress: int = 0
    patience: int = ASK_AFTER
    hold: int = 0
    pause: int = ASK_AFTER

    def moved(self, now: int) -> None:
        """It got on, or begins anew."""
        self.progress, self.patience = now, ASK_AFTER
        self.hold, self.pause = 0, ASK_AFTER


class SendWindow:
    """The producer's half, for one port.

    :param epoch: this incarnation; larger than any before (a start time in ns).
    :param consumers: name → whether its edge is ``fast``.
    :param messages: most messages kept; :attr:`room` is then False.
    :param size: most bytes kept.
    :param first: number of the first message (a durable outbox continues its numbering).
    :param earlier: epochs of this node's earlier incarnations in the same run.
    :ivar committed: with a durable outbox, the last number that is in it: what a restart would number anew, and perhaps
        give to another message, is not sent again. None: there is none, everything may go.
    """

    def __init__(
        self,
        epoch: int,
        consumers: dict[str, bool],
        *,
        messages: int = 1024,
        size: int = 64 * 1024 * 1024,
        first: int = 1,
        earlier: Collection[int] = (),
    ) -> None:
        self.epoch = epoch
        self.peers = {name: Peer(name, fast=fast) for name, fast in consumers.items()}
        self.next = first
        self.kept: deque[Kept] = deque()
        self.bytes = 0
        self.resent = 0
        self.committed: int | None = None
        self._messages = messages
        self._size = size
        self._earlier = frozenset(earlier)
        self._sequenced = any(not fast for fast in consumers.values())

    @property
    def sequenced(self) -> bool:
        """Whether data carry numbers: a ``safe`` consumer reads this port. The end always does."""
        return self._sequenced

    @property
    def base(self) -> int:
        """First number still kept, or the next one."""
        return self.kept[0].seq if self.kept else self.next

    @property
    def floor(self) -> int:
        """Every number up to here is done at every consumer."""
        return self.base - 1

    @property
    def room(self) -> bool:
        """Whether another message may be sent."""
        return len(self.kept) < self._messages and self.bytes < self._size

    @property
    def waiting(self) -> list[str]:
        """Consumers that were never heard of."""
        return [p.name for p in self.peers.values() if not p.heard and not p.ended]

    def push(self, topic: str, payload: bytes, now: int, *, final: bool = False) -> None:
        """Keep the message that was numbered :attr:`next`."""
        if not self.kept:
            for peer in self.peers.values():
                peer.moved(now)
        self.kept.append(Kept(self.next, topic, payload, final))
        self.bytes += len(payload)
        self.next += 1
        self._release()

    def heard(self, name: str, ack: Ack, now: int) -> tuple[Knock | None, list[Kept]]:
        """A consumer's acknowledgement: what to tell it, and what to send it again."""
        peer = self.peers.get(name)
        if peer is None:
            return None, []
        peer.heard = True
        if ack.epoch != self.epoch:
            if ack.ended and ack.epoch in self._earlier:
                peer.ended = True
                self._release()
                return None, []
            peer.received = peer.done = self.base - 1
            return Knock(self.epoch, self.base, self.committed is not None), []
        peer.ended = ack.ended
        behind = ack.received < peer.received
        if ack.received > peer.received or ack.done > peer.done or ack.hello:
            peer.moved(now)
        peer.received = ack.received
        peer.done = max(peer.done, ack.done)
        self._release()
        if ack.received < self.base - 1 and not peer.fast:
            return Knock(self.epoch, self.base, self.committed is not None), self._after(
                peer, now
            ) if behind or ack.hello else []
        if behind or ack.hello:
            return None, self._after(peer, now)
        if ack.answer:
            return None, self._answered(peer, now)
        if ack.missing:
            first, last = self.base, self._last
            wanted = (self.kept[seq - first] for seq in ack.missing if first <= seq <= last)
            return None, self._mark([k for k in wanted if now - k.resent > REPEAT_GUARD], now)
        return None, []

    def withdraw(self) -> list[Kept]:
        """Give up what is kept, but for the stream's end: somebody else is to get it. It counts as done here."""
        gone = [kept for kept in self.kept if not kept.final]
        self.kept = deque(kept for kept in self.kept if kept.final)
        self.bytes = sum(len(kept.payload) for kept in self.kept)
        return gone

    def anew(self, now: int) -> None:
        """Our link is there again: what was in vain before need not be now."""
        for peer in self.peers.values():
            peer.moved(now)

    def left(self, name: str) -> None:
        """A consumer has ended and left for good: somebody saw it who knows (the supervisor)."""
        if (peer := self.peers.get(name)) is not None:
            peer.ended = True
            self._release()

    def due(self, now: int) -> list[str]:
        """Consumers that had no progress for too long, and are to be asked where they stand with a :class:`Knock`.

        Their answer says what they lack, and only that is sent again: who is merely slow is not given everything twice. A
        question comes through at the latest :data:`ASK_AGAIN` after the way is open again, whatever was lost before, and
        they are few. Called a few times a second.
        """
        out = []
        for peer in self.peers.values():
            if now - peer.progress >= peer.patience and self._owes(peer):
                peer.progress, peer.patience = now, ASK_AGAIN
                out.append(peer.name)
        return out

    def _owes(self, peer: Peer) -> bool:
        """Whether something that may be sent waits for this consumer."""
        if peer.ended or not self.kept or peer.done >= self._last:
            return False
        return not peer.fast or self.kept[-1].final

    @property
    def _last(self) -> int:
        """Last number that may be sent."""
        return self.next - 1 if self.committed is None else self.committed

    def _answered(self, peer: Peer, now: int) -> list[Kept]:
        """What to send a consumer that was asked and says what it lacks; ever more rarely if that does not help."""
        if now < peer.hold or not (again := self._after(peer, now)):
            return []
        peer.hold, peer.pause = now + peer.pause, min(2 * peer.pause, RESEND_AT_MOST)
        return again

    def _after(self, peer: Peer, now: int) -> list[Kept]:
        last = self._last
        return self._mark(
            [k for k in self.kept if peer.received < k.seq <= last and (k.final or not peer.fast)],
            now,
        )

    def _mark(self, again: list[Kept], now: int) -> list[Kept]:
        for kept in again:
            kept.resent = now
        self.resent += len(again)
        return again

    def _release(self) -> None:
        kept = self.kept
        while kept:
            first = kept[0]
            for peer in self.peers.values():
                if peer.done < first.seq and not peer.ended and (first.final or not peer.fast):
                    return
            kept.popleft()
            self.bytes -= len(first.payload)


class ReceiveWindow:
    """The consumer's half, for one edge. What is handed on is any object the caller likes.

    :param limit: most arrivals kept while waiting for an earlier one; later ones are left to be sent again.
    """

    def __init__(self, *, limit: int = 4096, epoch: int = 0, done: int = 0) -> None:
        self.epoch = epoch
        self.done = done
        self.next = done + 1
        self.repeated = 0
        self.changed = True
        self.ended = False
        self._early: dict[int, Any] = {}
        self._limit = limit

    def accept(self, epoch: int, seq: int, item: Any) -> list[Any]:
        """Take an arrival; gives what can be handed on now, in order (often just ``[item]``)."""
        if epoch != self.epoch:
            if epoch < self.epoch:
                self.repeated += 1
                return []
            self._begin(epoch, 1)
        self.changed = True
        if seq == self.next:
            self.next += 1
            if not self._early:
                return [item]
            return [item, *self._ready()]
        if seq < self.next or seq in self._early:
            self.repeated += 1
        elif len(self._early) < self._limit:
            self._early[seq] = item
        return []

    def knocked(self, knock: Knock) -> list[Any]:
        """The producer said where its numbering begins; gives what can be handed on now."""
        self.changed = True
        if knock.epoch > self.epoch:
            self._begin(knock.epoch, knock.base)
        elif knock.epoch == self.epoch and knock.base > self.next:
            self.next = knock.base
            self.done = max(self.done, knock.base - 1)
            self._early = {seq: item for seq, item in self._early.items() if seq >= knock.base}
            return self._ready()
        return []

    def jump(self, epoch: int, seq: int) -> bool:
        """On a ``fast`` edge: the stream's end has arrived, whatever was before it. False: it is a repeat."""
        self.changed = True
        if epoch < self.epoch or (epoch == self.epoch and seq < self.next):
            self.repeated += 1
            return False
        self._begin(epoch, seq + 1)
        self.done = seq - 1
        return True

    def finish(self, epoch: int, seq: int) -> None:
        """The effect of this number, and of all before it, is done. Of an earlier epoch: ignored."""
        if epoch == self.epoch and seq > self.done:
            self.done = seq
            self.changed = True

    def ack(self, *, hello: bool = False, rooted: bool = False, answer: bool = False) -> Ack:
        """What to tell the producer now."""
        self.changed = False
        missing: tuple[int, ...] = ()
        if self._early:
            last = max(self._early)
            missing = tuple(
                seq for seq in range(self.next, min(last, self.next + MOST_MISSING)) if seq not in self._early
            )
        return Ack(self.epoch, self.next - 1, self.done, missing, hello, self.ended, rooted, answer)

    def _begin(self, epoch: int, first: int) -> None:
        self.epoch = epoch
        self.next = first
        self.done = first - 1
        self._early.clear()

    def _ready(self) -> list[Any]:
        out: list[Any] = []
        while self.next in self._early:
            out.append(self._early.pop(self.next))
            self.next += 1
        return out


class RecentIds:
    """The identities taken last, to know a repeat that comes with a new number.

    Exact as long as a restarted producer repeats fewer than ``capacity`` messages, which its window bounds. Kept in two
    generations, which costs less than an order: between ``capacity`` and twice as many are known.
    """

    def __init__(self, capacity: int = 8192, known: Iterable[str] = ()) -> None:
        self._capacity = capacity
        self._new = set(known)
        self._old: set[str] = set()

    def add(self, ident: str) -> bool:
        """Remember ``ident``; False if it was known."""
        if ident in self._new or ident in self._old:
            return False
        self._new.add(ident)
        if len(self._new) >= self._capacity:
            self._old, self._new = self._new, set()
        return True

    def add_all(self, idents: Sequence[str]) -> bool:
        """Remember all of them; False if any was known or is there twice: then nothing is remembered."""
        fresh = set(idents)
        if len(fresh) != len(idents) or not (self._new.isdisjoint(fresh) and self._old.isdisjoint(fresh)):
            return False
        self._new |= fresh
        if len(self._new) >= self._capacity:
            self._old, self._new = self._new, set()
        return True

    def discard(self, ident: str) -> None:
        """Forget ``ident``, if it is known."""
        self._new.discard(ident)
        self._old.discard(ident)

    def __contains__(self, ident: str) -> bool:
        return ident in self._new or ident in self._old

    def __len__(self) -> int:
        return len(self._new) + len(self._old)
