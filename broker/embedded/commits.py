"""Answers wait for the disk: what a turn of the loop changed is committed in a thread, then its answers leave.

One commit is under way at a time; what arrives meanwhile is one batch again. So the slower the disk, the more each commit
carries, and the loop never waits for it. QoS 0 messages and PINGRESP to clients that wait for nothing else are not held.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from broker.embedded.connection import Connection
from broker.embedded.core import Core

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


class Commits:
    """The commits of one broker.

    :param core: with a durable store.
    :param write: writes what may leave of a connection: its first ``free`` pieces.
    :param changed: called when there may be more to write.
    """

    def __init__(self, core: Core, write: Callable[[Connection], None], changed: Callable[[], None]) -> None:
        self._core = core
        self._store = core.store
        self._write = write
        self._changed = changed
        self._held: dict[Connection, None] = {}
        self._under_way: asyncio.Future[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, "broker-store")

    def hold(self, conn: Connection) -> bool:
        """Whether what ``conn`` has to write must wait; it is written later then, by itself."""
        if not conn.gated or self._store.failing or not (self._under_way is not None or self._store.pending):
            return False
        self._held[conn] = None
        return True

    def go(self) -> None:
        """Begin a commit, if there is something to commit and none is under way."""
        if self._under_way is not None or self._retry is not None:
            return
        held, self._held = self._held, {}
        if not self._store.pending:
            self._release(held)
            return
        for conn in held:
            conn.sealed = len(conn.out)
        self._begin(held)

    def _begin(self, held: dict[Connection, None]) -> None:
        loop = asyncio.get_running_loop()
        self._under_way = loop.run_in_executor(self._thread, self._store.write, self._store.seal())
        self._under_way.add_done_callback(partial(self._done, held))

    def _done(self, held: dict[Connection, None], result: asyncio.Future[None]) -> None:
        self._under_way = None
        if (error := result.exception()) is not None:
            self._fail(held, error)
            return
        if self._store.failing:
            log.warning("the store can be written again")
            self._store.failing = False
        for conn in held:
            conn.free = conn.sealed
            self._write(conn)
        self.go()
        self._changed()

    def _release(self, held: dict[Connection, None]) -> None:
        for conn in held:
            conn.free = len(conn.out)
            self._write(conn)

    def _fail(self, held: dict[Connection, None], error: BaseException) -> None:
        """Nothing false is said: who waits for an answer, and who has a session that is kept, is disconnected instead."""
        if not self._store.failing:
            log.error("nothing can be committed: %s; clients with sessions that are kept are refused", error)
        self._store.failing = True
        loop = asyncio.get_running_loop()
        held.update(self._held)
        self._held = {}
        for session in self._core.entrance.sessions.values():
            if session.stored and session.conn is not None:
                held[session.conn] = None
        for conn in held:
            conn.out.clear()
            conn.wrote(loop.time())
            conn.out.clear()
            conn.disconnect(0x97, "the broker cannot write its disk", loop.time())
            conn.free = len(conn.out)
            self._write(conn)
        self._retry = loop.call_later(RETRY_SECONDS, self._again)
        self._changed()

    def _again(self) -> None:
        self._retry = None
        self._begin({})

    async def finish(self) -> None:
        """Commit what is left, at the end; it is tried once more where it fails."""
        self.go()
        while self._under_way is not None:
            await asyncio.wait([self._under_way])
            await asyncio.sleep(0)  # its callbacks come first
            if self._retry is not None:
                break
            self.go()
        if self._retry is not None:
            self._retry.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
