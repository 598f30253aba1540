"""Frames with paho-mqtt: ``python -m benchmarks.peers.frames_paho camera|mean HOST PORT``."""

from __future__ import annotations

import struct
import sys
import time
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.peers.frames_common import SIZE, brightness, frames


def client(host: str, port: int) -> mqtt.Client:
    """A connected client."""
    made = mqtt.Client(CallbackAPIVersion.VERSION2)
    made.connect(host, port)
    return made


def camera(host: str, port: int) -> None:
    """Publish frames as fast as they go; each begins with the time in ns. At most four wait to be written."""
    pictures = [picture.tobytes() for picture in frames()]
    us = client(host, port)
    us.loop_start()
    number, waiting = 0, []
    while True:
        number += 1
        payload = struct.pack("<q", time.time_ns()) + pictures[number % len(pictures)]
        waiting.append(us.publish("frames/camera", payload))
        if len(waiting) >= 4:
            waiting.pop(0).wait_for_publish()


def mean(host: str, port: int) -> None:
    """Take frames, publish time and mean."""

    def on_message(us: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        del userdata
        picture = np.frombuffer(message.payload, np.uint8, SIZE, 8)
        us.publish("frames/mean", message.payload[:8] + struct.pack("<d", brightness(picture)))

    us = client(host, port)
    us.on_message = on_message
    us.subscribe("frames/camera")
    us.loop_forever()


if __name__ == "__main__":
    {"camera": camera, "mean": mean}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
