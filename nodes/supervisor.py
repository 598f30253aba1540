"""The supervisor: starts a plan's brokers, relays and node processes on this host, keeps them running, and ends them well.

One OS process per process label. A process that dies is started again with backoff; one that says it cannot start (a missing
library, a wrong file) ends the run with that one line. When every node has ended, the books are audited.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import msgspec

from nodes import continued, log, planned_relays, running
from nodes.assignment import Assignment, Broker, Command, Report
from nodes.brokers import Brokers, relays
from nodes.children import describe, keep
from nodes.forks import Fork, Nursery
from nodes.journal import Journal
from nodes.outcome import NodeView, Outcome, audited, traffic
from nodes.plan import Plan
from nodes.planned import PlannedNode, PlannedRelay
from nodes.specify import specify
from schemas.errors import BusError, ConfigError, PenstockError, RunError, UnableError
from schemas.messages import Ledger

__all__ = ["GRACE", "NodeView", "Outcome", "Supervisor"]

GRACE = 10.0
"""Seconds that a node may take to finish what it has when it is stopped."""
_MOST_FALSE_STARTS = 5
_decode = msgspec.json.Decoder(Report).decode
_encode = msgspec.json.Encoder().encode


class Supervisor:
    """Runs a plan.

    :param state: folder of the run's state (journals, a broker's files).
    :param host: only this host's nodes; None: all, on this machine.
    :param only: only these nodes; None: all.
    :param level: least log level of the nodes.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        state: Path,
        host: str | None = None,
        only: Iterable[str] | None = None,
        level: str = "info",
    ) -> None:
        wanted = set(only) if only is not None else None
        self._plan = plan
        self._state = state
        self._host = host
        self._level = level
        self._processes: dict[tuple[str, str], list[PlannedNode | PlannedRelay]] = {
            key: [*chosen]
            for key, nodes in plan.processes(host).items()
            if (chosen := [node for node in nodes if wanted is None or node.name in wanted])
        }
        for relay in plan.relays.values():
            if host in {None, relay.host} and (wanted is None or any(p.producer in wanted for p in relay.ports)):
                self._processes.setdefault((relay.host, relay.process), []).append(relay)
        self.views = {
            node.name: NodeView(node.name, node.kind, node.host, node.process)
            for nodes in self._processes.values()
            for node in nodes
        }
        if not self.views:
            raise ConfigError(f"there is no node to run{f' on host {host!r}' if host else ''}")
        self._children: dict[tuple[str, str], Fork] = {}
        self._changed = asyncio.Event()
        self._stopping = False
        self._failure: PenstockError | None = None
        self._false_starts: dict[tuple[str, str], int] = {}
        self._clock = 0
        kinds = Counter(kind for nodes in self._processes.values() for kind in {node.kind for node in nodes})
        self._nursery = Nursery([f"nodes.{kind}" for kind, processes in kinds.items() if processes > 1])
        self.brokers = Brokers(plan, state, host)
        self.on_report: Callable[[Report], None] = lambda report: None

    async def run(self, duration: float | None = None) -> Outcome:
        """Run until every node has left; then audit.

        :param duration: seconds, from when all nodes are ready, after which the sources are ended as if their data had.
        :raises PenstockError: a node or broker cannot start; all others are stopped.
        """
        lock = self._hold()
        began = time.monotonic()
        timer = asyncio.create_task(self._end_after(duration)) if duration is not None else None
        tasks: set[asyncio.Task[None]] = set()
        self._set_apart()
        try:
            for key in self._processes:
                self._children[key] = Fork("/".join(key), self._nursery, self._line)
            self._nursery.start()
            started = [asyncio.create_task(child.start()) for child in self._children.values()]
            await self.brokers.start()
            running.announce(self._state, self._reachable())
            await asyncio.gather(*started)
            relaying = [asyncio.create_task(relay) for relay in relays(self._plan, self.brokers, self._host)]
            tasks = {asyncio.create_task(self._keep(key)) for key in self._processes}
            watching = asyncio.create_task(self.brokers.watch())
            try:
                await self._all_left({*tasks, watching, *relaying})
            finally:
                for task in (watching, *relaying, *tasks):
                    task.cancel()
                await asyncio.gather(watching, *relaying, *tasks, return_exceptions=True)
        finally:
            if timer is not None:
                timer.cancel()
            await asyncio.gather(*(child.reap() for child in self._children.values()))
            for name in (name for name, view in self.views.items() if view.state == "ended"):
                Journal.erase(self._state / f"{name}.journal")  # it may have been ended between its last word and that
            await self._nursery.stop()
            await self.brokers.stop()
            running.withdraw(self._state, self._host or "")
            lock.close()
        if self._failure is not None:
            raise self._failure
        return audited(self._plan, self.views, time.monotonic() - began)

    def forget(self) -> None:
        """Remove what earlier runs kept, journals and nodes' folders; called before :meth:`run`."""
        with self._hold():
            for node in (node for nodes in self._processes.values() for node in nodes):
                Journal.erase(self._state / f"{node.name}.journal")
                shutil.rmtree(self._state / node.name, ignore_errors=True)
                if isinstance(node, PlannedNode):
                    node.config.forget(node.context)

    async def _end_after(self, seconds: float) -> None:
        while not all(view.ready_at for view in self.views.values()):
            self._changed.clear()
            await self._changed.wait()
        await asyncio.sleep(seconds)
        self.end()

    def end(self) -> None:
        """End the sources as if their data had ended, and what goes on without any; the run then completes by itself."""
        endless = {"ingest", "federate", "train", "ask", "answer", "pool"}
        self._tell(end=[name for name, view in self.views.items() if view.kind in endless])

    async def stop(self) -> None:
        """Drain: sources first, then down the topology, each when those before it have left; state is kept."""
        self._stopping = True
        for name in (*self._plan.nodes, *self._plan.relays):  # a relay takes until its producers have left
            if (view := self.views.get(name)) is None or view.gone:
                continue
            self._tell(stop=[name])
            try:
                async with asyncio.timeout(GRACE):
                    await self._until(view)
            except TimeoutError:
                log.warning("did not finish in time, ended", node=name, seconds=GRACE)
                self.kill(name)

    def kill_nursery(self) -> None:
        """SIGKILL the process that forks the workers; they live on, and the next one needed starts another."""
        self._nursery.kill()

    def kill(self, name: str) -> None:
        """SIGKILL the process of a node. Unless we are stopping it is started again."""
        view = self.views[name]
        self._children[view.host, view.process].kill()

    def move_clocks(self, offset: int) -> None:
        """Move the time of day of all node processes, also of those started later, by ``offset`` ns (a drill)."""
        self._clock = offset
        self._tell_all(Command(clock=offset))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _hold(self) -> IO[str]:
        return running.hold(self._state, self._host or "", self._plan.topology.name)

    def _set_apart(self) -> None:
        """Nodes that ended before this run was stopped, with a relay that still keeps what they sent, are not run."""
        relays = [node for nodes in self._processes.values() for node in nodes if isinstance(node, PlannedRelay)]
        for name in continued.ended(self._plan, relays, self._state) & self.views.keys():
            view = self.views[name]
            view.state, view.ready_at = "ended", time.monotonic()
            log.info("has ended before, a relay keeps what it sent", node=name)
        self._processes = {
            key: rest
            for key, nodes in self._processes.items()
            if (rest := [node for node in nodes if not self.views[node.name].gone])
        }

    async def _until(self, view: NodeView) -> None:
        while not view.gone:
            self._changed.clear()
            await self._changed.wait()

    async def _all_left(self, tasks: set[asyncio.Task[None]]) -> None:
        running = set(tasks)
        while self._failure is None and not all(view.gone for view in self.views.values()):
            self._changed.clear()
            changed = asyncio.create_task(self._note())
            done, _ = await asyncio.wait({*running, changed}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            running -= done
            for task in done - {changed}:
                task.result()

    async def _note(self) -> None:
        await self._changed.wait()

    async def _keep(self, key: tuple[str, str]) -> None:
        child = self._children[key]

        def prepare() -> None:
            child.send(_encode(self._assignment(key)))

        def ended(code: int) -> bool:
            return self._ended(key, code)

        await keep(child, prepare, ended, started=True, worked=lambda: not self._false_starts.get(key))

    def _ended(self, key: tuple[str, str], code: int) -> bool:
        views = [self.views[node.name] for node in self._processes[key]]
        self._changed.set()
        if self._stopping or self._failure is not None or all(view.gone for view in views):
            for view in views:
                view.state = view.state if view.gone else "stopped"
            return True
        started = any(view.state == "ready" or view.gone for view in views)
        self._false_starts[key] = 0 if started else self._false_starts.get(key, 0) + 1
        for view in views:
            if view.gone:  # it has left for good, though the process had others: it is not begun anew
                if view.state == "ended":
                    Journal.erase(self._state / f"{view.name}.journal")
                continue
            view.restarts += 1
            view.state = "restarting"
        if not started and (code in {2, 3, 4} or self._false_starts[key] >= _MOST_FALSE_STARTS):
            if self._failure is None:
                self._failure = RunError(f"process {'/'.join(key)} cannot start: {describe(code)}")
            return True
        return False

    def _line(self, line: bytes) -> None:
        try:
            report = _decode(line)
        except msgspec.DecodeError:
            log.debug("stdout", text=line[:500].decode(errors="replace"))
            return
        if report.log is not None:
            level, event, fields = report.log
            getattr(log, level)(event, **fields)
            return
        view = self.views.get(report.node)
        if view is not None:
            self._see(view, report)
        if report.state == "failed":
            self._failed(view, report)
        self._changed.set()
        self.on_report(report)

    def _see(self, view: NodeView, report: Report) -> None:
        view.pid = report.pid or view.pid
        if report.state:
            view.state = report.state
            if report.state == "ready":
                view.ready_at = time.monotonic()
            elif view.gone:
                view.left_at = time.monotonic()
                if report.state == "ended":
                    self._tell_all(Command(left=[view.name]))
        if report.ledger is None:
            return
        book, now = msgspec.convert(report.ledger, Ledger), time.monotonic()
        if view.books is not None and now > view.seen_at:
            view.rate = max(0, traffic(book) - traffic(view.books)) / (now - view.seen_at)
        view.books, view.seen_at = book, now
        view.rss, view.cpu, view.passing = report.rss, report.cpu, report.passing

    def _failed(self, view: NodeView | None, report: Report) -> None:
        name = report.node or "a worker"
        log.error("node failed", node=name, reason=report.detail)
        if report.exit_code in {2, 3, 4} and (view is None or view.restarts == 0) and self._failure is None:
            kind: type[PenstockError] = {2: ConfigError, 3: UnableError, 4: BusError}[report.exit_code]
            self._failure = kind(f"{name} cannot start: {report.detail}")

    def _tell(self, *, stop: list[str] | None = None, end: list[str] | None = None) -> None:
        for key, nodes in self._processes.items():
            names = {node.name for node in nodes}
            command = Command(stop=[n for n in stop or () if n in names], end=[n for n in end or () if n in names])
            if command.stop or command.end:
                self._children[key].send(_encode(command))

    def _tell_all(self, command: Command) -> None:
        for child in self._children.values():
            child.send(_encode(command))

    def _assignment(self, key: tuple[str, str]) -> Assignment:
        nodes = [node for node in self._processes[key] if not self.views[node.name].gone]
        specs = [specify(n, self._plan, bool(self._plan.topology.brokers)) for n in nodes if isinstance(n, PlannedNode)]
        brokers = {name: Broker(url=url, **self.brokers.credentials(name)) for name, url in self.brokers.urls.items()}
        return Assignment(
            topology=self._plan.topology.name,
            process=key[1],
            host=key[0],
            base=str(self._plan.topology.base.resolve()),
            state=str(self._state.resolve()),
            nodes=specs,
            brokers=brokers,
            level=self._level,
            relays=[planned_relays.specify(node, self.views) for node in nodes if isinstance(node, PlannedRelay)],
            left=[name for name, view in self.views.items() if view.state == "ended"],
            clock=self._clock,
        )

    def _reachable(self) -> running.Running:
        name, host = self._plan.topology.name, self._host or ""
        return running.Running(topology=name, host=host, pid=os.getpid(), brokers=dict(self.brokers.urls))
