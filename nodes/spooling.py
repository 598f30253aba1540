"""A sink with a spool: what arrives is on the disk before it is acknowledged, and goes to the far end when that is there.

The node is one with state. Its journal is the truth about what is in the spool: its commits hold, with the books and the
identities taken, the number of the last message stored and the runs of those that are gone (written, rejected, evicted).

1. In: append to the spool (on the disk when that returns), commit, acknowledge.
2. Out: take from the spool in memory, write to the sink, commit, remove from the spool.
3. Evict: take a file's messages in memory, commit, remove them.

So a crash leaves three differences, and :meth:`SpoolingRuntime.resume` settles each before anything arrives:

- Appended and not committed: the spool has numbers beyond the journal's. They are booked as received now, and their identities
  are remembered: they are repeats when the producer, which had no acknowledgement, sends them again.
- Committed as gone and not removed: removed now, never written or counted again.
- Written and neither committed nor removed: written again. Sinks know repeats by the messages' ids.

What the disk lost in spite of all that is what the books hold and the spool does not have: dropped as ``spool-damaged``.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from broker.spool import Item as Stored
from broker.spool import NoRoomError
from broker.throttle import Throttle
from nodes import log
from nodes.assignment import NodeSpec
from nodes.edge import FOREIGN, REPLAYED, Item
from nodes.journal import packed
from nodes.operator import Emit, Sink
from nodes.runners import SinkRuntime, mark
from nodes.spool_shelf import Shelf, pack, unpack
from nodes.step import Links, Step
from nodes.uplink import Spool as Options
from schemas.errors import BusError, PayloadError
from schemas.messages import End, Message

FULL, DAMAGED = "spool-full", "spool-damaged"
"""Reasons in the ledger's ``dropped``."""
_MOST = 1024
"""Messages taken in at once."""
_RETRY = 1.0
"""Seconds after which a full disk is tried again."""
_LAST = 5.0
"""Seconds that a write may still take when we are stopped."""


class _Arrival(msgspec.Struct, gc=False):
    """An item on its way into the spool.

    :param payload: None: it is not stored. ``reason`` and detail say why it cannot be.
    """

    item: Item
    topic: str = ""
    payload: bytes | None = None
    rows: int = 0
    reason: tuple[str, str] | None = None


class SpoolingRuntime(SinkRuntime):
    """Feeds a sink from a spool.

    :param options: of the spool.
    :param folder: where it is.
    """

    stateful = True

    def __init__(
        self, topology: str, spec: NodeSpec, state: Path, links: Links, sink: Sink, options: Options, folder: Path
    ) -> None:
        super().__init__(topology, spec, state, links, sink)
        self._options = options
        self._shelf = Shelf(folder, options, f"{self.name}: spool")
        self._throttle = Throttle(options.rate) if options.rate is not None else None
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._never = asyncio.Event()
        self._closed = False
        self._opened = False
        self._disk_full = False
        self._told: set[str] = set()

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the spool. The sink is opened by :meth:`_drain`: its far end may be away."""
        await self._shelf.open()

    async def resume(self) -> None:
        """Bring the books and the spool together again."""
        shelf, before = self._shelf, self.journal.get("position")
        if shelf.cut:
            log.warning("the end of the spool was damaged", node=self.name, bytes=shelf.cut)
        step = Step()
        for topic, ident, rows in await shelf.reconcile(before):
            self._adopt(step, topic, ident, rows)
        self.books.book(step.entry)
        total = self.books.total
        gone = total.passed + total.filtered + sum(total.dropped.values()) + sum(total.dead.values())
        lost = sum(rows for _, rows in total.received.values()) - gone - shelf.kept.weight
        if lost > 0:
            log.error("the disk has lost rows of the spool", node=self.name, rows=lost)
            total.drop(DAMAGED, lost)
        self._live = dict(total.received)
        if (position := shelf.position()) != before:
            values = packed({"books": self.books.snapshot(), "position": position})
            await self._commit_first(values, list(step.ids.items()))
        if kept := shelf.kept.messages:
            log.info("in the spool", node=self.name, messages=kept, rows=shelf.kept.weight, bytes=shelf.kept.bytes)

    def _adopt(self, step: Step, topic: str, ident: str, rows: int) -> None:
        """Book what was stored and not committed; its producer, if it can send it again, is told that it is known."""
        name, _, kind = topic.partition(" ")
        step.entry.receive(kind or name, 1, rows)
        edge = self.inputs.edges.get(name)
        if edge is None or not ident:
            return
        if kind == REPLAYED:
            edge.replayed.add(ident)
            step.ids.setdefault(f"{REPLAYED}:{name}", []).append(ident)
        elif edge.spec.safe and not kind:
            edge.ids.add(ident)
            step.ids.setdefault(name, []).append(ident)

    async def _commit_first(self, values: dict[str, bytes], seen: Sequence[tuple[str, list[str]]]) -> None:
        while True:
            try:
                return self.journal.commit(values, seen=seen)
            except sqlite3.OperationalError as error:
                log.error("cannot commit, waiting", node=self.name, reason=str(error))
                await asyncio.sleep(_RETRY)

    def stop(self) -> None:
        super().stop()
        self._news.set()
        self._room.set()

    async def close(self) -> None:
        if self._opened:
            await self.sink.close()
        kept = self._shelf.kept
        await self._shelf.close(erase=self._complete)
        if kept.messages:
            log.info("left in the spool", node=self.name, messages=kept.messages, rows=kept.weight, bytes=kept.bytes)

    async def work(self) -> None:
        intake, drain = asyncio.create_task(self._take_in()), asyncio.create_task(self._drain())
        stopped = asyncio.create_task(self._stopping.wait())
        tasks: set[asyncio.Task[Any]] = {intake, drain}
        try:
            while tasks and not stopped.done():
                done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
                tasks -= done
                for task in done:
                    task.result()
            if tasks:
                done, _ = await asyncio.wait(tasks, timeout=_LAST)
                for task in done:
                    task.result()
        finally:
            for task in (intake, drain, stopped):
                task.cancel()
            await asyncio.gather(intake, drain, stopped, return_exceptions=True)
        if not self._stopping.is_set() and not self.journal.get("ended"):
            await self._finish(Emit())

    def snapshot(self, values: dict[str, Any]) -> None:
        values["position"] = self._shelf.position()

    async def settled(self, position: Any) -> None:
        await self._shelf.committed()
        self._room.set()

    # -- in ------------------------------------------------------------------------------------------------------

    async def _take_in(self) -> None:
        while not self.inputs.ended:
            if self._stopping.is_set() and not self.inputs.queued:
                return
            waiting = [self._arrival(item) for item in await self.inputs.take(_MOST, 0, None)]
            while waiting:
                self._room.clear()
                async with self._whole():
                    done = await self._store(waiting)
                del waiting[:done]
                if waiting and not done and not await self._make_room(waiting):
                    return  # they are not acknowledged, and come again
        self._closed = True
        self._news.set()

    def _arrival(self, item: Item) -> _Arrival:
        message = item.message
        if isinstance(message.body, End):
            return _Arrival(item)
        kind = f" {REPLAYED}" if item.again else f" {FOREIGN}" if item.foreign else ""
        arrival = _Arrival(item, item.edge.name + kind, rows=message.rows)
        try:
            payload = pack(message, item.arrived)
        except (TypeError, ValueError, OverflowError) as error:
            arrival.reason = ("rejected", f"cannot be stored: {error}")
        else:
            if self._shelf.fits(size := self._shelf.size(arrival.topic, payload)):
                arrival.payload = payload
            else:
                arrival.reason = ("too-large", f"{size} bytes, the spool takes {self._options.size} in all")
        return arrival

    async def _store(self, waiting: Sequence[_Arrival], *, drop: bool = False) -> int:
        """Store arrivals, from the first on, as far as there is room, and enter them in the books; gives how many.

        :param drop: what does not fit is dropped.
        """
        chosen = self._new(waiting)
        batch = [(a.topic, a.payload) for i in chosen if (a := waiting[i]).payload is not None]
        done, refused = 0, list[int]()
        if batch:
            try:
                done, refused = await self._shelf.append(batch, [waiting[i].rows for i in chosen], drop=drop)
            except NoRoomError as error:
                self._disk_full = True
                self._tell("the disk is full, nothing is taken in until there is room", reason=str(error))
            else:
                self._disk_full = False
        upto = chosen[done] if done < len(chosen) else len(waiting)
        if not upto:
            return 0
        step = Step()
        new = {id(message) for message in self._admit([arrival.item for arrival in waiting[:upto]], step)}
        if refused:
            step.entry.drop(FULL, sum(waiting[chosen[i]].rows for i in refused))
            self._tell("the spool is full, what arrives is dropped")
        for arrival in waiting[:upto]:
            if arrival.reason is not None and id(arrival.item.message) in new:
                self._refuse(step, arrival, *arrival.reason)
        self._shelf.booked()
        await self._deliver(step, Emit())
        self._news.set()
        return upto

    def _new(self, waiting: Sequence[_Arrival]) -> list[int]:
        """Which of them are to be stored: no ends, no repeats, nothing that cannot be."""
        chosen, known = [], set[tuple[str, str]]()
        for i, arrival in enumerate(waiting):
            item, key = arrival.item, (arrival.topic, arrival.item.message.id)
            if arrival.payload is None or self.inputs.knows(item):
                continue
            if item.again or (item.edge.spec.safe and not item.foreign):
                if key in known:
                    continue
                known.add(key)
            chosen.append(i)
        return chosen

    def _refuse(self, step: Step, arrival: _Arrival, reason: str, detail: str) -> None:
        message, edge = arrival.item.message, arrival.item.edge
        step.entry.bury(reason, arrival.rows)
        if reason == "too-large":
            self._bury(message, reason, detail, edge.name)
        else:  # what cannot be encoded has no bytes to keep
            self.signs.deaths.append(self.signs.letter(reason, detail, edge.name, message.id, b"", arrival.rows))

    async def _make_room(self, waiting: list[_Arrival]) -> bool:
        """The first of ``waiting`` does not fit: see to it, or wait. False: we were stopped meanwhile."""
        shelf = self._shelf
        if self._options.overflow == "drop-oldest" and not self._disk_full and not shelf.moving:
            size = sum(shelf.size(a.topic, a.payload) for a in waiting if a.payload is not None)
            if runs := await shelf.doom(size):
                self._tell("the spool is full, the oldest are dropped")
                async with self._whole():
                    step = Step()
                    step.entry.drop(FULL, sum(run.weight for run in runs))
                    shelf.evicted(runs)
                    await self._deliver(step, Emit())
            elif not shelf.moving:  # all that is here is under way
                async with self._whole():
                    if await self._store(waiting[:1], drop=True):
                        del waiting[:1]
                return not self._stopping.is_set()
        elif not self._disk_full and not shelf.moving:
            self._tell("the spool is full, nothing is taken in until there is room")
        await self._either(self._room, _RETRY)
        return not self._stopping.is_set()

    # -- out -----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        self._opened = True
        if not await self._patiently(self.sink.open):
            return
        while batch := await self._next():
            if not await self._send(batch):
                return

    async def _next(self) -> list[Stored]:
        """The next messages for the sink; none: the end, or we are to stop."""
        most, lingered = self.sink.max_batch, False
        if self._throttle is not None:
            most = max(1, min(most, int(self._throttle.burst)))
        while not self._stopping.is_set():
            self._news.clear()
            waiting = self._shelf.waiting
            if not waiting:
                self._told.clear()
                if self._closed:
                    return []
                await self._either(self._news)
            elif waiting < most and self.sink.linger and not lingered and not self._closed:
                lingered = True
                await self._linger(most)
            elif batch := await self._read(most):
                await self._hold_back(len(batch))
                return [] if self._stopping.is_set() else batch
            else:
                await self._either(self._news, _RETRY)
        return []

    async def _linger(self, most: int) -> None:
        """Wait for a whole batch as long as the sink likes."""
        until = time.monotonic() + self.sink.linger
        while self._shelf.waiting < most and not self._closed and (left := until - time.monotonic()) > 0:
            self._news.clear()
            await self._either(self._news, left)

    async def _read(self, most: int) -> list[Stored]:
        try:
            batch, lost = await self._shelf.read(most)
        except BusError as error:
            log.error("the spool cannot be read, waiting", node=self.name, reason=str(error))
            await self._either(self._never, _RETRY)
            return []
        if lost:
            log.error("the disk has lost rows of the spool", node=self.name, rows=lost)
            async with self._whole():
                step = Step()
                step.entry.drop(DAMAGED, lost)
                await self._deliver(step, Emit())
        return batch

    async def _hold_back(self, messages: int) -> None:
        """Keep the rate."""
        if self._throttle is not None:
            while (wait := self._throttle.wait(messages, time.monotonic())) and not self._stopping.is_set():
                await self._either(self._never, wait)
            self._throttle.spend(messages)

    async def _send(self, batch: Sequence[Stored]) -> bool:
        """Write a batch to the sink and book what became of it; False when we were stopped meanwhile."""
        began, step = time.time_ns(), Step()
        given: list[tuple[Message, str, int]] = []
        messages: list[Message] = []
        letters = []
        for stored in batch:
            name = stored.topic.partition(" ")[0]
            edge = self.inputs.edges.get(name)
            try:
                message, arrived = unpack(stored.payload)
            except PayloadError as error:
                step.entry.bury(error.reason, stored.weight)
                letters.append(
                    (error.reason, error.detail, "", f"spool {stored.number}", stored.payload, stored.weight)
                )
                continue
            given.append((message, "" if edge is None else name, stored.weight))
            messages.append(mark(message, name) if edge is not None and edge.spec.marked else message)
            self.books.latency["wait"].add(began - arrived)
        rejected = await self._write_out(messages) if messages else ()
        if rejected is None:
            return False
        ended = time.time_ns()
        async with self._whole():
            self.signs.deaths += [self.signs.letter(*letter) for letter in letters]
            step.entry.passed += sum(rows for _, _, rows in given)
            for index, reason in rejected:
                message, name, rows = given[index]
                step.entry.passed -= rows
                step.entry.bury("rejected", rows)
                self._bury(message, "rejected", reason, name)
            self._shelf.gone(batch)
            self.books.latency["process"].add((ended - began) // len(batch), len(batch))
            if given and (born := given[0][0].born):
                self.books.latency["since-source"].add(ended - born, len(batch))
            await self._deliver(step, Emit())
        return True

    # -- helpers -------------------------------------------------------------------------------------------------

    async def _either(self, event: asyncio.Event, timeout: float | None = None) -> None:
        """Wait for an event, until we are to stop, or for a time."""
        waits = [asyncio.create_task(each.wait()) for each in (event, self._stopping)]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _tell(self, what: str, **fields: str) -> None:
        """Say that the spool or the disk is full: once until all has gone to the far end."""
        if what not in self._told:
            self._told.add(what)
            log.warning(what, node=self.name, size=self._options.size, **fields)
