"""Many times the messages: every edge's own ones again and again, and a burst on the topics of MQTT sources that the drill feeds.

What comes again by a safe edge is a repeat, and must be recognised as one. By a fast edge it is sent with new identities: it is
one more each time, and what does not fit the queue is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib

from broker.bus import Bus, Publication
from nodes.drill.fault import Blow, Ground, MissedError, Stage
from schemas import codec
from schemas.messages import Message

SECONDS = 3.0
_PER_SECOND = 3000
"""Messages per second in all, at most."""
_BYTES = 20_000_000
"""Bytes per second in all, at most."""
_LISTEN = 2.0
"""Seconds to listen for messages that can be sent again."""
FLOOD = "drill-flood:"
"""How identities begin that were made up here."""
_BURST = 20
"""Messages at once: the pace is kept by pauses between bursts."""


def why_not(ground: Ground) -> str | None:
    """There must be a topic."""
    if not ground.wires() and not ground.fed:
        return "all edges are within one process; there is no topic to flood"
    return None


def targets(ground: Ground) -> list[str]:
    """Everything at once."""
    del ground
    return [""]


async def strike(stage: Stage, blow: Blow) -> str:
    """Listen a little, then send what was heard, over and over."""
    for feed in stage.feeds.values():
        feed.hurry(20)
    try:
        heard = await _heard(stage)
        sent = 0
        if heard:
            sent = await _send(heard, blow.seconds)
        elif stage.feeds:
            await asyncio.sleep(blow.seconds)
    finally:
        for feed in stage.feeds.values():
            feed.hurry(1)
    if not heard and not stage.feeds:
        raise MissedError("nothing came by any edge to be sent again")
    parts = [f"{sent} messages again on {len({p.topic for _, p, _ in heard})} topics"] if heard else []
    parts += [f"20 times the messages to {name}" for name in stage.feeds]
    return f"{blow.seconds:.1f} s, {', '.join(parts)}"


async def _heard(stage: Stage) -> list[tuple[Bus, Publication, bool]]:
    """Some messages of every edge, and whether they are to get new identities."""
    plan = stage.ground.plan
    kinds: dict[tuple[str, str], set[str]] = {}
    for edge in stage.ground.wires():
        every = {other.delivery for other in plan.edges if other.topic == edge.topic}
        kinds[plan.nodes[edge.producer].broker, edge.topic] = set(every)
    listening = []
    for (broker, topic), deliveries in kinds.items():
        if (
            len(deliveries) == 1
        ):  # a topic with both kinds of readers: a new identity would be a new row on its safe edge
            bus = await stage.bus(broker)
            found = await bus.subscribe([f"{topic}/+"], qos=0, capacity=64, overflow="sample", retained=False)
            listening.append((bus, found, "fast" in deliveries))
    await asyncio.sleep(_LISTEN)
    out: list[tuple[Bus, Publication, bool]] = []
    for bus, found, fast in listening:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                came = await found.receive()
                out += [(bus, Publication(one.topic, bytes(one.payload), qos=0), fast) for one in came]
        await found.unsubscribe()
    return out


async def _send(heard: list[tuple[Bus, Publication, bool]], seconds: float) -> int:
    loop = asyncio.get_running_loop()
    began, sent, size = loop.time(), 0, 0
    while loop.time() - began < seconds:
        for bus, publication, fast in heard:
            fresh = Publication(publication.topic, _renamed(publication.payload, sent)) if fast else publication
            await bus.publish([fresh])
            sent, size = sent + 1, size + len(publication.payload)
            if sent % _BURST == 0:
                due = max(sent / _PER_SECOND, size / _BYTES)
                await asyncio.sleep(max(0.0, due - (loop.time() - began)))
                if loop.time() - began >= seconds:
                    break
    return sent


def _renamed(payload: bytes, number: int) -> bytes:
    message = codec.decode(payload)
    return codec.encode(Message(f"{FLOOD}{number}", message.source, message.time, message.body))
