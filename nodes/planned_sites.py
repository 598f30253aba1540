"""What must agree between a federated job and those that are parts of it (``of``), where a topology has both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from schemas.errors import Problem
from schemas.topology import Topology

if TYPE_CHECKING:
    from nodes.federate import Config
    from nodes.federated.options import JobOptions, Of

Member: TypeAlias = "tuple[str, str, JobOptions]"
"""A node of a job: its name, its kind, its options."""
Site: TypeAlias = "tuple[str, Config, Of]"


def problems(topology: Topology, jobs: Mapping[str, Sequence[Member]]) -> Iterator[Problem]:
    """Different models, a name or a place that is taken, jobs that are parts of themselves.

    :param jobs: members by name of the job, the one that leads first.
    """
    sites: dict[str, list[Site]] = {}
    for members in jobs.values():
        for name, _, config in members:
            of: Of | None = getattr(config, "of", None)
            if of is not None and of.topology in {None, topology.name}:
                sites.setdefault(of.job, []).append((name, config, of))  # type: ignore[arg-type] # only federate has one
    yield from _rings(sites)
    for job, those in sites.items():
        members = jobs.get(job, ())
        names = {getattr(config, "client", None) or name: name for name, kind, config in members if kind == "train"}
        for name, config, of in those:
            path = ("nodes", name, "federate", "of")
            client = of.client or name
            if client in names:
                said = f"{names[client]!r} is the client {client!r} of the job {job!r} already"
                yield Problem((*path, "client") if of.client else path, said, on_key=not of.client)
            names.setdefault(client, name)
            if members:
                yield from _part(topology, members[0], name, config, of)


def _part(topology: Topology, above: Member, name: str, config: Config, of: Of) -> Iterator[Problem]:
    """What does not go together in a job and one that is a part of it."""
    from nodes.federated import kinds
    from nodes.planned_jobs import differ

    lead, kind, options = above
    path = ("nodes", name, "federate")
    if config.trainer.plain() != options.trainer.plain():
        said = f"not the trainer of {lead!r}, of whose job this one is a part: {differ(options, config)}"
        yield Problem((*path, "trainer"), said)
    if kind != "federate":
        return
    there = options.broker or topology.hosts[topology.nodes[lead].host]
    here = topology.hosts[topology.nodes[name].host]
    if of.broker is None and here != there and "://" not in there:
        said = f"looks for the job above at its broker {here!r}, and {lead!r}, which leads it, is at {there!r}"
        yield Problem((*path, "of"), f"{said}; say with 'broker' where they meet", on_key=True)
    if getattr(options, "secure", None) is not None:
        said = f"{lead!r} leads the job above by secure sums, in which a site takes no part"
        yield Problem((*path, "of"), said, on_key=True)
    strategy = options.strategy  # type: ignore[attr-defined] # federate has one
    if "control" in kinds.strategy(strategy).task():
        said = f"{lead!r} leads the job above by {strategy.name}, which corrects each step of a client, and a site takes none"
        yield Problem((*path, "of"), said, on_key=True)


def _rings(sites: Mapping[str, Sequence[Site]]) -> Iterator[Problem]:
    """Jobs that are parts of themselves, each said once."""
    above = {config.job: (name, job) for job, those in sites.items() for name, config, _ in those}
    known: set[str] = set()
    for first in above:
        seen, at = [first], first
        while at in above and (at := above[at][1]) not in seen:
            seen.append(at)
        if at == first and at in above and not known.intersection(seen):
            known.update(seen)
            yield Problem(
                ("nodes", above[first][0], "federate", "of"), f"the job {first!r} is a part of itself", on_key=True
            )
