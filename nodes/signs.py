"""What a node tells of itself: its state, its books, its dead letters; on the bus and to the supervisor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from broker.bus import Bus, Publication
from nodes import log
from nodes.assignment import NodeSpec, Report
from nodes.dead import SUFFIX, Burials, Letter
from schemas import codec, topics
from schemas.errors import BusError
from schemas.messages import Dead, Ledger, Message, State


class Signs:
    """A node's life signs.

    :param bus: the node's connection; None: only the supervisor hears.
    :param report: sends a line to the supervisor.
    :param state: folder of the run's state; the dead letters' file is there.
    :ivar deaths: letters of the step that is under way, to be published with it.
    :ivar foreign: letters of what somebody else published on our topics.
    """

    def __init__(
        self, topology: str, spec: NodeSpec, bus: Bus | None, report: Callable[[Report], None], state: Path
    ) -> None:
        self._topology = topology
        self._spec = spec
        self._bus = bus
        self._report = report
        self.burials = Burials(state / f"{spec.name}{SUFFIX}")
        self.deaths: list[Publication] = []
        self.foreign: list[Publication] = []

    def say(self, state: str) -> None:
        """Tell the supervisor our state."""
        self._report(Report(node=self._spec.name, state=state, pid=os.getpid()))

    async def show_state(self, status: str) -> None:
        """Publish our state, retained."""
        payload = state_payload(self._spec.name, status, self._spec.host)
        await self._send([Publication(topics.state(self._topology, self._spec.name), payload, qos=1, retain=True)])

    async def show_books(self, book: Ledger, *, passing: bool) -> None:
        """Tell the supervisor our books, and publish them, retained, if there is a link just now."""
        name, times = self._spec.name, os.times()
        self._report(
            Report(
                node=name,
                ledger=book,
                pid=os.getpid(),
                cpu=times.user + times.system,
                rss=resident(),
                passing=passing,
            )
        )
        if self._bus is not None and self._bus.connected:
            payload = codec.encode(Message(f"{name}:ledger", name, time.time_ns(), book))
            await self._send([Publication(topics.ledger(self._topology, name), payload, retain=True)])

    def letter(self, reason: str, detail: str, edge: str, position: str, payload: bytes, rows: int = 1) -> Publication:
        """A dead letter: kept for the file, and to be published. Too large for the broker: its beginning."""
        name, now = self._spec.name, time.time_ns()
        log.warning("dead letter", node=name, reason=reason, detail=detail[:200], position=position)
        self.burials.add(
            Letter(first=now, reason=reason, detail=detail, edge=edge, position=position, payload=payload, rows=rows)
        )
        topic = topics.dead(self._topology, name)

        def encoded(detail: str, payload: bytes) -> bytes:
            body = Dead(node=name, reason=reason, detail=detail, edge=edge, position=position, payload=payload)
            return codec.encode(Message(f"{name}:dead:{now}", name, now, body))

        data = encoded(detail, payload)
        limit = self._bus.max_payload if self._bus is not None else None
        if limit is not None and (over := len(data) + len(topic) - limit) > 0:
            room = max(0, len(payload) - over - 64)
            data = encoded(f"{detail} (the first {room} of {len(payload)} bytes)", payload[:room])
        return Publication(topic, data, qos=1, content_type=codec.CONTENT_TYPE)

    async def send_foreign(self) -> None:
        """Keep and publish the letters of what somebody else threw at us."""
        if self.foreign:
            await self.burials.settle(self._spec.name, patient=False)
            letters, self.foreign = self.foreign, []
            await self._send(letters)

    async def _send(self, publications: list[Publication]) -> None:
        if self._bus is None:
            return
        try:
            await (await self._bus.publish(publications))
        except BusError as error:
            log.warning("not published", node=self._spec.name, topic=publications[0].topic, reason=str(error))


def state_payload(node: str, status: str, host: str) -> bytes:
    """A ``state/1`` message; also the will's."""
    now = time.time_ns()
    body = State(node=node, status=status, host=host, pid=os.getpid())
    return codec.encode(Message(f"{node}:state:{now}", node, now, body))


def resident() -> int:
    """Resident memory of this process in bytes (Linux; 0 elsewhere)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
