"""What one step is: for an operator, for a source, for a sink. See :mod:`nodes.runtime` for what surrounds it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import groupby
from pathlib import Path
from random import uniform
from typing import Any

from nodes import log, tuning
from nodes.assignment import NodeSpec
from nodes.edge import Edge, Item
from nodes.operator import Chunk, Emit, Operator, Sink, Source
from nodes.prompt import Prompt
from nodes.runtime import Runtime
from nodes.step import Links, Step
from schemas.errors import RejectedError, SinkAwayError
from schemas.messages import Message, rows_of, tensor_bytes

_MOST_DRAFTS = 256
"""Messages drawn from a source ahead of what is sent."""
_STAGED = 2 * 1024 * 1024
"""Bytes of big tensors that a source gives on at once: the memory of the first is used again for the next while it is in the
processor's cache, and nothing waits behind what is not even written."""
_BIG = 64 * 1024
"""Bytes of a message from which that is looked at."""
_BACKOFF = (0.2, 30.0)
"""Seconds to wait at first and at most before a sink that is away is tried again."""


class OperatorRuntime(Runtime):
    """Feeds an :class:`~nodes.operator.Operator`."""

    def __init__(self, topology: str, spec: NodeSpec, state: Path, links: Links, operator: Operator) -> None:
        super().__init__(topology, spec, state, links)
        self.operator = operator
        self._thread: ThreadPoolExecutor | None = None
        self._marked = False
        self._told: set[str] = set()
        self._times: dict[str, int] = {}
        self._single = spec.inputs[0].name if len(spec.inputs) == 1 else None
        self._wake: int | None = None  # when the operator wants a tick, as far as our task knows

    async def open(self) -> None:
        self.operator.open()
        self.stateful = self.spec.durable or self.operator.snapshot() is not None
        if self.operator.blocking:
            calls = self.operator.calls if self.operator.overlaps else 1
            self._thread = ThreadPoolExecutor(calls, thread_name_prefix=self.name)
            tuning.for_threads()
        self.passing = not self.operator.absorbs and self.spec.kind not in {"custom", "join"}
        self._marked = any(edge.marked for edge in self.spec.inputs) and not self.operator.absorbs

    async def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self.operator.close()

    async def beside(self) -> None:
        await self.operator.beside()

    async def resume(self) -> None:
        if (state := self.journal.get("state")) is not None:
            self.operator.restore(state)

    def snapshot(self, values: dict[str, Any]) -> None:
        if self.stateful and (state := self.operator.snapshot()) is not None:
            values["state"] = state

    async def work(self) -> None:
        operator = self.operator
        if self._thread is not None and operator.overlaps and not self.stateful:
            await self._work_ahead()
        prompt = Prompt(self.inputs, self._prompt_step)
        if self._thread is None and not operator.linger:
            self.inputs.prompt = prompt
        try:
            while not self.inputs.ended:
                if self._stopping.is_set() and not self.inputs.queued:
                    return
                await self.outputs.room()
                wake = self._wake = operator.wake()
                deadline = None if wake is None else time.monotonic() + max(0, wake - time.time_ns()) / 1e9
                items = await self.inputs.take(min(operator.max_batch, self.outputs.at_once), operator.linger, deadline)
                if prompt.left:
                    await prompt.finish()
                if not self.outputs.open:
                    await self.outputs.room()
                await self._step(items)
                items.clear()  # it may be all that keeps a lease of shared memory while we wait for more
                if wake is not None and (now := time.time_ns()) >= wake:
                    async with self._whole():
                        emit, held = Emit(), operator.held()
                        operator.tick(now, emit)
                        await self._answer(emit, held)
        finally:
            self.inputs.prompt = None
            prompt.close()
        if not self.journal.get("finished"):
            async with self._whole():
                emit, held = Emit(), operator.held()
                operator.finish(emit)
                self._book(self._final, 0, emit, held)
                await self._finish(emit)
        else:
            async with self._whole():
                await self._end_again()

    async def _step(self, items: list[Item]) -> None:
        if not self.stateful and self._single is not None:  # what follows, for most nodes that there are
            if items:
                await self._process(self._single, items)
            return
        async with self._whole():
            await self._process_all(items)
            await self._tell_ends()

    def _prompt_step(self) -> Coroutine[Any, Any, None] | None:
        """The step for what was just handed over, while our task waits for it. The task itself sees to the ends and to ticks."""
        if self._stopping.is_set() or not self.outputs.open:
            return None
        return self._step_promptly()

    async def _step_promptly(self) -> None:
        operator, inputs = self.operator, self.inputs
        most = min(operator.max_batch, self.outputs.at_once)
        items = inputs.take_now(most)
        if items:
            await self._step(items)
        wake = operator.wake()
        if len(items) == most or inputs.ended or (wake is not None and (self._wake is None or wake < self._wake)):
            inputs.wake()

    async def _process_all(self, items: list[Item]) -> None:
        for edge, run in _by_edge(items, one=len(self.inputs.edges) == 1):
            await self._process(edge, run)

    async def _work_ahead(self) -> None:
        """The loop of :meth:`work` where the operator's calls may overlap with everything else.

        While a thread is at one call, the answers of the one before are delivered and the next is taken and waits for it.
        """
        under_way: deque[asyncio.Task[None]] = deque()
        try:
            async with asyncio.TaskGroup() as deliveries:
                while not self.inputs.ended and not (self._stopping.is_set() and not self.inputs.queued):
                    await self.outputs.room()
                    most = min(self.operator.max_batch, self.outputs.at_once)
                    await self._begin(await self.inputs.take(most, self.operator.linger, None), under_way, deliveries)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _begin(
        self, items: list[Item], under_way: deque[asyncio.Task[None]], deliveries: asyncio.TaskGroup
    ) -> None:
        """Calls of :meth:`_work_ahead` for these; nothing of them is kept here while it waits for more."""
        for edge, run in _by_edge(items, one=len(self.inputs.edges) == 1):
            if len(under_way) > self.operator.calls:
                await under_way.popleft()
            step, emit, began = Step(), Emit(), time.time_ns()
            messages = self._admit(run, step)
            call = self._submit(messages, edge, emit) if messages else None
            last = under_way[-1] if under_way else None
            under_way.append(deliveries.create_task(self._end_call(last, call, edge, run, messages, step, emit, began)))

    async def _end_call(
        self,
        after: asyncio.Task[None] | None,
        call: asyncio.Future[None] | None,
        edge: str,
        items: list[Item],
        messages: list[Message],
        step: Step,
        emit: Emit,
        began: int,
    ) -> None:
        """Deliver what a call of :meth:`_work_ahead` answers, when that of the call before is delivered."""
        if call is not None:
            try:
                await call
            except Exception as error:  # noqa: BLE001 - as in _process
                emit = await self._one_by_one(messages, edge, error)
        if after is not None:
            await after
        await self._conclude(edge, items, messages, step, emit, 0, began)

    async def _process(self, edge: str, items: list[Item]) -> None:
        step, held, began = Step(), self.operator.held(), time.time_ns()
        messages = self._admit(items, step)
        emit = Emit()
        if messages:
            try:
                await self._call(messages, edge, emit)
            except Exception as error:  # noqa: BLE001 - no message kills a node, whatever the user's code raises
                emit = await self._one_by_one(messages, edge, error)
        await self._conclude(edge, items, messages, step, emit, held, began)

    async def _conclude(
        self, edge: str, items: list[Item], messages: list[Message], step: Step, emit: Emit, held: int, began: int
    ) -> None:
        """Book and deliver what a call has answered."""
        if messages:
            self._measure(items, began, time.time_ns())
            if self._marked:
                emit.sent = [(port, mark(message, edge)) for port, message in emit.sent]
            for message, reason, detail in emit.dead:
                self._bury(message, reason, detail, edge)
        for time_ in step.progress.values():
            self._times[edge] = max(self._times.get(edge, time_), self.operator.advance(edge, time_, emit))
            if len(self._times) == len(self.inputs.edges):
                step.advanced = min(self._times.values())
        self._book(step, rows_of(messages), emit, held)
        await self._deliver(step, emit)

    async def _call(self, messages: list[Message], edge: str, emit: Emit) -> None:
        if self._thread is None:
            self.operator.process(messages, edge, emit)
        else:
            await self._submit(messages, edge, emit)

    def _submit(self, messages: list[Message], edge: str, emit: Emit) -> asyncio.Future[None]:
        """Give a call to a thread; they begin in order."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, self.operator.process, messages, edge, emit)

    async def _one_by_one(self, messages: list[Message], edge: str, error: Exception) -> Emit:
        """The call with all of them failed: find those that fail, and answer the others."""
        whole = Emit()
        for message in messages:
            emit = Emit()
            try:
                if len(messages) == 1:
                    raise error
                await self._call([message], edge, emit)
            except Exception as cause:  # noqa: BLE001 - as above
                emit = Emit()
                emit.reject(message, "failed", f"{type(cause).__name__}: {cause}")
            whole.sent += emit.sent
            whole.dead += emit.dead
            whole.filtered += emit.filtered
            whole.absorbed += emit.absorbed
            for reason, rows in emit.dropped.items():
                whole.drop(reason, rows)
        return whole

    async def _tell_ends(self) -> None:
        """Tell the operator of streams that ended while others go on."""
        if len(self.inputs.edges) == 1:
            return
        for edge in self.inputs.edges.values():
            if edge.ended and edge.name not in self._told and not self.inputs.ended:
                self._told.add(edge.name)
                emit, held = Emit(), self.operator.held()
                self.operator.ended(edge.name, emit)
                await self._answer(emit, held)

    async def _answer(self, emit: Emit, held: int) -> None:
        """Deliver what an operator says without having been given messages."""
        if emit.sent or emit.dropped or emit.filtered or emit.absorbed:
            step = Step()
            self._book(step, 0, emit, held)
            await self._deliver(step, emit)

    def _book(self, step: Step, rows: int, emit: Emit, held: int) -> None:
        entry, dead = step.entry, 0
        entry.filtered += emit.filtered
        for reason, count in emit.dropped.items():
            entry.drop(reason, count)
        for message, reason, _ in emit.dead:
            entry.bury(reason, message.rows)
            dead += message.rows
        if self.operator.absorbs:
            entry.passed += emit.absorbed
        else:
            left = rows - emit.filtered - sum(emit.dropped.values()) - dead
            entry.passed += left - (self.operator.held() - held)


def _edges(items: list[Item]) -> dict[int, Edge]:
    """The edge of each message, by its ``id()``."""
    return {id(item.message): item.edge for item in items}


def _by_edge(items: list[Item], *, one: bool) -> Iterator[tuple[str, list[Item]]]:
    """Runs of items that came by one edge; ``one``: the node has no other."""
    if one:
        if items:
            yield items[0].edge.name, items
        return
    for edge, run in groupby(items, key=lambda item: item.edge.name):
        yield edge, list(run)


def mark(message: Message, edge: str) -> Message:
    """The same message with the edge in its identity: two inputs may both bring one origin's identities."""
    ident = f"{message.id}@{edge.removesuffix('.out')}"
    return Message(ident, message.source, message.time, message.body, message.trace, message.born)


class SourceRuntime(Runtime):
    """Draws from a :class:`~nodes.operator.Source`."""

    def __init__(self, topology: str, spec: NodeSpec, state: Path, links: Links, source: Source) -> None:
        super().__init__(topology, spec, state, links)
        self.source = source
        self.pace.hurried = source.awaits or any(port.safe for port in spec.outputs)
        self._stream = ""
        self._count = 0
        self._chunks: list[Chunk] = []
        self._drafts = 0
        self._have = asyncio.Event()
        self._space = asyncio.Event()

    async def open(self) -> None:
        """Opened where it stood, in :meth:`resume`."""
        self.stateful = self.spec.durable

    async def resume(self) -> None:
        position, self._count = self.journal.get("position") or (None, 0)
        if position is not None:
            log.info("continuing", node=self.name, position=str(position)[:80])
        self._stream = await self.source.open(position) or f"{time.time_ns() // 1_000_000:x}"

    async def close(self) -> None:
        await self.source.close()

    async def settled(self, position: Any) -> None:
        await self.source.settled(position[0])

    async def work(self) -> None:
        if self.journal.get("finished"):
            async with self._whole():
                await self._end_again()
            return
        pump = asyncio.create_task(self._pump())
        ending = asyncio.create_task(self._ending.wait())
        ending.add_done_callback(lambda _: self._have.set())
        try:
            while not self._ending.is_set():
                if chunks := self._take_chunks():
                    await self.outputs.room()
                    async with self._whole():
                        await self._send_on(chunks)
                elif pump.done():
                    break
                else:
                    self._have.clear()
                    await self._have.wait()
        finally:
            pump.cancel()
            ending.cancel()
            await asyncio.gather(pump, ending, return_exceptions=True)
        if pump.done() and not pump.cancelled() and (error := pump.exception()) is not None:
            raise error
        if not self._stopping.is_set():
            async with self._whole():
                await self._finish(Emit())

    async def _pump(self) -> None:
        """Draw chunks. What the source has ready is gathered; as soon as it waits, what there is goes on."""
        try:
            async with aclosing(_closable(self.source)) as chunks:
                async for chunk in chunks:
                    self._chunks.append(chunk)
                    self._drafts += len(chunk.drafts)
                    self._have.set()
                    if self._drafts >= min(_MOST_DRAFTS, self.outputs.at_once):
                        self._space.clear()
                        await self._space.wait()
        finally:
            self._have.set()

    def _take_chunks(self) -> list[Chunk]:
        chunks, self._chunks, self._drafts = self._chunks, [], 0
        self._space.set()
        return chunks

    async def _send_on(self, chunks: Sequence[Chunk]) -> None:
        step, emit, now = Step(), Emit(), time.time_ns()
        prefix = f"{self.name}:{self._stream}:"
        for chunk in chunks:
            for draft in chunk.drafts:
                if draft.key is None:
                    self._count += 1
                ident = f"{prefix}{self._count if draft.key is None else draft.key}"
                emit.send(Message(ident, draft.source, draft.time, draft.body, None, now))
            for reason, rows in chunk.dropped.items():
                step.entry.drop(reason, rows)
            for payload, reason, detail, where in chunk.dead:
                step.entry.bury(reason, 1)
                self.signs.deaths.append(self.signs.letter(reason, detail, "", where, payload))
        most = self.outputs.at_once
        if emit.sent and self.outputs.encodes and (size := tensor_bytes(emit.sent[0][1].body)) >= _BIG:
            most = min(most, max(1, _STAGED // size))
        while len(emit.sent) > most:  # the position is that after all of them
            some = Emit()
            some.sent, emit.sent = emit.sent[:most], emit.sent[most:]
            await self._deliver(Step(), some)
            await self.outputs.room()
        step.position = (chunks[-1].position, self._count)
        await self._deliver(step, emit)


async def _closable(source: Source) -> AsyncGenerator[Chunk, None]:
    async for chunk in source.chunks():
        yield chunk


class SinkRuntime(Runtime):
    """Feeds a :class:`~nodes.operator.Sink`."""

    def __init__(self, topology: str, spec: NodeSpec, state: Path, links: Links, sink: Sink) -> None:
        super().__init__(topology, spec, state, links)
        self.sink = sink
        self._marked = any(edge.marked for edge in spec.inputs)
        self._given_up = False

    async def open(self) -> None:
        """Opened patiently, in :meth:`resume`."""

    async def resume(self) -> None:
        await self._patiently(self.sink.open)

    async def close(self) -> None:
        await self.sink.close()

    async def beside(self) -> None:
        await self.sink.beside()

    async def work(self) -> None:
        prompt = Prompt(self.inputs, self._prompt_step)
        if self.sink.prompt and not self.sink.linger:
            self.inputs.prompt = prompt
        try:
            while not self.inputs.ended:
                if self._stopping.is_set() and not self.inputs.queued:
                    return
                items = await self.inputs.take(self.sink.max_batch, self.sink.linger, None)
                if prompt.left:
                    await prompt.finish()
                if self._given_up or (items and not await self._write(items)):
                    return
                items.clear()  # as for an operator
        finally:
            self.inputs.prompt = None
            prompt.close()
        if not self.journal.get("finished") and await self._until_finished():
            await self._finish(Emit())

    def _prompt_step(self) -> Coroutine[Any, Any, None] | None:
        """As an operator's."""
        return None if self._stopping.is_set() else self._write_promptly()

    async def _write_promptly(self) -> None:
        most, inputs = self.sink.max_batch, self.inputs
        items = inputs.take_now(most)
        if items and not await self._write(items):
            self._given_up = True
        if len(items) == most or inputs.ended or self._given_up:
            inputs.wake()

    async def _until_finished(self) -> bool:
        """Wait for what the sink does beside writing, or until the run is ended; False: we were stopped meanwhile."""
        finishing = asyncio.create_task(self.sink.finish())
        told = asyncio.create_task(self._ending.wait())  # set by both
        try:
            await asyncio.wait({finishing, told}, return_when=asyncio.FIRST_COMPLETED)
            if finishing.done():
                finishing.result()
                return True
            return not self._stopping.is_set()
        finally:
            for task in (finishing, told):
                task.cancel()
            await asyncio.gather(finishing, told, return_exceptions=True)

    async def _write(self, items: list[Item]) -> bool:
        step, began = Step(), time.time_ns()
        given = messages = self._admit(items, step)
        if self._marked:  # an edge is looked up only where it matters: this is done for every batch
            edges = _edges(items)
            messages = [mark(m, edge.name) if (edge := edges[id(m)]).spec.marked else m for m in given]
        if messages:
            rejected = await self._write_out(messages)
            if rejected is None:
                return False
            edges = _edges(items) if rejected else {}
            for index, reason in rejected:
                step.entry.bury("rejected", messages[index].rows)
                self._bury(given[index], "rejected", reason, edges[id(given[index])].name)
            step.entry.passed += rows_of(messages) - sum(step.entry.dead.values())
            self._measure(items, began, time.time_ns())
        await self._deliver(step, Emit())
        return True

    async def _write_out(self, messages: Sequence[Message]) -> Sequence[tuple[int, str]] | None:
        """Write them, however long that takes; (index, reason) of those that are refused. None: we were stopped meanwhile."""
        try:
            return () if await self._patiently(lambda: self.sink.write(messages)) else None
        except RejectedError as error:
            return error.rejected

    async def _patiently(self, act: Any) -> bool:
        """Do it until the far end lets us; False when we were stopped meanwhile (nothing is acknowledged then)."""
        wait, most = _BACKOFF
        while True:
            try:
                await act()
                return True
            except SinkAwayError as error:
                pause = error.retry_after if error.retry_after is not None else uniform(wait / 2, wait)  # noqa: S311
                log.warning("sink is away", node=self.name, reason=str(error), again_in=f"{pause:.1f}s")
            stopped = asyncio.ensure_future(self._stopping.wait())
            try:
                # not asyncio.timeout: it asks for the task, and we may be begun by another's (nodes.prompt)
                done, _ = await asyncio.wait({stopped}, timeout=pause)
            finally:
                stopped.cancel()
            if done:
                return False
            wait = min(wait * 2, most)
