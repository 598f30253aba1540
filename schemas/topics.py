"""Topic names: ``<topology>/<node>/<port>[/<source>]`` and the topology's own, at most seven levels.

Every level is ``[a-z0-9_-]+`` so that any broker, any bridge and AWS IoT carry it.
"""

from __future__ import annotations

import re
from functools import lru_cache

LEVEL = re.compile(r"[a-z0-9_-]+")
MAX_LEVELS = 7
RESERVED_PORTS = frozenset({"state", "ledger", "dead", "ack", "again", "shared", "blobs", "fed", "models"})
"""Names that a port may not have: the topology's own topics stand there."""

_OUTSIDE = re.compile(r"[^a-z0-9_-]+")


def is_level(text: str) -> bool:
    """Whether ``text`` may stand as one level of a topic (and so name a topology, a node or a port)."""
    return LEVEL.fullmatch(text) is not None


@lru_cache(maxsize=65536)
def level(text: str) -> str:
    """``text`` made fit for one level: lower case, everything else becomes ``-``; never empty.

    Not reversible; the envelope's ``source`` has the device's real name.
    """
    return _OUTSIDE.sub("-", text.lower()).strip("-") or "-"


def output(topology: str, node: str, port: str = "out", source: str | None = None) -> str:
    """Where a node's port publishes."""
    base = f"{topology}/{node}/{port}"
    return base if source is None else f"{base}/{level(source)}"


def state(topology: str, node: str) -> str:
    """Retained life sign of a node; ``state/1``."""
    return f"{topology}/{node}/state"


def ledger(topology: str, node: str) -> str:
    """Retained books of a node; ``ledger/1``."""
    return f"{topology}/{node}/ledger"


def dead(topology: str, node: str) -> str:
    """Dead letters of a node; ``dead/1``."""
    return f"{topology}/{node}/dead"


def federated(topology: str, job: str) -> str:
    """What the topics of a federated job begin with."""
    return f"{topology}/fed/{job}"


def matches(pattern: str, topic: str) -> bool:
    """Whether an MQTT topic filter matches a topic (MQTT 5, 4.7). ``$`` topics are not matched by a leading wildcard.

    A shared subscription's filter is given without its ``$share/<group>/``.
    """
    want, have = pattern.split("/"), topic.split("/")
    if topic.startswith("$") and want[0] in {"+", "#"}:
        return False
    for i, part in enumerate(want):
        if part == "#":
            return True
        if i >= len(have) or (part != "+" and part != have[i]):
            return False
    return len(want) == len(have)


def ack(topology: str, producer: str, port: str, consumer: str) -> str:
    """Where a consumer tells a producer what of a port has arrived and what is done."""
    return f"{topology}/{producer}/ack/{port}/{level(consumer)}"


def lane(topology: str, consumer: str, producer: str, port: str) -> str:
    """Where a producer publishes what one replica of a consumer is to get, and nobody else."""
    return f"{topology}/{consumer}/in/{producer}/{port}"


def again(topology: str, consumer: str, producer: str, port: str) -> str:
    """A consumer's private topic for what a producer sends again, so that foreign subscribers see each message once."""
    return f"{topology}/{consumer}/again/{producer}/{port}"


def shared(topology: str, producer: str, port: str) -> str:
    """A port's topic for readers on the same machine, who share memory with the producer."""
    return f"{topology}/{producer}/shared/{port}"
