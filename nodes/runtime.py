"""The runtime of one node: feeds its operator, source or sink, and keeps the promises of the edges.

One step is: take what has arrived, give it to the operator in one call, number and send the answers; when all of them are
done at their consumers, book the step, commit, and acknowledge what it came from. An operator with state does the commit
first, state and answers in one transaction, and acknowledges then. What happens in which order is told in
``docs/architecture.md``.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

from broker.bus import Receipt
from nodes import log
from nodes.assignment import NodeSpec
from nodes.edge import FOREIGN, MOST_REPLICAS, REPLAYED, Drops, Item
from nodes.inputs import Inputs
from nodes.journal import Journal, packed
from nodes.lanes import TAKEOVER
from nodes.ledger import Books, Entry
from nodes.operator import Emit
from nodes.outputs import Outputs
from nodes.pace import Pace
from nodes.signs import Signs
from nodes.step import Links, Step, Work
from schemas import codec
from schemas.errors import BusError, PayloadError, RunError
from schemas.messages import End, Message, Progress, rows_of

BOOKS_EVERY = 1.0
"""Seconds between publications of the books."""
_MOST_STEPS = 4096
"""Steps that may wait for their answers to be done."""
_RETRY_COMMIT = 1.0
_CONTROL: frozenset[type] = frozenset((End, Progress))
_FENCE = TAKEOVER - 1.0
"""Seconds without a link after which a replica begins anew."""


class FencedError(RunError):
    """A replica was away for so long that others may have taken its part over; its supervisor starts it again."""


class Runtime(ABC):
    """What all nodes have in common. Subclasses say what one step is.

    :param state: folder of the run's state.
    """

    stateful = False
    passing = False

    def __init__(self, topology: str, spec: NodeSpec, state: Path, links: Links) -> None:
        self.topology = topology
        self.spec = spec
        self.name = spec.name
        self.books = Books(spec.name)
        self._state = state
        self._bus = links.bus
        self._intake = links.intake
        self._local = links.local
        self._stopping = asyncio.Event()
        self._ending = asyncio.Event()
        self._moved = asyncio.Event()
        self._steps: deque[Step] = deque()
        self._few_steps = asyncio.Event()
        self._done: list[Step] = []
        self.pace = Pace(hurried=not spec.inputs or any(edge.safe for edge in spec.inputs))
        self._final = Step()
        self._sent: dict[str, int] = {}
        self._idle = asyncio.Event()
        self._live: dict[str, tuple[int, int]] = {}
        self._buried: Entry = Entry()
        self._refused = False
        self.signs = Signs(topology, spec, links.bus, links.report, state)
        self._ready = False
        self._left: set[str] = set()
        self._greeting: asyncio.Task[None] | None = None
        self._complete = False
        self._finished = False
        self._committing = False
        self._steady = asyncio.Lock()
        self._marks: dict[str, int] = {}
        self._cut_at: float | None = None
        self._fenced: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    # -- life ----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def open(self) -> None:
        """Open the operator, source or sink; sets :attr:`stateful` before the journal is opened."""

    @abstractmethod
    async def work(self) -> None:
        """Do the node's work until the data end or we are to stop."""

    async def close(self) -> None:
        """Close the operator, source or sink."""

    async def prepare(self) -> None:
        """Open everything and subscribe, so that nothing that is sent from now on is missed."""
        self.signs.say("starting")
        await self.open()
        self.journal = Journal(self._state / f"{self.name}.journal", durable=self.stateful)
        if (books := self.journal.get("books")) is not None:
            self.books.restore(books)
            self._live = dict(self.books.total.received)
            self._sent = {port: messages for port, (messages, _) in self.books.total.emitted.items()}
        epochs: list[int] = self.journal.get("epochs") or []
        if not epochs or not self.stateful:
            newest = max(time.time_ns() // MOST_REPLICAS, (epochs[-1] if epochs else 0) // MOST_REPLICAS + 1)
            epochs = [*epochs[-15:], newest * MOST_REPLICAS + self.spec.replica]
            self.journal.commit(packed({"epochs": epochs}))
        if self._bus is not None:
            await self._bus.open()
        if self._intake is not None:
            await self._intake.open()
        self.outputs = Outputs(
            self.topology,
            self.spec,
            bus=self._bus,
            local=self._local,
            journal=self.journal,
            epoch=epochs[-1],
            earlier=epochs[:-1],
            durable=self.stateful,
            progress=self._progress,
        )
        self.inputs = Inputs(
            self.topology,
            self.name,
            self.spec.inputs,
            control=self._bus,
            data=self._intake or self._bus,
            local=self._local,
            journal=self.journal,
            undecodable=self._undecodable,
            rooted=self.stateful,
        )
        self._marks = self.journal.get("marks") or {}
        for name in self.journal.get("ended") or ():
            self.inputs.streams[name].ended = True
        await self.resume()
        await self.inputs.start()
        await self.outputs.start()
        await self.signs.show_state("ready")
        self._ready = True
        for consumer in self._left:
            self.outputs.left(consumer)
        self.signs.say("ready")

    async def beside(self) -> None:
        """What else is done as long as the node works."""

    async def resume(self) -> None:
        """Give the operator its committed state back; open a source where it stood."""

    async def run(self) -> None:
        """Work until done; then leave. Whatever fails here fails the node."""
        helpers = [
            self.outputs.listen(),
            self.outputs.watch(),
            self.outputs.resend(),
            self.inputs.receive_again(),
            self.inputs.watch(),
            self.inputs.heartbeat(),
            self._commits(),
            self._publish_books(),
            self._fence(),
            *(self.inputs.receive(edge) for edge in self.inputs.edges.values() if edge.remote),
            *(self.inputs.receive_public(edge) for edge in self.inputs.edges.values()),
            self.beside(),
        ]
        work = asyncio.create_task(self._work(), name=f"{self.name}: work")
        tasks = [asyncio.create_task(helper, name=f"{self.name}: helper") for helper in helpers]
        try:
            pending: set[asyncio.Task[None]] = {work, *tasks}
            while work in pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (work, *tasks):
                task.cancel()
            await asyncio.gather(work, *tasks, return_exceptions=True)
            await self.close()
        await self._leave()

    def stop(self) -> None:
        """Take no new input; leave when everything taken is done, keeping the state."""
        self._stopping.set()
        self._ending.set()
        self._idle.set()
        self._hurry()
        if self._ready:
            self.inputs.wake()

    def left(self, consumer: str) -> None:
        """A consumer of ours has ended and left."""
        self._left.add(consumer)
        if self._ready:
            self.outputs.left(consumer)

    def end(self) -> None:
        """For a source: as if the data had ended here."""
        self._ending.set()

    def disconnected(self) -> None:
        """The link is gone."""
        if self._cut_at is None:
            self._cut_at = time.monotonic()

    def reconnected(self) -> None:
        """The link is there again: what was on its way may be lost, so both sides say where they stand."""
        away = time.monotonic() - self._cut_at if self._cut_at is not None else 0.0
        self._cut_at = None
        if self._ready and self.spec.replicas > 1 and not self.stateful and away > _FENCE:
            if not self._fenced.done():
                self._fenced.set_result(away)
        elif self._ready:
            self._greeting = asyncio.get_running_loop().create_task(self._greet())

    async def _fence(self) -> None:
        """A replica that was cut off for long: others may have its part, so what it still holds must not go out late."""
        away = await self._fenced
        raise FencedError(f"was cut off for {away:.1f} s; begins anew, for other replicas may have taken its part over")

    async def _greet(self) -> None:
        try:
            await self.inputs.acknowledge(hello=True)
            await self.outputs.knock()
            await self.signs.show_state("ready")  # our will may have said that we are gone
        except BusError as error:
            log.debug("not greeted", node=self.name, reason=str(error))

    async def _work(self) -> None:
        await self.outputs.ready()
        await self.work()
        await self._settled()
        if not self._stopping.is_set():
            self._complete = True

    async def _leave(self) -> None:
        if self._complete:
            for stream in self.inputs.streams.values():
                stream.window.ended = True
            await self.inputs.acknowledge(final=True)
        await self.signs.burials.close(self.name)
        await self._show_books()
        await self.signs.show_state("ended" if self._complete else "stopped")
        for bus in (self._intake, self._bus):
            if bus is not None:
                await bus.close()
        if self._complete:  # said first: whoever starts the process again, should it die now, leaves us out
            self.signs.say("ended")
            self.journal.remove()
        else:
            self.journal.close()
            self.signs.say("stopped")

    # -- steps -----------------------------------------------------------------------------------------------------

    async def _deliver(self, step: Step, emit: Emit) -> None:
        """Number the answers of a step and send them, or stage them for the commit of an operator with state."""
        if emit.sent:
            self._stage(step, emit)
        if step.advanced is not None and self.spec.replicas > 1:
            self.outputs.advance(step.advanced)
        for name, ident in step.replayed:
            if ident in self.inputs.edges[name].replayed:
                step.ids.setdefault(f"{REPLAYED}:{name}", []).append(ident)
        if self.signs.deaths:
            await self.signs.burials.settle(self.name)
            letters, self.signs.deaths = self.signs.deaths, []
            if self._bus is not None:
                receipt = await self._bus.publish(letters)
                step.mark.receipt(receipt)
                receipt.add_done_callback(self._published)
        if self.stateful:
            self._finished_step(step)
            self._moved.set()
            if self.outputs.staged:
                self.pace.press()
            return
        if self.outputs.staged:
            await self.outputs.flush(self.outputs.take_staged(), step.mark)
        self._steps.append(step)
        self._progress()
        while len(self._steps) >= _MOST_STEPS:
            self._few_steps.clear()
            await self._few_steps.wait()

    def _published(self, receipt: Receipt) -> None:
        """A step's dead letters are on the bus; one that the broker refuses is in the file all the same."""
        if not receipt.cancelled() and (error := receipt.exception()) is not None:
            log.warning("dead letters not published", node=self.name, reason=str(error))
        self._progress()

    def _stage(self, step: Step, emit: Emit) -> None:
        emit.sent = self.outputs.divided(emit.sent)
        refused = () if self.outputs.hand(emit.sent) else self.outputs.stage(emit.sent, step.mark)
        for message, detail in refused:
            self._bury(message, "too-large", detail, "")
            rows = message.rows
            if self.spec.inputs:
                # booked as passed when the operator answered, and a row taken in is booked once; where answers have rows
                # of their own (a window, a user's function) a refused one counts as one
                rows = min(rows if self.passing else 1, step.entry.passed)
                step.entry.passed -= rows
            step.entry.bury("too-large", rows)
        if not refused and len(ports := {port for port, _ in emit.sent}) == 1:
            (port,), count = ports, len(emit.sent)
            step.entry.emit(port, count, rows_of([message for _, message in emit.sent]))
            self._sent[port] = self._sent.get(port, 0) + count
            return
        gone = {id(message) for message, _ in refused}
        for port, message in emit.sent:
            if id(message) not in gone:
                step.entry.emit(port, 1, message.rows)
                self._sent[port] = self._sent.get(port, 0) + 1

    async def _finish(self, emit: Emit) -> None:
        """All inputs have ended: send the last answers and our own end, and be done with the inputs' ends."""
        step = self._final
        self._stage(step, emit)
        self.outputs.end(step.mark, self._sent)
        self._finished = True
        self._hurry()
        await self._deliver(step, Emit())

    async def _end_again(self) -> None:
        """We had finished before we were started again: those who read us may not have heard of the end."""
        self._finished = True
        self._hurry()
        if self.stateful:  # the end is in the outbox
            return
        self.outputs.end(self._final.mark, self._sent)
        await self._deliver(self._final, Emit())

    def _progress(self) -> None:
        """More is acknowledged: steps at the front that are complete can be booked."""
        steps, moved = self._steps, False
        while steps and steps[0].mark.done:
            self._finished_step(steps.popleft())
            moved = True
        if moved:
            self._few_steps.set()
        self._moved.set()

    def _finished_step(self, step: Step) -> None:
        """A step waits for the next commit."""
        self._done.append(step)
        self.pace.done(step.entry.messages)

    def _hurry(self) -> None:
        """From now on we wait for our own commits: to have ended."""
        self.pace.hurried = True
        self.pace.press()

    async def _settled(self) -> None:
        """Wait until every step is booked and committed, and every answer is done.

        Being stopped, not for the end of the stream alone: its consumer may not be done with that for long (a spool), and
        it is sent again by the next run.
        """
        while self._steps or self._done or self._committing or not self.outputs.idle:
            only_end = [*self._steps] == [self._final] or (self.stateful and self.outputs.only_end)
            if self._stopping.is_set() and self._finished and only_end and not self._done and not self._committing:
                return
            self._idle.clear()
            await self._idle.wait()

    async def _commits(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            if self._done or self.stateful or self._refused:
                await self.pace.wait()
                self._committing = True
                try:
                    await self._commit()
                finally:
                    self._committing = False
            self._idle.set()

    async def _commit(self) -> None:
        """Book what is done, in one transaction; then send what waited for it; then acknowledge."""
        async with self._whole():
            work = self._gather()
        if work is None:
            return
        steps, seen = work.steps, list(work.ids.items())
        finishes: dict[str, tuple[int, int]] = {}
        for step in steps:
            finishes.update(step.finishes)
        replayed = [letter for step in steps for letter in step.replayed]
        while True:
            try:
                if self.stateful:
                    await asyncio.to_thread(
                        self.journal.commit, work.values, seen=seen, outbox=work.outbox, floors=work.floors
                    )
                else:
                    self.journal.commit(work.values, seen=seen)
                break
            except sqlite3.OperationalError as error:
                log.error("cannot commit, waiting", node=self.name, reason=str(error))
                await asyncio.sleep(_RETRY_COMMIT)
        if replayed:
            await self.signs.burials.done(self.name, replayed)
        if work.staged is not None:
            await self.outputs.flush(work.staged)
        for name, (epoch, seq) in finishes.items():
            self.inputs.streams[name].window.finish(epoch, seq)
        for step in steps:
            for edge, deliveries in step.deliveries:
                if edge.subscription is not None:
                    edge.subscription.acknowledge(deliveries)
        await self.inputs.acknowledge()
        if work.position is not None:
            await self.settled(work.position)
        if self.journal.untidy:
            await self._tidy()

    async def _tidy(self) -> None:
        """Let nobody wait for the journal's housekeeping but the next commit."""
        try:
            await asyncio.to_thread(self.journal.tidy)
        except sqlite3.OperationalError as error:  # a full disk; the next commit will say so
            log.debug("journal not tidied", node=self.name, reason=str(error))

    def _whole(self) -> AbstractAsyncContextManager[object]:
        """Around an operator's call and the entry of its step: a commit of state sees both or neither."""
        return self._steady if self.stateful else nullcontext()

    def _gather(self) -> Work | None:
        """What the next commit holds: everything as of this moment; None when there is nothing to commit."""
        steps, self._done = self._done, []
        self.pace.begin()
        if not steps and not self.outputs.releasable and not self._refused:
            return None
        self._refused = False
        finishes: dict[str, tuple[int, int]] = {}
        ids: dict[str, list[str]] = {}
        fresh, outbox_floors, values = self.outputs.outbox()
        for step in steps:
            self.books.book(step.entry)
            finishes.update(step.finishes)
            for name, taken in step.ids.items():
                ids.setdefault(name, []).extend(taken)
            self._marks.update(step.marks)
            if step.position is not None:
                values["position"] = step.position
        self.books.book(self._buried)
        self._buried = Entry()
        values["books"] = self.books.snapshot()
        values["floors"] = {
            name: finishes.get(name) or (stream.window.epoch, stream.window.done)
            for name, stream in self.inputs.streams.items()
            if stream.edge.remote
        }
        if any(edge.spec.merged for edge in self.inputs.edges.values()):
            values["marks"] = self._marks
        if any(step is self._final for step in steps):  # not before: whoever is started again sends the end again
            values["ended"] = list(self.inputs.streams)
            values["finished"] = True
        self.snapshot(values)
        staged = self.outputs.take_staged() if self.stateful else None
        position = values.get("position")
        return Work(steps, packed(values), ids, fresh, outbox_floors, staged, position)

    def snapshot(self, values: dict[str, Any]) -> None:
        """Add the operator's state to a commit."""

    async def settled(self, position: Any) -> None:
        """A source's position is committed."""

    # -- taking items ----------------------------------------------------------------------------------------------

    def _admit(self, items: Sequence[Item], step: Step) -> list[Message]:
        """Enter items into a step; gives the new messages among them. A stream's end waits for the final step."""
        if items and (run := self._admit_run(items, step)) is not None:
            return run
        messages: list[Message] = []
        for item in items:
            edge, message = item.edge, item.message
            body = message.body
            end = isinstance(body, End)
            to = self._final if end else step
            if edge.merge is not None:
                to.marks[item.stream.name] = item.mark
            if item.number is not None:
                to.finishes[item.stream.name] = item.number
            if item.delivery is not None:
                if to.deliveries and to.deliveries[-1][0] is edge:
                    to.deliveries[-1][1].append(item.delivery)
                else:
                    to.deliveries.append((edge, [item.delivery]))
            if end:
                item.stream.ended = True
                continue
            if isinstance(body, Progress):
                step.progress[edge.name] = max(body.time, step.progress.get(edge.name, body.time))
                continue
            if item.again:
                step.replayed.append((edge.name, message.id))
            if not self.inputs.is_new(item):
                continue
            if edge.spec.safe and not item.foreign:
                step.ids.setdefault(edge.name, []).append(message.id)
            rows = message.rows
            name = REPLAYED if item.again else FOREIGN if item.foreign else edge.name
            step.entry.receive(name, 1, rows)
            count, total = self._live.get(name, (0, 0))
            self._live[name] = (count + 1, total + rows)
            messages.append(message)
        step.entry.repeated, self.inputs.repeated = self.inputs.repeated, {}
        for edge in {item.edge.name: item.edge for item in items}.values():
            if (drops := edge.dropped).messages:
                edge.dropped = Drops()
                lost = sum(drops.rows.values())
                step.entry.receive(edge.name, drops.messages, lost)
                for reason, rows in drops.rows.items():
                    step.entry.drop(reason, rows)
                count, total = self._live.get(edge.name, (0, 0))
                self._live[edge.name] = (count + drops.messages, total + lost)
        return messages

    def _admit_run(self, items: Sequence[Item], step: Step) -> list[Message] | None:
        """:meth:`_admit` for what is almost always there: new messages of one stream and nothing else; None otherwise."""
        stream = items[0].stream
        edge = stream.edge
        if edge.merge is not None or edge.dropped.messages or self.inputs.repeated:
            return None
        messages: list[Message] = []
        for item in items:
            message = item.message
            if item.stream is not stream or item.foreign or type(message.body) in _CONTROL:
                return None
            messages.append(message)
        name, last = edge.name, items[-1]
        if edge.spec.safe:
            idents = [message.id for message in messages]
            if not edge.ids.add_all(idents):
                return None
            step.ids.setdefault(name, []).extend(idents)
            if last.delivery is not None:
                step.deliveries.append((edge, [item.delivery for item in items if item.delivery is not None]))
        if last.number is not None:
            step.finishes[stream.name] = last.number
        rows = rows_of(messages)
        step.entry.receive(name, len(messages), rows)
        count, total = self._live.get(name, (0, 0))
        self._live[name] = (count + len(messages), total + rows)
        return messages

    def _measure(self, items: Sequence[Item], began: int, ended: int) -> None:
        latency, count, now = self.books.latency, len(items), time.monotonic()
        latency["wait"].add(began - items[0].arrived, count, now)
        latency["process"].add((ended - began) // count, count, now)
        if born := items[0].message.born:
            latency["since-source"].add(ended - born, count, now)

    # -- dead letters and books ------------------------------------------------------------------------------------

    def _bury(self, message: Message, reason: str, detail: str, edge: str) -> None:
        if edge:
            self.inputs.edges[edge].replayed.discard(message.id)  # it may be tried again
        letter = self.signs.letter(reason, detail, edge, message.id, codec.encode(message), message.rows)
        self.signs.deaths.append(letter)

    def _undecodable(self, edge: str, topic: str, payload: Any, error: PayloadError) -> None:
        """Somebody published what is no message of ours on an edge's topic."""
        self._buried.receive(FOREIGN, 1, 1)
        self._buried.bury(error.reason, 1)
        count, rows = self._live.get(FOREIGN, (0, 0))
        self._live[FOREIGN] = (count + 1, rows + 1)
        self._refused = True  # a commit of its own, should nothing else come: the books do not forget it either
        self._moved.set()
        self.signs.foreign.append(self.signs.letter(error.reason, error.detail, edge, topic, bytes(payload)))

    async def _publish_books(self) -> None:
        due = time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            await self.signs.send_foreign()
            if time.monotonic() >= due:
                due = time.monotonic() + BOOKS_EVERY
                await self._show_books()

    async def _show_books(self) -> None:
        self.books.book(self._buried)
        self._buried = Entry()
        await self.signs.show_books(self.books.ledger(self._live, self.outputs.moved), passing=self.passing)
