"""From a published message to the sessions that want it."""

from __future__ import annotations

import logging

from broker.embedded.limits import Limits
from broker.embedded.messages import Message
from broker.embedded.retained import Retained
from broker.embedded.runs import Run
from broker.embedded.sessions import Outcome, Session
from broker.embedded.stats import Stats
from broker.embedded.store import Store
from broker.embedded.topics import Group, Route, Subscription, Subscriptions, Target

log = logging.getLogger(__name__)

SUCCESS, NO_SUBSCRIBERS, QUOTA_EXCEEDED = 0x00, 0x10, 0x97


class Router:
    """Subscriptions and retained messages, and the ways between them."""

    def __init__(self, limits: Limits, stats: Stats, store: Store) -> None:
        self.limits = limits
        self.stats = stats
        self.store = store
        self.subscriptions = Subscriptions()
        self.retained = Retained(limits)

    def publish(self, message: Message, origin: Session | None, now: float) -> tuple[int, Session | None]:
        """Deliver ``message`` to all who want it.

        :param origin: the session that published it; None for the broker's own and for wills.
        :returns: the reason code for the publisher, and the slow session that it must wait for, if there is one.
        """
        code = NO_SUBSCRIBERS
        slow: Session | None = None
        if message.retain:
            store = self.store
            kept = store.durable and not message.topic.startswith("$SYS/")
            if (kept and store.full and not message.empty) or not self.retained.put(message):
                code = QUOTA_EXCEEDED
            elif kept:
                store.retain(message)
        route = self.subscriptions.route(message.topic)
        for target in route.targets:
            if not target.local and target.session is origin:
                own = target.own()
                if own is None:
                    continue
                target = own
            outcome = target.session.offer(message, target.manner(message.qos, message.retain), now)
            if outcome is Outcome.TAKEN:
                code = code if code > NO_SUBSCRIBERS else SUCCESS
            elif outcome is Outcome.SLOW:
                slow = target.session
                code = code if code > NO_SUBSCRIBERS else SUCCESS
            else:
                code = QUOTA_EXCEEDED
                self._full(target.session)
        for group in route.groups:
            outcome, session = self.share(group, message, now)
            if outcome is Outcome.REFUSED:
                code = QUOTA_EXCEEDED
            else:
                slow = session if outcome is Outcome.SLOW else slow
                code = code if code > NO_SUBSCRIBERS else SUCCESS
        return code, slow

    def share(
        self, group: Group, message: Message, now: float, besides: Session | None = None
    ) -> tuple[Outcome, Session | None]:
        """Deliver ``message`` to one member of a shared subscription, other than ``besides``."""
        target = group.choose(besides)
        if target is None:
            return Outcome.REFUSED, None
        outcome = target.session.offer(message, target.manner(message.qos, message.retain), now)
        if outcome is Outcome.REFUSED:
            self._full(target.session)
        return outcome, target.session

    def fan_out(self, run: Run, origin: Session, now: float) -> None:
        """Deliver a run of QoS 0 messages (not retained) to all who want them."""
        route = run.route
        for target in route.targets:
            if not target.local and target.session is origin:
                own = target.own()
                if own is None:
                    continue
                target = own
            session = target.session
            conn = session.conn
            if conn is None:
                continue
            how = target.manner(0, False)
            if not session.plain:
                conn.send_run(run, how.extra)
            else:
                for message in run.messages(now):
                    session.offer(message, how, now)
        for group in route.groups:
            for message in run.messages(now):
                self.share(group, message, now)

    def fan_in(self, route: Route, messages: list[Message], origin: Session, now: float) -> bool:
        """Deliver QoS 1 messages (not retained) that came one after the other, if everybody takes all of them at once.

        :returns: whether they were delivered; if not, nobody has one of them.
        """
        if route.groups or not route.targets:
            return False
        count = len(messages)
        for target in route.targets:
            if not target.local or not target.session.has_room(count):
                return False
        for target in route.targets:
            target.session.offer_all(messages, target.manner(1, False), now)
        return True

    def send_retained(self, subscription: Subscription, now: float) -> None:
        """Queue the retained messages that a new subscription matches (3.3.1.3)."""
        target = Target(subscription.session, [subscription])
        for message in self.retained.matching(subscription.pattern, now):
            subscription.session.offer_retained(message, target.retained(message.qos))

    def _full(self, session: Session) -> None:
        if not session.warned:
            session.warned = True
            log.warning("there is no room for more messages of session %r; publishers are refused", session.client_id)
