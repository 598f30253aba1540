"""``load.c`` in Python, for machines without a C compiler: the same arguments, packets and lines.

It carries less than the C program, so at full rate it may be what limits; its own rate (*generator alone*) says so.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import socket
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

DEVICES, VARIANTS, BURST = 200, 16, 1 << 16
FIRST = 2_000_000_000
_SEQ = re.compile(rb'"seq":\s*([0-9]+)')
_N = re.compile(rb'"n":\s*([0-9]+)')
_MEAN = re.compile(rb'"mean":\s*([-+.0-9eE]+)')
_TEMPERATURE = re.compile(rb'"temperature":\s*([-+.0-9eE]+)')


@dataclass
class Options:
    """What the command line says; ``load.c`` tells what each is."""

    port: int = 1883
    mode: str = "relay"
    qos: int = 0
    window: int = 4000
    rate: float = 0.0
    hot: int = 64
    warm: float = 1.0
    seconds: float = 3.0
    patience: float = 8.0


class Link:
    """A connection to the broker."""

    def __init__(self, port: int, name: str) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ident = f"{name}-{os.getpid()}".encode()
        head = b"\0\4MQTT\4\2\0\0" + len(ident).to_bytes(2, "big")
        self.sock.sendall(bytes([0x10, len(head) + len(ident)]) + head + ident)
        if self.sock.recv(4, socket.MSG_WAITALL)[3:] != b"\0":
            sys.exit("load: the broker refuses us")
        self.out = bytearray()
        self._in = bytearray()

    def subscribe(self, topic: str, qos: int) -> None:
        """Before the first message may come."""
        text = topic.encode()
        self.sock.sendall(bytes([0x82, 5 + len(text), 0, 1, 0, len(text)]) + text + bytes([qos]))
        if self.sock.recv(5, socket.MSG_WAITALL)[4:] in {b"", b"\x80"}:
            sys.exit("load: the broker refuses the subscription")

    def flush(self) -> None:
        """Write what the socket takes."""
        with suppress(BlockingIOError):
            while self.out:
                del self.out[: self.sock.send(self.out)]

    def messages(self) -> Iterator[tuple[bytes, bytes]]:
        """(topic, payload) of all that has arrived; QoS 1 is acknowledged."""
        with suppress(BlockingIOError):
            while True:
                chunk = self.sock.recv(1 << 18)
                if not chunk:
                    sys.exit("load: the broker closed the connection")
                self._in += chunk
                if len(chunk) < 1 << 17:
                    break
        data, at = bytes(self._in), 0
        while at + 2 <= len(data):
            length, shift, head = 0, 0, at + 1
            while head < len(data):
                byte = data[head]
                head += 1
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            else:
                break
            if head + length > len(data):
                break
            if data[at] & 0xF0 == 0x30:
                body = head + 2 + (data[head] << 8 | data[head + 1])
                topic = data[head + 2 : body]
                if data[at] & 6:
                    self.out += b"\x40\2" + data[body : body + 2]
                    body += 2
                yield topic, data[body : head + length]
            at = head + length
        del self._in[:at]
        self.flush()


@dataclass
class Reading:
    """A prebuilt packet: what stands before and after its packet identifier, time and number."""

    before: bytes
    middle: bytes
    fahrenheit: float


def reading(device: str, celsius: float, humidity: float, qos: int) -> Reading:
    """The packet of one reading."""
    topic = f"farm/{device}/reading".encode()
    body = f'{{"device":"{device}","temperature":{celsius:.1f},"humidity":{humidity:.1f},"ts":'.encode()
    rest = 2 + len(topic) + 2 * qos + len(body) + 13 + 7 + 10 + 1
    length = bytes([rest & 127 | 128, rest >> 7]) if rest > 127 else bytes([rest])
    head = bytes([0x30 | qos << 1]) + length + len(topic).to_bytes(2, "big") + topic
    return Reading(head, body, celsius * 1.8 + 32)


@dataclass
class Load:
    """Generator and collector."""

    it: Options
    sent: int = 0
    expected: int = 0
    received: int = 0
    counted: int = 0
    answered: int = 0
    sum_sent: float = 0.0
    sum_seen: float = 0.0
    probed: bool = False
    measuring: bool = False
    sent_at: array[float] = field(default_factory=lambda: array("d"))
    latencies: array[float] = field(default_factory=lambda: array("d"))
    _identifier: int = 0

    def __post_init__(self) -> None:
        it = self.it
        self.telemetry = it.mode == "telemetry"
        self.up, self.down = Link(it.port, "generator"), Link(it.port, "collector")
        for topic in ["farm/+/reading"] if it.mode == "direct" else ["farm/out", *["farm/+/mean"] * self.telemetry]:
            self.down.subscribe(topic, it.qos)
        self.up.sock.setblocking(False)
        self.down.sock.setblocking(False)
        places = [(d, v, f"dev-{d:03d}") for v in range(VARIANTS) for d in range(DEVICES)]
        self._normal = [
            reading(name, 15 + (d * 7 + v * 13) % 200 / 10, 40 + (d + v) % 30, it.qos) for d, v, name in places
        ]
        self._hot = [reading(name, 45 + (d + v) % 50 / 10, 30 + v, it.qos) for d, v, name in places]
        self._fault = [reading(name, 850, 0, it.qos) for _, _, name in places]
        self._probe = reading("probe", 45, 50, it.qos)

    def put(self, packet: Reading, number: int, ms: int) -> None:
        """One packet into the generator's buffer."""
        middle = packet.middle
        if self.it.qos:
            self._identifier = self._identifier % 65535 + 1
            middle = self._identifier.to_bytes(2, "big") + middle
        self.up.out += b'%b%b%d,"seq":%d}' % (packet.before, middle, ms, number)

    def next(self, moment: float, ms: int) -> None:
        """One reading. Faults are filtered by the program; only telemetry has them."""
        n = self.sent
        if self.telemetry and n % self.it.hot == 0:
            packet = self._hot[n % len(self._hot)]
        elif self.telemetry and n % 50 == 7:
            packet = self._fault[n % len(self._fault)]
        else:
            packet = self._normal[n % len(self._normal)]
        self.put(packet, FIRST + n, ms)
        self.sent_at.append(moment)
        self.sent += 1
        if packet.fahrenheit < 1000:
            self.expected += 1
            self.sum_sent += packet.fahrenheit

    def seen(self, topic: bytes, body: bytes) -> None:
        """One answer."""
        if topic.endswith(b"/mean"):
            if not topic.endswith(b"/probe/mean") and (n := _N.search(body)) and (mean := _MEAN.search(body)):
                self.counted += int(n[1])
                self.sum_seen += int(n[1]) * float(mean[1])
        elif self.it.mode == "gathered":
            if b'"probe"' in body:
                self.probed = True
            elif n := _N.search(body):
                self.received += int(n[1])
                self.answered = self.counted = self.received
        elif found := _SEQ.search(body):
            number = int(found[1]) - FIRST
            if number < 0:
                self.probed = True
                return
            self.received += 1
            if self.telemetry:
                self.answered = max(self.answered, number + 1)
            else:
                self.answered = self.counted = self.received
                if value := _TEMPERATURE.search(body):
                    self.sum_seen += float(value[1]) * 1.8 + 32 if self.it.mode == "direct" else float(value[1])
            if self.measuring and number < self.sent:
                self.latencies.append(time.monotonic() - self.sent_at[number])

    def turn(self, timeout: float) -> None:
        """Wait for the sockets, take what is there."""
        reads = [self.up.sock, self.down.sock]
        writes = [link.sock for link in (self.up, self.down) if link.out]
        select.select(reads, writes, [], max(0.0, timeout))
        for link in (self.up, self.down):
            for topic, body in link.messages():
                self.seen(topic, body)

    def wait(self) -> None:
        """Until the program answers: one reading of a device that is not counted; then until all of these are answered."""
        began, asked = time.monotonic(), 0.0
        while not self.probed:
            now = time.monotonic()
            if now - began > 60:
                sys.exit("load: nothing answers")
            if now - asked > 0.05:
                self.put(self._probe, FIRST // 2, time.time_ns() // 1_000_000)
                self.up.flush()
                asked = now
            self.turn(0.02)
        self.idle(0.3)

    def idle(self, seconds: float) -> None:
        """Take what comes."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.turn(0.02)

    def fill(self, now: float, start: float) -> None:
        """As many readings as are due, or as the window allows."""
        it, ms = self.it, time.time_ns() // 1_000_000
        due = int((now - start) * it.rate) + 1
        if not it.rate:
            free = it.window - (self.sent - self.answered)
            due = self.sent + (free if free >= max(1, it.window // 8) else 0)
        while self.sent < due and len(self.up.out) < BURST:
            self.next(time.monotonic() if it.rate else now, ms)
        self.up.flush()

    def run(self) -> dict[str, float]:
        """The whole load; gives the result's line."""
        it = self.it
        self.wait()
        print("ready", flush=True)
        start = progress = time.monotonic()
        begin, last, measured_from, first = start + it.warm, 0, 0.0, 0
        while (now := time.monotonic()) < begin + it.seconds:
            if not self.measuring and now >= begin:
                self.measuring, measured_from, first = True, now, self.answered
                print("begin", flush=True)
            self.fill(now, start)
            if self.answered != last:
                last, progress = self.answered, now
            if now - progress > it.patience:
                break  # something is lost, or the program is gone
            self.turn(min(0.9, start + self.sent / it.rate - time.monotonic()) if it.rate else 0.002)
        seconds, answers = time.monotonic() - measured_from, self.answered - first
        self.measuring = False
        print("end", flush=True)
        self.drain()
        exact = self.expected and self.counted == self.expected and it.mode != "gathered"
        ordered = sorted(self.latencies) or [0.0]
        return {
            "rate": answers / seconds if measured_from else 0.0,
            "seconds": seconds,
            "sent": self.sent,
            "expected": self.expected,
            "counted": self.counted,
            "answers": answers,
            "off": math.fabs(self.sum_seen - self.sum_sent) / self.sum_sent if exact else 0.0,
            "samples": len(self.latencies),
            "p50": ordered[int(0.5 * (len(ordered) - 1))],
            "p99": ordered[int(0.99 * (len(ordered) - 1))],
            "worst": ordered[-1],
        }

    def drain(self) -> None:
        """What is under way. A reading of a later second ends all windows."""
        while self.up.out:
            self.turn(0.001)
        if self.telemetry:
            self.put(self._probe, FIRST // 2, time.time_ns() // 1_000_000 + 1000)
            self.up.flush()
        progress, last = time.monotonic(), (-1, -1)
        while self.counted < self.expected and time.monotonic() - progress < self.it.patience:
            self.turn(0.01)
            if (self.counted, self.received) != last:
                last, progress = (self.counted, self.received), time.monotonic()
        self.idle(0.1)  # whatever comes twice


def main() -> None:
    """Entry."""
    given = Options()
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if not equals or not hasattr(given, name):
            sys.exit(f"load: unknown argument {argument}")
        setattr(given, name, type(getattr(given, name))(value))
    print(json.dumps(Load(given).run()), flush=True)


if __name__ == "__main__":
    main()
