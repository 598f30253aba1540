"""What a worker process is told: its nodes, resolved by the supervisor's plan, as plain JSON.

A worker does not read the topology again: it needs neither YAML nor the other nodes' kinds, and starts the faster for it.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from schemas.keeping import Order

Overflow: TypeAlias = Literal["block", "latest", "sample"]
"""As :data:`broker.bus.Overflow`; said again, because a plan is made of this module and ``check`` needs no bus."""


class InEdge(msgspec.Struct, frozen=True, kw_only=True):
    """An edge that a node reads.

    :param carrier: ``local`` (same process) or ``mqtt`` (relays are nobody's business here: they carry topics).
    :param safe: acknowledged after the effect; otherwise ``overflow`` says what a full queue does.
    :param queue: most messages queued.
    :param private: its messages come on the reader's own topic only.
    :param marked: another edge of this node may bring the same identities; answers get the edge's name.
    :param streams: names of the producer's replicas, by number; the producer's own name alone if it has none.
    :param lane: we are a replica, and what is ours comes on topics of our own.
    :param merged: the streams are put in the order of their times, see :mod:`nodes.merge`.
    :param shared: it shares the producer's memory, and this is its number among those that do; see :mod:`nodes.sharing`.
    """

    producer: str
    port: str
    carrier: str
    safe: bool
    queue: int
    overflow: Overflow = "block"
    marked: bool = False
    streams: list[str] = []
    lane: bool = False
    merged: bool = False
    private: bool = False
    shared: int | None = None

    @property
    def name(self) -> str:
        """``<producer>.<port>``."""
        return f"{self.producer}.{self.port}"


class Team(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer with replicas: each source's messages go to one of them.

    :param members: their names, by number.
    :param fast: whether the edge is ``fast``.
    """

    members: list[str]
    fast: bool


class OutPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port that a node writes.

    :param local: whether a node of the same process reads it.
    :param handed: whether one of them does so by a ``safe`` edge.
    :param remote: consumers by MQTT: name → whether that edge is ``fast``.
    :param publish: whether it is published by MQTT at all (somebody reads it there, or the user wants to see it).
    :param teams: consumers with replicas, by the name that the user gave.
    :param shared: those of ``remote`` that share our memory, by number → ``safe``, or what a full queue does.
    :param always: where there are such: the public topic carries everything all the same.
    """

    name: str
    local: bool
    remote: dict[str, bool]
    publish: bool
    teams: dict[str, Team] = {}
    handed: bool = False
    shared: dict[str, str] = {}
    always: bool = True

    @property
    def safe(self) -> bool:
        """Whether somebody reads it by a ``safe`` edge."""
        return self.handed or not all(self.remote.values()) or not all(team.fast for team in self.teams.values())


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One node. ``config`` is what the user wrote; it was found valid.

    :param durable: what it sends is kept on its disk until it is done.
    :param logical: the name that the user gave, which messages and their topics have; ``name`` is one of its replicas.
    :param replica: number of this replica, from 0.
    :param replicas: how many there are.
    """

    name: str
    kind: str
    config: dict[str, Any]
    inputs: list[InEdge]
    outputs: list[OutPort]
    host: str
    broker: str
    durable: bool = False
    logical: str = ""
    replica: int = 0
    replicas: int = 1

    @property
    def public(self) -> str:
        """The name that others see in topics and identities."""
        return self.logical or self.name


class RelayPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port that goes through a relay that keeps.

    :param consumers: its readers by safe edges at the far broker.
    :param private: readers by fast edges are there too, who have it by the port's topic; so ours goes on the readers' own.
    :param budget: bytes of its spool.
    """

    producer: str
    port: str
    consumers: list[str]
    private: bool
    budget: int


class RelaySpec(msgspec.Struct, frozen=True, kw_only=True):
    """A relay that keeps.

    :param broker: of the producers; ``far``: of the readers.
    :param rate: messages per second; None: no limit.
    :param local: those of its producers that run under the same supervisor.
    """

    name: str
    host: str
    broker: str
    far: str
    ports: list[RelayPort]
    overflow: str
    order: Order
    rate: float | None = None
    local: list[str] = []


class Broker(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a broker: url and credentials as files or values; this goes by pipe, never to a log."""

    url: str
    user: str | None = None
    password: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """All of one worker process.

    :param base: folder of the topology file.
    :param state: folder of the run's state; a node's journal is ``<state>/<node>.journal``.
    :param brokers: by name.
    :param relays: relays that keep, which this worker runs.
    :param left: nodes of the run that have ended already.
    :param level: least log level that is sent.
    :param clock: ns by which the time of day is moved for the process (a drill).
    """

    topology: str
    process: str
    host: str
    base: str
    state: str
    nodes: list[NodeSpec]
    brokers: dict[str, Broker]
    level: str = "info"
    left: list[str] = []
    relays: list[RelaySpec] = []
    clock: int = 0


class Report(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One line from a worker to its supervisor: a log event, a change of state, or the books.

    :param rss: resident memory of the process, bytes.
    :param cpu: processor time of the process so far, seconds.
    :param passing: each row of this node that is not left out leaves by a port (the audit compares them).
    """

    node: str = ""
    state: str = ""
    detail: str = ""
    exit_code: int = 0
    ledger: Any = None
    log: tuple[str, str, dict[str, Any]] | None = None
    pid: int = 0
    rss: int = 0
    cpu: float = 0.0
    passing: bool = False


class Command(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One line from the supervisor to a worker.

    :param stop: nodes to stop: sources read no more; a node whose inputs are idle leaves, keeping its state.
    :param end: sources to end as if their data had ended, so that windows close.
    :param left: nodes, of other processes too, that have ended and left.
    :param clock: ns by which the time of day is moved for the process from now on (a drill).
    """

    stop: list[str] = []
    end: list[str] = []
    left: list[str] = []
    clock: int | None = None
