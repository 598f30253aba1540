"""Reads a topology's results with nothing but an MQTT client and a msgpack library; no part of Penstock is imported.

pip install paho-mqtt msgpack
python subscribe.py --port 18830 --topic 'digits/digits/out/#'
"""

from __future__ import annotations

import argparse
import math
import struct
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it has no type hints
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

# A tensor is {"dtype": "<f4", "shape": [2, 3], "data": bytes}: C order, little endian. struct's letter for each dtype:
LETTERS = {
    "|b1": "?",
    "|i1": "b",
    "|u1": "B",
    "<i2": "h",
    "<u2": "H",
    "<i4": "i",
    "<u4": "I",
    "<i8": "q",
    "<u8": "Q",
    "<f2": "e",
    "<f4": "f",
    "<f8": "d",
}


def values(tensor: dict[str, Any]) -> list[Any]:
    """All numbers of a tensor, in C order."""
    return list(struct.unpack(f"<{math.prod(tensor['shape'])}{LETTERS[tensor['dtype']]}", tensor["data"]))


def line(message: dict[str, Any]) -> str:
    """One message in one line."""
    body = message["body"]
    if message["type"] == "predictions/1":
        scores = values(body["scores"])
        answers = ", ".join(f"{label} {score:.2f}" for label, score in zip(body["labels"], scores, strict=True))
        known = body.get("attributes", {}).get("label")
        return f"{message['id']}  {answers or 'nothing'}" + (f"  (it is {known})" if known is not None else "")
    if message["type"] == "readings/1":
        columns = {k: v if isinstance(v, list) else values(v) for k, v in body["columns"].items()}
        return f"{message['id']}  {body['n']} rows: {columns}"
    return f"{message['id']}  {body}"


def main() -> None:
    """Print what comes until interrupted, or until ``--count`` messages have come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=18830)
    parser.add_argument("--topic", default="digits/digits/out/#")
    parser.add_argument("--count", type=int, help="end after so many messages")
    options = parser.parse_args()
    seen = 0

    def connected(client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        print(f"connected: {reason}", flush=True)
        client.subscribe(options.topic)  # again after every reconnect

    def arrived(client: mqtt.Client, _data: Any, packet: mqtt.MQTTMessage) -> None:
        nonlocal seen
        if options.count is not None and seen >= options.count:
            return  # what was on its way while we took our leave
        message = msgpack.unpackb(packet.payload)
        print(packet.topic, line(message), flush=True)
        seen += 1
        if seen == options.count:
            client.disconnect()

    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_connect = connected
    client.on_message = arrived
    client.connect(options.host, options.port)
    client.loop_forever(retry_first_connection=True)


if __name__ == "__main__":
    main()
