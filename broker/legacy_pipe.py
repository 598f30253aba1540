"""One connection of the legacy client: paho's, read and written from the event loop. The session above: :mod:`broker.legacy`."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import aiomqtt
from paho.mqtt import client as paho

ROUNDS = 256
"""Reads after which others get their turn of the event loop."""


class Pipe:
    """One connection: what inbox and outbox ask of a link, in paho's terms."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self.client = client
        # paho's documented API does what aiomqtt's does not (manual acknowledgement, PUBACKs in any number); aiomqtt has
        # no public way to it
        self.paho: paho.Client = client._client
        self.closing = False
        self.paused = False
        self.progressed = False
        self.exactly: set[int] = set()  # ids of QoS 2 deliveries
        self.reason = ""
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.through: asyncio.Future[None] = loop.create_future()  # the thread that connects has done so, or failed
        connect = client._client_connect

        def connect_in_thread() -> None:
            try:
                connect()
            finally:
                loop.call_soon_threadsafe(self.through.set_result, None)

        client._client_connect = connect_in_thread  # type: ignore[method-assign] # the only way to know

    @property
    def congested(self) -> bool:
        """Whether paho has bytes that the socket did not take."""
        return self.paho.want_write()

    @congested.setter
    def congested(self, value: bool) -> None:
        raise AttributeError("paho knows")

    def write(self, data: bytes) -> None:
        """Acknowledge: whole PUBACKs of four bytes each."""
        if self.closing:
            return
        for i in range(0, len(data), 4):
            packet_id = int.from_bytes(data[i + 2 : i + 4], "big")
            qos = 2 if packet_id in self.exactly else 1
            self.exactly.discard(packet_id)
            self.paho.ack(packet_id, qos)

    def pause(self) -> None:
        """Read no more until :meth:`resume`."""
        sock = self.paho.socket()
        if not self.paused and sock is not None and not self.closing:
            self.paused = True
            asyncio.get_running_loop().remove_reader(sock.fileno())

    def resume(self) -> None:
        """Read again."""
        if self.paused:
            self.paused = False
            self.listen()
            asyncio.get_running_loop().call_soon(self.read)  # some may be in paho's hands already

    def listen(self) -> None:
        """Read with :meth:`read` from here on, not one packet at a time as aiomqtt does."""
        sock = self.paho.socket()
        if sock is not None and not self.closing:
            asyncio.get_running_loop().add_reader(sock.fileno(), self.read)

    def read(self) -> None:
        """Take what has arrived, as long as there is some and nobody asks to pause."""
        for _ in range(ROUNDS):
            if self.paused or self.closing:
                return
            self.progressed = False
            try:
                self.paho.loop_read()
            except Exception as error:  # noqa: BLE001 # paho lets socket and parser errors of many kinds through
                self.lose(f"connection lost: {error}")
                return
            if not self.progressed:
                return
        asyncio.get_running_loop().call_soon(self.read)

    def send(self) -> None:
        """The socket takes more of what paho has."""
        try:
            self.paho.loop_write()
        except Exception as error:  # noqa: BLE001 # as in read
            self.lose(f"connection lost: {error}")

    def lose(self, reason: str) -> None:
        """The link is of no use any more."""
        self.reason = self.reason or reason
        self.closing = True
        mqtt, sock = self.paho, self.paho.socket()
        # from here on paho must not call anybody: what it would do to the socket is done
        mqtt.on_socket_register_write = mqtt.on_socket_unregister_write = mqtt.on_socket_close = None
        mqtt.on_disconnect = mqtt.on_message = mqtt.on_publish = None
        if sock is not None:
            if sock.fileno() >= 0:
                loop = asyncio.get_running_loop()
                loop.remove_reader(sock.fileno())
                loop.remove_writer(sock.fileno())
            with suppress(OSError):
                sock.close()
        misc = self.client._misc_task
        if misc is not None:
            misc.cancel()
        if not self.lost.done():
            self.lost.set_result(None)
