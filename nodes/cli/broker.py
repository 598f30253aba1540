"""``penstock broker``: the embedded MQTT broker by itself, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import getpass
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from broker.embedded.server import TLS, EmbeddedBroker, Listener


def command(
    listen: Annotated[
        list[str] | None,
        typer.Option(help="Address and port, or unix:/path; may be given more than once. Default: 127.0.0.1:1883."),
    ] = None,
    tls_listen: Annotated[
        list[str] | None, typer.Option(help="Likewise, for TLS; needs --cert and --key.", show_default=False)
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="PEM file of the broker's certificate.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    clients: Annotated[
        Path | None, typer.Option(help="PEM file of authorities: TLS clients must have a certificate of theirs.")
    ] = None,
    users: Annotated[Path | None, typer.Option(help="File of lines name:hash; see --hash-password.")] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="With --users: let nameless clients in too.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder to keep sessions, their messages and retained ones in over restarts.")
    ] = None,
    max_packet: Annotated[str | None, typer.Option(help="Largest packet taken, e.g. 16MB.")] = None,
    max_connections: Annotated[int | None, typer.Option(min=1, help="Most clients at once.")] = None,
    max_queue: Annotated[int | None, typer.Option(min=1, help="Most messages kept for one client.")] = None,
    hash_password: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Print the line of --users for NAME, its password read from stdin; and end."),
    ] = None,
) -> None:
    """Run the embedded MQTT 5 broker by itself until Ctrl-C. It serves MQTT 3.1.1 clients too."""
    if hash_password is not None:
        print(user_line(hash_password))
        return
    from broker.embedded.__main__ import run
    from broker.embedded.access import Users
    from broker.embedded.server import TLS, EmbeddedBroker

    tls = None
    if tls_listen or cert or key or clients:
        if not (tls_listen and cert and key):
            raise ConfigError("TLS needs --tls-listen, --cert and --key together")
        tls = TLS(certificate=cert, key=key, clients=clients)
    plain = listen if listen is not None else [] if tls_listen else ["127.0.0.1:1883"]
    listeners = [_listener(text, None) for text in plain] + [_listener(text, tls) for text in tls_listen or ()]
    broker = EmbeddedBroker(
        listeners,
        limits=_limits(packet_bytes=_bytes(max_packet), connections=max_connections, queue_messages=max_queue),
        users=None if users is None else Users.read(users),
        anonymous=anonymous,
        data=data,
    )
    run(_serve(broker))


def user_line(name: str) -> str:
    """``name:hash``, as the users' file has it; the password comes from a prompt, or from stdin where that is a pipe.

    :raises ConfigError: there is no password, or the name cannot stand in the file.
    """
    from broker.embedded.access import hash_password

    if not name or ":" in name or name.startswith("#") or not name.isprintable():
        raise ConfigError(f"{name!r} cannot be a user name")
    password = getpass.getpass("Password: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise ConfigError("no password was given")
    return f"{name}:{hash_password(password)}"


def _listener(text: str, tls: TLS | None) -> Listener:
    from broker.embedded.server import Listener

    if text.startswith("unix:"):
        return Listener(unix=Path(text.removeprefix("unix:")), tls=tls)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"expected an address and a port, e.g. 127.0.0.1:1883, got {text!r}")
    return Listener(host=host.strip("[]"), port=int(port), tls=tls)


def _bytes(text: str | None) -> int | None:
    from schemas.units import size

    try:
        return None if text is None else size(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise ConfigError(f"--max-packet: {error}") from None


def _limits(**wanted: int | None) -> Any:
    from broker.embedded.limits import Limits

    return Limits(**{name: value for name, value in wanted.items() if value is not None})


async def _serve(broker: EmbeddedBroker) -> None:
    from broker.embedded.tuning import tune

    tune()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with broker:
        for address in broker.addresses:
            print(f"listening on {address}", flush=True)
        await stop.wait()
