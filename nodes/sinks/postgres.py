"""Rows in a table of a PostgreSQL database, each exactly once: the key is the message's id and the row's number in it.

The table is made, gets new columns as they come, and a column becomes wider where its numbers do. A server that is away is
waited for; values that it refuses are found by halving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from nodes.operator import Context, Flow, Sink
from nodes.options import Options
from nodes.sinks._postgres_table import Table, rounds
from schemas.errors import (
    ConfigError,
    ConnectError,
    MissingError,
    PenstockError,
    Problem,
    RejectedError,
    RunError,
    SinkAwayError,
)
from schemas.messages import Message
from schemas.rows import ROW_TYPES
from schemas.topology_parts import Secret
from schemas.units import Duration

if TYPE_CHECKING:
    import ssl

EXTRA = "postgres"
_SLACK = 5.0
"""Seconds after which we give a statement up that the server itself should have given up."""


class Config(Options):
    """Options of the ``postgres`` sink."""

    url: str | Secret = Field(
        description="postgres://host:port/database; or where such a URL is to be found, which may hold a password then"
    )
    user: str | None = Field(None, min_length=1, description="user name, where the URL has none")
    password: Secret | None = Field(None, description="where the password is to be found")
    table: str | None = Field(
        None, min_length=1, max_length=127, description="table or schema.table; the node's name if left out"
    )
    tls: Literal["disable", "prefer", "require", "verify-full"] | None = Field(
        None,
        description="require: encrypted; verify-full: and the server's certificate is checked; left out: as the URL's "
        "sslmode says, or prefer",
    )
    ca: str | None = Field(None, description="file of the authorities that the certificate is checked with; PEM")
    cert: str | None = Field(None, description="file of our certificate, PEM")
    key: str | None = Field(None, description="file of our certificate's key, PEM")
    connect_timeout: Duration = Field(10 * 10**9, gt=0, description="wait for a connection at most")
    timeout: Duration = Field(30 * 10**9, ge=10**6, description="wait for one statement, and for its locks, at most")
    max_columns: int = Field(500, ge=1, le=1500, description="most columns; messages that need more are rejected")

    def check(self, context: Context) -> None:
        if isinstance(self.url, str) and (wrong := _wrong(self.url)):
            raise ConfigError(Problem(("url",), wrong))
        if not all((self.table or "x").split(".", 1)):
            raise ConfigError(Problem(("table",), f"expected table or schema.table, got {self.table!r}"))
        for name in ("ca", "cert", "key"):
            path = getattr(self, name)
            if path is not None and not context.path(path).is_file():
                raise ConfigError(Problem((name,), f"no such file: {context.path(path)}"))
        if (self.cert is None) != (self.key is None):
            raise ConfigError(Problem((), "'cert' and 'key' are given together"))
        if self.tls in {"disable", "prefer"} and (self.ca or self.cert):
            raise ConfigError(Problem(("tls",), "'ca', 'cert' and 'key' need tls: require or verify-full"))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {}

    def accepts(self) -> frozenset[str]:
        return ROW_TYPES


def _wrong(url: str) -> str:
    """What is wrong with a URL, or nothing. Several hosts (``a:1,b:2``) are fine, so the port is not looked at."""
    try:
        parts = urlsplit(url)
        if parts.password is not None:
            return "no password in a URL; say password: {env: NAME}, or the whole url: {env: NAME}"
    except ValueError as error:
        return f"no URL: {error}"
    if parts.scheme not in {"postgres", "postgresql"}:
        return f"expected postgres://host/database, got {url!r}"
    return ""


def build(config: Config, context: Context) -> Sink:
    """A :class:`PostgresSink`.

    :raises MissingError: asyncpg is not installed.
    :raises ConfigError: a secret is not where it should be, or holds no URL.
    """
    try:
        import asyncpg  # type: ignore[import-untyped] # noqa: F401 - has no py.typed; found out now, not at the first message
    except ImportError:
        raise MissingError("asyncpg", extra=EXTRA) from None
    url, password = config.url, None
    if isinstance(url, Secret):
        try:
            url = url.read(context.base)
        except ConfigError as error:
            raise error.under("url") from None
        if urlsplit(url).scheme not in {"postgres", "postgresql"}:
            raise ConfigError(Problem(("url",), "what is there is no postgres:// URL"))
    if config.password is not None:
        try:
            password = config.password.read(context.base)
        except ConfigError as error:
            raise error.under("password") from None
    return PostgresSink(config, context, url, password)


_REFUSED = ("28", "3D", "3F", "42501")
"""SQLSTATEs that speak of us: password, rights, no such database or schema."""
_DATA = ("22", "23", "54")
"""SQLSTATEs that speak of the data: values, constraints, sizes."""
_AWAY = ("08", "25006", "40", "42703", "42804", "42P01", "53", "55", "57", "58")
"""SQLSTATEs that speak of the server: going, coming, full, busy, locked, read-only for now, in a conflict; or of a table that
somebody else is changing."""


class PostgresSink(Sink):
    """One connection, made anew when it is lost; one statement at a time, each a transaction."""

    max_batch = 4096

    def __init__(self, config: Config, context: Context, url: str, password: str | None) -> None:
        self._config = config
        self._context = context
        self._url = url
        self._password = password
        self._name = config.table or context.node
        self._timeout = config.timeout / 1e9
        self._connection: Any = None
        self._table: Table | None = None

    async def open(self) -> None:
        """:raises ConnectError: the server refuses us: user, password, rights, database, certificate.
        :raises RunError: the table is not ours.
        :raises SinkAwayError: the server is away, starting, or has no room for us.
        """
        await self._connect()

    async def write(self, messages: Sequence[Message]) -> None:
        rejected: list[tuple[int, str]] = []
        try:
            if self._table is None or self._connection.is_closed():
                await self._connect()
            for part in rounds(messages):
                await self._insert(messages, part, rejected)
        except ConnectError as error:  # it let us in before: a week of rows is not given up for a changed password
            raise SinkAwayError(str(error)) from error
        if rejected:
            raise RejectedError(sorted(rejected))

    async def close(self) -> None:
        connection, self._connection, self._table = self._connection, None, None
        if connection is not None and not connection.is_closed():
            try:
                await connection.close(timeout=_SLACK)
            except _errors():
                connection.terminate()

    async def _connect(self) -> None:
        import asyncpg

        self._drop()
        config = self._config
        options: dict[str, Any] = {"server_settings": {"application_name": f"penstock {self._context.node}"[:63]}}
        if config.user is not None:
            options["user"] = config.user
        if self._password is not None:
            options["password"] = self._password
        if (tls := self._tls()) is not None:
            options["ssl"] = tls
        try:
            self._connection = await asyncpg.connect(self._url, timeout=config.connect_timeout / 1e9, **options)
            await self._connection.execute(
                "SELECT set_config('statement_timeout', $1, false),"
                # when a write returns it is on the disk, whatever the server's own default
                " CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END",
                f"{config.timeout // 10**6}ms",
                timeout=self._timeout + _SLACK,
            )
            table = Table(self._connection, self._name, config.max_columns, self._timeout + _SLACK)
            await table.prepare()
        except BaseException as error:
            self._drop()
            if isinstance(error, _errors()):
                raise self._said(error) from error
            raise
        self._table = table

    def _tls(self) -> ssl.SSLContext | str | bool | None:
        """What asyncpg is to do; None: as the URL says."""
        config = self._config
        mode = config.tls or (
            "verify-full" if config.ca is not None else "require" if config.cert is not None else None
        )
        if mode in {None, "prefer"}:
            return mode
        if mode == "disable":
            return False
        import ssl

        context = ssl.create_default_context(cafile=str(self._context.path(config.ca)) if config.ca else None)
        if mode == "require":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE if config.ca is None else ssl.CERT_REQUIRED
        if config.cert is not None and config.key is not None:
            context.load_cert_chain(self._context.path(config.cert), self._context.path(config.key))
        return context

    async def _insert(self, messages: Sequence[Message], part: list[int], rejected: list[tuple[int, str]]) -> None:
        """Insert some; if the data of some are refused, halve until only those are left out."""
        table = self._table
        assert table is not None  # noqa: S101 - write() has connected
        try:
            await table.insert([messages[i] for i in part])
        except _errors() as error:
            if not _of_data(error):
                self._drop()  # begin anew: a connection is of no use after most of these
                raise self._said(error) from error
            if len(part) == 1:
                rejected.append((part[0], f"{self._name}: {_text(error)}"))
                return
            half = len(part) // 2
            await self._insert(messages, part[:half], rejected)
            await self._insert(messages, part[half:], rejected)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
        self._connection = self._table = None

    def _said(self, error: BaseException) -> PenstockError:
        """What an error means for whoever runs us."""
        import ssl

        state, where = getattr(error, "sqlstate", None) or "", _without_password(self._url)
        text = f"{where}: {_text(error)}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return ConnectError(f"{where}: its certificate is not accepted: {error.verify_message}", permanent=True)
        if state.startswith(_REFUSED):
            return ConnectError(text, permanent=True)
        if isinstance(error, TimeoutError | asyncio.TimeoutError):
            return SinkAwayError(f"{where}: no answer in time")
        if not state or state.startswith(_AWAY):
            return SinkAwayError(text)
        return RunError(text)


def _errors() -> tuple[type[Exception], ...]:
    """What a connection, and values that it cannot take, may raise."""
    import asyncpg

    own = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
    return OSError, OverflowError, TypeError, ValueError, *own  # a TimeoutError is an OSError


def _of_data(error: BaseException) -> bool:
    """Whether other data would be taken."""
    state = getattr(error, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_DATA)
    return isinstance(error, OverflowError | TypeError | ValueError)


def _text(error: BaseException) -> str:
    """An error in one line."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
