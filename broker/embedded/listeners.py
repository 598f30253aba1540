"""Where clients come in: addresses and TLS."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import ConfigError, Problem

if TYPE_CHECKING:
    import ssl


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """What a TLS listener shows and asks for.

    :param certificate: PEM file of the broker's certificate (and chain).
    :param key: PEM file of its key.
    :param clients: PEM file of the authorities that sign client certificates. Clients must then have one, and its
        common name is their user name.
    """

    certificate: Path
    key: Path
    clients: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The context for a server.

        :raises ConfigError: a file cannot be read or is not what it should be.
        """
        import ssl  # only who uses TLS pays for it

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.clients is not None:
                context.load_verify_locations(self.clients)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(Problem(("tls",), f"certificate files cannot be used: {error}")) from None
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Where clients come in.

    :param host: address to bind.
    :param port: TCP port; 0 takes a free one.
    :param tls: None for plain TCP.
    :param unix: path of a unix socket instead of host and port.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls: TLS | None = None
    unix: Path | None = None


def common_name(certificate: Any) -> str | None:
    """The common name in a client certificate as ``SSLSocket.getpeercert`` gives it."""
    for part in (certificate or {}).get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return None


def remove_stale(path: Path) -> None:
    """Remove a unix socket that nobody listens on any more.

    :raises OSError: somebody listens on it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError("another broker listens there")
