"""Bytes that are no message, on every edge's topic: garbage, cut short, wrong schema, deep nesting, NaN, giant declared sizes.

Each is to become a dead letter of whoever reads it, and nothing else is to happen. Likewise on the topics of MQTT sources
that the drill feeds, and on the topics where nodes tell each other what arrived.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from broker.bus import Publication
from nodes.drill.fault import Blow, Ground, Stage, until
from schemas import codec, topics
from schemas.messages import End, Event, Message

SECONDS = 3.0
_WITHIN = 20.0
"""Seconds for all of them to be refused."""
_DEEP = 20_000


def why_not(ground: Ground) -> str | None:
    """There must be a topic."""
    if not ground.wires() and not ground.fed:
        return "all edges are within one process; nobody else can publish to them"
    return None


def targets(ground: Ground) -> list[str]:
    """Everything at once."""
    del ground
    return [""]


def payloads() -> dict[str, bytes]:
    """What is sent, by what is wrong with it."""
    pack = msgspec.msgpack.encode
    whole = codec.encode(Message("drill:0", "drill", 0, Event(name="drill", values={"x": 1.0})))
    end = codec.encode(Message("drill:end", "drill", 0, End(messages=1)))

    def told(**changed: Any) -> bytes:
        return pack({"type": "readings/1", "id": "drill:0", "source": "drill", "time": 0, **changed})

    column = {"dtype": "<f8", "shape": [2**40], "data": b"\0" * 8}
    return {
        "garbage": bytes(range(255, 0, -3)),
        "nothing": b"",
        "a text": b"hello",
        "JSON": b'{"type": "readings/1", "value": 1}',
        "cut short": whole[: len(whole) // 2],
        "an end cut short": end[:-2],
        "an unknown type": told(type="sausages/9", body={}),
        "no body": told(),
        "a body of another type": told(body={"name": "drill"}),
        "an impossible shape": told(body={"n": 1, "columns": {"x": column}}),
        "columns of other lengths": told(body={"n": 7, "columns": {"x": [None, "a"]}}),
        "NaN for a time": told(time=math.nan, body={"n": 0, "columns": {}}),
        "NaN for a number of rows": told(body={"n": math.nan, "columns": {}}),
        "deep nesting": b"\x91" * _DEEP + b"\xc0",
        "deep nesting within": told(body=0)[:-1] + b"\x81\xa1x" * _DEEP + b"\xc0",
        "a giant text": b"\xdb\xff\xff\xff\xff",
        "a giant list": b"\xdd\xff\xff\xff\xff",
        "a giant map": b"\xdf\xff\xff\xff\xff",
        "giant bytes": b"\xc6\xff\xff\xff\xff\x00",
    }


async def strike(stage: Stage, blow: Blow) -> str:
    """Send all of them everywhere; wait until they are refused."""
    del blow
    ground, bad = stage.ground, list(payloads().values())
    places: dict[tuple[str, str], set[str]] = {}
    for edge in ground.wires():
        broker = ground.plan.nodes[edge.producer].broker
        places.setdefault((broker, f"{edge.topic}/drill"), set()).update(
            # everybody who reads the port, whether it may be struck or not: the topic is one
            other.consumer
            for other in ground.plan.edges
            if other.topic == edge.topic and other.carrier != "local"
        )
        private = topics.again(ground.plan.topology.name, edge.consumer, edge.producer, edge.port)
        places.setdefault((ground.plan.nodes[edge.consumer].broker, private), set()).add(edge.consumer)
    fresh: dict[str, int] = {}
    for (broker, topic), readers in places.items():
        bus = await stage.bus(broker)
        await (await bus.publish([Publication(topic, payload, qos=1) for payload in bad]))
        for reader in readers:
            fresh[reader] = fresh.get(reader, 0) + len(bad)
    for edge in ground.wires():
        bus = await stage.bus(ground.plan.nodes[edge.producer].broker)
        heard = topics.ack(ground.plan.topology.name, edge.producer, edge.port, edge.consumer)
        # numbers would be an acknowledgement, however wrong; what cannot be one is to be passed over
        await (await bus.publish([Publication(heard, payload, qos=1) for payload in bad if payload != b""]))
    for name, feed in stage.feeds.items():
        fresh[name] = fresh.get(name, 0) + await feed.send_bad()
    expected = {node: _dead(stage, node) for node in fresh}
    for node, count in fresh.items():
        stage.injected[node] = stage.injected.get(node, 0) + count
        expected[node] = stage.injected[node]
    await until(lambda: all(_dead(stage, node) >= count for node, count in expected.items()), within=_WITHIN)
    return f"{len(bad)} each on {len(places) + len(stage.feeds)} topics"


def _dead(stage: Stage, node: str) -> int:
    book = stage.supervisor.views[node].books
    return sum(book.dead.values()) if book is not None else 0
