"""Pretends to be the devices of a house: two climate sensors as zigbee2mqtt publishes them, and a Shelly plug.

    pip install paho-mqtt
    python devices.py --port 18831 --seconds 30

Now and then something comes that is not what was promised, as it does in a real house: a text that is no JSON, a value that
is missing. The topology must live with it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

ROOMS = {"kitchen": 21.5, "cellar": 12.0}


def messages(step: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """(topic, payload) of one moment."""
    for room, usual in ROOMS.items():
        temperature = usual + 1.5 * math.sin(step / 40) + draw.gauss(0, 0.05)
        state: dict[str, float | None] = {
            "temperature": round(temperature, 2),
            "humidity": draw.randint(40, 55),
            "battery": 93,
            "linkquality": 120,
        }
        if draw.random() < 0.02:
            state["temperature"] = None  # a sensor that just woke up
        yield f"zigbee2mqtt/{room}", json.dumps(state)
    on = step % 60 < 30
    warm = 40 if on else 25
    switch = {"id": 0, "output": on, "apower": 312.5 if on else 0.0, "temperature": {"tC": warm, "tF": warm * 1.8 + 32}}
    yield "shellyplusplug-7c2d/status/switch:0", json.dumps(switch)
    if draw.random() < 0.05:
        yield "zigbee2mqtt/kitchen", "not JSON at all"


def main() -> None:
    """Publish until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=18831)
    parser.add_argument("--rate", type=float, default=5, help="moments a second")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)  # noqa: S311 - weather, not secrets
    # Most devices speak MQTT 3.1.1 only.
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.connect(options.host, options.port)
    client.loop_start()
    sent = 0
    for step in range(round(options.rate * options.seconds)):
        for topic, payload in messages(step, draw):
            client.publish(topic, payload, qos=1).wait_for_publish(5)
            sent += 1
        time.sleep(1 / options.rate)
    client.disconnect()
    client.loop_stop()
    print(f"{sent} messages")


if __name__ == "__main__":
    main()
