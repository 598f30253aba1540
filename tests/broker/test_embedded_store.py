"""The store's interface carries all that a restart needs: a store that keeps it, and brokers killed at any moment."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import pytest
from embedded_fixtures import Bench, Client
from mqtt5 import PubAckPacket, PublishPacket, PubRecPacket, PubRelPacket, UnsubscribePacket

from broker.embedded.messages import Message
from broker.embedded.store import Store, StoredDelivery, StoredSession, StoredSubscription


class Disk(Store):
    """Keeps in dicts what a durable store keeps in tables."""

    durable = True

    def __init__(self) -> None:
        self._sessions: dict[str, StoredSession] = {}
        self._retained: dict[str, Message] = {}

    def load(self, now: float) -> tuple[Iterable[StoredSession], Iterable[Message]]:
        return list(deepcopy(self._sessions).values()), list(self._retained.values())

    def _of(self, client_id: str) -> StoredSession:
        return self._sessions[client_id]

    def save_session(self, client_id: str, user: str | None, seconds: int) -> None:
        known = self._sessions.setdefault(client_id, StoredSession(client_id, user, seconds))
        known.seconds = seconds

    def drop_session(self, client_id: str) -> None:
        self._sessions.pop(client_id, None)

    def subscribed(self, client_id: str, subscription: StoredSubscription) -> None:
        self.unsubscribed(client_id, subscription.pattern)
        self._of(client_id).subscriptions.append(subscription)

    def unsubscribed(self, client_id: str, pattern: str) -> None:
        session = self._of(client_id)
        session.subscriptions = [s for s in session.subscriptions if s.pattern != pattern]

    def queued(self, client_id: str, delivery: StoredDelivery) -> None:
        self._of(client_id).deliveries.append(delivery)

    def sent(self, client_id: str, sequence: int, packet_id: int) -> None:
        for delivery in self._of(client_id).deliveries:
            if delivery.sequence == sequence:
                delivery.packet_id = packet_id

    def done(self, client_id: str, sequence: int) -> None:
        session = self._of(client_id)
        session.deliveries = [d for d in session.deliveries if d.sequence != sequence]

    def released(self, client_id: str, packet_id: int) -> None:
        self._of(client_id).released.append(packet_id)

    def completed(self, client_id: str, packet_id: int) -> None:
        self._of(client_id).released.remove(packet_id)

    def received(self, client_id: str, packet_id: int) -> None:
        self._of(client_id).received.add(packet_id)

    def forgotten(self, client_id: str, packet_id: int) -> None:
        self._of(client_id).received.discard(packet_id)

    def retain(self, message: Message) -> None:
        if message.empty:
            self._retained.pop(message.topic, None)
        else:
            self._retained[message.topic] = message


KEPT: dict[str, Any] = {"clean": False, "session_expiry_interval": 1000}


def back(disk: Disk, client_id: str) -> tuple[Bench, Client]:
    """The broker was killed; a new one on the same store, and the client connected to it."""
    bench = Bench(store=disk)
    client = bench.client(client_id, **KEPT)
    assert client.connack.session_present
    return bench, client


def test_queued_messages_and_subscriptions_survive() -> None:
    disk = Disk()
    bench = Bench(store=disk)
    client, publisher = bench.client("s", **KEPT), bench.client("p")
    client.subscribe("a/#", 1, identifier=7)
    client.subscribe("$share/g/b", 2)
    client.subscribe("gone", 1)
    client.send(UnsubscribePacket(1, ["gone"]))
    client.lose()
    for i in range(1, 4):
        publisher.publish("a/x", b"%d" % i, 1, i, content_type="t")
    publisher.publish("keep", b"retained", 1, 9, retain=True)
    bench, client = back(disk, "s")
    messages = client.messages()
    assert [(m.payload, m.content_type, m.subscription_ids, m.duplicate) for m in messages] == [
        (b"%d" % i, "t", [7], False) for i in range(1, 4)
    ]
    other = bench.client("p")
    for topic in ("a/y", "b", "gone"):
        other.publish(topic, b"new", 1)
    assert [m.topic for m in client.messages()] == ["a/y", "b"]
    assert [p.payload for p in client.subscribe("keep") if isinstance(p, PublishPacket)] == [b"retained"]
    bench, client = back(disk, "s")
    assert client.messages() == []


def test_in_flight_messages_survive_with_their_identifiers() -> None:
    disk = Disk()
    bench = Bench(store=disk)
    client, publisher = bench.client("s", **KEPT), bench.client("p")
    client.subscribe("a", 2)
    for i in range(1, 5):
        publisher.publish("a", b"%d" % i, 1 + i % 2, i)
    first = client.messages(answer=False)
    numbers = [m.packet_id or 0 for m in first]
    assert [int(m.qos) for m in first] == [2, 1, 2, 1]
    client.send(PubRecPacket(numbers[0]))
    client.one(PubRelPacket)
    client.send(PubAckPacket(numbers[1]))
    _, client = back(disk, "s")
    packets = client.take()
    assert isinstance(packets[0], PubRelPacket)
    assert packets[0].packet_id == numbers[0]
    again = [(p.packet_id, p.payload, p.duplicate) for p in packets if isinstance(p, PublishPacket)]
    assert again == [(numbers[2], b"3", True), (numbers[3], b"4", True)]


@pytest.mark.parametrize("released", [False, True])
def test_qos_2_from_a_client_survives(released: bool) -> None:
    """A repeat after the restart is not delivered twice."""
    disk = Disk()
    bench = Bench(store=disk)
    client, publisher = bench.client("s", **KEPT), bench.client("p", **KEPT)
    client.subscribe("a", 1)
    publisher.publish("a", b"once", 2, 5)
    assert client.payloads() == [b"once"]
    if released:
        publisher.send(PubRelPacket(5))
    bench, publisher = back(disk, "p")
    publisher.publish("a", b"once", 2, 5, duplicate=not released)
    client = bench.client("s", **KEPT)
    assert client.payloads() == ([b"once"] if released else [])


def test_sessions_that_end_leave_nothing() -> None:
    disk = Disk()
    bench = Bench(store=disk)
    for client_id, end in (("a", "expired"), ("b", "clean start"), ("c", "changed")):
        client = bench.client(client_id, clean=False, session_expiry_interval=10)
        client.subscribe("t", 1)
        if end == "changed":
            client.leave(session_expiry_interval=0)
        else:
            client.lose()
        if end == "clean start":
            bench.client(client_id, clean=True)
    bench.client("p").publish("t", b"x", 1)
    bench.later(11)
    assert disk._sessions == {}
    bench = Bench(store=disk)
    assert bench.core.router.subscriptions.count == 0


def test_a_restored_session_expires_too() -> None:
    disk = Disk()
    bench = Bench(store=disk)
    bench.client("s", clean=False, session_expiry_interval=10).lose()
    bench = Bench(store=disk)
    bench.later(11)
    assert bench.core.entrance.sessions == {}
    assert disk._sessions == {}
