"""A topology in memory: hosts, nodes and edges as written, and the error that places what is wrong in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from schemas.errors import ConfigError, Problem
from schemas.located import Located, Place, YamlError
from schemas.topology_parts import Broker, EdgeOptions, RelayOptions


def instance(name: str, replica: int) -> str:
    """Name of a replica of a node; they are counted from 1 where people read them."""
    return f"{name}-{replica + 1}"


@dataclass(frozen=True, slots=True)
class Edge:
    """One entry of a node's ``from``.

    :param path: where it was written, relative to the node.
    """

    producer: str
    port: str
    options: EdgeOptions
    path: tuple[str | int, ...]

    @property
    def name(self) -> str:
        """``<producer>.<port>``: the edge's name in the consumer and in the ledger."""
        return f"{self.producer}.{self.port}"


@dataclass(frozen=True, slots=True)
class Node:
    """One node as written: its kind and the kind's config, not yet looked at.

    :param host: name of its host, which is there; of the first, if it has replicas on several.
    :param process: label as written; None: a process of its own.
    :param durable: what it sends is kept on its disk until it is done.
    :param hosts: host of each replica, in order; one for a node without replicas.
    """

    name: str
    kind: str
    config: Any
    inputs: tuple[Edge, ...]
    host: str
    process: str | None = None
    publish: Literal["auto", "always"] = "auto"
    durable: bool = False
    hosts: tuple[str, ...] = ()

    @property
    def members(self) -> dict[str, str]:
        """Name → host of each replica; of the node itself where it has none."""
        if len(self.hosts) < 2:
            return {self.name: self.host}
        return {instance(self.name, i): host for i, host in enumerate(self.hosts)}


class Line(NamedTuple):
    """One fault in the file: ``str()`` is ``file:line:column: message``."""

    file: str
    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.place.line}:{self.place.column}: {self.message}"


class TopologyError(ConfigError):
    """What is wrong in a topology file; its text has one line for each fault, ``file:line:column: message``.

    :param lines: all faults, by their place in the file.
    """

    def __init__(self, lines: Sequence[Line], problems: Sequence[Problem] = ()) -> None:
        super().__init__(*problems)
        self.lines = tuple(sorted(set(lines), key=lambda line: (line.place, line.message)))

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))


@dataclass(frozen=True)
class Topology:
    """A topology whose form is right.

    :param path: the file, as it was given.
    :param base: its folder; relative paths in configs start here.
    :param hosts: host → name of its broker.
    :param relays: host → its relay that keeps, where it has one.
    :param repeated: keys that are in the file twice; only :func:`read` leaves any, as of the next.
    :param broken: nodes that are in the file but whose form is wrong, with what can be made of them.
    :param shared: edges may share memory.
    """

    name: str
    path: Path
    base: Path
    brokers: dict[str, Broker]
    hosts: dict[str, str]
    nodes: dict[str, Node]
    document: Located = field(repr=False)
    relays: dict[str, RelayOptions] = field(default_factory=dict)
    repeated: tuple[YamlError, ...] = ()
    broken: dict[str, Node | None] = field(default_factory=dict)
    shared: bool = True

    @property
    def members(self) -> dict[str, tuple[Node, str]]:
        """Every process's node, replicas by their own names → the node as written, and the host."""
        return {name: (node, host) for node in self.nodes.values() for name, host in node.members.items()}

    def error(self, problems: Sequence[Problem]) -> TopologyError:
        """Problems with paths from the document's root, placed in the file."""
        lines = [Line(str(self.path), fault.place, fault.message) for fault in self.repeated]
        for problem in problems:
            place = self.document.find(problem.path, offset=problem.offset, on_key=problem.on_key)
            lines.append(Line(str(self.path), place, problem.message))
        return TopologyError(lines, problems)
