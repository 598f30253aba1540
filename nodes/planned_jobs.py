"""What must agree among the nodes of one federated job, where a topology has several of them.

The other side of a job may be in another topology's file: only what is here is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nodes import planned_sites
from nodes.operator import Context
from nodes.options import Options
from schemas.errors import PenstockError, Problem
from schemas.topology import Topology

if TYPE_CHECKING:
    from nodes.federated.options import JobOptions


MEMBERS = frozenset({"train", "federate", "answer", "ask"})
"""Kinds that have a job."""
LEAD = frozenset({"federate", "ask"})
"""Those that lead one."""


def problems(topology: Topology, configs: Mapping[str, Options]) -> Iterator[Problem]:
    """Different models in one job, two that lead it, two clients of one name."""
    jobs: dict[str, list[tuple[str, str, JobOptions]]] = {}
    for name, node in topology.nodes.items():
        if node.kind in MEMBERS and name in configs:
            config: JobOptions = configs[name]  # type: ignore[assignment] # what these kinds have
            jobs.setdefault(config.job, []).append((name, node.kind, config))
    for job, members in jobs.items():
        members.sort(key=lambda member: not _leads(*member[1:]))  # the one that leads says what is right
        first = members[0]
        leads = [(name, kind) for name, kind, config in members if _leads(kind, config)]
        for name, kind in leads[1:]:
            yield Problem(("nodes", name, kind, "job"), f"{leads[0][0]!r} leads the job {job!r} already")
        clients: dict[str, str] = {}
        for name, kind, config in members:
            if config.trainer.plain() != first[2].trainer.plain():
                counts = kind in {"ask", "answer"}
                what = "what is counted by" if counts else "the trainer of"
                said = f"not {what} {first[0]!r}, which has the same job: {differ(first[2], config)}"
                yield Problem(("nodes", name, kind, "questions" if counts else "trainer"), said)
            if config.broker is None and (apart := _apart(topology, first, name)):
                yield Problem(("nodes", name, kind), apart, on_key=True)
            if _leads(kind, config):
                continue
            if leads and leads[0][1] == "train":
                said = f"{leads[0][0]!r} learns the job {job!r} alone, and asks no clients"
                yield Problem(("nodes", name, kind, "job"), said)
            else:
                if leads and (why := _never(first[2], config)):
                    said = f"it would answer no call of {first[0]!r}: {why}"
                    yield Problem(("nodes", name, kind, "privacy"), said, on_key=True)
                if said := _unwilling(first, config):
                    yield Problem(("nodes", name, kind, "secure"), said)
                if kind == "train" and (missing := _cannot_agree(first, config)):
                    yield Problem(("nodes", name, kind), missing, on_key=True)
                client = getattr(config, "client", None) or name
                if client in clients:
                    where = ("nodes", name, kind, "client" if getattr(config, "client", None) else "job")
                    yield Problem(where, f"{clients[client]!r} is the client {client!r} of the job {job!r} already")
                clients.setdefault(client, name)
        yield from _keys(topology, members)
    yield from planned_sites.problems(topology, jobs)
    first_leads = {job: members[0][2] for job, members in jobs.items() if members[0][1] == "federate"}
    yield from _gifts(topology, configs, first_leads)


def _gifts(topology: Topology, configs: Mapping[str, Options], leads: Mapping[str, JobOptions]) -> Iterator[Problem]:
    """Who gives to a job that takes nothing, or two of one name.

    :param leads: job → ``federate`` of it.
    """
    from nodes.federated import key_options

    givers: dict[tuple[str, str], str] = {}
    for name, node in topology.nodes.items():
        if node.kind != "pool" or name not in configs:
            continue
        config: Any = configs[name]
        job, client = config.job, config.client or name
        if (first := givers.setdefault((job, client), name)) != name:
            where = "client" if config.client else "job"
            yield Problem(("nodes", name, "pool", where), f"{first!r} already gives to the job {job!r} as {client!r}")
        lead: Any = leads.get(job)
        if lead is None:
            continue
        if lead.pool is None:
            yield Problem(("nodes", name, "pool", "job"), f"who leads the job {job!r} has no 'pool', and takes nothing")
        elif lead.devices is not None:
            try:
                devices = key_options.known(lead.devices, Context(topology.name, name, topology.base, topology.base))
            except PenstockError:
                continue  # told at its own option
            if client not in devices:
                why = f"who leads the job has no key of {client!r} among its devices"
                yield Problem(("nodes", name, "pool"), why, on_key=True)


def _keys(topology: Topology, members: list[tuple[str, str, JobOptions]]) -> Iterator[Problem]:
    """Keys that do not go together. What is in a file is compared on one host only: on another it may be another's key."""
    from nodes.federated import key_options

    lead, kind, first = members[0]
    if kind != "federate" or not any(_has_keys(config) for _, _, config in members):
        return
    context = Context(topology.name, lead, topology.base, topology.base)
    try:
        devices = None if first.devices is None else key_options.known(first.devices, context)  # type: ignore[attr-defined]
        leads = key_options.own(first.key, context)
        for name, _, config in members[1:]:
            client, here = (
                getattr(config, "client", None) or name,
                topology.nodes[name].host == topology.nodes[lead].host,
            )
            said: str | None = getattr(config, "coordinator", None)
            if devices is not None and client not in devices:
                yield Problem(
                    ("nodes", name, "train"), f"{lead!r} has no key of {client!r} among its devices", on_key=True
                )
            elif devices is not None and config.key is None:
                yield Problem(
                    ("nodes", name, "train"), f"needs a 'key': {lead!r} knows its devices by theirs", on_key=True
                )
            elif (
                devices is not None
                and here
                and (own := key_options.own(config.key, context)) not in {None, devices[client]}
            ):
                why = f"not the key that {lead!r} has of {client!r}, but that of {_owner(devices, own)}"
                yield Problem(("nodes", name, "train", "key"), why)
            if said is not None and first.key is None:
                yield Problem(("nodes", name, "train", "coordinator"), f"{lead!r} has no 'key', and signs nothing")
            elif said is not None and here and leads not in {None, key_options.public(said, context)}:
                yield Problem(("nodes", name, "train", "coordinator"), f"not the key of {lead!r}, which leads the job")
    except PenstockError:
        return  # a file that cannot be read was told at its own option; the library that compares is looked for at the start


def _has_keys(config: JobOptions) -> bool:
    return any(getattr(config, option, None) is not None for option in ("key", "devices", "coordinator"))


def _owner(devices: Mapping[str, bytes], key: bytes | None) -> str:
    return next((repr(name) for name, known in devices.items() if known == key), "nobody there")


def _never(lead: JobOptions, client: JobOptions) -> str:
    """Why a client that insists on privacy would answer no call; empty: it would."""
    insists, asked = getattr(client, "privacy", None), getattr(lead, "privacy", None)
    if insists is None:
        return ""
    if asked is None or asked.where != "local":
        return "that does not ask for noise of the clients' own (privacy: {where: local})"
    noise = math.inf if asked.noise is None else asked.noise  # not known before it runs
    why: str = insists.too_little({"where": "local", "clip": asked.clip, "noise": min(noise, 1e6)})
    return why


def _leads(kind: str, config: JobOptions) -> bool:
    """Whether it makes the job's models: ``federate`` and ``ask``, and ``train`` that learns alone."""
    return kind in LEAD or getattr(config, "alone", None) is not None


def _apart(topology: Topology, first: tuple[str, str, JobOptions], name: str) -> str:
    """Why a node and the first one of its job would not hear each other; empty: they would."""
    there = first[2].broker or topology.hosts[topology.nodes[first[0]].host]
    here = topology.hosts[topology.nodes[name].host]
    if there == here or "://" in there:
        return ""
    return f"its broker is {here!r}, and {first[0]!r}, which has the same job, is at {there!r}; say with 'broker' where they meet"


def _unwilling(first: tuple[str, str, JobOptions], config: JobOptions) -> str:
    """Why a client would never take part; empty: it does."""
    wants, sums = getattr(config, "secure", None), getattr(first[2], "secure", None)
    if first[1] != "federate" or not isinstance(wants, int):
        return ""
    if sums is None:
        return (
            f"it trains for secure sums only, and {first[0]!r}, which leads the job, asks for updates that it can see"
        )
    if sums.least < wants:
        return f"it wants sums of {wants} clients at least, and {first[0]!r} is content with {sums.least}"
    return ""


def _cannot_agree(first: tuple[str, str, JobOptions], config: JobOptions) -> str:
    """Why a client could not sign who is in a sum; empty: it can, or need not."""
    sums = getattr(first[2], "secure", None) if first[1] == "federate" else None
    if sums is None or not sums.agreed:
        return ""
    missing = " and ".join(f"{option!r}" for option in ("key", "devices") if getattr(config, option, None) is None)
    return missing and f"needs {missing}: {first[0]!r} has clients sign who is in a sum ('agreed')"


def differ(one: JobOptions, other: JobOptions) -> str:
    """The first thing in which two trainers differ."""
    if one.trainer.name != other.trainer.name:
        return f"{one.trainer.name} there, {other.trainer.name} here"
    there, here = one.trainer.plain()[one.trainer.name], other.trainer.plain()[other.trainer.name]
    path = ""
    while isinstance(there, dict) and isinstance(here, dict):  # questions have a name each
        key = next(key for key in (*there, *here) if there.get(key) != here.get(key))
        there, here, path = there.get(key), here.get(key), f"{path}.{key}" if path else key
    return f"{path} is {there} there, {here} here"
