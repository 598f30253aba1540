"""The receiving halves of :mod:`broker.blobs`: of a blob for us alone, and of one that many get."""

from __future__ import annotations

from typing import Literal, TypeAlias

from broker.blob_format import Ack, Buffer, Chunk, Need, NotAMessageError
from broker.blob_hold import Hold
from broker.blob_pace import FIRST_ASK, MS, Pace, Steady
from broker.spool_figures import NoRoomError

Took: TypeAlias = Literal["new", "repeat", "foreign", "wrong", "garbage", "no-room"]
"""What a payload was to a receiver: a chunk that it lacked; one that it had; one of another blob; one that cannot be of this
blob; no chunk at all; one that the disk does not take now."""

SPOILS = 3
"""So often a blob may arrive complete and be another one than was offered, before it is refused."""
PATIENCE = 1_000 * MS
MOST_PATIENCE = 30_000 * MS
LATER = 3
"""A chunk that was asked for is asked for again when so many that were asked for after it have arrived."""


class Receiver:
    """What both kinds of receivers have.

    :param hold: where the chunks go, and what is there of them already.
    :ivar spoiled: how often all chunks were there and made another blob than was offered; then all of them are wanted again.
    :ivar refused: why it was given up: ``damaged``, or what :meth:`refuse` was told.
    :ivar lack: why the last chunk that came could not be kept, if so; it is tried again.
    """

    def __init__(self, hold: Hold, now: int) -> None:
        self.hold = hold
        self.offer = hold.offer
        self.spoiled = 0
        self.refused = ""
        self.lack: NoRoomError | None = None
        self._clock = Steady(now)
        self._quiet = now  # since when nothing came, or was said
        self._patience = PATIENCE
        self._last = 0  # turn of the chunk that came last
        self._say = True
        self._ask = True
        if not hold.whole and hold.held.full:  # killed just before it was looked at
            self._finish()

    @property
    def whole(self) -> bool:
        """All of it is there, and it is what was offered."""
        return self.hold.whole

    @property
    def over(self) -> bool:
        """Nothing more is wanted. What comes nevertheless should be handed on: the sender waits for an answer."""
        return self.whole or bool(self.refused)

    def refuse(self, reason: str) -> None:
        """Give it up; the sender is told why."""
        self.refused = reason
        self._say = True

    def take(self, payload: Buffer | Chunk, now: int) -> Took:
        """Something arrived on the topic of the chunks: perhaps late, repeated, out of order, or garbage. Never raises.

        Take all that has arrived before asking :meth:`Incoming.say` or :meth:`Fetching.say`.
        """
        now = self._clock(now)
        try:
            chunk = payload if isinstance(payload, Chunk) else Chunk.decode(payload)
        except NotAMessageError:
            return "garbage"
        offer, hold, index = self.offer, self.hold, chunk.index
        if chunk.digest != offer.digest:
            return "foreign"
        if index >= offer.count or len(chunk.data) != offer.length(index):
            return "wrong"
        if self.over:
            self._say = True
            return "repeat"
        self._patience = min(max(PATIENCE, 2 * (now - self._quiet)), MOST_PATIENCE)
        self._quiet, self._last = now, chunk.turn
        new = False
        try:
            new = hold.write(index, chunk.data)
            self.lack = None
        except NoRoomError as error:
            self.lack = error
            return "no-room"  # nothing is said: the sender waits, and tries again
        self._say = True
        if new:
            self._arrived(index, now)
        if hold.held.full and not hold.whole:
            self._finish()
        return "new" if new else "repeat"

    def wake(self) -> int | None:
        """When ``say`` has something, if nothing comes until then; None: never."""
        if self._say:
            return self._clock.outside(self._quiet)
        return None if self.over else self._clock.outside(self._quiet + self._patience)

    def _arrived(self, index: int, now: int) -> None:
        """A chunk that was lacking."""

    def _anew(self) -> None:
        """All chunks are wanted again."""

    def _finish(self) -> None:
        try:
            if self.hold.finish():
                return
        except NoRoomError as error:
            self.lack = error
            return
        self.spoiled += 1
        if self.spoiled >= SPOILS:
            self.refuse("damaged")
        self._ask = True
        self._anew()

    def _tired(self, now: int) -> bool:
        """Nothing came for too long."""
        if self.over or now < self._quiet + self._patience:
            return False
        if self.hold.held.full:
            self._finish()  # the disk had no room to make it durable
        self._quiet, self._patience = now, min(2 * self._patience, MOST_PATIENCE)
        return True


class Incoming(Receiver):
    """A blob that one sender sends to us. Make it when its offer was accepted, or again after a restart; then :meth:`say`.

    :param life: tells this incarnation from those before; by default made of ``now``.
    """

    def __init__(self, hold: Hold, now: int, *, life: int | None = None) -> None:
        self._life = now & 0xFFFF_FFFF_FFFF if life is None else life
        self._seq = 0
        super().__init__(hold, now)

    def say(self, now: int) -> bytes | None:
        """What to tell the sender now, encoded; None: nothing."""
        now = self._clock(now)
        if not self._say:
            if not self._tired(now):
                return None
            self._ask = True
        self._say = False
        self._seq += 1
        held, over = self.hold.held, self.over
        ask, self._ask = self._ask and not over, False
        return Ack(
            self.offer.digest,
            0 if over else held.edge,
            b"" if over else held.tail(),
            self._life,
            self._seq,
            self._last,
            whole=self.whole,
            ask=ask,
            refused="" if self.whole else self.refused,
        ).encode()

    def linked(self, now: int) -> None:
        """The link was lost and is there again: the sender is told where we stand."""
        self._quiet = self._clock(now)
        self._say = self._ask = True

    def _anew(self) -> None:
        self._life += 1
        self._seq = 0


class Fetching(Receiver):
    """A blob that is published for many: asks for what is missing here, the first chunks first, and takes what others asked for.

    :param pace: of the way there; its window is how many chunks are asked for at once.
    :param since: when the topic of the chunks was subscribed to; by default ``now``.
    """

    def __init__(self, hold: Hold, now: int, *, pace: Pace | None = None, since: int | None = None) -> None:
        self._began = now if since is None else since
        self.pace = Pace(first=FIRST_ASK) if pace is None else pace
        self._asked: dict[
            int, tuple[int, int, bool]
        ] = {}  # index → when, the how manieth, again; in the order of asking
        self._asks = 0
        self._newest = 0  # the last asking that was answered
        self._again = False
        super().__init__(hold, now)

    def say(self, now: int) -> bytes | None:
        """What to ask for now, encoded; None: nothing. Once the blob is :attr:`whole`: never anything."""
        now = self._clock(now)
        self._say = False
        if self.over:
            return None
        asked, pace = self._asked, self.pace
        if asked and now >= self._due():
            pace.silent()
            self._again, self._quiet = True, now
            asked.clear()
        elif not asked and self.hold.held.full and not self._tired(now):
            return None
        gone = [index for index, (_, order, _) in asked.items() if order + LATER <= self._newest]
        if gone:
            pace.lost()
            for index in gone:
                del asked[index]
        elif 2 * len(asked) > pace.window:
            return None
        wanted: list[int] = []
        for index in self.hold.held.missing():
            if len(asked) >= pace.window:
                break
            if index not in asked:
                self._asks += 1
                asked[index] = now, self._asks, self._again or index in gone
                wanted.append(index)
        again, self._again = self._again, False
        if not wanted:
            return None
        return Need(
            self.offer.digest, _ranges(wanted), self._last, min(max(0, now - self._began), 1 << 40), again
        ).encode()

    def wake(self) -> int | None:
        if self.over:
            return None
        if self._say or not (self._asked or self.hold.held.full):
            return self._clock.outside(self._quiet)
        return self._clock.outside(self._due())

    def linked(self, now: int) -> None:
        """The link was lost and is there again: what was asked for is asked for again."""
        self._quiet = self._began = self._clock(now)
        self._say = self._again = True
        self._asked.clear()
        self.pace.heard()

    def _due(self) -> int:
        first = next(iter(self._asked.values()), None)
        if first is None:
            return self._quiet + self._patience
        return max(self._quiet, first[0]) + self.pace.timeout

    def _arrived(self, index: int, now: int) -> None:
        found = self._asked.pop(index, None)
        if found is not None:
            when, order, again = found
            if not again:
                self._newest = max(self._newest, order)
                self.pace.measured(now - when)
            self.pace.heard()
            self.pace.arrived(1)

    def _anew(self) -> None:
        self._asked.clear()
        self._say = self._again = True


def _ranges(indexes: list[int]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for index in indexes:
        if out and sum(out[-1]) == index:
            out[-1] = out[-1][0], out[-1][1] + 1
        else:
            out.append((index, 1))
    return tuple(out)
