"""The broker without I/O: connections are given bytes and the present time, and leave bytes to be written.

The server (or a test, in virtual time) makes a :class:`Connection` for each client with :meth:`Core.accept`, calls
``receive`` and ``close`` on it, calls :meth:`Core.tick` when :attr:`Core.timers` says so, and after each of these looks at
what there is to do: ``dirty`` (connections with something to write, or to close), ``checks`` (passwords to be
checked) and ``resumed`` (connections to be read again).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from broker.embedded.access import Authorize, Users
from broker.embedded.connection import Connection, State
from broker.embedded.desk import Desk
from broker.embedded.entrance import Entrance
from broker.embedded.limits import Limits
from broker.embedded.router import Router
from broker.embedded.sessions import Session
from broker.embedded.stats import Stats
from broker.embedded.store import Store
from broker.embedded.system import System
from broker.embedded.timers import Timers

_SWEEP_SECONDS = 60.0


class Core:
    """The broker.

    :param limits: what clients may use.
    :param users: None lets everybody in, with any user name.
    :param anonymous: with ``users``: whether clients without a user name are let in.
    :param authorize: None allows everything (but publishing to ``$SYS``).
    :param store: what outlives a restart.
    :param now: broker time, seconds; only differences count.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        users: Users | None = None,
        anonymous: bool = False,
        authorize: Authorize | None = None,
        store: Store | None = None,
        now: float = 0.0,
    ) -> None:
        self.limits = limits or Limits()
        self.users = users
        self.anonymous = anonymous
        self.authorize = authorize
        self.store = store or Store()
        self.stats = Stats()
        self.timers = Timers()
        self.router = Router(self.limits, self.stats, self.store)
        self.entrance = Entrance(self)
        self.desk = Desk(self)
        self.system = System(self, now)
        self.dirty: list[Connection] = []
        self.checks: list[Connection] = []
        self.resumed: list[Connection] = []
        self.ending = False
        sessions, retained = self.store.load(now)
        for session in sessions:
            self.entrance.restore(session, now)
        for message in retained:
            self.router.retained.put(message)
        self.timers.at(now + _SWEEP_SECONDS, self._sweep)

    def accept(self, now: float, *, identity: str | None = None, peer: str = "") -> Connection:
        """A client has connected."""
        return Connection(self, now, identity=identity, peer=peer)

    def tick(self, now: float) -> None:
        """Do what is due."""
        self.timers.run(now)

    def shut_down(self, now: float) -> None:
        """Tell every client that the broker ends (DISCONNECT 0x8B). Sessions and wills are left as they are: clients come
        back, and a planned end is no fault of theirs."""
        self.ending = True
        for session in list(self.entrance.sessions.values()):
            if session.conn is not None:
                session.conn.disconnect(0x8B, "the broker is shutting down", now)

    def allows(self, client_id: str, user: str | None, action: Literal["publish", "subscribe"], topic: str) -> bool:
        """Whether a client may publish to a topic, or subscribe to a filter."""
        if action == "publish" and topic.startswith("$SYS/"):
            return False
        return self.authorize is None or self.authorize(client_id, user, action, topic)

    def watch(self, session: Session, now: float) -> None:
        """See to it that ``session``, which holds publishers up, goes on taking messages."""
        self.timers.at(now + self.limits.stall_seconds, self._stalled(session))

    def _stalled(self, session: Session) -> Callable[[float], None]:
        def look(now: float) -> None:
            conn = session.conn
            if not session.slow or conn is None or conn.state is not State.OPEN:
                return
            due = session.progress + self.limits.stall_seconds
            if now >= due:
                conn.disconnect(0x97, "the queue is full and nothing is acknowledged", now)
            else:
                self.timers.at(due, look)

        return look

    def _sweep(self, now: float) -> None:
        for topic in self.router.retained.sweep(now):
            self.store.unretain(topic)
        self.timers.at(now + _SWEEP_SECONDS, self._sweep)
