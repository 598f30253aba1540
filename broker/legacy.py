"""The same bus over ``aiomqtt`` (on paho), for brokers that speak only MQTT 3.1.1 and for WebSockets.

aiomqtt makes the connection and drives paho from the event loop. Sending, receiving and coming back are ours, for three
reasons: its incoming queue drops messages that are already acknowledged (here acknowledgement is manual, after the effect);
its ``publish`` waits for each PUBACK in turn; and paho sends again by itself what we send again too (here each connection
gets a new paho client).

What MQTT 3.1.1 cannot do: say that a publish was refused (the broker acknowledges it and drops it, or closes); carry
properties and expiry; bound what the broker has in flight towards us; mark what we send again. A broker that sends one copy
for each of several overlapping filters gives each of our subscriptions as many copies.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Coroutine
from typing import Any

import aiomqtt
import mqtt5
from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode

from broker.bus import Publication
from broker.legacy_pipe import Pipe
from broker.session_client import FAREWELL, Client
from broker.session_dial import PERMANENT
from broker.session_inbox import Filter, Inbox
from broker.session_options import Address, Options
from broker.session_outbox import Outbox
from schemas.errors import BusError, ConnectError

WINDOW = 20
"""QoS 1 publications in flight: MQTT 3.1.1 has no receive maximum, and brokers commonly take this many."""

_LOGGER = logging.getLogger("penstock.legacy")
_LOGGER.addHandler(logging.NullHandler())
_LOGGER.propagate = False


class _LegacyOutbox(Outbox):
    """Writes by paho's ``publish``."""

    def __init__(self) -> None:
        super().__init__()
        self.pipe: Pipe | None = None
        self.ours: dict[int, int] = {}  # paho's message id → our packet id

    def detach(self) -> None:
        self.pipe = None
        self.ours.clear()
        super().detach()

    def _send(self, publication: Publication, packet_id: int, *, duplicate: bool = False) -> BusError | None:
        topic, payload = publication.topic, publication.payload
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            return BusError(f"{topic}: the payload is {type(payload).__name__}, not bytes")
        if self.pipe is None:
            return BusError(f"{topic}: no connection")
        if isinstance(payload, memoryview):
            payload = bytes(payload)
        try:
            info = self.pipe.paho.publish(topic, payload, publication.qos, publication.retain)
        except (ValueError, TypeError) as error:
            return BusError(f"{topic}: cannot be sent: {error}")
        if info.rc not in {MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN}:
            return BusError(f"{topic}: cannot be sent: {paho.error_string(info.rc)}")
        if packet_id:
            self.ours[info.mid] = packet_id
        return None


class Legacy(Client):
    """One MQTT 3.1.1 session. Use it as ``async with Legacy("ws://…") as bus``.

    Of the options, ``receive_maximum`` bounds what is unacknowledged beyond a subscription's capacity before reading stops;
    ``max_packet_size`` and ``aliases`` mean nothing here; ``session_expiry`` > 0 keeps the session for as long as the broker
    likes.

    :param url: ``mqtt3://``, ``mqtt3s://``, ``mqtt://``, ``mqtts://``, ``ws://``, ``wss://`` or ``unix://``.
    """

    def __init__(self, url: str | Address, options: Options | None = None, *, impatient: bool = False) -> None:
        super().__init__(url, options, impatient=impatient)
        self._inbox = Inbox(65535, self._on_free, surplus=self.options.receive_maximum)
        self._sender = self._outbox = _LegacyOutbox()
        self._pipe: Pipe | None = None
        self._last: Pipe | None = None  # as _pipe, but stays when detached
        self._dialling: Pipe | None = None
        self._turning = False
        self._tls: ssl.SSLContext | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._leftover: set[asyncio.Future[None]] = set()  # threads that connect for nothing

    @property
    def connected(self) -> bool:
        return self._pipe is not None and not self._pipe.closing

    # life

    def _client(self) -> aiomqtt.Client:
        where, options, will = self.address, self.options, self.options.will
        websocket = where.scheme in {"ws", "wss"}
        client = aiomqtt.Client(
            where.path if where.scheme == "unix" else where.host,
            where.port or 1883,
            identifier=self.client_id,
            username=options.user,
            password=options.password,
            clean_session=self._fresh,
            protocol=aiomqtt.ProtocolVersion.V311,
            transport="unix" if where.scheme == "unix" else "websockets" if websocket else "tcp",
            websocket_path=(where.path or "/mqtt") if websocket else None,
            keepalive=options.keep_alive,
            will=None if will is None else aiomqtt.Will(will.topic, will.payload, will.qos, will.retain),
            tls_context=self._tls,
            timeout=options.timeout,
            max_inflight_messages=WINDOW,
            logger=_LOGGER,
        )
        mqtt: paho.Client = client._client
        mqtt.manual_ack_set(True)
        mqtt.connect_timeout = options.timeout
        return client

    async def _dial(self, left: float) -> asyncio.Future[None]:
        if not self.client_id:
            # 3.1.1 brokers need not take an empty one, and a kept session needs a name
            self.client_id = f"penstock-{id(self):x}-{asyncio.get_running_loop().time():.0f}"
        if self.address.tls and self._tls is None:
            self._tls = await asyncio.to_thread(self.options.tls)
        client = self._client()
        pipe = Pipe(client)
        self._dialling = pipe
        self._listen(pipe)
        entering = asyncio.ensure_future(client.__aenter__())
        try:
            either: list[asyncio.Future[Any]] = [entering, pipe.lost]
            done, _ = await asyncio.wait(either, timeout=max(0.05, left), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._abandon(entering, pipe)
            raise
        if entering not in done:
            why = pipe.reason or f"no answer within {left:.3g} s"
            self._abandon(entering, pipe)
            raise ConnectError(f"{self.address}: {why}")
        try:
            entering.result()
        except aiomqtt.MqttError as error:
            pipe.lose(str(error))
            raise self._refusal(error) from error
        return pipe.lost

    def _abandon(self, entering: asyncio.Task[Any], pipe: Pipe) -> None:
        """Hang up as soon as the thread that connects is through: it cannot be stopped. Closing waits for it."""

        def through(_: object) -> None:
            self._leftover.discard(pipe.through)
            entering.cancel()
            pipe.lose("abandoned")

        if pipe.through.done():
            through(None)
        else:
            self._leftover.add(pipe.through)
            pipe.through.add_done_callback(through)

    def _refusal(self, error: aiomqtt.MqttError) -> ConnectError:
        if isinstance(error, aiomqtt.MqttCodeError) and error.rc is not None:
            code = error.rc if isinstance(error.rc, int) else error.rc.value
            said = str(error.rc).lower()
            return ConnectError(
                f"{self.address}: refused by the broker: {said} ({code})", code=code, permanent=code in PERMANENT
            )
        cause = error.__context__
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConnectError(f"{self.address}: certificate refused: {cause.verify_message}", permanent=True)
        return ConnectError(f"{self.address}: {error}", permanent=isinstance(cause, ssl.SSLError))

    def _listen(self, pipe: Pipe) -> None:
        """Put our callbacks where aiomqtt's are; they run in the event loop."""
        mqtt = pipe.paho
        entered = mqtt.on_connect
        loop = asyncio.get_running_loop()

        def on_connect(client: paho.Client, data: Any, flags: paho.ConnectFlags, code: Any, properties: Any) -> None:
            if entered is not None:
                entered(client, data, flags, code, properties)  # type: ignore[call-arg, arg-type] # one of paho's two shapes
            if code == 0 and self._dialling is pipe:
                self._attach(pipe, resumed=flags.session_present)

        def on_disconnect(client: paho.Client, data: Any, flags: Any, code: Any, properties: Any) -> None:
            pipe.lose("closed" if self._closed else f"connection lost: {str(code).lower()}")

        def on_message(client: paho.Client, data: Any, message: paho.MQTTMessage) -> None:
            pipe.progressed = True
            self._on_message(pipe, message)

        def on_publish(client: paho.Client, data: Any, mid: int, code: Any, properties: Any) -> None:
            pipe.progressed = True
            packet_id = self._sender.ours.pop(mid, None) if self._pipe is pipe else None
            if packet_id is not None:
                self._outbox.acknowledged(packet_id)
                self._soon()

        def on_filled(client: paho.Client, data: Any, sock: Any) -> None:
            # the first time in the thread that connects
            loop.call_soon_threadsafe(lambda: sock.fileno() >= 0 and loop.add_writer(sock.fileno(), pipe.send))

        def on_drained(client: paho.Client, data: Any, sock: Any) -> None:
            if sock.fileno() >= 0:
                loop.remove_writer(sock.fileno())
            self._soon()

        mqtt.on_connect = on_connect
        mqtt.on_disconnect = on_disconnect
        mqtt.on_message = on_message
        mqtt.on_publish = on_publish
        mqtt.on_socket_register_write = on_filled
        mqtt.on_socket_unregister_write = on_drained

    def _soon(self) -> None:
        """Let publishers go on and consumers wake, once for all that comes in this turn of the loop."""
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self._inbox.turn()
        self._outbox.progress()

    def _attach(self, pipe: Pipe, *, resumed: bool) -> None:
        """The broker accepted. Called before anything else that it sent is looked at."""
        sock = pipe.paho.socket()
        raw = getattr(sock, "_socket", sock)  # a WebSocket wraps it
        if isinstance(raw, socket.socket) and raw.family != getattr(socket, "AF_UNIX", None):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipe = self._last = self._sender.pipe = pipe
        self._fresh = self.options.session_expiry == 0
        self._inbox.attach(pipe, resumed=resumed, by_id=False)
        self._attached(resumed=resumed)
        # what 3.1.1 has no words for, as if it had been announced
        self._outbox.attach(pipe, mqtt5.ConnAckPacket(receive_max=WINDOW))
        pipe.listen()
        self.options.report("connected", "session resumed" if resumed else "new session")

    def _detach(self) -> None:
        self._pipe = None
        for task in self._asking:
            task.cancel()
        super()._detach()

    def _why(self) -> str:
        return self._last.reason if self._last is not None else ""

    def _goodbye(self) -> None:
        if self._pipe is not None and not self._pipe.closing:
            self._pipe.paho.disconnect()

    async def _hang_up(self) -> None:
        if self._leftover:
            await asyncio.wait(self._leftover, timeout=self.options.timeout)
            await asyncio.sleep(0)  # their callbacks hang up
        pipe = self._last
        if pipe is not None:
            try:
                if not pipe.lost.done():
                    await asyncio.wait([pipe.lost], timeout=FAREWELL)
            finally:
                pipe.lose("closed")

    # subscribing

    def _ask(self, found: Filter) -> None:
        if self._pipe is not None:
            self._later(self._subscribe(self._pipe, found))

    def _leave(self, pattern: str) -> None:
        if self._pipe is not None:
            self._later(self._unsubscribe_at(self._pipe, pattern))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _subscribe(self, pipe: Pipe, found: Filter) -> None:
        try:
            codes = await pipe.client.subscribe(found.pattern, found.qos, timeout=self.options.timeout)
        except ValueError:  # paho looks at filters itself
            self._subscribed(found, 143)
        except aiomqtt.MqttError as error:
            pipe.lose(f"no answer to a subscription: {error}")
        else:
            code = codes[0] if codes else 128
            self._subscribed(found, code if isinstance(code, int) else code.value)

    async def _unsubscribe_at(self, pipe: Pipe, pattern: str) -> None:
        try:
            await pipe.client.unsubscribe(pattern, timeout=self.options.timeout)
        except (ValueError, aiomqtt.MqttError):
            return
        self._left(pattern)

    # receiving

    def _on_message(self, pipe: Pipe, message: paho.MQTTMessage) -> None:
        if self._pipe is not pipe:
            return
        if message.retain and not self._inbox.wants_retained(message.topic):
            if message.qos:
                pipe.paho.ack(message.mid, message.qos)
            return
        if message.qos == 2:
            pipe.exactly.add(message.mid)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            pipe.lose("malformed packet: a topic that is not UTF-8")
            return
        # paho speaks QoS 2 by itself and hands over once: what is left is one acknowledgement, as of QoS 1
        packet = mqtt5.PublishPacket(
            topic,
            bytes(message.payload),
            qos=mqtt5.QoS.AT_LEAST_ONCE if message.qos else mqtt5.QoS.AT_MOST_ONCE,
            packet_id=message.mid if message.qos else None,
            retain=message.retain,
            duplicate=message.dup,
        )
        self._inbox.publish(packet)
        if self._inbox.blocking:
            pipe.pause()
        self._soon()

    def _on_free(self) -> None:
        if self._pipe is not None:
            self._pipe.resume()
