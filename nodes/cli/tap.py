"""``penstock tap``: what travels on a broker, decoded, while it travels."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from broker.bus import Bus, Delivery, Subscription
    from schemas.topology import Topology


def command(
    where: Annotated[
        str, typer.Argument(help="A broker's URL (mqtt://host), or a topology's YAML file.", show_default=False)
    ],
    what: Annotated[
        str | None,
        typer.Argument(
            help="A topic filter; with a topology also one of its nodes, or node.port. Default: everything.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="End after so many messages.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    broker: Annotated[str | None, typer.Option(help="Name of the topology's broker, where it has several.")] = None,
    user: Annotated[str | None, typer.Option(help="User name; the password is taken from PENSTOCK_PASSWORD.")] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file of the authorities to trust.")] = None,
    cert: Annotated[Path | None, typer.Option(help="PEM file of our certificate.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the run's state; default: .penstock/<topology> beside the file.")
    ] = None,
) -> None:
    """Show what travels on a topic, decoded, live. Ctrl-C ends it."""
    access: dict[str, Any] = {"user": user, "password": os.environ.get("PENSTOCK_PASSWORD") if user else None}
    access.update(ca=_text(ca), cert=_text(cert), key=_text(key))
    if "://" in where:
        url, pattern = where, what or "#"
    else:
        url, pattern, own = _of_topology(Path(where), what, broker, state)
        access = {name: value if value is not None else own.get(name) for name, value in access.items()}
    asyncio.run(_tap(url, pattern, access, count, as_json))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _of_topology(
    path: Path, what: str | None, broker: str | None, state: Path | None
) -> tuple[str, str, dict[str, str | None]]:
    """URL, topic filter and credentials, from a topology's file and, for a broker that the run starts, from its run."""
    from nodes.cli._reach import place

    found = place(path, state)
    name = _broker_name(found.topology, what, broker)
    return found.url(name), _filter(found.topology, what), found.access(name)


def _broker_name(topology: Topology, what: str | None, broker: str | None) -> str:
    if broker is not None:
        if broker not in topology.brokers:
            raise ConfigError(f"there is no broker {broker!r} in it{did_you_mean(broker, topology.brokers)}")
        return broker
    node = (what or "").split(".", 1)[0]
    if node in topology.nodes:
        return topology.hosts[topology.nodes[node].host]
    if len(topology.brokers) > 1:
        raise ConfigError(f"it has several brokers; choose one with --broker: {', '.join(topology.brokers)}")
    return next(iter(topology.brokers))


def _filter(topology: Topology, what: str | None) -> str:
    """A topic filter as it is; a node or ``node.port`` as the topics that it publishes on."""
    if what is None:
        return f"{topology.name}/#"
    if "/" in what or "#" in what or "+" in what:
        return what
    node, _, port = what.partition(".")
    if node not in topology.nodes:
        raise ConfigError(f"there is no node {node!r} in it{did_you_mean(node, topology.nodes)}")
    return f"{topology.name}/{node}/{port or '#'}{'/#' if port else ''}"


async def _tap(url: str, pattern: str, access: dict[str, Any], count: int | None, as_json: bool) -> None:
    from broker.connect import connect

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    bus: Bus = connect(url, client_id=f"penstock-tap-{os.getpid()}", **access)
    ending = asyncio.create_task(stop.wait())
    try:
        async with bus:
            # at most once: whoever watches must not hold up what he watches
            subscription = await bus.subscribe([pattern], qos=0, capacity=4096, overflow="latest")
            print(f"listening to {pattern} on {_without_password(url)}", file=sys.stderr)
            await _show(subscription, ending, count, as_json)
            if subscription.dropped:
                print(f"{subscription.dropped} messages came faster than they could be shown", file=sys.stderr)
    finally:
        ending.cancel()


async def _show(subscription: Subscription, ending: asyncio.Task[bool], count: int | None, as_json: bool) -> None:
    left = count
    while True:
        receiving = asyncio.create_task(subscription.receive())
        await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            receiving.cancel()
            return
        for delivery in receiving.result():
            _print(delivery, as_json)
            if left is not None:
                left -= 1
                if left == 0:
                    return
        sys.stdout.flush()


def _print(delivery: Delivery, as_json: bool) -> None:
    from nodes.cli import _show

    payload = bytes(delivery.payload)
    if as_json:
        found = _show.data(delivery.topic, payload, retained=delivery.retain)
        print(json.dumps(found, ensure_ascii=False, allow_nan=False))
    else:
        print(_show.line(delivery.topic, payload, retained=delivery.retain))


def _without_password(url: str) -> str:
    """For the screen."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
