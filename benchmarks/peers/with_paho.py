"""The benchmarks' work with paho-mqtt: ``python with_paho.py PORT telemetry|relay|gathered [QOS]``.

paho's own loop takes one packet a ``select`` and wakes itself for every publication. Here a loop of our own reads what is
there, works, then writes, by the calls that paho has for that (``loop_read``, ``loop_write``, ``loop_misc``); it carries half
as much again as work in the callback of ``loop_start``, which carries more than work in a second thread. JSON by msgspec,
typed. What the work is, says ``program.c``.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

BURST = 64
"""Packets read before what they led to is written."""


class Reading(msgspec.Struct, gc=False):
    """What a device sends; with °F for °C what goes on."""

    device: str
    temperature: float
    humidity: float
    ts: int
    seq: int


Publish = Callable[[str, bytes], object]
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Reading).decode


class Telemetry:
    """°C to °F, a range, alarms, one-second means per device."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._second = 0
        self._open: dict[str, list[float]] = {}  # device → number, sum

    def take(self, payload: bytes | bytearray) -> None:
        """One reading."""
        reading = decode(payload)
        fahrenheit = reading.temperature * 1.8 + 32
        if not -40 <= fahrenheit <= 185:
            return
        if fahrenheit > 104:
            reading.temperature = fahrenheit
            self._publish("farm/out", encode(reading))
        second = reading.ts // 1000
        if second > self._second:
            self._close(second)
        window = self._open.get(reading.device)
        if window is None:
            self._open[reading.device] = [1, fahrenheit]
        else:
            window[0] += 1
            window[1] += fahrenheit

    def after(self) -> None:
        """What is there was taken. Windows end by the clock too, if nothing comes any more."""
        if time.time() > self._second + 2:
            self._close(int(time.time()))

    def _close(self, second: int) -> None:
        for device, (n, total) in self._open.items():
            mean = {"device": device, "start": self._second, "n": n, "mean": total / n}
            self._publish(f"farm/{device}/mean", encode(mean))
        self._open.clear()
        self._second = second


class Relay:
    """°F for °C: one message in, one message out; or ``gathered``, those of a burst in one message."""

    def __init__(self, publish: Publish, gathered: bool) -> None:
        self._publish = publish
        self._gathered = gathered
        self._batch: list[Reading] = []

    def take(self, payload: bytes | bytearray) -> None:
        """One reading."""
        reading = decode(payload)
        reading.temperature = reading.temperature * 1.8 + 32
        if self._gathered:
            self._batch.append(reading)
        else:
            self._publish("farm/out", encode(reading))

    def after(self) -> None:
        """What is there was taken."""
        if self._batch:
            self._publish("farm/out", encode({"n": len(self._batch), "readings": self._batch}))
            self._batch.clear()


def no_delay(client: mqtt.Client, userdata: object, sock: Any) -> None:
    """paho leaves TCP_NODELAY off."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def main() -> None:
    """Entry."""
    port, kind, qos = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="with-paho")
    client.max_inflight_messages_set(1000)

    def publish(topic: str, payload: bytes) -> object:
        return client.publish(topic, payload, qos)

    work: Telemetry | Relay = Telemetry(publish) if kind == "telemetry" else Relay(publish, kind == "gathered")
    taken = 0

    def on_message(client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        nonlocal taken
        taken += 1
        work.take(message.payload)

    client.on_message = on_message
    client.on_connect = lambda client, *_: client.subscribe("farm/+/reading", qos)
    client.on_socket_open = no_delay
    client.connect("127.0.0.1", port)
    while client.loop_misc() == mqtt.MQTT_ERR_SUCCESS:
        sock: Any = client.socket()
        select.select([sock], [sock] if client.want_write() else [], [], 1.0)
        until = taken + BURST
        while taken < until:
            before = taken
            client.loop_read()
            if taken == before:  # nothing is left, or it was another packet: select will tell
                break
        work.after()
        if client.want_write():
            client.loop_write()


if __name__ == "__main__":
    main()
