"""Which relays keep, and what: from the hosts' ``relay`` and the planned edges."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from nodes.assignment import RelayPort, RelaySpec
from nodes.planned import Plan, PlannedEdge, PlannedRelay
from schemas.errors import Problem
from schemas.keeping import LEAST
from schemas.topology import Topology


def keeping(
    topology: Topology, edges: Mapping[str, list[PlannedEdge]]
) -> tuple[dict[str, PlannedRelay], dict[str, list[PlannedEdge]]]:
    """The relays by name, and the edges (by consumer) with the names of those that keep them.

    A relay is from one broker to one other. It takes the safe edges that leave its host's broker, whichever host of that
    broker their producers are on.

    :raises TopologyError: a ``relay`` that has nothing to do, or cannot do it; all that is wrong.
    """
    problems: list[Problem] = []
    relays: dict[str, PlannedRelay] = {}
    owners: dict[str, str] = {}
    broker_of = {name: topology.hosts[node.host] for name, node in topology.nodes.items()}
    every = [edge for some in edges.values() for edge in some if edge.carrier == "relay"]
    for host, options in topology.relays.items():
        here, path = topology.hosts[host], ("hosts", host, "relay")
        if (other := owners.setdefault(here, host)) != host:
            message = f"the broker {here!r} has a relay that keeps already, on host {other!r}"
            problems.append(Problem(path, message, on_key=True))
            continue
        leaving = [edge for edge in every if broker_of[edge.producer] == here]
        ports: dict[tuple[str, str, str], list[str]] = {}
        for edge in leaving:
            if edge.delivery == "safe":
                ports.setdefault((broker_of[edge.consumer], edge.producer, edge.port), []).append(edge.consumer)
        if not ports:
            fast = " (fast ones are not kept)" if leaving else ""
            message = f"there is nothing to keep: no safe edge leaves the broker {here!r} for another one{fast}"
            problems.append(Problem(path, message, on_key=True))
            continue
        budget = options.spool // len(ports)
        if budget < LEAST:
            shared = f"{len(ports)} ports share it, and each needs {LEAST} bytes: " if len(ports) > 1 else ""
            message = f"{shared}at least {len(ports) * LEAST} bytes, got {options.spool}"
            problems.append(Problem((*path, "spool"), message))
        fast_ports = {(broker_of[e.consumer], e.producer, e.port) for e in leaving if e.delivery == "fast"}
        for far in dict.fromkeys(far for far, _, _ in ports):
            name = f"relay-{host}-{far}"
            if name in topology.nodes:
                problems.append(Problem(("nodes", name), f"the relay of host {host!r} has this name", on_key=True))
            elif name in relays:
                problems.append(Problem(path, f"two relays would be named {name!r}: rename a host", on_key=True))
            relays[name] = PlannedRelay(
                name=name,
                host=host,
                broker=here,
                far=far,
                ports=[
                    RelayPort(
                        producer=producer,
                        port=port,
                        consumers=readers,
                        private=(far, producer, port) in fast_ports,
                        budget=budget,
                    )
                    for (to, producer, port), readers in ports.items()
                    if to == far
                ],
                options=options,
            )
    if problems:
        raise topology.error(problems)
    kept = {
        (port.producer, port.port, reader): relay.name
        for relay in relays.values()
        for port in relay.ports
        for reader in port.consumers
    }
    marked = {
        name: [replace(e, relay=kept.get((e.producer, e.port, e.consumer), "")) for e in some]
        for name, some in edges.items()
    }
    return relays, marked


def specify(relay: PlannedRelay, local: Container[str]) -> RelaySpec:
    """A planned relay as its worker is told it; ``local``: names of this supervisor's nodes."""
    return RelaySpec(
        name=relay.name,
        host=relay.host,
        broker=relay.broker,
        far=relay.far,
        ports=relay.ports,
        overflow=relay.options.overflow,
        order=relay.options.order,
        rate=relay.options.rate,
        local=[port.producer for port in relay.ports if port.producer in local],
    )


def private(edge: PlannedEdge, plan: Plan) -> bool:
    """Whether the relay sends what the edge carries on its reader's own topic."""
    ports = plan.relays[edge.relay].ports if edge.relay else []
    return any(port.private for port in ports if (port.producer, port.port) == (edge.producer, edge.port))
