"""``python -m broker.embedded``: the broker as a process of its own.

Prints one line of JSON when it is ready, ``{"addresses": ["mqtt://127.0.0.1:1883"], "pid": 4711}``, and ends cleanly on
SIGTERM and SIGINT. A wrong configuration is one line of JSON on standard error, ``{"error": "…"}``, and exit code 2.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from broker.embedded.access import Rule, Users
from broker.embedded.limits import Limits
from broker.embedded.server import TLS, EmbeddedBroker, Listener
from broker.embedded.tuning import tune
from schemas.errors import ConfigError, PenstockError, Problem, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What ``serve`` is to serve; see :class:`broker.embedded.server.EmbeddedBroker`."""

    listen: tuple[Listener, ...] = (Listener(port=1883),)
    limits: Limits = field(default_factory=Limits)
    users: Users | None = None
    anonymous: bool = False
    acl: tuple[Rule, ...] | None = None
    data: Path | None = None


async def serve(config: Config, *, ready: Callable[[list[str]], None]) -> None:
    """Serve until SIGTERM or SIGINT. ``ready`` is called with the addresses once all are bound.

    :raises ConfigError: an address cannot be bound, or a file or the data folder cannot be used.
    """
    tune()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with EmbeddedBroker(
            config.listen,
            limits=config.limits,
            users=config.users,
            anonymous=config.anonymous,
            acl=config.acl,
            data=config.data,
        ) as broker:
            ready(broker.addresses)
            await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def run(main: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run`` on uvloop, where that is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def parse_listen(text: str, tls: TLS | None = None) -> Listener:
    """``host:port``, ``[v6]:port``, ``:port`` (every address), or ``unix:/path``.

    :raises ConfigError: it is none of these.
    """
    if text.startswith("unix:"):
        return Listener(unix=Path(text.removeprefix("unix:")))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(Problem(("listen",), f"{text!r}: expected host:port or unix:/path"))
    return Listener(host=host.strip("[]"), port=int(port), tls=tls)


def parse_limits(settings: list[str]) -> Limits:
    """``name=value`` settings of :class:`Limits`.

    :raises ConfigError: an unknown name, or a value that is not a positive number.
    """
    limits = Limits()
    names = {f.name for f in fields(Limits)}
    chosen: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names:
            raise ConfigError(Problem(("limit",), f"unknown limit {name!r}{did_you_mean(name, names)}"))
        number: float
        try:
            number = float(value) if isinstance(getattr(limits, name), float) else int(value)
        except ValueError:
            number = 0
        if number <= 0:
            raise ConfigError(Problem(("limit",), f"{setting!r}: expected a positive number"))
        chosen[name] = number
    return replace(limits, **chosen)


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Rules from a JSON file: ``[{"user": "sensor", "publish": ["plant/%u/#"], "subscribe": []}, …]``.

    :raises ConfigError: the file cannot be read, or is not of that form.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(("acl",), f"{path}: {error}")) from None
    if not isinstance(found, list):
        raise ConfigError(Problem(("acl",), f"{path}: expected a list of rules"))
    rules: list[Rule] = []
    for index, entry in enumerate(found):
        if not isinstance(entry, dict) or not isinstance(entry.get("user"), str):
            raise ConfigError(Problem(("acl", index), f'{path}: rule {index}: expected a map with a "user"'))
        if unknown := sorted(set(entry) - {"user", "publish", "subscribe"}):
            hint = did_you_mean(unknown[0], ("user", "publish", "subscribe"))
            raise ConfigError(Problem(("acl", index), f"{path}: rule {index}: unknown key {unknown[0]!r}{hint}"))
        lists = [entry.get(key, []) for key in ("publish", "subscribe")]
        if not all(isinstance(patterns, list) and all(isinstance(p, str) for p in patterns) for patterns in lists):
            raise ConfigError(Problem(("acl", index), f"{path}: rule {index}: expected lists of topic filters"))
        rules.append(Rule(entry["user"], tuple(lists[0]), tuple(lists[1])))
    return tuple(rules)


def configure(arguments: list[str]) -> Config:
    """A :class:`Config` from command line arguments.

    :raises ConfigError: a value is wrong. Unknown arguments end the process as ``argparse`` does, with code 2.
    """
    import argparse

    parser = argparse.ArgumentParser(prog="python -m broker.embedded", description="The embedded MQTT broker.")
    parser.add_argument("--listen", action="append", metavar="HOST:PORT", help="or unix:/path; may be given again")
    parser.add_argument("--listen-tls", action="append", metavar="HOST:PORT", help="the same with TLS")
    parser.add_argument("--cert", type=Path, help="PEM file of the broker's certificate")
    parser.add_argument("--key", type=Path, help="PEM file of its key")
    parser.add_argument("--client-ca", type=Path, help="PEM file of authorities: clients need a certificate")
    parser.add_argument("--users", type=Path, help="file of name:hash lines")
    parser.add_argument("--anonymous", action="store_true", help="with --users: let clients without a name in too")
    parser.add_argument("--acl", type=Path, help="JSON file of rules")
    parser.add_argument("--data", type=Path, help="folder to keep sessions and messages in over restarts")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help="e.g. connections=100")
    parser.add_argument("--hash-password", action="store_true", help="print the hash of a password read from stdin")
    given = parser.parse_args(arguments)
    if given.hash_password:
        from broker.embedded.access import hash_password

        print(hash_password(sys.stdin.readline().rstrip("\n")))
        raise SystemExit(0)
    tls: TLS | None = None
    if given.listen_tls:
        if given.cert is None or given.key is None:
            raise ConfigError(Problem(("listen-tls",), "a TLS listener needs --cert and --key"))
        tls = TLS(certificate=given.cert, key=given.key, clients=given.client_ca)
    listen = [parse_listen(text) for text in given.listen or ()]
    listen += [parse_listen(text, tls) for text in given.listen_tls or ()]
    return Config(
        listen=tuple(listen) or (Listener(port=1883),),
        limits=parse_limits(given.limit),
        users=Users.read(given.users) if given.users else None,
        anonymous=given.anonymous,
        acl=read_rules(given.acl) if given.acl else None,
        data=given.data,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""

    def ready(addresses: list[str]) -> None:
        print(json.dumps({"addresses": addresses, "pid": os.getpid()}), flush=True)

    try:
        run(serve(configure(sys.argv[1:] if arguments is None else arguments), ready=ready))
    except PenstockError as error:
        print(json.dumps({"error": str(error)}), file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
