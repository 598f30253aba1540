"""What both sides of a federated job are: machines without I/O.

Who carries a machine (:mod:`nodes.federated.party` on a real bus, :mod:`nodes.federated.simulate` on one that is not) calls it
with what happened, and does what it answers, in this order: commit (all in one transaction), then publish, then begin to compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Say(msgspec.Struct, frozen=True, gc=False):
    """One publication. Topics are the job's own: without ``<topology>/fed/<job>/`` before them.

    :param payload: bytes; empty with ``retain``: takes the retained message back.
    :param expiry: seconds after which the broker may drop it.
    """

    topic: str
    payload: bytes
    retain: bool = False
    expiry: int | None = None


@dataclass(slots=True)
class Work:
    """Something that takes long (training, aggregating): called in a thread; :meth:`Machine.worked` gets what it returned.

    A machine has at most one under way. ``act`` touches nothing of the machine but what it was given.
    """

    name: str
    act: Callable[[], Any]


@dataclass(slots=True)
class Answer:
    """What a machine wants done.

    :param commit: key → plain msgpack value, durable before anything is published; None forgets the key.
    :param rows: for the coordinator's output stream: one row of plain numbers and texts for each round that ended.
    :param over: the machine's job is done; nothing more will come of it.
    :param tell: for the log: what a person should know, in plain words.
    """

    commit: dict[str, Any] = field(default_factory=dict)
    say: list[Say] = field(default_factory=list)
    work: Work | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False
    tell: list[str] = field(default_factory=list)


class Machine(ABC):
    """One side of a job. All times are ns since the epoch, and always given: a machine looks at no clock."""

    @abstractmethod
    def filters(self) -> tuple[str, ...]:
        """What it listens to, topics of the job (``r/+/key``)."""

    def will(self) -> Say | None:
        """What the broker says for it when it is gone."""
        return None

    @abstractmethod
    def start(self, kept: Mapping[str, Any], now: int) -> Answer:
        """Begin, or continue with what was committed before a crash. Called once, when the bus is there and subscribed.

        :param kept: may be looked at later too, also by a work in its thread: it has what was committed last.
        """

    @abstractmethod
    def heard(self, topic: str, payload: bytes, now: int) -> Answer:
        """A message arrived: perhaps late, repeated, out of order, or garbage. Never raises."""

    @abstractmethod
    def worked(self, name: str, result: Any, now: int) -> Answer:
        """What :class:`Work` returned, or the exception that it raised."""

    def linked(self, now: int) -> Answer:
        """The link was lost and is there again: say what the others may have missed."""
        return Answer()

    @abstractmethod
    def wake(self) -> int | None:
        """When :meth:`tick` is wanted next; None: not at all."""

    @abstractmethod
    def tick(self, now: int) -> Answer:
        """Time passed."""
