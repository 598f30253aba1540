"""What carries one machine of a federated job: a bus, a store, a thread and the clock.

One task asks the machine, one event after the other: what arrived, what a thread computed, the link that is there again,
the time. Each answer is committed before anything of it is published, and published before anything of it is computed;
deliveries are acknowledged after the commit. Each bus has a :class:`nodes.federated.line.Line`, and tasks of its own.
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
from typing import Any, TypeVar

from broker.bus import Delivery
from nodes import log
from nodes.federated.line import AT_ONCE, Connect, Line, Way
from nodes.federated.machine import Answer, Machine, Say, Work
from nodes.federated.store import Store
from schemas.errors import RunError

T = TypeVar("T")

_RETRY_COMMIT = 1.0
_LONGEST_WAIT = 1.0
"""Seconds after which the time of day is looked at again, should it have been moved."""
_SHORTEST_WAIT = 0.001


class Party:
    """Carries ``machine`` from :meth:`open` until it is over.

    :param root: topics of the job begin so: ``<topology>/fed/<job>``.
    :param told: what the log says beside the reason: the node, the job.
    :param on_rows: called after each commit that added rows to the store.
    :param ways: further buses of the machine; that they are away holds up nothing.
    """

    def __init__(
        self,
        machine: Machine,
        store: Store,
        connect: Connect,
        root: str,
        *,
        on_rows: Callable[[], None] = lambda: None,
        ways: Sequence[Way] = (),
        **told: Any,
    ) -> None:
        self.machine = machine
        self.store = store
        self._told = told
        self._on_rows = on_rows
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="federated")
        self._news = asyncio.Event()
        self._calls: deque[Callable[[int], Answer]] = deque()
        self._work: tuple[str, asyncio.Future[Any]] | None = None
        self.over = False
        self._lines = [self._line(way) for way in (*ways, Way("", connect, root, machine.linked))]

    def _line(self, way: Way) -> Line:
        will = self.machine.will()
        mine = None if will is None or not will.topic.startswith(way.prefix) else _without(way.prefix, will)
        return Line(way, mine, self._news.set, {**self._told, **({"at": way.root} if way.prefix else {})})

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and subscribe; :meth:`run` starts the machine.

        :raises BusError: the broker refuses us, or is away for longer than the bus is patient.
        """
        await self._open(self._lines[-1])

    async def _open(self, line: Line) -> None:
        found = [topic for topic in self.machine.filters() if self._line_of(topic) is line]
        await line.open([topic.removeprefix(line.way.prefix) for topic in found])

    def _line_of(self, topic: str) -> Line:
        return next(line for line in self._lines if topic.startswith(line.way.prefix))

    async def run(self) -> None:
        """Until the machine is over.

        :raises RunError: the machine failed, which it must not.
        """
        helpers = [asyncio.create_task(self._attend(line)) for line in self._lines]
        drive = asyncio.create_task(self._drive())
        try:
            done, _ = await asyncio.wait({drive, *helpers}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self.over:
                await asyncio.gather(*(line.flushed() for line in self._lines if line.opened))
        finally:
            for task in (drive, *helpers):
                task.cancel()
            await asyncio.gather(drive, *helpers, return_exceptions=True)

    async def _attend(self, line: Line) -> None:
        if not line.opened:
            await self._open(line)
        helpers = [asyncio.create_task(line.receive()), asyncio.create_task(line.send())]
        try:
            await asyncio.gather(*helpers)
        finally:
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    async def close(self) -> None:
        """Say that we are gone, as our will would, and leave."""
        for line in self._lines:
            await line.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def tell(self, call: Callable[[int], Answer]) -> None:
        """Have the machine asked something of its own (``fed``), with the time, when its turn comes."""
        self._calls.append(call)
        self._news.set()

    async def apart(self, act: Callable[[], T]) -> T:
        """Do something in the machine's thread, after the work that is under way."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    def _worked(self, _: asyncio.Future[Any]) -> None:
        self._news.set()

    # -- the machine -----------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        machine = self.machine
        answer = self._ask(machine.start, self.store.kept(), time.time_ns())
        await self._do([answer], hard=True)
        while not self.over:
            await self._until_news()
            now = time.time_ns()
            for line in self._lines:
                if line.relinked:
                    line.relinked = False
                    await self._do([self._ask(line.way.linked, now)])
            if (work := self._work) is not None and work[1].done():
                await self._do([self._finished(*work, now)])
            while self._calls:
                await self._do([self._ask(self._calls.popleft(), now)])
            for line in self._lines:
                if self._may_hear(line):
                    await self._hear(line, now)
            if self._due(now):
                await self._do([self._ask(machine.tick, now)])

    def _due(self, now: int) -> bool:
        wake = None if self.over else self.machine.wake()
        return wake is not None and wake <= now

    def _may_hear(self, line: Line) -> bool:
        """Whether something has arrived and may be taken."""
        return bool(line.inbox) and not self.over and not any(each.full for each in self._lines)

    async def _until_news(self) -> None:
        """Wait until something happens, or it is time for a tick."""
        if any(self._may_hear(line) for line in self._lines):
            await asyncio.sleep(0)
            return
        wake = self.machine.wake()
        wait = None if wake is None else max(_SHORTEST_WAIT, min((wake - time.time_ns()) / 1e9, _LONGEST_WAIT))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._news.wait()
        self._news.clear()

    async def _hear(self, line: Line, now: int) -> None:
        """Give the machine what has arrived, and commit once for all of it."""
        answers: list[Answer] = []
        heard: list[Delivery] = []
        while line.inbox and len(heard) < AT_ONCE:
            delivery = line.inbox.popleft()
            heard.append(delivery)
            answer = self._ask(self.machine.heard, *line.take(delivery), now)
            answers.append(answer)
            if answer.over:
                break
        await self._do(answers)
        line.acknowledge(heard)

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

    async def _do(self, answers: Sequence[Answer], *, hard: bool = False) -> None:
        """Commit, publish, begin to compute: in this order."""
        values: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        for answer in answers:
            values.update(answer.commit)
            rows += [{"time": time.time_ns(), **row} for row in answer.rows]
            hard = hard or answer.hard
        if values or rows or hard:
            await self._commit(values, rows, hard=hard)
        if rows:
            self._on_rows()
        for answer in answers:
            for say in answer.say:
                line = self._line_of(say.topic)
                line.say(_without(line.way.prefix, say))
            if answer.work is not None:
                self._begin(answer.work)
            for text in answer.tell:
                log.warning(text, **self._told)
            self.over = self.over or answer.over

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


def _without(prefix: str, say: Say) -> Say:
    return Say(say.topic.removeprefix(prefix), say.payload, say.retain, say.expiry) if prefix else say
