"""Dead letters to their nodes again: what ``penstock dead replay`` does.

A letter goes out on the node's private topic, where only that node listens, without the number that it once had in its
producer's stream: it is no part of that any more, and the node takes it whatever its identity. The node itself removes the
letter from its file when the effect is committed, or enters it anew if it refuses it once more; we wait for that.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from broker.bus import Publication
from schemas import codec, topics
from schemas.errors import PayloadError, RunError
from schemas.messages import End, State

if TYPE_CHECKING:
    from broker.bus import Bus, Subscription
    from nodes.cli._reach import Place
    from nodes.dead import DeadLetters, Letter

_AT_ONCE = 64
"""Letters sent before their answers are waited for."""
_HEARD_WITHIN = 2.0
"""Seconds for the broker to tell the state of the nodes."""


@dataclass
class Tally:
    """What became of one node's letters."""

    done: int = 0
    refused: int = 0
    silent: int = 0
    skipped: list[str] = field(default_factory=list)


async def replay(
    place: Place,
    kept: dict[str, DeadLetters],
    chosen: dict[str, list[Letter]],
    *,
    keep: bool,
    patience: float,
    as_json: bool,
) -> int:
    """Send the chosen letters again and tell what became of them.

    :raises RunError: a node is not running.
    :raises BusError: a broker cannot be reached.
    """
    tallies: dict[str, Tally] = {}
    by_broker: dict[str, list[str]] = {}
    for name in chosen:
        if name in place.topology.members:
            broker = place.topology.hosts[place.topology.members[name][1]]
            by_broker.setdefault(broker, []).append(name)
        else:
            tallies[name] = Tally(skipped=["there is no such node in the topology any more"])
    for broker, names in by_broker.items():
        async with place.bus(broker, f"penstock-dead-{os.getpid()}", patience=patience) as bus:
            await _all_ready(place, bus, names)
            for name in names:
                tallies[name] = await _replay(place, bus, name, kept[name], chosen[name], keep, patience)
    if as_json:
        print(json.dumps({name: vars(tally) for name, tally in tallies.items()}, ensure_ascii=False))
    else:
        for name, tally in tallies.items():
            print("\n".join(_told(name, tally)))
        if not chosen:
            print("no dead letters")
    return 0 if all(not (t.refused or t.silent or t.skipped) for t in tallies.values()) else RunError.exit_code


def _told(name: str, tally: Tally) -> list[str]:
    parts = [f"{tally.done} replayed"]
    if tally.refused:
        parts.append(f"{tally.refused} refused again")
    if tally.silent:
        parts.append(f"{tally.silent} without an answer (they are kept; replay them again)")
    return [f"{name}: {', '.join(parts)}", *(f"{name}: not replayed: {why}" for why in tally.skipped)]


async def _all_ready(place: Place, bus: Bus, names: Sequence[str]) -> None:
    """Every node says that it is there."""
    said: dict[str, str] = {}
    listening = await bus.subscribe([topics.state(place.topology.name, name) for name in names], qos=0)
    try:
        async with asyncio.timeout(_HEARD_WITHIN):
            while not said.keys() >= set(names) or "starting" in said.values():
                said.update(await _states(listening))
    except TimeoutError:
        pass
    for name in names:
        if (status := said.get(name, "never heard of")) != "ready":
            raise RunError(f"{name} is not running ({status}): start the topology, then replay")


async def _states(listening: Subscription) -> dict[str, str]:
    out = {}
    for delivery in await listening.receive():
        try:
            body = codec.decode(delivery.payload).body
        except PayloadError:
            continue
        if isinstance(body, State):
            out[body.node] = body.status
    return out


async def _replay(
    place: Place, bus: Bus, name: str, file: DeadLetters, letters: Sequence[Letter], keep: bool, patience: float
) -> Tally:
    tally = Tally()
    node = place.topology.members[name][0]
    edges = {edge.name: edge for edge in node.inputs}
    for start in range(0, len(letters), _AT_ONCE):
        ids: list[int] = []
        publications: list[Publication] = []
        for letter in file.letters([letter.id for letter in letters[start : start + _AT_ONCE]]):
            edge = edges.get(letter.edge)
            if edge is None:
                why = (
                    "it came from outside, not from a node" if not letter.edge else f"it no longer reads {letter.edge}"
                )
                tally.skipped.append(f"{name}/{letter.id}: {why}")
                continue
            try:
                payload = _unnumbered(letter)
            except PayloadError as error:
                tally.skipped.append(f"{name}/{letter.id}: {error}")
                continue
            topic = topics.again(place.topology.name, name, edge.producer, edge.port)
            publications.append(Publication(topic, payload, qos=1, content_type=codec.CONTENT_TYPE))
            ids.append(letter.id)
        if ids:
            file.sending(ids, keep=keep)
            await (await bus.publish(publications))
            answers = await _answers(file, ids, patience)
            tally.done += sum(answer is True for answer in answers.values())
            tally.refused += sum(answer is False for answer in answers.values())
            tally.silent += sum(answer is None for answer in answers.values())
            if sys.stderr.isatty():
                print(f"{name}: {start + len(ids)} of {len(letters)}", file=sys.stderr)
    return tally


def _unnumbered(letter: Letter) -> bytes:
    """The message as it was, without its place in the producer's stream.

    :raises PayloadError: it is none, or not all of it was kept.
    """
    if len(letter.payload) < letter.length:
        raise PayloadError("too-big", f"only {len(letter.payload)} of its {letter.length} bytes are kept")
    message = codec.decode(letter.payload)
    if isinstance(message.body, End):
        raise PayloadError("bad-body", "the end of a stream is not replayed")
    return codec.encode(message)


async def _answers(file: DeadLetters, ids: Sequence[int], patience: float) -> dict[int, bool | None]:
    """What the node says of each; None where it said nothing for ``patience`` seconds."""
    loop = asyncio.get_running_loop()
    answers = await asyncio.to_thread(file.answers, ids)
    until, open_ = loop.time() + patience, len(ids)
    while (waiting := sum(answer is None for answer in answers.values())) and loop.time() < until:
        if waiting < open_:
            until, open_ = loop.time() + patience, waiting
        await asyncio.sleep(0.05)
        answers = await asyncio.to_thread(file.answers, ids)
    return answers
