"""What carries one machine of a federated job: a bus, a store, a thread and the clock.

One task asks the machine, one event after the other: what arrived, what a thread computed, the link that is there again,
the time. Each answer is committed before anything of it is published, and published before anything of it is computed;
deliveries are acknowledged after the commit. Publishing has a task of its own, so that a broker that is away holds up
neither the clock nor a deadline; while more than :data:`AHEAD` bytes wait for it, nothing more is taken in.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from broker.bus import Bus, Delivery, Publication, Receipt, Subscription, Will
from nodes import log
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.store import Store
from schemas.errors import BusError, ClosedError, PublishFailedError, RunError

T = TypeVar("T")
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
_RETRY_COMMIT = 1.0
_LONGEST_WAIT = 1.0
"""Seconds after which the time of day is looked at again, should it have been moved."""
_SHORTEST_WAIT = 0.001
_FAREWELL = 5.0
"""Seconds that the last publications may take when we leave."""


class Party:
    """Carries ``machine`` from :meth:`open` until it is over.

    :param root: topics of the job begin so: ``<topology>/fed/<job>``.
    :param told: what the log says beside the reason: the node, the job.
    :param on_rows: called after each commit that added rows to the store.
    """

    def __init__(
        self,
        machine: Machine,
        store: Store,
        connect: Connect,
        root: str,
        *,
        on_rows: Callable[[], None] = lambda: None,
        **told: Any,
    ) -> None:
        self.machine = machine
        self.store = store
        self._root = root
        self._told = told
        self._on_rows = on_rows
        will = machine.will()
        last = None if will is None else Will(f"{root}/{will.topic}", will.payload, retain=will.retain)
        self._bus = connect(will=last, on_state=self._link_changed)
        self._subscription: Subscription | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="federated")
        self._news = asyncio.Event()
        self._inbox: deque[Delivery] = deque()
        self._space = asyncio.Event()
        self._calls: deque[Callable[[int], Answer]] = deque()
        self._work: tuple[str, asyncio.Future[Any]] | None = None
        self._opened = False
        self._relinked = False
        self._last = ""
        self._outgoing: list[Publication] = []
        self._ahead = 0
        self._to_send = asyncio.Event()
        self._receipts: set[Receipt] = set()
        self._quiet = asyncio.Event()
        self._complained: set[str] = set()
        self.over = False

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and subscribe; :meth:`run` starts the machine.

        :raises BusError: the broker refuses us, or is away for longer than the bus is patient.
        """
        await self._bus.open()
        filters = [f"{self._root}/{topic}" for topic in self.machine.filters()]
        self._subscription = await self._bus.subscribe(filters, qos=1, capacity=RECEIVE)
        self._opened = True

    async def run(self) -> None:
        """Until the machine is over.

        :raises RunError: the machine failed, which it must not.
        """
        helpers = [asyncio.create_task(self._receive()), asyncio.create_task(self._send())]
        drive = asyncio.create_task(self._drive())
        try:
            done, _ = await asyncio.wait({drive, *helpers}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self.over:
                await self._flushed()
        finally:
            for task in (drive, *helpers):
                task.cancel()
            await asyncio.gather(drive, *helpers, return_exceptions=True)

    async def close(self) -> None:
        """Say that we are gone, as our will would, and leave."""
        will = self.machine.will()
        if self._opened and will is not None and self._bus.connected:
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(_FAREWELL):
                    await (await self._bus.publish([self._publication(will)]))
        await self._bus.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def tell(self, call: Callable[[int], Answer]) -> None:
        """Have the machine asked something of its own (``fed``), with the time, when its turn comes."""
        self._calls.append(call)
        self._news.set()

    async def apart(self, act: Callable[[], T]) -> T:
        """Do something in the machine's thread, after the work that is under way."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    # -- in ------------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        if (subscription := self._subscription) is None:
            raise RunError("the party is not open")
        while True:
            try:
                self._inbox.extend(await subscription.receive())
            except ClosedError:
                return await asyncio.Future()
            self._news.set()
            while len(self._inbox) >= AT_ONCE:
                self._space.clear()
                await self._space.wait()

    def _link_changed(self, state: str, reason: str) -> None:
        if state == "connected":
            self._last = ""
            if self._opened:
                self._relinked = True
                self._news.set()
            return
        if reason != self._last:  # said once, however often it is tried again
            self._last = reason
            log.warning(state, reason=reason, **self._told)

    def _worked(self, _: asyncio.Future[Any]) -> None:
        self._news.set()

    # -- the machine -----------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        machine = self.machine
        answer = self._ask(machine.start, self.store.kept(), time.time_ns())
        await self._do([answer], [], hard=True)
        while not self.over:
            await self._until_news()
            now = time.time_ns()
            if self._relinked:
                self._relinked = False
                await self._do([self._ask(machine.linked, now)], [])
            if (work := self._work) is not None and work[1].done():
                await self._do([self._finished(*work, now)], [])
            while self._calls:
                await self._do([self._ask(self._calls.popleft(), now)], [])
            if self._ready:
                await self._hear(now)
            if self._due(now):
                await self._do([self._ask(machine.tick, now)], [])

    def _due(self, now: int) -> bool:
        wake = None if self.over else self.machine.wake()
        return wake is not None and wake <= now

    @property
    def _ready(self) -> bool:
        """Whether something has arrived and may be taken."""
        return bool(self._inbox) and self._ahead < AHEAD

    async def _until_news(self) -> None:
        """Wait until something happens, or it is time for a tick."""
        if self._ready:
            await asyncio.sleep(0)
            return
        wake = self.machine.wake()
        wait = None if wake is None else max(_SHORTEST_WAIT, min((wake - time.time_ns()) / 1e9, _LONGEST_WAIT))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._news.wait()
        self._news.clear()

    async def _hear(self, now: int) -> None:
        """Give the machine what has arrived, and commit once for all of it."""
        answers: list[Answer] = []
        heard: list[Delivery] = []
        start = len(self._root) + 1
        while self._inbox and len(heard) < AT_ONCE:
            delivery = self._inbox.popleft()
            heard.append(delivery)
            topic = delivery.topic[start:]
            answer = self._ask(self.machine.heard, topic, _bytes(delivery.payload), now)
            answers.append(answer)
            if answer.over:
                break
        self._space.set()
        await self._do(answers, heard)

    def _finished(self, name: str, work: asyncio.Future[Any], now: int) -> Answer:
        self._work = None
        error = work.exception()
        if error is not None:
            log.debug("work failed", work=name, reason=f"{type(error).__name__}: {error}", **self._told)
        return self._ask(self.machine.worked, name, error or work.result(), now)

    def _ask(self, method: Callable[..., Answer], *arguments: Any) -> Answer:
        try:
            return method(*arguments)
        except Exception as error:  # a fault of ours: said in one line, and the node ends
            log.debug("traceback", text=traceback.format_exc(), **self._told)
            said = f"{type(error).__name__}: {error}"
            raise RunError(
                f"{type(self.machine).__name__}.{getattr(method, '__name__', method)} failed: {said}"
            ) from error

    async def _do(self, answers: Sequence[Answer], heard: Sequence[Delivery], *, hard: bool = False) -> None:
        """Commit, acknowledge, publish, begin to compute: in this order."""
        values: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        for answer in answers:
            values.update(answer.commit)
            rows += [{"time": time.time_ns(), **row} for row in answer.rows]
        if values or rows or hard:
            await self._commit(values, rows, hard=hard)
        if heard and self._subscription is not None:
            self._subscription.acknowledge(heard)
        if rows:
            self._on_rows()
        for answer in answers:
            for say in answer.say:
                publication = self._publication(say)
                self._outgoing.append(publication)
                self._ahead += len(publication.payload)
            if answer.work is not None:
                self._begin(answer.work)
            for text in answer.tell:
                log.warning(text, **self._told)
            self.over = self.over or answer.over
        if self._outgoing:
            self._to_send.set()

    async def _commit(self, values: dict[str, Any], rows: Sequence[dict[str, Any]], *, hard: bool) -> None:
        while True:
            try:
                return self.store.commit(values, rows, hard=hard)
            except sqlite3.OperationalError as error:
                log.error("cannot commit, waiting", reason=str(error), **self._told)
                await asyncio.sleep(_RETRY_COMMIT)

    def _begin(self, work: Work) -> None:
        if self._work is not None:
            raise RunError(f"{type(self.machine).__name__} wants {work.name!r} while {self._work[0]!r} is under way")
        future = asyncio.get_running_loop().run_in_executor(self._thread, work.act)
        future.add_done_callback(self._worked)
        self._work = work.name, future

    # -- out -----------------------------------------------------------------------------------------------------

    def _publication(self, say: Say) -> Publication:
        return Publication(f"{self._root}/{say.topic}", say.payload, 1, say.retain, say.expiry)

    async def _send(self) -> None:
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
            self._ahead -= sum(len(publication.payload) for publication in batch)
            self._news.set()

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

    async def _flushed(self) -> None:
        """Wait until the broker has all that was said, though not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                while self._ahead or self._outgoing or self._receipts:
                    self._quiet.clear()
                    self._news.clear()
                    if self._receipts:
                        await self._quiet.wait()
                    else:
                        await self._news.wait()


def _bytes(payload: Any) -> bytes:
    return payload if isinstance(payload, bytes) else bytes(payload)
