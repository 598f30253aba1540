"""Where sessions, queued messages and retained messages are kept: the place of a durable store.

The broker's own structures in memory are what it works with; it tells a store of every change that a restart must not
forget. What changed in a turn of the loop is sealed as one batch and written by a thread, and the answers of that turn leave
the broker *after* it is written. So a PUBACK or PUBREC speaks of something committed, and one commit serves all that
arrived together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from broker.embedded.messages import Message


@dataclass(slots=True)
class StoredDelivery:
    """One queued message of a session.

    :param sequence: its place among the session's messages.
    :param packet_id: set once it was sent; it is sent again with the same one.
    """

    sequence: int
    message: Message
    qos: int
    retain: bool
    identifiers: tuple[int, ...] = ()
    packet_id: int | None = None


@dataclass(slots=True)
class StoredSubscription:
    """One subscription of a session, its filter with ``$share/<group>/`` where it has that."""

    pattern: str
    qos: int
    no_local: bool = False
    retain_as_published: bool = False
    identifier: int | None = None


@dataclass(slots=True)
class StoredWill:
    """The will of a client that was connected when the broker ended.

    :param delay: will delay interval, seconds.
    """

    message: Message
    delay: int


@dataclass(slots=True)
class StoredSession:
    """A session as a restart finds it.

    :param seconds: session expiry interval; it starts anew at the restart, since nobody can say how long we were away.
    :param released: packet identifiers of QoS 2 messages that the client has, and that PUBREL is owed for.
    :param received: packet identifiers of QoS 2 messages taken from the client and not yet released.
    """

    client_id: str
    user: str | None
    seconds: int
    subscriptions: list[StoredSubscription] = field(default_factory=list)
    deliveries: list[StoredDelivery] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    received: set[int] = field(default_factory=set)
    will: StoredWill | None = None


class Batch:
    """Changes that are committed together; what is in it is the store's own."""


class Store:
    """Keeps nothing: a restart forgets all. A durable store overrides every method, and sets ``durable``.

    All are called in the broker's loop, but for :meth:`write`, and must not raise for lack of an entry. Messages have their
    ``received`` in broker time (monotonic): a store that outlives the process turns it into wall-clock time.
    """

    durable: bool = False
    """Whether the broker needs to call anything but :meth:`load` and :meth:`close`."""

    full: bool = False
    """There is no room for new messages and sessions: the broker refuses them (0x97)."""

    failing: bool = False
    """The last commit failed: sessions that are to be kept cannot be served until one succeeds."""

    def load(self, now: float) -> tuple[Iterable[StoredSession], Iterable[Message]]:
        """What was there: sessions and retained messages. Called once, at the start.

        :param now: broker time.
        :raises ConfigError: it cannot be read.
        """
        return (), ()

    def save_session(self, client_id: str, user: str | None, seconds: int) -> None:
        """A session with an expiry interval exists (again)."""

    def drop_session(self, client_id: str) -> None:
        """It ended, and all that it had."""

    def subscribed(self, client_id: str, subscription: StoredSubscription) -> None:
        """A subscription was made or replaced."""

    def unsubscribed(self, client_id: str, pattern: str) -> None:
        """A subscription ended."""

    def queued(self, client_id: str, delivery: StoredDelivery) -> None:
        """A message with QoS > 0 waits for this session."""

    def sent(self, client_id: str, sequence: int, packet_id: int) -> None:
        """It was written to the client under this packet identifier."""

    def released(self, client_id: str, packet_id: int) -> None:
        """QoS 2: the client has the message (PUBREC); the message itself is ``done``, only PUBREL is owed."""

    def completed(self, client_id: str, packet_id: int) -> None:
        """QoS 2: PUBREL is answered (PUBCOMP); the identifier is free."""

    def done(self, client_id: str, sequence: int) -> None:
        """The client has acknowledged it, or it expired."""

    def received(self, client_id: str, packet_id: int) -> None:
        """A QoS 2 message of the client was taken."""

    def forgotten(self, client_id: str, packet_id: int) -> None:
        """The client released that identifier (PUBREL)."""

    def will(self, client_id: str, will: StoredWill | None) -> None:
        """The client's will; None when it was published, or is not to be."""

    def retain(self, message: Message) -> None:
        """The retained message of its topic; none any more where the payload is empty."""

    def unretain(self, topic: str) -> None:
        """The topic's retained message expired."""

    @property
    def pending(self) -> bool:
        """Whether there are changes that no batch has yet."""
        return False

    def seal(self) -> Batch:
        """The changes since the last call, as one batch."""
        return Batch()

    def write(self, batch: Batch) -> None:
        """Make a batch durable, with those before it that failed. Called in a thread, one call at a time.

        :raises OSError: it could not be written; it is kept for the next call.
        """

    def close(self) -> None:
        """The broker ends: write what is left. No :meth:`write` runs any more."""
