"""A node that waits for input begins with what comes while it is handed over, not when its task has its turn.

From a source to a sink of one process a message used to pass a turn of the event loop at each node, and with it whatever
else had one. What a node begins here is its step as its task does it; as soon as the step has to wait for something, the
task does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodes.inputs import Inputs


class Begun:
    """A coroutine that was begun outside of the task that awaits this.

    :param awaited: what it gave when it first had to wait.
    """

    __slots__ = ("_awaited", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        coroutine, awaited = self._coroutine, self._awaited
        while True:
            try:
                answer = yield awaited
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - whatever is thrown is for the coroutine
                resume: Callable[[Any], Any] = coroutine.throw
                given: Any = error
            else:
                resume, given = coroutine.send, answer
            try:
                awaited = resume(given)
            except StopIteration:
                return

    def close(self) -> None:
        """Nobody will await it."""
        self._coroutine.close()


class Prompt:
    """Begins steps for a runtime whose task waits in :meth:`nodes.inputs.Inputs.take`.

    A step must not ask, before it first waits, for the task that it runs in (``asyncio.timeout`` does).

    :param step: takes what has arrived and gives the step for it; None: the task is to do it.
    """

    def __init__(self, inputs: Inputs, step: Callable[[], Coroutine[Any, Any, None] | None]) -> None:
        self._inputs = inputs
        self._step = step
        self._begun: Begun | None = None
        self._error: BaseException | None = None

    def __call__(self) -> None:
        """Something has arrived."""
        inputs = self._inputs
        if not inputs.parked:
            return
        step = self._step()
        if step is not None:
            try:
                awaited = step.send(None)
            except StopIteration:
                return
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001 - raised again in the task, where it belongs
                self._error = error
            else:
                self._begun = Begun(step, awaited)
        inputs.parked = False
        inputs.wake()

    @property
    def left(self) -> bool:
        """The task is to :meth:`finish` something before it does anything else."""
        return self._begun is not None or self._error is not None

    async def finish(self) -> None:
        """Do the rest of a step that had to wait; raises what a step has raised."""
        error, begun = self._error, self._begun
        self._error = self._begun = None
        if error is not None:
            raise error
        if begun is not None:
            await begun

    def close(self) -> None:
        """The task ends."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.close()
