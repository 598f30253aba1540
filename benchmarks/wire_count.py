"""Counts what clients send to a broker, byte by byte, between them and it: a TCP link that knows where MQTT's packets end.

Who is who is in the CONNECT; what a PUBLISH is about, in its topic or the topic's alias. Everything counts, headers and
acknowledgements too, but nothing of TCP's own.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_NAMES = {1: "connect", 3: "publish", 4: "puback", 8: "subscribe", 10: "unsubscribe", 12: "ping", 14: "disconnect"}


@dataclass
class Sent:
    """What one client sent, over all of its connections.

    :ivar bytes: by kind of packet; of a PUBLISH by the last level of its topic, in brackets.
    :ivar packets: likewise.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    packets: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes."""
        return self.bytes.total()


class Count:
    """Clients by their MQTT names, each with what it :class:`Sent`. ``port``: where they connect to."""

    def __init__(self) -> None:
        self.port = 0
        self.clients: dict[str, Sent] = {}

    def of(self, part: str) -> Sent:
        """All clients whose names have this in them."""
        out = Sent()
        for name, sent in list(self.clients.items()):
            if part in name:
                out.bytes.update(sent.bytes)
                out.packets.update(sent.packets)
        return out


class _Stream:
    """One connection's bytes, cut into packets."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._rest = bytearray()
        self._sent = Sent()
        self._aliases: dict[int, str] = {}

    def feed(self, data: bytes) -> None:
        """So much more."""
        self._rest += data
        while (size := self._size()) and len(self._rest) >= size:
            packet = bytes(self._rest[:size])
            del self._rest[:size]
            self._packet(packet)

    def _size(self) -> int:
        """Of the packet that begins here; 0: not known yet."""
        length = 0
        for i, byte in enumerate(self._rest[1:5]):
            length |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return length + i + 2
        return 0

    def _packet(self, packet: bytes) -> None:
        kind, at = packet[0] >> 4, 2
        while packet[at - 1] >= 0x80:
            at += 1
        name = _NAMES.get(kind, str(kind))
        if kind == 1:
            at += 2 + int.from_bytes(packet[at : at + 2], "big") + 4  # the protocol's name, version, flags, keep-alive
            at += 1 + packet[at]  # properties; ours are fewer than 128 bytes
            client = _text(packet, at)
            self._sent = self._count.clients.setdefault(client, Sent())
        elif kind == 3:
            name = f"publish ({self._topic(packet, at).rpartition('/')[2]})"
        self._sent.bytes[name] += len(packet)
        self._sent.packets[name] += 1

    def _topic(self, packet: bytes, at: int) -> str:
        topic = _text(packet, at)
        at += 2 + len(topic.encode()) + (2 if packet[0] & 0x06 else 0)
        end, at = at + 1 + packet[at], at + 1
        while at < end:
            kind = packet[at]
            if kind == 0x23:
                alias = int.from_bytes(packet[at + 1 : at + 3], "big")
                if topic:
                    self._aliases[alias] = topic
                return topic or self._aliases[alias]
            at += {0x01: 2, 0x02: 5}.get(
                kind, end
            )  # payload format and expiry; what else there is comes after an alias
        return topic


def _text(packet: bytes, at: int) -> str:
    size = int.from_bytes(packet[at : at + 2], "big")
    return packet[at + 2 : at + 2 + size].decode()


@contextmanager
def counted(port: int) -> Iterator[Count]:
    """A link to the MQTT 5 broker on ``port`` of this machine, carried by a thread."""
    count = Count()
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection("127.0.0.1", port)
        stream = _Stream(count)

        async def up() -> None:
            while data := await reader.read(1 << 16):
                stream.feed(data)
                there.write(data)
                await there.drain()

        async def down() -> None:
            while data := await back.read(1 << 16):
                writer.write(data)
                await writer.drain()

        ways = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for result in await asyncio.gather(*ways, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, OSError):
                    raise result
            there.close()
            writer.close()

    async def main(stop: asyncio.Event) -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        count.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(stop),), daemon=True)
    thread.start()
    if not ready.wait(10):
        raise RuntimeError("the link does not start")
    try:
        yield count
    finally:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
