"""One connection of a :class:`broker.session.Session`: bytes to packets, packets to bytes, in batches.

A chunk from the socket is parsed whole and handed on as one list. What is written during one turn of the event loop goes
out in one call. A packet larger than the read buffer gets a buffer of its size, so its bytes are moved once, by the
kernel, before the codec makes the payload of them. The next one finds that buffer: a new one is zeroed first.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias, cast

import mqtt5

from broker.memory import keep_freed
from schemas.errors import BusError


class Way(NamedTuple):
    """Where QoS 0 messages of one topic go, known by the bytes between the fixed header and the payload.

    :param targets: for whoever handles the packets; the link only hands them on.
    """

    topic: str
    targets: Sequence[Any]


Incoming: TypeAlias = mqtt5.Packet | int | tuple[Way, bytes]
"""A packet. The packet id of a plain PUBACK with success, and a QoS 0 message on a known way, are by far the most frequent
and not worth an object."""

BUFFER = 256 * 1024
"""Bytes read at once."""
KEPT = 8 * 1024 * 1024
"""Bytes up to which a larger buffer is kept for the next packet that needs it,"""
KEEP = 10.0
"""and seconds for which it is, after the last one."""
FREED = 4 * 1024 * 1024
"""Bytes of a block up to which a process that has such packets uses freed memory again: frames, not models."""
GATHER = 64 * 1024
"""Bytes gathered before they are written without waiting for the end of the loop's turn. A payload of this size is
written by itself."""
HIGH_WATER = 256 * 1024
"""Bytes in the transport's write buffer from which publishers wait."""
SMALL = 4096
"""Bytes up to which a packet is looked at as one of many."""
MANY = 24
"""Packets in one read from which more are let come before the next."""
REST = 0.001
"""Seconds until then. Reading a few at a time costs several times as much for each."""

_Reason = mqtt5.DisconnectReasonCode
_QUICKACK: int = getattr(socket, "TCP_QUICKACK", 0)
_NOT_OURS = (KeyboardInterrupt, SystemExit)


class MalformedError(BusError):
    """The peer sent what is not MQTT 5, or more than we take.

    :param code: reason for the DISCONNECT.
    """

    def __init__(self, text: str, code: mqtt5.DisconnectReasonCode = _Reason.MALFORMED_PACKET) -> None:
        super().__init__(text)
        self.code = code


def decode(view: memoryview) -> mqtt5.Packet:
    """One whole packet.

    :raises MalformedError: anything that the codec cannot make a packet of. It panics on some (text that is not UTF-8),
        and a panic is no ``Exception``.
    """
    try:
        packet, size = mqtt5.read(view)
    except _NOT_OURS:
        raise
    except BaseException as error:  # noqa: BLE001 # the codec's panics are BaseExceptions; see above
        raise MalformedError(f"malformed packet: {error}") from None
    if size != len(view):
        raise MalformedError(f"malformed packet: {size} of {len(view)} bytes used")
    return packet


class Link(asyncio.BufferedProtocol):
    """The protocol object of one connection. Made by the session for each attempt, used once.

    :param on_packets: called with all packets of a chunk, in order.
    :param on_writable: called when the write buffer has drained after :attr:`congested` was set.
    :param max_packet_size: bytes; a larger packet ends the link.
    :param ways: bytes that a QoS 0 PUBLISH has before its payload → where it goes; the owner's own, who fills it.
    :param learn: given such bytes and the packet, where they are new.
    """

    def __init__(
        self,
        on_packets: Callable[[Link, list[Incoming]], None],
        on_writable: Callable[[], None],
        max_packet_size: int,
        ways: Mapping[bytes, Way],
        learn: Callable[[bytes, mqtt5.PublishPacket], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_packets = on_packets
        self._on_writable = on_writable
        self._limit = max_packet_size
        self._ways = ways
        self._learn = learn
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._start = 0  # first byte not yet parsed
        self._end = 0  # end of what was received
        self._grown = 0.0  # when the buffer was last too small otherwise
        self._out: list[bytes] = []
        self._out_size = 0
        self._flushing = False
        self._transport: Any = None
        self.congested = False
        self.paused = False
        self._resting = False
        self.closing = False
        self.heard = False  # something came since the last look of the keep-alive
        self.said = False  # something was written since
        self.prompt = False  # acknowledge at once what comes, to TCP
        self.old = False  # a CONNACK of MQTT 3.1.1 came
        self.reason = ""
        self.error: BaseException | None = None
        self.answered: asyncio.Future[mqtt5.ConnAckPacket] = self._loop.create_future()
        self.lost: asyncio.Future[None] = self._loop.create_future()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.set_write_buffer_limits(high=HIGH_WATER)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self.error = self.error or exc
        if not self.reason:
            self.reason = f"connection lost: {exc}" if exc else "the broker closed the connection"
        self._out.clear()
        if not self.lost.done():
            self.lost.set_result(None)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.congested = True

    def resume_writing(self) -> None:
        self.congested = False
        self._on_writable()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._end == len(self._buffer):  # only when a paused transport has a little more to give
            self._rebuffer(2 * len(self._buffer))
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        self.heard = True
        if self.prompt:
            self._acknowledge()
        if self.closing:
            self._start = self._end = 0
            return
        packets: list[Incoming] = []
        try:
            self._parse(packets)
        except MalformedError as error:
            self.error = error
            if packets:
                self._on_packets(self, packets)
            self.refuse(error.code, str(error))
            return
        if packets:
            self._on_packets(self, packets)
            if len(packets) >= MANY and nbytes < BUFFER // 8:
                self._rest()

    def _acknowledge(self) -> None:
        """Send TCP's acknowledgement now. Linux forgets that this is wanted, so it is said again each time."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
            with suppress(OSError):  # it was closed just now
                sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    # reading

    def _parse(self, packets: list[Incoming]) -> None:
        """All whole packets in the buffer; the rest is moved to where there is room for it."""
        buffer, view, pos, end, ways = self._buffer, self._view, self._start, self._end, self._ways
        need, data, base = 2, b"", 0
        while end - pos >= 2:
            length, start = buffer[pos + 1], pos + 2
            if length >= 128:
                if end > start and buffer[start] < 128:
                    length, start = length & 127 | buffer[start] << 7, start + 1
                else:
                    length, head = self._length(pos, end)
                    if not head:
                        need = 5
                        break
                    start = pos + head
            stop = start + length
            if stop - pos > self._limit:
                raise MalformedError(
                    f"packet of {stop - pos} bytes, we take at most {self._limit}", _Reason.PACKET_TOO_LARGE
                )
            if stop > end:
                need = stop - pos
                break
            kind = buffer[pos]
            if kind == 0x30 and 2 < length <= SMALL:
                cut = start + 2 + (buffer[start] << 8 | buffer[start + 1])  # end of the topic, then of the properties
                if cut < stop and (cut := cut + 1 + buffer[cut]) <= stop:
                    if not data:
                        data, base = bytes(view[pos:end]), pos  # its parts are made in half the time of a view's
                    before = data[start - base : cut - base]
                    way = ways.get(before)
                    if way is not None:
                        packets.append((way, data[cut - base : stop - base]))
                    else:
                        packet = decode(view[pos:stop])
                        packets.append(packet)
                        self._learn(before, cast("mqtt5.PublishPacket", packet))
                    pos = stop
                    continue
            if length == 2 and kind == 0x40:
                packets.append(buffer[pos + 2] << 8 | buffer[pos + 3])
            else:
                if length == 2 and kind == 0x20:
                    self.old = True
                    raise MalformedError("the broker answers in MQTT 3.1.1")
                packets.append(decode(view[pos:stop]))
            pos = stop
        self._start = pos
        size = len(buffer)
        if need > BUFFER:
            self._grown = self._loop.time()
            keep_freed(FREED)
        elif size > BUFFER and (size > KEPT or self._loop.time() - self._grown > KEEP):
            size = BUFFER
        if pos == end:
            pos = end = self._start = self._end = 0
        if need > size:
            self._rebuffer(need)
        elif size != len(buffer) and end - pos <= size:
            self._rebuffer(size)
        elif pos and (pos + need > size or pos > BUFFER // 2):
            self._rebuffer(len(buffer))

    def _length(self, pos: int, end: int) -> tuple[int, int]:
        """Remaining length and size of the fixed header; size 0 where it is not all there."""
        length = 0
        for i in range(4):
            if pos + 1 + i >= end:
                return 0, 0
            byte = self._buffer[pos + 1 + i]
            length |= (byte & 127) << (7 * i)
            if byte < 128:
                return length, i + 2
        raise MalformedError("malformed packet: length of more than four bytes")

    def _rebuffer(self, size: int) -> None:
        """Move what is not parsed to the front of a buffer of ``size``."""
        rest = self._end - self._start
        if size == len(self._buffer):
            self._view[:rest] = self._view[self._start : self._end]
        else:
            bigger = bytearray(size)
            bigger[:rest] = self._view[self._start : self._end]
            self._buffer = bigger
            self._view = memoryview(bigger)
        self._start, self._end = 0, rest

    def pause(self) -> None:
        if not self.paused and not self.closing:
            self.paused = True
            if not self._resting:
                self._transport.pause_reading()

    def resume(self) -> None:
        if self.paused and not self.closing:
            self.paused = False
            self.heard = True
            if not self._resting:
                self._transport.resume_reading()

    def _rest(self) -> None:
        """Read again in a moment, more at once: what comes fast is waiting in the kernel anyway."""
        if not self.paused and not self._resting and not self.closing:
            self._resting = True
            self._transport.pause_reading()
            self._loop.call_later(REST, self._rested)

    def _rested(self) -> None:
        self._resting = False
        if not self.paused and not self.closing:
            self._transport.resume_reading()

    # writing

    def write(self, data: bytes) -> None:
        """Write at the end of this turn of the loop, with everything else."""
        self._out.append(data)
        self._out_size += len(data)
        if self._out_size >= GATHER:
            self.flush()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._turn)

    def write_large(self, head: bytes, payload: bytes | bytearray | memoryview) -> None:
        """Write now, without putting the two together."""
        self.flush()
        keep_freed(FREED)  # it was made for this packet, and so will the next be
        if not self.closing:
            self._transport.write(head)
            self._transport.write(payload)

    def _turn(self) -> None:
        self._flushing = False
        self.flush()

    def flush(self) -> None:
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            self._out_size = 0
            self.said = True
            if not self.closing:
                self._transport.write(data)

    # ending

    def refuse(self, code: mqtt5.DisconnectReasonCode, text: str) -> None:
        """Tell the broker why, and end."""
        self.end(mqtt5.DisconnectPacket(reason_code=code).write(), text)

    def end(self, farewell: bytes, text: str) -> None:
        """Write everything and ``farewell``, then close; :attr:`lost` is done when it has gone out."""
        if self.closing:
            return
        self.reason = text
        self._out.append(farewell)
        self.flush()
        self.closing = True
        if self._transport is not None:
            self._transport.close()

    def abort(self, text: str) -> None:
        """Close without a word; the broker publishes our will."""
        self.reason = self.reason or text
        self.closing = True
        if self._transport is not None:
            if not self.lost.done():  # a transport that has closed by itself raises here
                self._transport.abort()
        elif not self.lost.done():
            self.lost.set_result(None)
