"""The broker on sockets: asyncio around :class:`broker.embedded.core.Core`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, cast

from broker.embedded.access import Authorize, Rule, Rules, Users
from broker.embedded.commits import Commits
from broker.embedded.connection import Connection, State
from broker.embedded.core import Core
from broker.embedded.limits import Limits
from broker.embedded.listeners import TLS, Listener, common_name, remove_stale
from broker.embedded.store import Store
from schemas.errors import ConfigError, Problem

__all__ = ["TLS", "EmbeddedBroker", "Listener"]

log = logging.getLogger(__name__)

_HIGH_WATER = 1 << 20
"""Bytes in a transport's own buffer above which the broker keeps what is for that client to itself."""
_LINGER_SECONDS = 2.0
_SPARE = 64
"""Connections above the limit that may come so far as to be told that there are too many."""
_JOIN_BELOW = 1 << 16


class EmbeddedBroker:
    """An MQTT 5 and 3.1.1 broker in this process. Use it as ``async with``.

    :param listen: listeners; by default one on a free port of 127.0.0.1.
    :param limits: what clients may use.
    :param users: user name -> password hash (:func:`broker.embedded.access.hash_password`), or :class:`Users`. None lets
        everybody in.
    :param anonymous: with ``users``: whether clients without a user name are let in.
    :param acl: rules, or a callable; None allows everything.
    :param store: what outlives a restart; by default nothing does.
    :param data: folder for a :class:`broker.embedded.sqlite_store.SqliteStore`, instead of ``store``.
    """

    def __init__(
        self,
        listen: Sequence[Listener] = (Listener(),),
        *,
        limits: Limits | None = None,
        users: Mapping[str, str] | Users | None = None,
        anonymous: bool = False,
        acl: Sequence[Rule] | Authorize | None = None,
        store: Store | None = None,
        data: Path | None = None,
    ) -> None:
        self._listen = tuple(listen)
        self._limits = limits or Limits()
        self._users = Users(users) if isinstance(users, Mapping) else users
        self._anonymous = anonymous
        self._authorize = Rules(acl) if isinstance(acl, Sequence) else acl
        self._store = store or Store()
        self._data = data
        self._commits: Commits | None = None
        self._servers: list[asyncio.Server] = []
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._flushing = False
        self._core: Core | None = None
        self._unix: list[Path] = []
        self.addresses: list[str] = []
        """URLs of the listeners, in their order: ``mqtt://host:port``, ``mqtts://…``, ``mqtt+unix:///path``."""

    @property
    def core(self) -> Core:
        """The broker itself; there while it runs."""
        if self._core is None:
            raise RuntimeError("the broker is not running")
        return self._core

    @property
    def url(self) -> str:
        """URL of the first listener."""
        return self.addresses[0]

    @property
    def port(self) -> int:
        """TCP port of the first listener that has one."""
        for server in self._servers:
            for sock in server.sockets:
                if sock.family != socket.AF_UNIX:
                    return cast("int", sock.getsockname()[1])
        raise RuntimeError("no TCP listener is open")

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Bind all listeners and serve.

        :raises ConfigError: an address cannot be bound, a certificate or the store cannot be used.
        """
        loop = asyncio.get_running_loop()
        if self._data is not None:
            from broker.embedded.sqlite_store import SqliteStore  # only who keeps something pays for SQLite

            self._store = SqliteStore(self._data)
        self._core = Core(
            limits=self._limits,
            users=self._users,
            anonymous=self._anonymous,
            authorize=self._authorize,
            store=self._store,
            now=loop.time(),
        )
        if self._store.durable:
            self._commits = Commits(self._core, _write, self.schedule)
        try:
            for index, listener in enumerate(self._listen):
                try:
                    await self._bind(listener)
                except (OSError, OverflowError) as error:
                    where = listener.unix or f"{listener.host}:{listener.port}"
                    raise ConfigError(Problem(("listen", index), f"{where} cannot be bound: {error}")) from None
        except BaseException:
            await self.close()
            raise
        self._arm()

    async def _bind(self, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        context = listener.tls.context() if listener.tls else None
        if listener.unix is not None:
            with contextlib.suppress(FileNotFoundError):
                remove_stale(listener.unix)
            server = await loop.create_unix_server(lambda: _Client(self), str(listener.unix), ssl=context)
            self._unix.append(listener.unix)
            self.addresses.append(f"mqtt+unix://{listener.unix}")
        else:
            server = await loop.create_server(
                lambda: _Client(self), listener.host or None, listener.port, ssl=context, backlog=512
            )
            name = server.sockets[0].getsockname()
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            self.addresses.append(f"{'mqtts' if context else 'mqtt'}://{host}:{name[1]}")
        self._servers.append(server)

    async def close(self) -> None:
        """Tell the clients (DISCONNECT 0x8B), close, and wait until all is closed. Idempotent."""
        core, self._core = self._core, None
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        if core is None:
            return
        now = asyncio.get_running_loop().time()
        core.shut_down(now)
        for client in list(self._clients):
            client.stop(now)
        self._flush(core)
        commits, self._commits = self._commits, None
        if commits is not None:
            await commits.finish()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await asyncio.sleep(0)  # connections that are accepted at this moment become clients, and are refused
        if waiting := [client.closed for client in self._clients]:
            await asyncio.wait(waiting, timeout=_LINGER_SECONDS)
        for client in list(self._clients):
            client.abort()
        while remaining := [client.closed for client in self._clients]:
            await asyncio.wait(remaining)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for server in servers:
            await server.wait_closed()
        for path in self._unix:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self._unix.clear()
        self.addresses.clear()
        core.store.close()

    # What the clients' protocols call

    def schedule(self) -> None:
        """Write what there is at the end of this turn of the loop, once for all that was read in it."""
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._flushing = False
        if self._core is not None:
            self._flush(self._core)
            self._arm()

    def _flush(self, core: Core) -> None:
        """Write what is to be written, or have it wait for its commit; then see to passwords and paused readers."""
        now = asyncio.get_running_loop().time()
        for _ in range(2):
            # Writing makes room, room lets queued messages out: they go in the second round, later ones in the next turn.
            dirty, core.dirty = core.dirty, []
            if not dirty:
                break
            for conn in dirty:
                conn.dirty = False
                if self._commits is None or not self._commits.hold(conn):
                    conn.free = len(conn.out)
                    cast("_Client", conn.owner).flush(now)
        if self._commits is not None:
            self._commits.go()
        if core.dirty:
            self.schedule()
        resumed, core.resumed = core.resumed, []
        for conn in resumed:
            cast("_Client", conn.owner).resume(now)
        checks, core.checks = core.checks, []
        for conn in checks:
            task = asyncio.get_running_loop().create_task(self._check(core, conn))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _check(self, core: Core, conn: Connection) -> None:
        """Check a password in a thread: it takes tens of milliseconds on purpose."""
        packet, users = conn.connect, core.users
        if packet is None or users is None:
            return
        good = await asyncio.to_thread(users.check, packet.username or "", packet.password or b"")
        core.entrance.checked(conn, good, asyncio.get_running_loop().time())
        self.schedule()

    def _arm(self) -> None:
        """Have :meth:`Core.tick` called when its next timer is due."""
        if self._core is None or (due := self._core.timers.next) is None:
            return
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = asyncio.get_running_loop().call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._core is not None:
            self._core.tick(asyncio.get_running_loop().time())
            self._turn()


def _write(conn: Connection) -> None:
    client = cast("_Client", conn.owner)
    client.flush(asyncio.get_running_loop().time())


class _Client(asyncio.Protocol):
    """One client's socket."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._blocked = False
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.conn: Connection | None = None
        """None where it is refused at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        core, clients = self._broker._core, self._broker._clients
        clients.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if core is None or len(clients) > core.limits.connections + _SPARE:
            self._transport.abort()
            return
        self.conn = core.accept(
            self._loop.time(),
            identity=common_name(transport.get_extra_info("peercert")),
            peer=str(transport.get_extra_info("peername") or "unix"),
        )
        self.conn.owner = self
        self._broker._arm()

    def data_received(self, data: bytes) -> None:
        conn = self.conn
        if conn is None:
            return
        conn.receive(data, self._loop.time())
        if conn.paused and self._transport is not None:
            self._transport.pause_reading()
        self._broker.schedule()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        conn = self.conn
        if conn is None:
            return
        if conn.free:
            self.flush(self._loop.time())
        if conn.out and not conn.dirty:
            conn.dirty = True
            conn.core.dirty.append(conn)
        self._broker.schedule()

    def flush(self, now: float) -> None:
        """Give the transport what may be written, unless it has enough; close if that was all."""
        conn, transport = self.conn, self._transport
        if conn is None:
            return
        if transport is None or transport.is_closing():
            conn.out = []
            conn.sealed = conn.free = 0
            return
        if not self._blocked or conn.closing:
            count = conn.free
            out = conn.out if count == len(conn.out) else conn.out[:count]
            if len(out) == 1:
                transport.write(out[0])
            elif out:
                if conn.pending < _JOIN_BELOW:
                    transport.write(b"".join(out))
                else:
                    transport.writelines(out)
            conn.wrote(now, count)
        if conn.closing and not conn.out:
            transport.close()
            self._loop.call_later(_LINGER_SECONDS, self.abort)

    def resume(self, now: float) -> None:
        """Read again, beginning with what was left."""
        conn = self.conn
        if self._transport is None or conn is None or conn.state is State.CLOSED:
            return
        conn.proceed(now)
        if not conn.paused:
            self._transport.resume_reading()
        self._broker.schedule()

    def stop(self, now: float) -> None:
        """The broker ends: close, whatever state the client is in."""
        if self.conn is None:
            self.abort()
        else:
            self.conn.close(now)

    def abort(self) -> None:
        """Close without waiting for a client that does not read."""
        if self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._broker._clients.discard(self)
        if not self.closed.done():
            self.closed.set_result(None)
        if self.conn is not None:
            self.conn.close(self._loop.time())
            self._broker.schedule()
