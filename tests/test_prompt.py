"""Steps that begin while messages are handed over, and go on in their own task where they have to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from nodes.prompt import Begun, Prompt


class Waiting:
    """Stands where :class:`nodes.inputs.Inputs` stands: a task that waits for items."""

    def __init__(self) -> None:
        self.parked = False
        self.woken = asyncio.Event()

    @property
    def stirred(self) -> bool:
        """What comes now is to wait for the task."""
        return self.woken.is_set() and not self.parked

    def wake(self) -> None:
        self.woken.set()


def begun(coroutine: Coroutine[Any, Any, None]) -> Begun:
    return Begun(coroutine, coroutine.send(None))


def test_the_rest_of_a_coroutine_is_done_by_the_task_that_awaits_it() -> None:
    async def main() -> None:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        seen: list[object] = []

        async def step() -> None:
            seen.append(await done)
            await asyncio.sleep(0)
            seen.append(asyncio.current_task())

        rest = begun(step())
        task = asyncio.create_task(_await(rest))
        await asyncio.sleep(0)
        done.set_result(7)
        await task
        assert seen == [7, task]

    asyncio.run(main())


def test_what_it_waited_for_may_be_there_before_anybody_awaits_the_rest() -> None:
    async def main() -> None:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        seen: list[int] = []

        async def step() -> None:
            seen.append(await done)

        rest = begun(step())
        done.set_result(1)
        await asyncio.sleep(0)
        await rest
        assert seen == [1]

    asyncio.run(main())


def test_errors_and_cancellation_reach_the_coroutine() -> None:
    async def main() -> None:
        failing: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        ended: list[str] = []

        async def step(name: str, awaited: asyncio.Future[int]) -> None:
            try:
                await awaited
            finally:
                ended.append(name)

        rest = begun(step("failed", failing))
        failing.set_exception(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await rest
        task = asyncio.create_task(_await(begun(step("cancelled", asyncio.get_running_loop().create_future()))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        begun(step("closed", asyncio.get_running_loop().create_future())).close()
        assert ended == ["failed", "cancelled", "closed"]

    asyncio.run(main())


def test_a_step_begins_only_where_its_task_waits_and_fails_in_it() -> None:
    async def main() -> None:
        inputs = Waiting()
        steps: list[str] = []
        free = asyncio.Event()

        async def quick() -> None:
            steps.append("quick")

        async def slow() -> None:
            await free.wait()
            steps.append("slow")

        async def wrong() -> None:
            raise ValueError("wrong")

        coming: list[Any] = [quick, slow, wrong]
        prompt = Prompt(inputs, lambda: coming.pop(0)())  # type: ignore[arg-type]
        prompt()
        assert steps == []
        inputs.parked = True
        prompt()
        assert steps == ["quick"]
        assert (prompt.left, inputs.stirred) == (False, False)  # its task need not know
        prompt()
        assert (prompt.left, inputs.stirred) == (True, True)
        free.set()
        await prompt.finish()
        assert steps == ["quick", "slow"]
        inputs.parked = True
        prompt()
        with pytest.raises(ValueError, match="wrong"):
            await prompt.finish()
        assert not prompt.left

    asyncio.run(main())


async def _await(rest: Begun) -> None:
    await rest
