"""Sessions: what is kept for a client, connected or not (4.1), and the flow of its outgoing messages (4.3, 4.4, 4.9).

What happens when a session's queue is full, and why
----------------------------------------------------
A message with QoS > 0 is never dropped in silence.

- A *connected* subscriber that is slow holds its publishers up: the message is queued, but the publisher's PUBACK or PUBREC is
  sent only when the queue has gone down to half. MQTT's own windows do the rest: a publisher has at most ``inflight``
  publications unacknowledged, so a full queue grows by no more than that per publisher. Reading from the publisher goes on,
  because acknowledgements come by the same connection: a client that publishes to itself, or two that publish to each
  other, would otherwise block for ever. Only a client that runs past its window (3.1.1 has none) is read no more.
- A connected subscriber that then acknowledges nothing for ``stall_seconds`` is disconnected (0x97), so that it cannot hold
  the others up for ever.
- A session that is *away* cannot catch up, so nobody waits for it: every other subscriber gets the message, and the
  publisher is answered 0x97 (quota exceeded), which tells it that one did not. A repeat may reach the
  others twice, which is what QoS 1 allows. The same holds for sessions that are to outlive a restart when the store is full,
  and for all sessions that are away when all queues together are at ``all_queue_bytes``. A 3.1.1 publisher can be told
  nothing in a PUBACK: the loss is counted and logged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

from broker.embedded.limits import Limits
from broker.embedded.messages import UNLIMITED, Kind, Manner, Message, head
from broker.embedded.stats import Stats
from broker.embedded.store import Store, StoredDelivery

if TYPE_CHECKING:
    from broker.embedded.connection import Connection
    from broker.embedded.topics import Subscription

Delivery: TypeAlias = tuple[Message, Manner, int]
"""A message on its way to one session: the message, how, and its sequence number in the session."""

_JOIN_BELOW = 4096
"""Payloads of this size and more are written by themselves instead of copied behind their header."""


class Outcome(IntEnum):
    """What became of a message that a session was offered."""

    TAKEN = 0
    SLOW = 1
    """Taken, but the publisher must wait: the session's queue is full."""
    REFUSED = 2
    """Not taken: the session's queue is full and its client is away, or the store is full."""


class Session:
    """The state of one client.

    :param seconds: session expiry interval; 0 ends it with its connection.
    """

    __slots__ = (
        "_next_id",
        "_sequence",
        "bytes",
        "client_id",
        "conn",
        "ended",
        "holding",
        "inflight",
        "limits",
        "plain",
        "progress",
        "queue",
        "received",
        "resend",
        "seconds",
        "slow",
        "stats",
        "store",
        "stored",
        "subscriptions",
        "user",
        "version",
        "warned",
    )

    def __init__(self, client_id: str, user: str | None, limits: Limits, stats: Stats, store: Store) -> None:
        self.client_id = client_id
        self.user = user
        self.limits = limits
        self.stats = stats
        self.store = store
        self.stored = False
        self.seconds = 0
        self.ended = False
        self.version = 5
        self.conn: Connection | None = None
        self.subscriptions: dict[str, Subscription] = {}
        self.queue: deque[Delivery] = deque()
        self.plain = 0
        """How many of the queue are QoS 0: later QoS 0 messages must not overtake them."""
        self.inflight: dict[int, Delivery | None] = {}
        """Sent and not acknowledged, in the order sent; None once only PUBREL is to be answered (QoS 2)."""
        self.resend: deque[int] = deque()
        """Of ``inflight``: what this connection has not sent again yet."""
        self.received: set[int] = set()
        """Packet identifiers of QoS 2 messages from the client that it has not released."""
        self.bytes = 0
        self.slow = False
        """Publishers are held up for this session."""
        self.holding: set[Connection] = set()
        self.progress = 0.0
        """When the client last acknowledged something."""
        self.warned = False
        self._next_id = 1
        self._sequence = 0

    @property
    def readiness(self) -> int:
        """For a shared subscription's choice: 0 can send at once, 1 connected, 2 away, 3 cannot take more."""
        conn = self.conn
        if self.stored and self.store.full:
            return 3
        if conn is None:
            return 3 if self.full else 2
        room = len(self.inflight) - len(self.resend) < conn.receive_max and conn.pending < self.limits.out_bytes
        return 0 if room and not self.queue else 1

    @property
    def full(self) -> bool:
        """Whether the queue is at its limit, or all queues together are (then a client that keeps up may go on)."""
        limits = self.limits
        return (
            self.bytes >= limits.queue_bytes
            or len(self.queue) + len(self.inflight) >= limits.queue_messages
            or (self.stats.queued >= limits.all_queue_bytes and (self.conn is None or bool(self.queue)))
        )

    def offer(self, message: Message, manner: Manner, now: float) -> Outcome:
        """Deliver ``message``, now or when the client takes it. QoS 0 is for connected clients only, and may be dropped."""
        conn = self.conn
        if not manner.qos:
            if conn is not None:
                if self.plain:
                    self._enqueue_plain(message, manner)
                else:
                    self._send_plain(conn, message, manner, now)
            return Outcome.TAKEN
        if self.stored and self.store.full:
            return Outcome.REFUSED
        if (
            conn is not None
            and not self.queue
            and len(self.inflight) < conn.receive_max
            and conn.pending < self.limits.out_bytes
            and not self.resend
        ):
            self._sequence += 1
            size = message.size
            self.bytes += size
            self.stats.queued += size
            if self.stored:
                self._record(message, manner, self._sequence)
            self._send(conn, (message, manner, self._sequence), now)
            return Outcome.TAKEN
        if conn is None and self.full:
            return Outcome.REFUSED
        self._enqueue(message, manner)
        return Outcome.SLOW if conn is not None and self.full else Outcome.TAKEN

    def has_room(self, count: int) -> bool:
        """Whether so many messages can be sent at once, without a look at each."""
        conn = self.conn
        return (
            conn is not None
            and not self.queue
            and not self.resend
            and len(self.inflight) + count <= conn.receive_max
            and conn.pending < self.limits.out_bytes
            and conn.packet_max == UNLIMITED
            and not (self.stored and self.store.full)
        )

    def offer_all(self, messages: list[Message], manner: Manner, now: float) -> None:
        """As :meth:`offer` for each of these, which were published with QoS 1 just now; there is room for them."""
        conn = self.conn
        assert conn is not None  # noqa: S101 - that there is one was asked by has_room
        if not manner.qos:
            for message in messages:
                self.offer(message, manner, now)
            return
        inflight, sequence, number, size = self.inflight, self._sequence, self._next_id, 0
        version, extra, aliases = conn.version, manner.extra, conn.alias_max
        last: Kind | None = None
        name = block = b""
        start, same, shorter = 0, False, True
        parts: list[bytes] = []
        for message in messages:
            body, kind = message.body, message.kind
            if kind is not last:
                last, shorter = kind, not aliases
                name, block, start = kind.name, kind.written(version, extra), len(kind.block)
                same = not aliases and kind.same(version, extra)
            if not shorter:
                name, block = conn.shorten(kind.name, kind.written(version, extra), len(body) - start)
                shorter = name == b"\0\0"
            while number in inflight:
                number = number + 1 if number < 65_535 else 1
            sequence += 1
            inflight[number] = (message, manner, sequence)
            if self.stored:
                self._record(message, manner, sequence)
                self.store.sent(self.client_id, sequence, number)
            if same:
                parts += (head(0x32, len(name) + 2 + len(body)), name, number.to_bytes(2, "big"), body)
            else:
                length = len(name) + 2 + len(block) + len(body) - start
                parts += (head(0x32, length), name, number.to_bytes(2, "big"), block, body[start:])
            number = number + 1 if number < 65_535 else 1
            size += message.size
        self._sequence, self._next_id = sequence, number
        self._count(size)
        self.stats.sent += len(messages)
        conn.send(b"".join(parts))

    def offer_retained(self, message: Message, manner: Manner) -> None:
        """Queue a retained message for a new subscription; :meth:`pump` sends it. Past the limit it is dropped, counted."""
        if self.full:
            self.stats.dropped += 1
        elif manner.qos:
            self._enqueue(message, manner)
        else:
            self._enqueue_plain(message, manner)

    def take_back(self, message: Message, manner: Manner) -> None:
        """Queue again what :meth:`orphans` gave, whatever the limits say: it was taken before."""
        self._enqueue(message, manner)

    def _enqueue(self, message: Message, manner: Manner) -> None:
        self._sequence += 1
        self._count(message.size)
        self.queue.append((message, manner, self._sequence))
        if self.stored:
            self._record(message, manner, self._sequence)

    def _enqueue_plain(self, message: Message, manner: Manner) -> None:
        if self.full:
            self.stats.dropped += 1
            return
        self.plain += 1
        self._count(message.size)
        self.queue.append((message, manner, 0))

    def pump(self, now: float) -> None:
        """Send what the client's window and its connection have room for. Called after each acknowledgement and write."""
        conn = self.conn
        if conn is None:
            return
        top = self.limits.out_bytes
        while self.resend and conn.pending < top and len(self.inflight) - len(self.resend) < conn.receive_max:
            self._send_again(conn, self.resend.popleft(), now)
        while self.queue and conn.pending < top:
            delivery = self.queue[0]
            message, manner, _ = delivery
            if manner.qos and (self.resend or len(self.inflight) >= conn.receive_max):
                break
            self.queue.popleft()
            if not manner.qos:
                self.plain -= 1
                self._count(-message.size)
                before, after = message.form(manner, conn.version, now)
                if len(before) + len(after) <= conn.packet_max:
                    conn.send(before + after)
                    self.stats.sent += 1
                else:
                    self.stats.dropped += 1
            elif (expires := message.expires) is not None and expires <= now:  # [MQTT-3.3.2-5]
                self._finish(delivery)
                self.stats.expired += 1
            else:
                self._send(conn, delivery, now)
        if self.slow:
            self.ease()

    def _send_plain(self, conn: Connection, message: Message, manner: Manner, now: float) -> None:
        before, after = message.form(manner, conn.version, now)
        conn.send_plain(before + after)

    def _send(self, conn: Connection, delivery: Delivery, now: float) -> None:
        message, manner, sequence = delivery
        number = self._next_id
        while number in self.inflight:
            number = number + 1 if number < 65_535 else 1
        self._next_id = number + 1 if number < 65_535 else 1
        before, after = self._form(conn, message, manner, now)
        length = len(after)
        if len(before) + length + 2 > conn.packet_max:  # [MQTT-3.1.2-24], -25: as if it had been delivered
            self._finish(delivery)
            self.stats.dropped += 1
            return
        self.inflight[number] = delivery
        if length < _JOIN_BELOW:
            conn.send(before + number.to_bytes(2, "big") + after)
        else:
            conn.send(before + number.to_bytes(2, "big"))
            conn.send(after)
        self.stats.sent += 1
        if self.stored:
            self.store.sent(self.client_id, sequence, number)

    def _form(self, conn: Connection, message: Message, manner: Manner, now: float) -> tuple[bytes, bytes]:
        """See :meth:`Message.form`; with a topic alias, where the client takes them."""
        before, after = message.form(manner, conn.version, now)
        if not conn.alias_max:
            return before, after
        kind = message.kind
        length = len(message.body) - len(kind.block)
        block = after[: len(after) - length]
        name, longer = conn.shorten(kind.name, block, length)
        if longer is block:
            return before, after
        payload = after[len(block) :]
        return head(before[0], len(name) + 2 + len(longer) + length) + name, longer + payload

    def _send_again(self, conn: Connection, number: int, now: float) -> None:
        delivery = self.inflight[number]
        if delivery is None:
            conn.send(b"\x62\x02" + number.to_bytes(2, "big"))
            return
        message, manner, _ = delivery
        before, after = self._form(conn, message, manner, now)
        if len(before) + len(after) + 2 > conn.packet_max:
            del self.inflight[number]
            self._finish(delivery)
            self.stats.dropped += 1
            return
        conn.send(bytes((before[0] | 8,)) + before[1:] + number.to_bytes(2, "big"))  # [MQTT-3.3.1-1]
        conn.send(after)
        self.stats.sent += 1

    def acknowledged(self, numbers: Iterable[int], now: float) -> None:
        """PUBACK (QoS 1), or PUBREC with an error: the client is done with these. Unknown identifiers are ignored."""
        inflight, stored, freed = self.inflight, self.stored, 0
        for number in numbers:
            delivery = inflight.get(number)
            if delivery is not None:
                del inflight[number]
                freed += delivery[0].size
                if stored:
                    self.store.done(self.client_id, delivery[2])
        self._count(-freed)
        self.progress = now
        if self.queue or self.slow or self.resend:
            self.pump(now)

    def taken(self, number: int, now: float) -> bool:
        """PUBREC: the client has a QoS 2 message.

        :returns: whether the identifier is known; PUBREL is to be sent either way.
        """
        if number not in self.inflight:
            return False
        delivery = self.inflight[number]
        self.progress = now
        if delivery is not None:
            self.inflight[number] = None
            self._count(-delivery[0].size)
            if self.stored:
                self.store.released(self.client_id, number)
                self.store.done(self.client_id, delivery[2])
        return True

    def completed(self, number: int, now: float) -> None:
        """PUBCOMP: the last step of a QoS 2 message."""
        if number in self.inflight and self.inflight[number] is None:
            del self.inflight[number]
            if self.stored:
                self.store.completed(self.client_id, number)
        self.progress = now
        self.pump(now)

    def expects(self, number: int) -> int:
        """The QoS that ``number`` was sent with; 0 where it is not in flight."""
        if number not in self.inflight:
            return 0
        delivery = self.inflight[number]
        return 2 if delivery is None else delivery[1].qos

    def attach(self, conn: Connection, now: float) -> None:
        """Its client is connected. What was in flight goes out again first, in order ([MQTT-4.4.0-1], [MQTT-4.6.0-1])."""
        self.conn = conn
        self.version = conn.version
        self.resend = deque(self.inflight)
        self.progress = now
        self.warned = False

    def detach(self) -> None:
        """Its connection ended. QoS 0 messages are not kept, and nobody waits for it any more."""
        self.conn = None
        self.resend.clear()
        if self.plain:
            self._count(-sum(d[0].size for d in self.queue if not d[1].qos))
            self.queue = deque(d for d in self.queue if d[1].qos)
            self.plain = 0
        self.ease(whatever=True)

    def ease(self, *, whatever: bool = False) -> None:
        """Let the waiting publishers go on, if the queue is down to half (or ``whatever`` it is)."""
        limits = self.limits
        if not whatever and (
            self.bytes > limits.queue_bytes // 2
            or len(self.queue) + len(self.inflight) > limits.queue_messages // 2
            or (self.queue and self.stats.queued >= limits.all_queue_bytes)
        ):
            return
        self.slow = False
        waiting, self.holding = self.holding, set()
        for conn in waiting:
            conn.publisher.settle()

    def orphans(self) -> list[Delivery]:
        """Messages of shared subscriptions that nobody has seen, taken out of the queue for another member."""
        if not any(d[1].group is not None for d in self.queue):
            return []
        found = [d for d in self.queue if d[1].group is not None]
        self.queue = deque(d for d in self.queue if d[1].group is None)
        for delivery in found:
            self._finish(delivery)
        return found

    def _count(self, size: int) -> None:
        self.bytes += size
        self.stats.queued += size

    def forget(self) -> None:
        """The session ended: its messages take no room any more."""
        self._count(-self.bytes)
        self.inflight.clear()
        self.queue.clear()

    def _record(self, message: Message, manner: Manner, sequence: int) -> None:
        self.store.queued(
            self.client_id, StoredDelivery(sequence, message, manner.qos, manner.retain, manner.identifiers)
        )

    def _finish(self, delivery: Delivery) -> None:
        self._count(-delivery[0].size)
        if self.stored:
            self.store.done(self.client_id, delivery[2])

    def restore(self, deliveries: list[StoredDelivery], released: list[int]) -> None:
        """Fill a new session with what a store had."""
        self.inflight.update(dict.fromkeys(released))
        for stored in sorted(deliveries, key=lambda d: d.sequence):
            how = Manner(stored.qos, stored.retain, stored.identifiers)
            delivery = (stored.message, how, stored.sequence)
            self._sequence = max(self._sequence, stored.sequence)
            if stored.packet_id is None:
                self.queue.append(delivery)
            else:
                self.inflight[stored.packet_id] = delivery
            self._count(stored.message.size)
