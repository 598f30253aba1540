"""The MQTT 5 client of every node.

An asyncio protocol over the sans-I/O codec ``mqtt5``. It reads and writes in batches, acknowledges after the effect, obeys
what the broker announced in its CONNACK, and comes back by itself after a lost link.

How it is bounded: QoS 1 and 2 receipt by our receive maximum; QoS 1 sending by the broker's; QoS 0 sending by the write
buffer; QoS 0 receipt by each subscription's capacity and overflow policy. With ``block`` the session stops reading the
socket while a queue is full: then nothing else arrives either, neither for other subscriptions nor acknowledgements of our
own publishes. Who consumes with ``block`` and publishes QoS 1 from the same task uses two sessions.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import cast

import mqtt5

from broker.session_client import FAREWELL, Client
from broker.session_dial import check, hello, reach, words
from broker.session_encode import SessionOutbox
from broker.session_inbox import Filter, Inbox
from broker.session_link import Incoming, Link, MalformedError, Way
from broker.session_options import Address, Options
from schemas.errors import ConnectError

OVERHEAD = 512
"""Bytes of a packet kept for everything that is neither topic nor payload: header, properties, trace context."""

_Reason = mqtt5.DisconnectReasonCode


class Session(Client):
    """One MQTT 5 session. Use it as ``async with Session("mqtt://…") as bus``.

    :param url: ``mqtt://``, ``mqtts://`` or ``unix://``.
    """

    def __init__(self, url: str | Address, options: Options | None = None, *, impatient: bool = False) -> None:
        super().__init__(url, options, impatient=impatient)
        self._inbox = Inbox(self.options.receive_maximum, self._on_free)
        self._sender = self._outbox = SessionOutbox(aliases=self.options.aliases)
        self._link: Link | None = None
        self._connack: mqtt5.ConnAckPacket | None = None
        self._stash: Iterable[Incoming] | None = None  # came in the chunk that filled a queue, not yet routed
        self._asked: dict[int, Filter] = {}
        self._leaving: dict[int, str] = {}
        self._tls: ssl.SSLContext | None = None
        self._last: Link | None = None  # as _link, but stays when detached

    @property
    def connected(self) -> bool:
        return self._connack is not None

    @property
    def max_payload(self) -> int | None:
        limit = None if self._connack is None else self._connack.max_packet_size
        return None if limit is None else max(0, limit - OVERHEAD)

    @property
    def limits(self) -> mqtt5.ConnAckPacket | None:
        """What the broker announced on this connection."""
        return self._connack

    # life

    async def _dial(self, left: float) -> asyncio.Future[None]:
        if self.address.tls and self._tls is None:
            self._tls = await asyncio.to_thread(self.options.tls)
        inbox, most = self._inbox, self.options.max_packet_size
        link = self._link = self._last = Link(self._packets, self._outbox.progress, most, inbox.ways, inbox.learn)
        link.prompt = self.options.prompt and hasattr(socket, "TCP_QUICKACK")
        greeting = hello(self.client_id, self.options, fresh=self._fresh)
        timeout = max(0.05, min(self.options.timeout, left))
        await reach(link, self.address, self.options, self._tls, greeting, timeout)
        try:
            check(link.answered.result(), self.address)
        except ConnectError:
            link.abort("refused")
            raise
        return link.lost

    def _why(self) -> str:
        return self._last.reason if self._last is not None else ""

    def _goodbye(self) -> None:
        if self._link is not None and self._connack is not None:
            self._link.end(mqtt5.DisconnectPacket().write(), "closed")

    async def _hang_up(self) -> None:
        link = self._last
        if link is None:
            return
        try:
            if link.closing:
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(link.lost), FAREWELL)
        finally:
            link.abort("closed")

    def _attach(self, link: Link, connack: mqtt5.ConnAckPacket) -> None:
        """The broker accepted. Called before anything else of the same chunk is looked at."""
        loop, options = asyncio.get_running_loop(), self.options
        self._connack = connack
        self.client_id = connack.assigned_client_id or self.client_id
        self._fresh = options.session_expiry == 0
        resumed = connack.session_present
        self._inbox.attach(link, resumed=resumed, by_id=connack.subscription_id_available)
        self._attached(resumed=resumed)
        self._sender.start(link, connack)
        alive = options.keep_alive if connack.server_keep_alive is None else connack.server_keep_alive
        if alive:
            self._timers["alive"] = loop.call_later(alive / 2, self._watch, link, alive / 2, False)
        options.report("connected", "session resumed" if resumed else "new session")

    def _detach(self) -> None:
        self._connack = None
        self._link = None
        self._stash = None
        for packet_id in (*self._asked, *self._leaving):
            self._outbox.free_id(packet_id)
        self._asked.clear()
        self._leaving.clear()
        super()._detach()

    def _watch(self, link: Link, interval: float, pinged: bool) -> None:
        """Every half keep-alive: ping where it was quiet; end where a ping was not answered."""
        if link.closing:
            return
        if link.heard or link.paused:
            pinged = False
        elif pinged:
            link.abort("the broker does not answer to a ping")
            return
        if not link.heard or not link.said:
            link.write(mqtt5.PingReqPacket().write())
            pinged = not link.paused
        link.heard = link.said = False
        loop = asyncio.get_running_loop()
        self._timers["alive"] = loop.call_later(interval, self._watch, link, interval, pinged)

    # subscribing

    def _ask(self, found: Filter) -> None:
        """Subscribe at the broker; the answer comes to :meth:`_on_suback`."""
        connack, link = self._connack, self._link
        if connack is None or link is None:
            return
        code = 0
        if found.pattern != found.topic and not connack.shared_subscription_available:
            code = mqtt5.SubAckReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED.value
        elif not connack.wildcard_subscription_available and ("+" in found.topic or "#" in found.topic):
            code = mqtt5.SubAckReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED.value
        if code:
            self._subscribed(found, code)
            return
        handling = mqtt5.RetainHandling.SEND_ALWAYS if found.retained else mqtt5.RetainHandling.SEND_NEVER
        packet_id = self._outbox.take_id()
        data = mqtt5.SubscribePacket(
            packet_id,
            [
                mqtt5.TopicFilter(
                    found.pattern, max_qos=mqtt5.QoS(found.qos), retain_as_published=False, retain_handling=handling
                )
            ],
            subscription_id=found.identifier if connack.subscription_id_available else None,
        ).write()
        self._asked[packet_id] = found
        link.write(data)

    def _leave(self, pattern: str) -> None:
        if self._connack is not None and self._link is not None:
            packet_id = self._outbox.take_id()
            self._leaving[packet_id] = pattern
            self._link.write(mqtt5.UnsubscribePacket(packet_id, [pattern]).write())

    # packets

    def _packets(self, link: Link, packets: list[Incoming]) -> None:
        """A chunk has come."""
        if link is not self._link:
            return
        if self._stash is not None:  # the transport had a little more to give after we paused it
            self._stash = chain(self._stash, packets)
            return
        if self._connack is None and not isinstance(packets[0], (mqtt5.ConnAckPacket, mqtt5.DisconnectPacket)):
            link.error = MalformedError("the broker's first packet is no CONNACK", _Reason.PROTOCOL_ERROR)
            link.refuse(_Reason.PROTOCOL_ERROR, str(link.error))
            return
        self._route(link, packets)

    def _route(self, link: Link, packets: Iterable[Incoming]) -> None:
        inbox, outbox, acked = self._inbox, self._outbox, False
        publish, deliver, blocking = inbox.publish, inbox.deliver, inbox.blocking
        todo = iter(packets)
        try:
            for packet in todo:
                kind = type(packet)
                if kind is tuple:
                    deliver(*cast("tuple[Way, bytes]", packet))
                elif kind is mqtt5.PublishPacket:
                    publish(cast("mqtt5.PublishPacket", packet))
                elif kind is int:
                    acked = True
                    outbox.acknowledged(cast("int", packet))
                    continue
                else:
                    acked = self._control(link, cast("mqtt5.Packet", packet)) or acked
                    continue
                if blocking:
                    self._stash = todo
                    break
        except MalformedError as error:
            link.refuse(error.code, str(error))
        inbox.turn()
        if acked:
            outbox.progress()

    def _control(self, link: Link, packet: mqtt5.Packet) -> bool:
        """Everything that is rare; True: the send window may have room."""
        match packet:
            case mqtt5.PubAckPacket():
                code = packet.reason_code
                self._outbox.acknowledged(packet.packet_id, code.value, packet.reason_str or words(code))
                return True
            case mqtt5.PubRelPacket():
                self._inbox.release(packet.packet_id)
            case mqtt5.PingRespPacket():
                pass
            case mqtt5.SubAckPacket() if packet.packet_id in self._asked:
                self._outbox.free_id(packet.packet_id)
                code_of = packet.reason_codes
                self._subscribed(self._asked.pop(packet.packet_id), code_of[0].value if code_of else 128)
            case mqtt5.UnsubAckPacket() if packet.packet_id in self._leaving:
                self._outbox.free_id(packet.packet_id)
                self._left(self._leaving.pop(packet.packet_id))
            case mqtt5.ConnAckPacket() if self._connack is None and not link.answered.done():
                if not packet.reason_code.value:
                    self._attach(link, packet)
                link.answered.set_result(packet)
            case mqtt5.DisconnectPacket():
                said = f": {packet.reason_str}" if packet.reason_str else ""
                link.reason = f"the broker ended the connection: {words(packet.reason_code)}{said}"
                link.abort(link.reason)
            case _:
                raise MalformedError(f"unexpected {type(packet).__name__}", _Reason.PROTOCOL_ERROR)
        return False

    def _on_free(self) -> None:
        """No queue blocks any more: route what is left of the chunk, then read on."""
        link, stash = self._link, self._stash
        self._stash = None
        if link is None:
            return
        if stash is not None:
            self._route(link, stash)
        if not self._inbox.blocking:
            link.resume()
