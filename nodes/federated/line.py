"""One bus of a party: what has come from it, and what goes out on it.

Publishing is a task of its own for each bus, so that a broker that is away holds up neither the clock nor the other bus.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from broker.bus import Bus, Delivery, Publication, Receipt, Subscription, Will
from nodes import log
from nodes.federated.machine import Answer, Say
from schemas.errors import BusError, ClosedError, PublishFailedError, RunError

Connect: TypeAlias = Callable[..., Bus]
"""Gives the bus, not opened yet; called with ``will`` and ``on_state`` of :func:`broker.connect.connect`."""

AHEAD = 8 * 2**20
"""Bytes that may wait to be published."""
AT_ONCE = 64
"""Deliveries between two commits, at most."""
RECEIVE = 32
"""QoS 1 deliveries that the broker may have on the way to us: with chunks of 64 KiB, 2 MiB."""
SESSION = 300
"""Seconds that the broker keeps for us what comes while the link is lost."""
FAREWELL = 5.0
"""Seconds that the last publications may take when we leave."""


@dataclass(frozen=True, slots=True)
class Way:
    """A bus beside a party's own.

    :param prefix: the machine's topics that begin so are there, without it.
    :param root: topics on that bus begin so: ``<topology>/fed/<job>``.
    :param linked: asked of the machine when the link was lost and is there again.
    """

    prefix: str
    connect: Connect
    root: str
    linked: Callable[[int], Answer]


class Line:
    """One bus.

    :param will: what the broker says there when we are gone.
    :param on_news: called when something has come, was sent, or the link is there again.
    :param told: what the log says beside the reason.
    :ivar ahead: bytes that wait to be published.
    """

    def __init__(self, way: Way, will: Say | None, on_news: Callable[[], None], told: dict[str, Any]) -> None:
        self.way = way
        self.inbox: deque[Delivery] = deque()
        self.ahead = 0
        self.opened = False
        self.relinked = False
        self._will = will
        self._on_news = on_news
        self._told = told
        last = None if will is None else Will(f"{way.root}/{will.topic}", will.payload, retain=will.retain)
        self._bus = way.connect(will=last, on_state=self._link_changed)
        self._subscription: Subscription | None = None
        self._space = asyncio.Event()
        self._last = ""
        self._lost = False
        self._outgoing: list[Publication] = []
        self._to_send = asyncio.Event()
        self._receipts: set[Receipt] = set()
        self._quiet = asyncio.Event()
        self._complained: set[str] = set()

    async def open(self, filters: list[str]) -> None:
        """Connect and subscribe.

        :param filters: topics of the machine, those of this bus.
        :raises BusError: the broker refuses us, or is away for longer than the bus is patient.
        """
        await self._bus.open()
        here = [f"{self.way.root}/{topic}" for topic in filters]
        self._subscription = await self._bus.subscribe(here, qos=1, capacity=RECEIVE)
        self.opened, self.relinked = True, self._lost

    async def close(self) -> None:
        """Say that we are gone, as our will would, and leave."""
        if self.opened and self._will is not None and self._bus.connected:
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    await (await self._bus.publish([self._publication(self._will)]))
        await self._bus.close()

    def _link_changed(self, state: str, reason: str) -> None:
        if state == "connected":
            self._last = ""
            if self.opened:
                self.relinked = True
                self._on_news()
            return
        if reason != self._last:  # said once, however often it is tried again
            self._last = reason
            log.warning(state, reason=reason, **self._told)

    @property
    def full(self) -> bool:
        """So much waits to be published that nothing more is to be taken in."""
        return self.ahead >= AHEAD and self._bus.connected

    # -- in ------------------------------------------------------------------------------------------------------

    async def receive(self) -> None:
        """For ever."""
        if (subscription := self._subscription) is None:
            raise RunError("the party is not open")
        while True:
            try:
                self.inbox.extend(await subscription.receive())
            except ClosedError:
                return await asyncio.Future()
            self._on_news()
            while len(self.inbox) >= AT_ONCE:
                self._space.clear()
                await self._space.wait()

    def take(self, delivery: Delivery) -> tuple[str, bytes]:
        """The machine's topic, and the payload."""
        self._space.set()
        payload = delivery.payload
        topic = self.way.prefix + delivery.topic[len(self.way.root) + 1 :]
        return topic, payload if isinstance(payload, bytes) else bytes(payload)

    def acknowledge(self, heard: list[Delivery]) -> None:
        """What came of them is committed."""
        if heard and self._subscription is not None:
            self._subscription.acknowledge(heard)

    # -- out -----------------------------------------------------------------------------------------------------

    def _publication(self, say: Say) -> Publication:
        return Publication(f"{self.way.root}/{say.topic}", say.payload, 1, say.retain, say.expiry)

    def say(self, say: Say) -> None:
        """Publish that when its turn comes.

        Where the link is lost and much waits already, it is lost too: machines say again what was not answered, and what matters
        when the link is there again.

        :param say: without the prefix.
        """
        if self.ahead >= AHEAD and not self._bus.connected:
            self._lost = True
            return
        publication = self._publication(say)
        self._outgoing.append(publication)
        self.ahead += len(publication.payload)
        self._to_send.set()

    async def send(self) -> None:
        """For ever."""
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            batch, self._outgoing = self._outgoing, []
            if not batch:
                continue
            try:
                receipt = await self._bus.publish(batch)
            except ClosedError:
                return await asyncio.Future()
            self._receipts.add(receipt)
            receipt.add_done_callback(self._sent)
            self.ahead -= sum(len(publication.payload) for publication in batch)
            self._on_news()
            self._quiet.set()

    def _sent(self, receipt: Receipt) -> None:
        self._receipts.discard(receipt)
        if not self._receipts:
            self._quiet.set()
        if receipt.cancelled() or (error := receipt.exception()) is None:
            return
        if isinstance(error, PublishFailedError):
            for _, failure in error.failures:
                self._refused(failure)

    def _refused(self, error: BaseException) -> None:
        """The broker does not take it: said once for each reason; the protocol goes on as if it were lost."""
        if (text := str(error)) not in self._complained:
            self._complained.add(text)
            log.error("not published", reason=text, **self._told)

    async def flushed(self) -> None:
        """Until the broker has all that was said, though not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                while self.ahead or self._outgoing or self._receipts:
                    self._quiet.clear()
                    await self._quiet.wait()
