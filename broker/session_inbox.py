"""What a session receives: routing to subscriptions, bounds, and acknowledgements in MQTT's order.

PUBACKs leave in the order in which the PUBLISHes came (MQTT 5, 4.6), whatever order the consumers are done in; so one
delivery that is never acknowledged holds up the others once the receive maximum is used up.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import mqtt5

from broker.bus import Delivery, Overflow, Subscription
from broker.session_link import MalformedError, Way
from schemas.errors import BusError, ClosedError
from schemas.topics import matches

ALIASES = 32
"""Topic aliases that the broker may use towards us."""
WAYS = 16_384
"""Topics whose way is remembered."""

_PUBACK = b"\x40\x02"
_PUBREC = b"\x50\x02"
_PUBCOMP = b"\x70\x02"


class Pipe(Protocol):
    """What is asked of a link when receiving."""

    def write(self, data: bytes) -> None:
        """Send whole PUBACK, PUBREC and PUBCOMP packets."""

    def pause(self) -> None:
        """Read no more."""

    def resume(self) -> None:
        """Read again."""


class Inbound:
    """One QoS 1 or 2 message on its way through us.

    :param waiting: subscriptions that have it and have not acknowledged.
    """

    __slots__ = ("packet_id", "qos", "waiting")

    def __init__(self, packet_id: int, qos: int) -> None:
        self.packet_id = packet_id
        self.qos = qos
        self.waiting = 0


class Filter:
    """One topic filter at the broker, shared by all subscriptions of this session that use it.

    :param pattern: as the broker knows it, with ``$share/<group>/``.
    :param topic: the same without it.
    :param identifier: subscription identifier, made of the pattern: a later process that resumes the session uses the
        same, so what the broker kept for it finds its way.
    :param answer: the SUBACK's reason code, when it has come.
    """

    __slots__ = ("answer", "identifier", "pattern", "qos", "retained", "subscriptions", "topic")

    def __init__(self, pattern: str, topic: str, identifier: int, answer: asyncio.Future[int]) -> None:
        self.pattern = pattern
        self.topic = topic
        self.identifier = identifier
        self.answer = answer
        self.qos = 0
        self.retained = False
        self.subscriptions: list[SessionSubscription] = []


class SessionSubscription(Subscription):
    """Queue of one ``subscribe`` call. Made by the session."""

    def __init__(
        self, inbox: Inbox, ender: Callable[[SessionSubscription], Awaitable[None]], capacity: int, overflow: Overflow
    ) -> None:
        self.capacity = capacity
        self.overflow = overflow
        self.queue: deque[Delivery] = deque()
        self.held = 0  # QoS 1 and 2 deliveries given out, not yet acknowledged
        self.dropped = 0
        self.closed = False
        self.ready = False  # handed to the caller: before that nobody could make room, so it must not block the link
        self.error: BusError | None = None
        self._inbox = inbox
        self._ender = ender
        self._waiter: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        return len(self.queue) + self.held >= self.capacity

    @property
    def queued(self) -> int:
        return len(self.queue)

    async def arrived(self) -> None:
        while not self.queue:
            if self.error is not None:
                raise self.error
            if self.closed:
                raise ClosedError("the subscription is closed")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def receive(self) -> list[Delivery]:
        await self.arrived()
        taken = list(self.queue)
        self.queue.clear()
        if self._inbox.numbered:
            self.held += sum(d.handle is not None for d in taken)
        self._inbox.unblock(self)
        return taken

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        if not self._inbox.numbered:
            return
        done = False
        for delivery in deliveries:
            inbound: Inbound | None = delivery.handle
            if inbound is not None:
                delivery.handle = None
                self.held -= 1
                inbound.waiting -= 1
                done = done or not inbound.waiting
        if done:
            self._inbox.settle()
        self._inbox.unblock(self)

    async def unsubscribe(self) -> None:
        if not self.closed:
            await self._ender(self)

    def put(self, delivery: Delivery) -> None:
        """Queue it, or drop it or another by the policy."""
        if delivery.handle is None and self.full:
            if self.overflow == "sample":
                self._drop(delivery)
                return
            if self.overflow == "latest":
                self._replace(delivery)
                return
        self.queue.append(delivery)

    def _replace(self, delivery: Delivery) -> None:
        """Drop the oldest QoS 0 delivery for this one; where all are QoS 1, this one is what is dropped."""
        for i, old in enumerate(self.queue):
            if old.handle is None:
                del self.queue[i]
                self.queue.append(delivery)
                self._drop(old)
                return
        self._drop(delivery)

    def _drop(self, delivery: Delivery) -> None:
        self.dropped += 1
        if self.on_drop is not None:
            self.on_drop(delivery)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, error: BusError | None = None) -> None:
        """No more will come."""
        self.closed = True
        self.error = self.error or error
        self.wake()
        self._inbox.unblock(self)


class Inbox:
    """All subscriptions of a session, and its unacknowledged deliveries.

    :param receive_maximum: as told to the broker.
    :param surplus: QoS 1 deliveries beyond a subscription's capacity from which it blocks the link.
    :param on_free: called when no queue blocks any more: go on with what was not yet routed, then read on.
    """

    def __init__(self, receive_maximum: int, on_free: Callable[[], None], *, surplus: int | None = None) -> None:
        self.filters: dict[str, Filter] = {}
        self.dropped = 0  # QoS 0 without a subscription
        self.numbered = False  # something of QoS 1 or 2 has come
        self._receive_maximum = receive_maximum
        self._on_free = on_free
        self._surplus = receive_maximum if surplus is None else surplus
        self._link: Pipe | None = None
        self._by_id = True
        self._ids: dict[int, tuple[SessionSubscription, ...]] = {}
        self._routes: dict[str, tuple[SessionSubscription, ...]] = {}
        self.ways: dict[bytes, Way] = {}
        self._aliases: dict[int, str] = {}
        self._order: deque[Inbound] = deque()
        self._exactly: dict[int, Inbound] = {}  # QoS 2: handed over, PUBREL has not come
        self._orphans: list[tuple[str, mqtt5.PublishPacket, Inbound]] = []
        self.blocking: set[object] = set()  # full, and may not drop: nothing is read
        self._touched: set[SessionSubscription] = set()

    # life of a connection

    def attach(self, link: Pipe, *, resumed: bool, by_id: bool) -> None:
        """A connection stands. ``resumed``: the broker has our session and sends again what is unacknowledged."""
        self._link = link
        self._by_id = by_id
        self._forget_routes()
        self._aliases.clear()
        self._order.clear()
        self._orphans.clear()
        self.blocking.discard(self)
        if not resumed:
            self._exactly.clear()
            return
        for subscription in self.subscriptions:
            stale = [d for d in subscription.queue if d.handle is not None and d.handle.qos == 1]
            if stale:
                gone = {id(d) for d in stale}
                subscription.queue = deque(d for d in subscription.queue if id(d) not in gone)

    def detach(self) -> None:
        self._link = None
        self._order.clear()
        self._orphans.clear()
        self.blocking.discard(self)

    @property
    def subscriptions(self) -> set[SessionSubscription]:
        return {s for f in self.filters.values() for s in f.subscriptions}

    def add(self, subscription: SessionSubscription, topic: str, group: str | None, qos: int, retained: bool) -> Filter:
        """Route what matches ``topic`` to ``subscription`` too. The filter is to be asked for at the broker."""
        pattern = f"$share/{group}/{topic}" if group else topic
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        found = self.filters.get(pattern)
        if found is None:
            identifier = zlib.crc32(pattern.encode("utf-8", "replace")) & 0x7FFFFFF or 1
            while identifier in self._ids:
                identifier = identifier % 0x7FFFFFF + 1
            found = self.filters[pattern] = Filter(pattern, topic, identifier, answer)
        elif found.answer.done():
            found.answer = answer
        found.qos = max(found.qos, qos)
        found.retained = found.retained or retained
        if subscription not in found.subscriptions:
            found.subscriptions.append(subscription)
        self._ids[found.identifier] = tuple(found.subscriptions)
        self._forget_routes()
        return found

    def adopt(self, subscription: SessionSubscription) -> None:
        """Hand over what came for it from a resumed session before it was there."""
        waiting, self._orphans = self._orphans, []
        for topic, packet, inbound in waiting:
            if subscription in self._targets(topic, packet):
                self._hand([subscription], topic, packet, inbound)
            else:
                self._orphans.append((topic, packet, inbound))
        subscription.wake()
        self.hold()

    def start(self, subscription: SessionSubscription) -> None:
        """The caller has it: from here on it may block."""
        subscription.ready = True
        queue = subscription.queue
        over = len(queue) > subscription.capacity + self._surplus
        if over or (subscription.overflow == "block" and subscription.full and any(d.handle is None for d in queue)):
            self.blocking.add(subscription)
            self.hold()

    def remove(self, subscription: SessionSubscription) -> list[Filter]:
        """Route nothing more to it; the filters that nobody uses any more."""
        unused = []
        for found in tuple(self.filters.values()):
            if subscription in found.subscriptions:
                found.subscriptions.remove(subscription)
                self._ids[found.identifier] = tuple(found.subscriptions)
                if not found.subscriptions:
                    del self.filters[found.pattern], self._ids[found.identifier]
                    unused.append(found)
        self._forget_routes()
        return unused

    def refuse_orphans(self) -> int:
        """Refuse what nobody subscribed to, so that it does not hold up the others; how many there were."""
        count = len(self._orphans)
        link = self._link
        for _, _, inbound in self._orphans:
            inbound.waiting = 0
        self._orphans.clear()
        if link is not None and count:
            self.settle()
        return count

    def _forget_routes(self) -> None:
        self._routes.clear()
        self.ways.clear()

    def wants_retained(self, topic: str) -> bool:
        """Whether a filter that matches asked for retained messages, for brokers that cannot be told."""
        return any(f.retained for f in self.filters.values() if matches(f.topic, topic)) or not self.filters

    # packets

    def publish(self, packet: mqtt5.PublishPacket) -> None:
        """Route one PUBLISH. :meth:`turn` follows at the end of the chunk."""
        topic = packet.topic
        if not topic:
            topic = self._aliased(packet)
        elif packet.topic_alias is not None:
            self._alias(packet)
        targets = self._targets(topic, packet)
        packet_id = packet.packet_id
        if packet_id is None:
            if not targets:
                self.dropped += 1
                return
            properties = packet.user_properties
            for subscription in targets:
                delivery = Delivery(topic, packet.payload, 0, packet.retain)
                if properties:
                    delivery.properties = tuple(properties)
                self._put(subscription, delivery)
            return
        qos = packet.qos.value
        if qos == 2:
            known = self._exactly.get(packet_id)
            if known is not None:  # handed over before; the broker has not heard of it
                self._order.append(known)
                if not known.waiting:
                    self.settle()
                return
        inbound = Inbound(packet_id, qos)
        self.numbered = True
        if qos == 2:
            self._exactly[packet_id] = inbound
        self._order.append(inbound)
        if len(self._order) > self._receive_maximum:
            # mosquitto 2.0.11 sends twice as many as it may; what it cannot do is make us read them
            self.blocking.add(self)
        if targets:
            self._hand(targets, topic, packet, inbound)
        else:
            inbound.waiting = 1
            self._orphans.append((topic, packet, inbound))

    def deliver(self, way: Way, payload: bytes) -> None:
        """Route a QoS 0 message whose way is known: :meth:`_put`, without the call, for it is what comes most."""
        topic, targets = way
        for subscription in targets:
            queue = subscription.queue
            if not queue:
                self._touched.add(subscription)
            if subscription.overflow != "block":
                subscription.put(Delivery(topic, payload))
                continue
            queue.append(Delivery(topic, payload))
            if len(queue) + subscription.held >= subscription.capacity and subscription.ready:
                self.blocking.add(subscription)

    def learn(self, before: bytes, packet: mqtt5.PublishPacket) -> None:
        """Remember where QoS 0 messages go that begin like this one, if nothing in it is for this one alone."""
        if packet.topic_alias is None and packet.message_expiry_interval is None and not packet.user_properties:
            targets = self._targets(packet.topic, packet)
            if targets:
                if len(self.ways) >= WAYS:
                    self.ways.clear()
                self.ways[before] = Way(packet.topic, tuple(targets))

    def _put(self, subscription: SessionSubscription, delivery: Delivery) -> None:
        """Queue a QoS 0 delivery, or drop it or another by the subscription's policy."""
        queue = subscription.queue
        if not queue:  # nobody waits at a queue that has something
            self._touched.add(subscription)
        if subscription.overflow == "block":
            queue.append(delivery)
            if len(queue) + subscription.held >= subscription.capacity and subscription.ready:
                self.blocking.add(subscription)
        else:
            subscription.put(delivery)

    def _hand(
        self, targets: Sequence[SessionSubscription], topic: str, packet: mqtt5.PublishPacket, inbound: Inbound
    ) -> None:
        properties = packet.user_properties
        inbound.waiting = len(targets)
        for subscription in targets:
            subscription.put(
                Delivery(
                    topic,
                    packet.payload,
                    inbound.qos,
                    packet.retain,
                    packet.duplicate,
                    tuple(properties) if properties else (),
                    inbound,
                )
            )
            if len(subscription.queue) > subscription.capacity + self._surplus and subscription.ready:
                self.blocking.add(subscription)  # left over from lost connections: wait for the consumer
            self._touched.add(subscription)

    def release(self, packet_id: int) -> None:
        """PUBREL: the broker has forgotten the id; so do we."""
        found = self._exactly.pop(packet_id, None)
        if self._link is not None:
            if found is None:
                code = mqtt5.PubCompReasonCode.PACKET_ID_NOT_FOUND
                self._link.write(mqtt5.PubCompPacket(packet_id, reason_code=code).write())
            else:
                self._link.write(_PUBCOMP + packet_id.to_bytes(2, "big"))

    def turn(self) -> None:
        """The chunk is done: wake who got something."""
        for subscription in self._touched:
            subscription.wake()
        self._touched.clear()
        self.hold()

    # bounds

    def hold(self) -> None:
        """Stop reading where a queue is full that may not drop."""
        if self.blocking and self._link is not None:
            self._link.pause()

    def unblock(self, subscription: SessionSubscription) -> None:
        if subscription in self.blocking and (subscription.closed or not subscription.full):
            self._free(subscription)

    def _free(self, blocker: object) -> None:
        self.blocking.discard(blocker)
        if not self.blocking and self._link is not None:
            self._on_free()

    def settle(self) -> None:
        """Acknowledge, oldest first, what is done; stop at the first that is not."""
        link, order = self._link, self._order
        acks: list[bytes] = []
        while order and not order[0].waiting:
            inbound = order.popleft()
            kind = _PUBACK if inbound.qos == 1 else _PUBREC
            acks.append(kind + inbound.packet_id.to_bytes(2, "big"))
        if acks and link is not None:
            link.write(acks[0] if len(acks) == 1 else b"".join(acks))
        if self in self.blocking and len(order) <= self._receive_maximum:
            self._free(self)

    # routing

    def _targets(self, topic: str, packet: mqtt5.PublishPacket) -> Sequence[SessionSubscription]:
        if self._by_id:
            ids = packet.subscription_ids
            if len(ids) == 1:
                return self._ids.get(ids[0], ())
            if ids:
                return list(dict.fromkeys(s for i in ids for s in self._ids.get(i, ())))
        route = self._routes.get(topic)
        if route is None:
            if len(self._routes) >= 4096:
                self._forget_routes()
            found = (s for f in self.filters.values() if matches(f.topic, topic) for s in f.subscriptions)
            route = self._routes[topic] = tuple(dict.fromkeys(found))
        return route

    def _alias(self, packet: mqtt5.PublishPacket) -> None:
        alias = packet.topic_alias or 0
        if not 1 <= alias <= ALIASES:
            raise MalformedError(f"topic alias {alias}", mqtt5.DisconnectReasonCode.TOPIC_ALIAS_INVALID)
        self._aliases[alias] = packet.topic

    def _aliased(self, packet: mqtt5.PublishPacket) -> str:
        topic = self._aliases.get(packet.topic_alias or 0)
        if topic is None:
            raise MalformedError("unknown topic alias", mqtt5.DisconnectReasonCode.TOPIC_ALIAS_INVALID)
        return topic
