"""The benchmarks' work with paho-mqtt: ``python with_paho.py PORT telemetry|relay|gathered [QOS]``.

The client's own thread reads the socket, works and publishes: no queue between threads. JSON by msgspec, typed.
What the work is, says ``program.c``.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion


class Reading(msgspec.Struct, gc=False):
    """What a device sends; with °F for °C what goes on."""

    device: str
    temperature: float
    humidity: float
    ts: int
    seq: int


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Reading).decode


class Telemetry:
    """°C to °F, a range, alarms, one-second means per device."""

    def __init__(self, publish: Callable[[str, bytes], object]) -> None:
        self._publish = publish
        self._second = 0
        self._open: dict[str, list[float]] = {}  # device → number, sum
        self._lock = threading.Lock()  # the clock closes windows from another thread

    def on_message(self, client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        """One reading."""
        reading = decode(message.payload)
        fahrenheit = reading.temperature * 1.8 + 32
        if not -40 <= fahrenheit <= 185:
            return
        if fahrenheit > 104:
            reading.temperature = fahrenheit
            self._publish("farm/out", encode(reading))
        with self._lock:
            second = reading.ts // 1000
            if second > self._second:
                self._close(second)
            window = self._open.get(reading.device)
            if window is None:
                self._open[reading.device] = [1, fahrenheit]
            else:
                window[0] += 1
                window[1] += fahrenheit

    def tick(self, now: float) -> None:
        """Windows end by the clock too, if nothing comes any more."""
        with self._lock:
            if now > self._second + 2:
                self._close(int(now))

    def _close(self, second: int) -> None:
        for device, (n, total) in self._open.items():
            mean = {"device": device, "start": self._second, "n": n, "mean": total / n}
            self._publish(f"farm/{device}/mean", encode(mean))
        self._open.clear()
        self._second = second


def main() -> None:
    """Entry."""
    port, work, qos = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="with-paho")
    client.max_inflight_messages_set(1000)

    def publish(topic: str, payload: bytes) -> object:
        return client.publish(topic, payload, qos)

    def relay(client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        reading = decode(message.payload)
        reading.temperature = reading.temperature * 1.8 + 32
        publish("farm/out", encode(reading))

    def no_delay(client: mqtt.Client, userdata: object, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    telemetry = Telemetry(publish)
    client.on_message = telemetry.on_message if work == "telemetry" else relay
    client.on_connect = lambda client, *_: client.subscribe("farm/+/reading", qos)
    client.on_socket_open = no_delay
    client.connect("127.0.0.1", port)
    client.loop_start()
    while True:
        time.sleep(1)
        telemetry.tick(time.time())


if __name__ == "__main__":
    main()
