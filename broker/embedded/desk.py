"""SUBSCRIBE and UNSUBSCRIBE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mqtt5
from mqtt5 import SubAckReasonCode, UnsubAckReasonCode

from broker.embedded.codec5 import PROTOCOL_ERROR, FaultError
from broker.embedded.store import StoredSubscription
from broker.embedded.topics import Subscription, is_filter, split_shared

if TYPE_CHECKING:
    from broker.embedded.connection import Connection
    from broker.embedded.core import Core
    from broker.embedded.sessions import Session


class Desk:
    """Makes and ends subscriptions for clients."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def subscribe(self, conn: Connection, session: Session, packet: mqtt5.SubscribePacket, now: float) -> None:
        """Answer each filter with what is granted, then send the retained messages it matches (3.8.4)."""
        codes: list[SubAckReasonCode] = []
        fresh: list[Subscription] = []
        for wanted in packet.topic_filters:
            existed = wanted.pattern in session.subscriptions
            code, subscription = self._grant(conn, session, wanted, packet.subscription_id)
            codes.append(code)
            if subscription is None:
                continue
            handling = int(wanted.retain_handling)
            # A shared subscription gets no retained messages, and retain handling 1 none for a filter it had (3.8.3.1).
            if subscription.group is None and (handling == 0 or (handling == 1 and not existed)):
                fresh.append(subscription)
        conn.write(mqtt5.SubAckPacket(packet.packet_id, codes))
        for subscription in fresh:
            if subscription.pattern.startswith("$SYS/"):
                self._core.system.refresh(now)
            self._core.router.send_retained(subscription, now)
        session.pump(now)

    def _grant(
        self, conn: Connection, session: Session, wanted: mqtt5.TopicFilter, identifier: int | None
    ) -> tuple[SubAckReasonCode, Subscription | None]:
        core = self._core
        pattern = wanted.pattern
        try:
            group, inner = split_shared(pattern)
        except ValueError:
            return SubAckReasonCode.TOPIC_FILTER_INVALID, None
        if not is_filter(inner, core.limits.topic_levels):
            return SubAckReasonCode.TOPIC_FILTER_INVALID, None
        if group is not None and wanted.no_local:  # [MQTT-3.8.3-4]
            raise FaultError(PROTOCOL_ERROR, "no local on a shared subscription")
        if not conn.may("subscribe", inner):
            return SubAckReasonCode.NOT_AUTHORIZED, None
        if pattern not in session.subscriptions and (
            len(session.subscriptions) >= core.limits.subscriptions or (session.stored and core.store.full)
        ):
            return SubAckReasonCode.QUOTA_EXCEEDED, None
        subscription = self.make(
            session,
            StoredSubscription(pattern, int(wanted.max_qos), wanted.no_local, wanted.retain_as_published, identifier),
        )
        return SubAckReasonCode(int(wanted.max_qos)), subscription

    def make(self, session: Session, stored: StoredSubscription) -> Subscription:
        """Put a subscription in, in place of an earlier one with the same filter ([MQTT-3.8.4-3])."""
        group, inner = split_shared(stored.pattern)
        subscription = Subscription(
            session,
            inner,
            stored.qos,
            no_local=stored.no_local,
            retain_as_published=stored.retain_as_published,
            identifier=stored.identifier,
            group=group,
        )
        session.subscriptions[stored.pattern] = subscription
        self._core.router.subscriptions.add(subscription)
        if session.stored:
            self._core.store.subscribed(session.client_id, stored)
        return subscription

    def unsubscribe(self, conn: Connection, session: Session, packet: mqtt5.UnsubscribePacket) -> None:
        """End subscriptions; what is queued for them is still delivered (3.10.4)."""
        core = self._core
        codes: list[UnsubAckReasonCode] = []
        for pattern in packet.patterns:
            subscription = session.subscriptions.pop(pattern, None)
            if subscription is not None:
                core.router.subscriptions.remove(subscription)
                if session.stored:
                    core.store.unsubscribed(session.client_id, pattern)
                codes.append(UnsubAckReasonCode.SUCCESS)
            elif is_filter(pattern, 65_536):
                codes.append(UnsubAckReasonCode.NO_SUBSCRIPTION_EXISTED)
            else:
                codes.append(UnsubAckReasonCode.TOPIC_FILTER_INVALID)
        conn.write(mqtt5.UnsubAckPacket(packet.packet_id, codes))
