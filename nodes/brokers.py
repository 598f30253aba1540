"""The brokers that a run starts itself, and the relays between brokers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from broker import memory
from nodes import log
from nodes.children import Child, describe, keep
from nodes.plan import Plan
from schemas import topics
from schemas.errors import MissingError, RunError

_START_WITHIN = 10.0


class Brokers:
    """Starts the brokers whose topology entry says ``run`` and that belong on this host.

    :ivar urls: name → url of every broker of the plan, known after :meth:`start`.
    """

    def __init__(self, plan: Plan, state: Path, host: str | None) -> None:
        self._plan = plan
        self._state = state
        self._needed = plan.brokers(host)
        self._host = host
        self.urls: dict[str, str] = {}
        self.children: dict[str, Child] = {}
        self._addresses: dict[str, str] = {}
        self._ready: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        """Start them and wait until they answer.

        :raises MissingError: mosquitto is wanted and not installed.
        :raises RunError: one does not start.
        """
        for name, broker in self._needed.items():
            if broker.run is None:
                self.urls[name] = broker.url or ""
            elif self._host is not None and broker.on not in {None, self._host}:
                self.urls[name] = f"mqtt://{broker.listen}"
            else:
                self._ready[name] = asyncio.Event()
                self._addresses[name] = broker.listen
                self._tasks.append(asyncio.create_task(self._keep(name, broker.run)))
        for name, ready in self._ready.items():
            waiting = asyncio.create_task(ready.wait())
            done, _ = await asyncio.wait({waiting, *self._tasks}, timeout=_START_WITHIN, return_when="FIRST_COMPLETED")
            waiting.cancel()
            for task in done - {waiting}:
                task.result()
            if not ready.is_set():
                raise RunError(f"broker {name!r} did not start within {_START_WITHIN:.0f} s")

    async def watch(self) -> None:
        """Wait for ever; a broker that cannot be kept running ends it with its error."""
        if self._tasks:
            await asyncio.gather(*self._tasks)
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End them."""
        self._stopping = True
        for child in self.children.values():
            child.terminate()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=3)
            for child in self.children.values():
                child.kill()
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(child.reap() for child in self.children.values()))

    def credentials(self, name: str) -> dict[str, str | None]:
        """User, password and files for a broker that is there already; empty for one that we start."""
        broker = self._plan.topology.brokers[name]
        base = self._plan.topology.base

        def path(text: str | None) -> str | None:
            return str((base / Path(text).expanduser()).resolve()) if text else None

        return {
            "user": broker.user,
            "password": broker.password.read(base) if broker.password is not None else None,
            "ca": path(broker.ca),
            "cert": path(broker.cert),
            "key": path(broker.key),
        }

    async def _keep(self, name: str, program: str) -> None:
        if program == "mosquitto":
            await self._keep_mosquitto(name)
            return

        def line(text: bytes) -> None:
            try:
                self._addresses[name] = json.loads(text)["addresses"][0].removeprefix("mqtt://")
            except (ValueError, KeyError, IndexError, TypeError):
                log.debug("stdout", process=name, text=text.decode(errors="replace")[:200])
                return
            self._up(name)

        # a restart listens where the first start did: the nodes know that address
        child = Child(f"broker {name}", [None, "-m", "broker.embedded", "--listen", self._addresses[name]], line)
        self.children[name] = child

        def ended(code: int) -> bool:
            if not self._ready[name].is_set() and not self._stopping:
                raise RunError(f"broker {name!r} cannot listen on {self._addresses[name]}: {describe(code)}")
            child.replace([None, "-m", "broker.embedded", "--listen", self._addresses[name]])
            return self._stopping

        await keep(child, lambda: None, ended, worked=self._ready[name].is_set)

    async def _keep_mosquitto(self, name: str) -> None:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise MissingError(f"broker {name!r} is to run mosquitto, which")
        host, _, port = self._addresses[name].rpartition(":")
        port = port if port != "0" else str(_free_port(host))
        self._addresses[name] = f"{host}:{port}"
        folder = self._state / f"mosquitto-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "mosquitto.conf"
        config.write_text(
            f"listener {port} {host.strip('[]')}\nallow_anonymous true\nset_tcp_nodelay true\n"
            "max_queued_messages 100000\nmax_inflight_messages 200\n"
        )
        _readable(folder, config)
        child = Child(f"broker {name}", [program, "-c", str(config)], lambda _: None, memory.ENVIRONMENT)
        self.children[name] = child
        answering = asyncio.create_task(self._answers(name, host.strip("[]"), int(port)))

        def ended(code: int) -> bool:
            if not self._ready[name].is_set() and not self._stopping:
                raise RunError(f"broker {name!r} (mosquitto) cannot listen on {host}:{port}: {describe(code)}")
            return self._stopping

        try:
            await keep(child, lambda: None, ended, worked=self._ready[name].is_set)
        finally:
            answering.cancel()

    async def _answers(self, name: str, host: str, port: int) -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            self._up(name)
            return

    def _up(self, name: str) -> None:
        self.urls[name] = f"mqtt://{self._addresses[name]}"
        self._ready[name].set()


def relays(plan: Plan, brokers: Brokers, host: str | None) -> list[Coroutine[Any, Any, None]]:
    """The relays that run here: one for each pair of brokers with an edge between them that no other relay keeps.

    A relay runs on the lower of the two hosts, the one that comes first on the way from the sensors, and dials out.
    """
    from broker.relay import Relay

    order = {name: i for i, name in enumerate(plan.nodes)}
    pairs: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    lowest: dict[tuple[str, str], tuple[int, str]] = {}
    for edge in plan.edges:
        if edge.carrier != "relay" or edge.relay:
            continue
        ends = [plan.nodes[edge.producer], plan.nodes[edge.consumer]]
        low, high = sorted(
            ends, key=lambda node: min(order[n.name] for n in plan.nodes.values() if n.host == node.host)
        )
        key = (low.broker, high.broker)
        up, down = pairs.setdefault(key, ([], []))
        there = [f"{edge.topic}/#", topics.again(plan.topology.name, edge.consumer, edge.producer, edge.port)]
        back = [topics.ack(plan.topology.name, edge.producer, edge.port, edge.consumer)]
        if edge.lane:
            back.append(topics.state(plan.topology.name, edge.consumer))
        if ends[0].replicas > 1:
            there.append(topics.state(plan.topology.name, edge.producer))
        forward = ends[0] is low
        (up if forward else down).extend(there)
        (down if forward else up).extend(back)
        lowest.setdefault(key, (order[low.name], low.host))
    urls = brokers.urls
    return [
        Relay(
            f"{plan.topology.name}-{low}-{high}",  # several may dial out to one broker
            urls[low],
            urls[high],
            up=sorted(set(up)),
            down=sorted(set(down)),
            say=_say,
            credentials=(brokers.credentials(low), brokers.credentials(high)),
        ).run()
        for (low, high), (up, down) in pairs.items()
        if host is None or lowest[low, high][1] == host
    ]


def _say(level: str, event: str, fields: dict[str, Any]) -> None:
    getattr(log, level)(event, **fields)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host.strip("[]"), 0))
        return int(probe.getsockname()[1])


def _readable(*paths: Path) -> None:
    """mosquitto started as root gives its rights away before it reads its files."""
    if os.geteuid() == 0:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
