"""A worker process: the nodes of one process label, run together. Started by the supervisor: ``python -m nodes.worker``.

It reads its :class:`~nodes.assignment.Assignment` as the first line of stdin, then commands; it writes reports to stdout, one
JSON line each. When stdin ends (the supervisor is gone) it stops as if told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from broker.bus import Bus, Will
from nodes import log
from nodes.assignment import Assignment, Command, NodeSpec, Report
from nodes.link import link
from nodes.operator import Context, Operator, Sink, Source
from nodes.runners import OperatorRuntime, SinkRuntime, SourceRuntime
from nodes.runtime import Runtime
from nodes.signs import state_payload
from nodes.step import Links
from schemas import topics
from schemas.errors import PenstockError, RunError

if TYPE_CHECKING:
    from broker.local import LocalBus
    from nodes.relay import Relay

_encode = msgspec.json.Encoder().encode
_GARBAGE = (20_000, 20, 50)
"""Objects made after which Python looks for cycles, and how many such looks it takes to look at older ones."""
_MADV_DONTNEED = 4
_STARTED = 1.0
"""Seconds after which we have begun in earnest. Looking for what is not needed takes 5 ms, which the start need not wait for."""
_ORPHANED = 10.0
"""Seconds that we take to finish when the supervisor is gone. Nodes that stop all at once may wait for each other for ever; the
journals are right at any moment."""


class Reporter:
    """Writes reports to the supervisor's pipe; never blocks the loop for long (the supervisor always reads)."""

    def __init__(self, level: str) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)  # whatever a library prints to stdout goes to stderr, not between our reports
        self._least = log.LEVELS.index(level)

    def __call__(self, report: Report) -> None:
        """Send one report."""
        data = _encode(report) + b"\n"
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except BrokenPipeError:
            return

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Send a log event."""
        if log.LEVELS.index(level) >= self._least:
            self(Report(log=(level, event, fields)))


def build(
    assignment: Assignment, spec: NodeSpec, local: LocalBus | None, nodes: Mapping[str, Runtime | Relay], report: Any
) -> Runtime:
    """One node, ready to be prepared.

    :param nodes: where it will be found by name once it is built.
    :raises PenstockError: its config or what it needs is not right after all.
    """
    kind = import_module(f"nodes.{spec.kind}")
    base, state = Path(assignment.base), Path(assignment.state)
    context = Context(
        topology=assignment.topology,
        node=spec.public,
        base=base,
        state=state / spec.name,
        broker=spec.broker,
        brokers={name: broker.url for name, broker in assignment.brokers.items()},
        inputs=tuple(edge.name for edge in spec.inputs),
        credentials={
            name: {key: getattr(broker, key) for key in ("user", "password", "ca", "cert", "key")}
            for name, broker in assignment.brokers.items()
        },
    )
    config = kind.Config.model_validate(spec.config)
    body = kind.build(config, context)
    pauses = any(e.carrier != "local" and not e.safe and e.overflow == "block" for e in spec.inputs)
    links = Links(
        bus=_bus(assignment, spec, nodes, "", will=True) if spec.broker else None,
        intake=_bus(assignment, spec, nodes, "-in", will=False) if pauses else None,
        local=local,
        report=report,
    )
    match body:
        case Operator():
            return OperatorRuntime(assignment.topology, spec, state, links, body)
        case Source():
            return SourceRuntime(assignment.topology, spec, state, links, body)
        case Sink() if getattr(config, "spool", None) is not None:
            from nodes.spooling import SpoolingRuntime

            return SpoolingRuntime(assignment.topology, spec, state, links, body, config.spool, config.folder(context))
        case Sink():
            return SinkRuntime(assignment.topology, spec, state, links, body)
        case _:
            raise RunError(f"{spec.name}: kind {spec.kind} built a {type(body).__name__}")


def _bus(
    assignment: Assignment, spec: NodeSpec, nodes: Mapping[str, Runtime | Relay], suffix: str, *, will: bool
) -> Bus:
    def up() -> None:
        if isinstance(node := nodes.get(spec.name), Runtime):
            node.reconnected()

    def down() -> None:
        if isinstance(node := nodes.get(spec.name), Runtime):
            node.disconnected()

    last = Will(topics.state(assignment.topology, spec.name), state_payload(spec.name, "offline", spec.host))
    client_id = f"{assignment.topology}-{spec.name}{suffix}"
    return link(
        assignment.brokers[spec.broker], client_id, up=up, down=down, will=last if will else None, node=spec.name
    )


async def work(assignment: Assignment, report: Reporter) -> None:
    """Run all nodes of the assignment; returns when all have left."""
    within: dict[str, LocalBus] = {}
    if any(edge.carrier == "local" for spec in assignment.nodes for edge in spec.inputs):
        from broker.local import LocalBus
        from broker.local_hub import Hub

        hub = Hub()
        for spec in assignment.nodes:  # each its own: a publication that waits for room holds up the others of its bus
            within[spec.name] = LocalBus(hub)
            await within[spec.name].open()
    nodes: dict[str, Runtime | Relay] = {}
    for spec in assignment.nodes:
        with _blame(spec.name):
            node = nodes[spec.name] = build(assignment, spec, within.get(spec.name), nodes, report)
            for consumer in assignment.left:
                node.left(consumer)
    for relay in assignment.relays:
        from nodes.relay import Relay

        with _blame(relay.name):
            nodes[relay.name] = Relay(assignment, relay, report)
            for name in assignment.left:
                nodes[relay.name].left(name)
    preparing = asyncio.create_task(_prepare(nodes))
    listener = asyncio.create_task(_commands(nodes, preparing))
    try:
        await preparing
    except asyncio.CancelledError:  # told to stop before we began
        for name in nodes:
            report(Report(node=name, state="stopped"))
        listener.cancel()
        return
    _settle_memory()
    asyncio.get_running_loop().call_later(_STARTED, _release_code)
    running = [asyncio.create_task(_run(name, node), name=name) for name, node in nodes.items()]
    try:
        await asyncio.gather(*running)
    finally:
        for task in (listener, *running):
            task.cancel()
        await asyncio.gather(listener, *running, return_exceptions=True)
    for bus in within.values():
        await bus.close()


def _settle_memory() -> None:
    """What starting up took and no longer needs goes back to the system; what stays is not scanned again.

    Messages are no cycles, but they are many: looking for cycles every 700 objects, as Python does by itself, costs a tenth of
    the time of a node with much to do.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _release_code() -> None:
    """The same for the pages of programs and libraries that only starting needed: a third of them."""
    with contextlib.suppress(OSError, AttributeError):  # another system than Linux
        madvise = ctypes.CDLL(None).madvise
        for begin, end in _unchanged():
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _unchanged() -> list[tuple[int, int]]:
    """Where programs and libraries are mapped as they are in their files: a page let go is there again when it is used."""
    found: list[tuple[int, int]] = []
    where = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if "-" in first:
            rights, inode = rest[0], rest[3]
            begin, _, end = first.partition("-")
            where = (int(begin, 16), int(end, 16)) if rights in {"r-xp", "r--p"} and inode != "0" else (0, 0)
        elif first == "Anonymous:" and rest[0] == "0" and where != (0, 0):
            found.append(where)
    return found


async def _run(name: str, node: Runtime | Relay) -> None:
    with _blame(name):
        await node.run()


class _blame:  # noqa: N801 - reads as a statement
    """Names the node in whatever fails inside."""

    def __init__(self, node: str) -> None:
        self._node = node

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not hasattr(error, "node"):
            error.node = self._node  # type: ignore[attr-defined]  # read in main, where the error ends


async def _prepare(nodes: Mapping[str, Runtime | Relay]) -> None:
    for name, node in reversed(list(nodes.items())):  # consumers first: nothing is sent before they listen
        with _blame(name):
            await node.prepare()


async def _commands(nodes: Mapping[str, Runtime | Relay], preparing: asyncio.Task[None]) -> None:
    """Take the supervisor's commands; the end of stdin stops all."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while True:
        line = await reader.readline()
        command = msgspec.json.decode(line, type=Command) if line else Command(stop=list(nodes))
        for consumer in command.left:
            for node in nodes.values():
                node.left(consumer)
        for name in command.end:
            nodes[name].end()
        if command.clock is not None:
            _move_clock(command.clock)
        for name in command.stop:
            nodes[name].stop()
        if command.stop:
            preparing.cancel()
        if not line:
            loop.call_later(_ORPHANED, _exit, 1)
            return


def _move_clock(offset: int) -> None:
    from nodes.drill import clock

    clock.move(offset)


def main() -> NoReturn:
    """Entry of the process. Its exit code is the error's, see :mod:`schemas.errors`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor tells us what to do
    assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment)
    if assignment.clock:
        _move_clock(assignment.clock)
    report = Reporter(assignment.level)
    log.send_to(report.log)
    try:
        _loop()(work(assignment, report))
    except PenstockError as error:
        report(Report(node=getattr(error, "node", ""), state="failed", detail=str(error), exit_code=error.exit_code))
        _exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the last resort: say it in one line, details at debug
        import traceback

        detail = f"{type(error).__name__}: {error}"
        report(Report(node=getattr(error, "node", ""), state="failed", detail=detail, exit_code=1))
        report.log("debug", "traceback", {"text": traceback.format_exc()})
        _exit(1)
    _exit(0)


def _loop() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def _exit(code: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)  # libraries' threads (a stuck camera, a model runtime) do not keep us


if __name__ == "__main__":
    main()
