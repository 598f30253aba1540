"""What there is to know of the federated jobs of a topology: from the bus while they run, from this disk when they do not."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.operator import Context
from schemas.errors import BusError, ConfigError

if TYPE_CHECKING:
    from broker.bus import Bus
    from nodes.cli._reach import Place
    from nodes.federated.wire import Call, Manifest, Presence
    from nodes.planned import PlannedNode

QUIET = 0.4
"""Seconds without anything new after which all that is retained has come."""
LISTENS = 1.5
"""Seconds that are listened at most."""
PATIENCE = 5.0
"""Seconds that a broker may take to let us in."""


@dataclass
class Job:
    """One job.

    :param leads: the node that leads it, where it is in this topology.
    :param rows: of its rounds, as they were committed here; empty where it is led on another machine.
    :param call: what the bus says; None: nothing was heard.
    """

    name: str
    members: list[PlannedNode]
    leads: PlannedNode | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None
    model: Manifest | None = None
    clients: dict[str, Presence] = field(default_factory=dict)
    coordinator: bytes | None = None
    devices: dict[str, bytes] | None = None
    passed_over: int = 0

    def believe(self, coordinator: str | None) -> None:
        """Find the public keys of who leads, and of the clients, as far as this topology has them.

        :param coordinator: the key or its file, in the place of the topology's.
        :raises ConfigError: one is not where it should be.
        :raises MissingError: there are keys, and the library that computes with them is not installed.
        """
        from nodes.federated import key_options

        if self.leads is not None:
            config: Any = self.leads.config
            self.coordinator = key_options.own(config.key, self.leads.context)
            if (devices := getattr(config, "devices", None)) is not None:  # who learns alone has none
                self.devices = key_options.known(devices, self.leads.context)
        for node in self.members:
            said: str | None = getattr(node.config, "coordinator", None)
            if self.coordinator is None and said is not None:
                self.coordinator = key_options.public(said, node.context)
        if coordinator is not None:
            self.coordinator = key_options.public(coordinator, Context("", "", Path(), Path()))
        if self.coordinator is not None or self.devices is not None:
            from nodes.privacy.keys import require

            require()

    def hear(self, topic: str, payload: bytes) -> bytes | None:
        """A message without its signature; None: it is not by whom it should be."""
        from nodes.federated.identity import Ear

        known = self.coordinator
        if topic.startswith("c/") and self.devices is not None:
            known = self.devices.get(topic.split("/")[1])
            if known is None:
                return None
        elif topic.startswith("c/"):
            known = None
        return Ear(self.name, known).hear(topic, payload)


def jobs(path: Path, state: Path | None, only: str | None) -> tuple[Place, list[Job]]:
    """The jobs of a topology, with what is on the disk.

    :raises TopologyError: the file is wrong.
    :raises ConfigError: it has no job, or none of that name.
    """
    from nodes.cli._reach import Place
    from nodes.federated.store import look
    from nodes.plan import prepare
    from nodes.planned_jobs import LEAD, MEMBERS
    from schemas.errors import did_you_mean

    plan = prepare(path, state=state)
    place = Place(plan.topology, state if state is not None else plan.topology.base / ".penstock" / plan.topology.name)
    found: dict[str, Job] = {}
    for node in plan.nodes.values():
        if node.kind not in MEMBERS:
            continue
        name = node.config.job  # type: ignore[attr-defined] # these kinds have it
        job = found.setdefault(name, Job(name, []))
        job.members.append(node)
        alone = getattr(node.config, "alone", None) is not None
        if node.kind in LEAD or alone:
            job.leads = node
            store = place.state / node.name / (f"{name}.alone.sqlite" if alone else f"{name}.sqlite")
            if store.is_file():
                job.rows, job.kept = look(store)
    if not found:
        raise ConfigError(f"{path} has no federated job: no node is of the kind train or federate, answer or ask")
    if only is not None and only not in found:
        raise ConfigError(f"there is no job {only!r}{did_you_mean(only, found)}")
    return place, [job for name, job in found.items() if only in {None, name}]


async def listen(place: Place, job: Job) -> str:
    """Hear what is retained of a job; gives why nothing could be heard, or nothing."""
    try:
        bus = bus_of(place, job)
        async with asyncio.timeout(PATIENCE):
            await bus.open()
    except (BusError, ConfigError, TimeoutError) as error:
        return str(error) or "the broker does not answer"
    try:
        root = f"{place.topology.name}/fed/{job.name}"
        subscription = await bus.subscribe([f"{root}/round", f"{root}/model", f"{root}/c/+/state"])
        with contextlib.suppress(TimeoutError):
            until = asyncio.get_running_loop().time() + LISTENS  # a job that goes on is never quiet
            while (left := until - asyncio.get_running_loop().time()) > 0:
                async with asyncio.timeout(min(QUIET, left)):
                    deliveries = await subscription.receive()
                for delivery in deliveries:
                    topic = delivery.topic[len(root) + 1 :]
                    if not delivery.payload:
                        continue  # what was retained there was taken back
                    if (payload := job.hear(topic, bytes(delivery.payload))) is None:
                        job.passed_over += 1
                    else:
                        _hear(job, topic.split("/"), payload)
                subscription.acknowledge(deliveries)
    finally:
        await bus.close()
    return ""


def bus_of(place: Place, job: Job) -> Bus:
    """A client at the job's broker, not opened yet."""
    from broker.connect import connect

    node = job.leads or job.members[0]
    broker: str = node.config.broker or node.broker  # type: ignore[attr-defined] # both kinds have it
    if "://" in broker:
        return connect(broker, patience=PATIENCE)
    return place.bus(broker, "", patience=PATIENCE)


def _hear(job: Job, topic: list[str], payload: bytes) -> None:
    from nodes.federated import wire
    from schemas.errors import PayloadError

    with contextlib.suppress(PayloadError):  # somebody else's: it is not a job's
        match topic:
            case ["round"]:
                job.call = wire.hear(wire.Call, payload)
            case ["model"]:
                job.model = wire.hear(wire.Manifest, payload)
            case ["c", client, "state"] if payload:
                job.clients[client] = wire.hear(wire.Presence, payload)
