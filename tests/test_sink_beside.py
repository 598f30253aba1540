"""A sink that does something beside writing: it is waited for, and its failure is the node's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from nodes.assignment import NodeSpec
from nodes.operator import Sink
from nodes.runners import SinkRuntime
from nodes.step import Links
from schemas.errors import RunError
from schemas.messages import Message


class Beside(Sink):
    """Its inputs have ended already."""

    def __init__(self, fails: bool = False) -> None:
        self.began, self.over, self.waited, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event(), False
        self.fails = fails

    async def write(self, messages: Sequence[Message]) -> None:
        raise AssertionError("there is nothing to write")

    async def beside(self) -> None:
        self.began.set()
        if self.fails:
            raise RunError("the machine failed")
        await self.over.wait()

    async def finish(self) -> None:
        self.waited.set()
        await self.over.wait()

    async def close(self) -> None:
        self.closed = True


async def runtime(sink: Sink, folder: Path, said: list[str]) -> SinkRuntime:
    spec = NodeSpec(name="n", kind="train", config={}, inputs=[], outputs=[], host="local", broker="local")
    made = SinkRuntime("t", spec, folder, Links(None, None, None, lambda report: said.append(report.state)), sink)
    await made.prepare()
    return made


@pytest.mark.parametrize(("how", "state"), [("over", "ended"), ("end", "ended"), ("stop", "stopped")])
def test_it_is_waited_for_until_it_is_over_or_somebody_says_so(
    how: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodes.inputs.Inputs.ended", True)
    said: list[str] = []

    async def scenario() -> Beside:
        sink = Beside()
        node = await runtime(sink, tmp_path, said)
        running = asyncio.create_task(node.run())
        async with asyncio.timeout(20):
            await sink.began.wait()
            await sink.waited.wait()
            assert not running.done()
            match how:
                case "over":
                    sink.over.set()
                case "end":
                    node.end()
                case "stop":
                    node.stop()
            await running
        return sink

    assert asyncio.run(scenario()).closed
    assert said[-1] == state


def test_its_failure_is_the_nodes(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = await runtime(Beside(fails=True), tmp_path, [])
        async with asyncio.timeout(20):
            await node.run()

    with pytest.raises(RunError, match="the machine failed"):
        asyncio.run(scenario())
