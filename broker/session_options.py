"""What every networked client is told: where the broker is, who we are, and how patient to be."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from broker.bus import Will
from schemas.errors import ConfigError, ConnectError, did_you_mean

OnState: TypeAlias = Callable[[str, str], None]
"""Called with (state, reason) from the event loop; must not block. States: ``connected``, ``disconnected``, and
``orphaned`` (messages of a resumed session that nobody subscribed to were refused)."""

PORTS = {"mqtt": 1883, "mqtts": 8883, "mqtt3": 1883, "mqtt3s": 8883, "ws": 80, "wss": 443, "unix": 0, "mqtt+unix": 0}
"""Default port by URL scheme."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker is.

    :param path: of the socket file (``unix``) or of the WebSocket resource (``ws``, ``wss``).
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def tls(self) -> bool:
        return self.scheme in {"mqtts", "mqtt3s", "wss"}

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def parse(url: str) -> Address:
    """Read a broker's URL: ``mqtt://[user[:password]@]host[:port]``, ``mqtts://…``, ``unix:///path`` (or
    ``mqtt+unix:///path``), ``ws://…/path``.

    User and password may be percent-encoded. ``str`` of the answer has no password in it.

    :raises ConfigError: not a URL of a broker.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"broker URL {url!r}: {error}") from None
    if parts.scheme not in PORTS or not url.startswith(f"{parts.scheme}://"):
        raise ConfigError(f"broker URL must start with a known scheme and ://{did_you_mean(parts.scheme, PORTS)}")
    if parts.scheme in {"unix", "mqtt+unix"}:
        if parts.netloc or len(parts.path) < 2:
            raise ConfigError("a unix URL needs an absolute path: unix:///run/broker.sock")
        return Address("unix", path=unquote(parts.path))
    if not parts.hostname:
        raise ConfigError(f"broker URL has no host: {parts.scheme}://host:{PORTS[parts.scheme]}")
    path = parts.path if parts.scheme in {"ws", "wss"} else ""
    if parts.query or parts.fragment or (parts.path not in {"", "/"} and not path):
        raise ConfigError(f"broker URL has more than host and port after {parts.scheme}://")
    return Address(
        parts.scheme,
        parts.hostname,
        PORTS[parts.scheme] if port is None else port,
        path,
        None if parts.username is None else unquote(parts.username),
        None if parts.password is None else unquote(parts.password),
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a client connects and what it promises.

    :param client_id: our name at the broker; empty: the broker gives one, which is kept for reconnects.
    :param user: user name; goes before one in the URL.
    :param password: likewise.
    :param ca: PEM file of the authorities that may sign the broker's certificate; None: those of the system.
    :param cert: PEM file of our own certificate (mutual TLS), with ``key`` its private key (None: in the same file).
    :param keep_alive: seconds without traffic after which a ping is sent; a peer that answers nothing for about one and
        a half of this is taken for dead. 0: never. The broker may impose another value.
    :param session_expiry: seconds that the broker keeps our session (subscriptions, unacknowledged QoS 1 deliveries)
        after the link is lost or closed; 0: not at all, so unacknowledged deliveries are not repeated.
    :param clean_start: forget a session left over at the first connection. None: yes, unless ``session_expiry`` > 0.
    :param receive_maximum: most QoS 1 and 2 deliveries unacknowledged at once, over all subscriptions, 1 … 65535.
    :param max_packet_size: largest packet taken, in bytes; the broker is told, and cut off if it sends a larger one.
    :param aliases: use topic aliases on what we send where the broker offers them.
    :param prompt: acknowledge to TCP at once what comes, at the price of a small packet and a system call for each piece. A
        broker that does not set TCP_NODELAY (mosquitto, unless told) sends a small message behind another one only when that was
        acknowledged, for which Linux takes 40 ms where nothing is sent back. For exchanges of questions and answers.
    :param patience: seconds that the first connection may take in all, retries included.
    :param timeout: seconds for one attempt to connect, and for the broker's answer to it.
    :param backoff: seconds before the first retry; doubled each time, up to a second, or a thirtieth of the time that the
        broker has been away, and never beyond ``max_backoff``. Up to half less at random.
    """

    client_id: str = ""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    keep_alive: int = 30
    session_expiry: int = 0
    clean_start: bool | None = None
    will: Will | None = None
    receive_maximum: int = 1024
    max_packet_size: int = 64 * 1024 * 1024
    aliases: bool = True
    prompt: bool = False
    patience: float = 30.0
    timeout: float = 10.0
    backoff: float = 0.1
    max_backoff: float = 30.0
    on_state: OnState | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("keep_alive", 0, 65535),
            ("session_expiry", 0, 0xFFFFFFFF),
            ("receive_maximum", 1, 65535),
            ("max_packet_size", 256, 268_435_460),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be {low} to {high}, got {getattr(self, name)}")

    @property
    def fresh(self) -> bool:
        """Whether the first connection starts a new session."""
        return self.session_expiry == 0 if self.clean_start is None else self.clean_start

    def signed_in(self, address: Address) -> Options:
        """These options with user and password of the URL where none are given beside it."""
        if self.user is not None or address.user is None:
            return self
        return replace(self, user=address.user, password=self.password or address.password)

    def tls(self) -> ssl.SSLContext:
        """A context that verifies the broker. Reads files: not for the event loop's thread.

        :raises ConnectError: a file is missing or not what it should be (permanent).
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ConnectError(f"authorities {self.ca}: {error}", permanent=True) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key)
            except (OSError, ssl.SSLError) as error:
                files = self.cert if self.key is None else f"{self.cert}, {self.key}"
                raise ConnectError(f"certificate {files}: {error}", permanent=True) from error
        return context

    def report(self, state: str, reason: str) -> None:
        """Tell the caller; what its callback raises goes to the loop's handler and ends nothing here."""
        if self.on_state is not None:
            try:
                self.on_state(state, reason)
            except Exception as error:  # noqa: BLE001 # the caller's code
                context = {"message": "on_state raised", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
