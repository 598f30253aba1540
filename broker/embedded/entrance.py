"""Clients coming and going: CONNECT, take-over, wills, the life of sessions."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import mqtt5
from mqtt5 import ConnAckReasonCode

from broker.embedded.connection import Connection, State
from broker.embedded.messages import UNLIMITED, Message, make, will_properties
from broker.embedded.sessions import Delivery, Outcome, Session
from broker.embedded.store import StoredWill
from broker.embedded.topics import Group, is_name

if TYPE_CHECKING:
    from broker.embedded.core import Core
    from broker.embedded.store import StoredSession

log = logging.getLogger(__name__)

RETURN_SECONDS = 10
"""After a restart, clients that were connected have so long to come back before their wills are published."""


class Entrance:
    """Lets clients in and out."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.sessions: dict[str, Session] = {}
        self._wills: dict[Session, Message] = {}
        """Wills whose delay runs."""
        self._born: dict[Session, int] = {}
        """Counts a session's connections, so that a timer of an earlier one does nothing."""

    def connect(self, conn: Connection, packet: mqtt5.ConnectPacket, now: float) -> None:
        """A whole CONNECT has come: refuse it, have its password checked, or let it in."""
        refusal = self._refusal(conn, packet)
        if refusal is not None:
            self._refuse(conn, packet, *refusal, now)
            return
        users = self._core.users
        if users is not None and conn.identity is None:
            if packet.username is None:
                if not self._core.anonymous:
                    self._refuse(
                        conn, packet, ConnAckReasonCode.NOT_AUTHORIZED, "a user name and password are needed", now
                    )
                    return
            elif not users.remembered(packet.username, packet.password or b""):
                conn.state = State.CHECKING
                conn.connect = packet
                conn.pause()
                self._core.checks.append(conn)
                return
        self._admit(conn, packet, now)

    def checked(self, conn: Connection, good: bool, now: float) -> None:
        """The password of a CONNECT was checked."""
        packet = conn.connect
        if conn.state is not State.CHECKING or packet is None:
            return
        conn.connect = None
        if good:
            self._admit(conn, packet, now)
            conn.go_on()
        else:
            self._refuse(conn, packet, ConnAckReasonCode.BAD_USER_NAME_OR_PASSWORD, "wrong user name or password", now)

    def _refusal(self, conn: Connection, packet: mqtt5.ConnectPacket) -> tuple[ConnAckReasonCode, str] | None:
        limits = self._core.limits
        if self._core.stats.connected >= limits.connections and packet.client_id not in self.sessions:
            return ConnAckReasonCode.SERVER_BUSY, f"{limits.connections} clients are connected, which is the limit"
        if packet.authentication_method is not None:  # 4.12
            return ConnAckReasonCode.BAD_AUTHENTICATION_METHOD, "no extended authentication is known here"
        if len(packet.client_id.encode()) > limits.client_id_bytes:
            return ConnAckReasonCode.CLIENT_ID_NOT_VALID, f"client id longer than {limits.client_id_bytes} bytes"
        if not packet.client_id and conn.version != 5 and not packet.clean_start:  # 3.1.1: [MQTT-3.1.3-8]
            return ConnAckReasonCode.CLIENT_ID_NOT_VALID, "no client id"
        if packet.will is not None and not is_name(packet.will.topic, limits.topic_levels):
            return ConnAckReasonCode.TOPIC_NAME_INVALID, "the will's topic cannot be published to"
        return None

    def _refuse(
        self, conn: Connection, packet: mqtt5.ConnectPacket, code: ConnAckReasonCode, why: str, now: float
    ) -> None:
        log.info("client %r %s refused: %s", packet.client_id, conn.peer, why)
        conn.write(mqtt5.ConnAckPacket(reason_code=code, reason_str=why))
        conn.close(now)

    def _admit(self, conn: Connection, packet: mqtt5.ConnectPacket, now: float) -> None:
        core, limits = self._core, self._core.limits
        client_id = packet.client_id or f"auto-{os.urandom(12).hex()}"
        user = conn.identity if conn.identity is not None else packet.username
        session = self.sessions.get(client_id)
        if session is not None and session.user != user:
            self._refuse(conn, packet, ConnAckReasonCode.NOT_AUTHORIZED, "this client id belongs to another user", now)
            return
        if packet.will is not None and not core.allows(client_id, user, "publish", packet.will.topic):
            self._refuse(conn, packet, ConnAckReasonCode.NOT_AUTHORIZED, "no right to publish the will", now)
            return
        if session is None and len(self.sessions) >= limits.sessions:
            self._refuse(
                conn, packet, ConnAckReasonCode.QUOTA_EXCEEDED, f"{limits.sessions} sessions, which is the limit", now
            )
            return
        if core.store.failing and packet.session_expiry_interval:
            self._refuse(conn, packet, ConnAckReasonCode.SERVER_UNAVAILABLE, "the broker cannot write its disk", now)
            return
        if core.store.full and packet.session_expiry_interval and (session is None or packet.clean_start):
            self._refuse(conn, packet, ConnAckReasonCode.QUOTA_EXCEEDED, "the broker's disk is full", now)
            return
        if session is not None and session.conn is not None:  # [MQTT-3.1.4-3]
            session.conn.disconnect(0x8E, "another connection has this client id", now)
            session = self.sessions.get(client_id)
        if session is not None and packet.clean_start:  # [MQTT-3.1.2-4]
            self._end(session, now)
            session = None
        present = session is not None
        if session is None:
            session = self.sessions[client_id] = Session(client_id, user, limits, core.stats, core.store)
        self._wills.pop(session, None)  # [MQTT-3.1.3-9]: it came back within the will delay
        self._born[session] = self._born.get(session, 0) + 1
        self._settle_terms(conn, packet, session, now)
        conn.session = session
        conn.state = State.OPEN
        core.stats.connected += 1
        core.stats.connections += 1
        self._answer(conn, packet, session, present=present, assigned=None if packet.client_id else client_id)
        session.attach(conn, now)
        conn.watch(now)
        session.pump(now)

    def _settle_terms(self, conn: Connection, packet: mqtt5.ConnectPacket, session: Session, now: float) -> None:
        limits = self._core.limits
        session.seconds = min(packet.session_expiry_interval, limits.session_seconds)
        conn.expiry_fixed = packet.session_expiry_interval == 0
        session.stored = self._core.store.durable and session.seconds > 0
        if self._core.store.durable:
            if session.stored:
                self._core.store.save_session(session.client_id, session.user, session.seconds)
            else:
                self._core.store.drop_session(session.client_id)
        conn.receive_max = min(packet.receive_max, limits.outgoing_inflight)
        conn.alias_max = min(packet.topic_alias_max, limits.topic_aliases)
        conn.packet_max = packet.max_packet_size or UNLIMITED
        conn.problems = packet.request_problem_info
        keep_alive = packet.keep_alive
        if conn.version == 5 and limits.keep_alive is not None and not 0 < keep_alive <= limits.keep_alive:
            keep_alive = limits.keep_alive
        conn.keep_alive = float(keep_alive)
        conn.last_heard = now
        if packet.will is not None:
            will = packet.will
            conn.will = make(
                will.topic,
                will.payload or b"",
                now,
                qos=int(will.qos),
                retain=will.retain,
                properties=will_properties(will),
            )
            conn.will_delay = will.will_delay_interval
        if session.stored:
            self._core.store.will(session.client_id, StoredWill(conn.will, conn.will_delay) if conn.will else None)

    def _answer(
        self, conn: Connection, packet: mqtt5.ConnectPacket, session: Session, *, present: bool, assigned: str | None
    ) -> None:
        limits = self._core.limits
        wanted = packet.session_expiry_interval
        conn.write(
            mqtt5.ConnAckPacket(
                session_present=present,
                session_expiry_interval=None if session.seconds == wanted else session.seconds,
                assigned_client_id=assigned,
                server_keep_alive=None if conn.keep_alive == packet.keep_alive else int(conn.keep_alive),
                receive_max=limits.inflight,
                topic_alias_max=limits.topic_aliases,
                max_packet_size=limits.packet_bytes,
            )
        )

    def leave(self, conn: Connection, now: float) -> None:
        """A connection ended: its will, its session's expiry, its share of shared subscriptions."""
        session = conn.session
        if session is None or session.conn is not conn:
            return
        self._core.stats.connected -= 1
        session.detach()
        will, conn.will = conn.will, None
        if will is not None:
            delay = min(conn.will_delay, session.seconds)
            if delay and not self._core.ending:
                self._delay_will(session, will, now + delay)
            elif not self._core.ending:
                self._forget_will(session)
                self._publish_will(will, now)
        elif not self._core.ending:
            self._forget_will(session)
        if not session.seconds:
            self._end(session, now)
            return
        self._pass_on(session, session.orphans(), now)
        if self._core.store.durable and session.stored:
            self._core.store.save_session(session.client_id, session.user, session.seconds)
        born = self._born[session]
        self._core.timers.at(now + session.seconds, lambda then: self._expire(session, born, then))

    def _expire(self, session: Session, born: int, now: float) -> None:
        if not session.ended and session.conn is None and self._born.get(session) == born:
            self._end(session, now)

    def _end(self, session: Session, now: float) -> None:
        """A session ends: its subscriptions, its queue, and its will, if that still waits ([MQTT-3.1.2-8])."""
        session.ended = True
        for subscription in session.subscriptions.values():
            self._core.router.subscriptions.remove(subscription)
        session.subscriptions.clear()
        self.sessions.pop(session.client_id, None)
        self._born.pop(session, None)
        will = self._wills.pop(session, None)
        # QoS 1 messages of a shared subscription that were not acknowledged go to another member (4.8.2); QoS 2 ones must not.
        unanswered = [d for d in session.inflight.values() if d and d[1].group is not None and d[1].qos == 1]
        orphans = session.orphans()
        session.forget()
        session.ease(whatever=True)
        if session.stored:
            self._core.store.drop_session(session.client_id)
        if will is not None:
            self._publish_will(will, now)
        self._pass_on(session, unanswered + orphans, now)

    def _pass_on(self, session: Session, deliveries: list[Delivery], now: float) -> None:
        """Give what a member of a shared subscription has not seen to another one; back to it where there is none."""
        for message, manner, _ in deliveries:
            group = manner.group
            outcome = Outcome.REFUSED
            if isinstance(group, Group) and (message.expires is None or message.expires > now):
                outcome, _ = self._core.router.share(group, message, now, besides=session)
            if outcome is Outcome.REFUSED:
                if session.ended:
                    self._core.stats.dropped += 1
                else:
                    session.take_back(message, manner)

    def _delay_will(self, session: Session, will: Message, when: float) -> None:
        self._wills[session] = will
        self._core.timers.at(when, lambda now: self._send_will(session, now, will))

    def _forget_will(self, session: Session) -> None:
        if session.stored:
            self._core.store.will(session.client_id, None)

    def _send_will(self, session: Session, now: float, will: Message) -> None:
        if self._wills.get(session) is will:
            del self._wills[session]
            self._forget_will(session)
            self._publish_will(will, now)

    def _publish_will(self, will: Message, now: float) -> None:
        will.received = now  # its message expiry runs from its publication
        code, _ = self._core.router.publish(will, None, now)
        if code >= 0x80:
            self._core.stats.dropped += 1

    def restore(self, stored: StoredSession, now: float) -> None:
        """A session that the store has from before a restart."""
        core = self._core
        session = self.sessions[stored.client_id] = Session(
            stored.client_id, stored.user, core.limits, core.stats, core.store
        )
        session.seconds = stored.seconds
        for subscription in stored.subscriptions:
            core.desk.make(session, subscription)
        session.restore(stored.deliveries, stored.released)
        session.received |= stored.received
        session.stored = True
        if stored.will is not None:
            # The client was connected when the broker ended (3.1.2.5: a will may wait for the restart). It gets time to
            # come back: that the broker was away is no fault of its.
            delay = min(max(stored.will.delay, RETURN_SECONDS), stored.seconds)
            self._delay_will(session, stored.will.message, now + delay)
        born = self._born[session] = 1
        core.timers.at(now + stored.seconds, lambda then: self._expire(session, born, then))
