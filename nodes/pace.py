"""When a node commits: soon where somebody waits for it, later where only its books do."""

from __future__ import annotations

import asyncio

LINGER = 0.005
"""Seconds over which done steps are gathered into one commit and one acknowledgement."""
LATE = 0.05
"""The same, where no producer waits for it and nothing is to be sent after it: only the books are late."""
MANY = 256
"""Messages whose steps are done at which a commit waits no longer: who sent them may be waiting for room."""


class Pace:
    """The pauses before a node's commits.

    :ivar hurried: somebody waits for each of them: a producer by a ``safe`` edge, a source's far end.
    """

    def __init__(self, *, hurried: bool) -> None:
        self.hurried = hurried
        self._pressed = False
        self._messages = 0
        self._enough = asyncio.Event()

    def done(self, messages: int) -> None:
        """A step of so many messages waits for the next commit."""
        self._messages += messages
        if self._messages >= MANY and (self.hurried or self._pressed):
            self._enough.set()

    def press(self) -> None:
        """Somebody waits for the next commit after all."""
        self._pressed = True
        self._enough.set()

    def begin(self) -> None:
        """A commit takes all that is done."""
        self._messages, self._pressed = 0, False

    async def wait(self) -> None:
        """Until the next commit is due; something is done already."""
        if not self.hurried and not self._pressed:
            await self._pause(LATE)
            if not self._pressed:
                return
        if self._messages < MANY:
            await self._pause(LINGER)

    async def _pause(self, seconds: float) -> None:
        self._enough.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._enough.set)
        try:
            await self._enough.wait()
        finally:
            timer.cancel()
