"""When a node commits: soon where somebody waits for it, every 50 ms where only its books do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from broker.local import LocalBus
from broker.local_hub import Hub
from nodes import pace
from nodes.assignment import InEdge, NodeSpec, OutPort, Team
from nodes.journal import Journal
from nodes.operator import Chunk, Emit, Operator, Source
from nodes.pace import Pace
from nodes.runners import OperatorRuntime, SourceRuntime
from nodes.step import Links, Step
from schemas.messages import Message

DEADLINE = 30.0


class Nothing(Operator):
    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        raise AssertionError("not called here")


class Silent(Source):
    async def chunks(self) -> AsyncIterator[Chunk]:
        return
        yield


def spec(*safe: bool, ports: list[OutPort] | None = None) -> NodeSpec:
    """A node with a local input for each; whether it is ``safe``."""
    inputs = [
        InEdge(producer=f"p{i}", port="out", safe=each, carrier="local", queue=8, overflow="block")
        for i, each in enumerate(safe)
    ]
    return NodeSpec(name="n", kind="custom", config={}, inputs=inputs, outputs=ports or [], host="h", broker="b")


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not true():  # noqa: ASYNC110 - a file and other tasks are looked at
            await asyncio.sleep(0.005)


async def is_pending(task: asyncio.Task[None]) -> bool:
    done, _ = await asyncio.wait([task], timeout=0.1)
    return not done


async def prepared(tmp_path: Path, node: NodeSpec) -> OperatorRuntime:
    local = LocalBus(Hub())
    await local.open()
    runtime = OperatorRuntime("t", node, tmp_path, Links(None, None, local, lambda report: None), Nothing())
    await runtime.prepare()
    return runtime


def test_a_commit_that_nobody_waits_for_waits_for_its_time_however_much_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "LATE", 3600.0)

    async def scenario() -> None:
        late = Pace(hurried=False)
        late.done(1)
        waiting = asyncio.create_task(late.wait())
        assert await is_pending(waiting)
        late.done(100 * pace.MANY)
        assert await is_pending(waiting)
        late.press()
        async with asyncio.timeout(DEADLINE):
            await waiting
        late.begin()
        late.done(1)
        waiting = asyncio.create_task(late.wait())
        assert await is_pending(waiting)  # what was pressing is committed
        waiting.cancel()

    asyncio.run(scenario())


def test_a_commit_that_is_waited_for_is_gathered_for_shortly_or_until_much_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "LATE", 3600.0)

    async def scenario() -> None:
        soon = Pace(hurried=True)
        async with asyncio.timeout(DEADLINE):
            await soon.wait()
        monkeypatch.setattr(pace, "LINGER", 3600.0)
        waiting = asyncio.create_task(soon.wait())
        assert await is_pending(waiting)
        soon.done(pace.MANY)
        async with asyncio.timeout(DEADLINE):
            await waiting
            await soon.wait()  # as much is done: at once

    asyncio.run(scenario())


def test_the_books_of_a_node_with_fast_inputs_only_are_committed_with_nothing_to_hurry_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LINGER", 3600.0)  # so it is by the other pause that it happens
    assert pace.LATE == 0.05

    async def scenario() -> dict[str, Any]:
        node = await prepared(tmp_path, spec(False, False))
        commits = asyncio.create_task(node._commits())
        step = Step()
        step.entry.receive("p0.out", 3, 7)
        step.entry.passed = 7
        node._finished_step(step)
        node._moved.set()
        other = Journal(tmp_path / "n.journal")
        await until(lambda: other.get("books") is not None)
        commits.cancel()
        books: list[Any] = other.get("books")
        return {"received": books[0], "passed": books[3]}

    assert asyncio.run(scenario()) == {"received": {"p0.out": [3, 7]}, "passed": 7}


@pytest.mark.parametrize(("safe", "hurried"), [((), True), ((False,), False), ((False, True), True), ((True,), True)])
def test_who_is_in_a_hurry(tmp_path: Path, safe: tuple[bool, ...], hurried: bool) -> None:
    async def scenario() -> bool:
        return (await prepared(tmp_path, spec(*safe))).pace.hurried

    assert asyncio.run(scenario()) is hurried


PORT = {"local": False, "remote": {}, "publish": True}


@pytest.mark.parametrize(
    ("awaits", "port", "hurried"),
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"remote": {"a": True}}, False),
        (False, {"remote": {"a": True, "b": False}}, True),
        (False, {"handed": True}, True),
        (False, {"teams": {"team": Team(members=["a-1"], fast=True)}}, False),
        (False, {"teams": {"team": Team(members=["a-1"], fast=False)}}, True),
    ],
)
def test_a_source_is_in_a_hurry_where_its_far_end_or_a_reader_waits(
    tmp_path: Path, awaits: bool, port: dict[str, Any], hurried: bool
) -> None:
    async def scenario() -> bool:
        source = Silent()
        source.awaits = awaits
        ports = [OutPort(name="out", **{**PORT, **port})]
        links = Links(None, None, None, lambda report: None)
        return SourceRuntime("t", spec(ports=ports), tmp_path, links, source).pace.hurried

    assert asyncio.run(scenario()) is hurried
