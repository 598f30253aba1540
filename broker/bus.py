"""The contract of every bus: the MQTT 5 session, the legacy client and the in-process bus.

A bus carries opaque payloads between topics. Sending is in two steps, so that order is kept while acknowledgements are
outstanding: ``await bus.publish(...)`` returns when the publications are *accepted* in order (this is where back-pressure
is felt), and gives a :class:`Receipt` that is done when they are *acknowledged*.
Receiving is by subscription: ``await subscription.receive()`` gives all that has arrived as one list, and the consumer
says :meth:`Subscription.acknowledge` when the effect of a delivery is done, not before.

One behaviour suite, ``tests/broker/test_bus.py``, runs against every implementation.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self, TypeAlias

import msgspec

Overflow: TypeAlias = Literal["block", "latest", "sample"]
"""What a full subscription queue does with a new QoS 0 delivery: ``block`` the link, keep the ``latest`` (the oldest is
dropped), or ``sample`` (the new one is dropped, so what is queued stays evenly old). QoS 1 is never dropped: the receive
maximum bounds it."""

Receipt: TypeAlias = "asyncio.Future[None]"
"""Done when every publication of one call is acknowledged; raises :class:`schemas.errors.PublishFailedError` when some
were refused, :class:`schemas.errors.ClosedError` when the bus was closed before."""


class Publication(msgspec.Struct, frozen=True, gc=False):
    """One message to be sent.

    :param topic: topic name, no wildcards.
    :param payload: the bytes; on a bus whose ``encoded`` is False any object, handed over as it is.
    :param qos: 0 or 1. On QoS 1 the receipt waits for the broker's PUBACK (local bus: for the consumers' acknowledgement).
    :param retain: keep as the topic's retained message; an empty payload clears it.
    :param expiry: seconds after which the broker may discard it undelivered (MQTT 5 message expiry).
    :param properties: MQTT 5 user properties, e.g. ``(("traceparent", "00-…"),)``; dropped where the far end has none.
    :param heard: on QoS 1, told once it is acknowledged whether somebody subscribes to the topic; True where the far end
        does not say. A bus without such answers (MQTT 3.1.1, in process) never calls it.
    """

    topic: str
    payload: Any
    qos: int = 0
    retain: bool = False
    expiry: int | None = None
    properties: tuple[tuple[str, str], ...] = ()
    content_type: str | None = None
    heard: Callable[[bool], None] | None = None


class Delivery(msgspec.Struct, gc=False):
    """One message received. ``handle`` is the bus's own, for the acknowledgement.

    :param payload: bytes, or the object itself on a bus whose ``encoded`` is False.
    :param duplicate: the DUP flag: it may have been delivered before.
    """

    topic: str
    payload: Any
    qos: int = 0
    retain: bool = False
    duplicate: bool = False
    properties: tuple[tuple[str, str], ...] = ()
    handle: Any = None


class Will(msgspec.Struct, frozen=True):
    """What the broker publishes for us if we vanish. ``delay``: seconds it waits for us to come back (MQTT 5)."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True
    delay: int = 0


class Subscription(ABC):
    """Deliveries of one ``subscribe`` call, bounded."""

    dropped: int = 0
    """QoS 0 deliveries dropped so far because the queue was full (never with ``block``)."""

    on_drop: Callable[[Delivery], None] | None = None
    """Called with each of them; set by who subscribed. Must not raise."""

    @property
    @abstractmethod
    def queued(self) -> int:
        """Deliveries that wait to be received."""

    @abstractmethod
    async def arrived(self) -> None:
        """Wait until something is queued, and leave it there, where the overflow policy still applies to it.

        By the task that calls :meth:`receive`. Raises like it.
        """

    @abstractmethod
    async def receive(self) -> list[Delivery]:
        """Wait for at least one delivery, then give everything queued, oldest first.

        Called by one task at a time. Safe to cancel: nothing is lost.

        :raises ClosedError: the subscription or its bus was closed and nothing is queued.
        """

    @abstractmethod
    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """The effects of these deliveries are done. QoS 0 ones are ignored.

        Never blocks and never raises: an acknowledgement that cannot be sent (the link is down) is dropped, and the
        broker delivers again. Any order is allowed; the implementation keeps MQTT's order of PUBACKs where it must.
        """

    @abstractmethod
    async def unsubscribe(self) -> None:
        """End it at the broker too. Queued deliveries can still be received."""


class Bus(ABC):
    """One connection (of any kind) to one broker, reconnecting by itself. Use it as ``async with``."""

    encoded: ClassVar[bool] = True
    """Whether payloads must be bytes. False on the in-process bus, which hands objects over."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether there is a link at this moment."""

    @property
    def max_payload(self) -> int | None:
        """Most bytes that topic and payload of one publication may have together, where the far end has a limit."""
        return None

    @abstractmethod
    async def open(self) -> None:
        """Connect for the first time.

        Retries with jittered backoff while the broker is away, for at most the ``patience`` that the bus was made with.

        :raises ConnectError: refused for good (credentials, certificate), or still away after ``patience``.
        """

    @abstractmethod
    async def close(self) -> None:
        """Send what is accepted, disconnect cleanly (no will), fail what is unacknowledged. Idempotent."""

    @abstractmethod
    async def publish(self, publications: Sequence[Publication]) -> Receipt:
        """Accept ``publications`` in order; wait while the send window or write buffer is full.

        QoS 1 publications survive a reconnect: they are sent again, marked DUP, in their order. QoS 0 ones are written
        once; while the link is down they are not accepted (the call waits for the link).

        :returns: the receipt. Its exception, if nobody awaits it, is logged by asyncio; keep it.
        :raises ClosedError: the bus is closed.
        """

    @abstractmethod
    async def subscribe(
        self,
        filters: Sequence[str],
        *,
        qos: int = 1,
        capacity: int = 1024,
        overflow: Overflow = "block",
        group: str | None = None,
        retained: bool = True,
    ) -> Subscription:
        """Subscribe, and again by itself after each reconnect.

        :param capacity: most deliveries queued, unacknowledged QoS 1 ones included.
        :param group: shared subscription group (MQTT 5 ``$share``); each message goes to one member.
        :param retained: whether retained messages are wanted at the first subscription.
        :raises DeniedError: the broker refused a filter.
        :raises ClosedError: the bus is closed.
        """

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
