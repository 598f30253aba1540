"""A relay between two brokers: carries chosen topics up and chosen topics down, and dials out to both.

It keeps nothing: the ends of a ``safe`` edge send again what was lost on the way. It runs beside the lower broker, so the
upper one needs no way down (NAT).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.bus import Bus, Publication, Receipt
from broker.connect import connect
from schemas.errors import BusError, ClosedError

Say = Callable[[str, str, dict[str, Any]], None]
_QUEUE = 1024


class Relay:
    """Carries ``up`` filters from ``lower`` to ``upper`` and ``down`` filters back. The two sets must not overlap.

    :param name: begins the client identifiers.
    :param lower: url of the broker on this side.
    :param upper: url of the far one.
    :param say: takes log events.
    :param credentials: user, password, ca, cert and key for each of the two brokers, as :func:`broker.connect.connect` has them.
    """

    def __init__(
        self,
        name: str,
        lower: str,
        upper: str,
        *,
        up: Sequence[str],
        down: Sequence[str],
        say: Say,
        credentials: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    ) -> None:
        self._name = name
        self._urls = (lower, upper)
        self._filters = (list(up), list(down))
        self._say = say
        self._credentials = credentials
        self.carried = [0, 0]
        """Messages carried up and down."""

    async def run(self) -> None:
        """Carry for ever. Waits for brokers that are away, also at first.

        :raises ConnectError: a broker refuses us for good.
        """
        ends = [
            connect(url, client_id=f"{self._name}-relay-{side}", patience=float("inf"), **access)
            for url, side, access in zip(self._urls, ("lower", "upper"), self._credentials, strict=True)
        ]
        async with ends[0] as lower, ends[1] as upper, asyncio.TaskGroup() as group:
            group.create_task(self._carry(lower, upper, 0))
            group.create_task(self._carry(upper, lower, 1))

    async def _carry(self, here: Bus, there: Bus, way: int) -> None:
        if not self._filters[way]:
            return
        subscription = await here.subscribe(self._filters[way], qos=1, capacity=_QUEUE, overflow="latest")
        while True:
            batch = await subscription.receive()
            receipt = await there.publish(
                [
                    Publication(d.topic, d.payload, d.qos, d.retain, properties=d.properties)
                    for d in batch
                    if there.max_payload is None or len(d.payload) + len(d.topic) <= there.max_payload
                ]
            )
            self.carried[way] += len(batch)
            receipt.add_done_callback(self._refused)
            subscription.acknowledge(batch)

    def _refused(self, receipt: Receipt) -> None:
        error = None if receipt.cancelled() else receipt.exception()
        if isinstance(error, BusError) and not isinstance(error, ClosedError):
            self._say("warning", "not relayed", {"relay": self._name, "reason": str(error)})
