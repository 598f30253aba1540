"""The user's topology in disguise: the same nodes and edges, with nothing of the user's own world at its ends.

Sinks become probes; brokers that the run starts listen on free ports; the topology gets a name of its own, so that on a broker
that is there already nothing is mistaken for the real one. File sources end by themselves and give the same data in each run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nodes.drill import sources
from nodes.plan import Plan
from nodes.variants import VariantConfig
from schemas.errors import ConfigError, did_you_mean
from schemas.topology import Broker, Edge, EdgeOptions, Node, Topology

PROBE = "probe"


@dataclass(frozen=True)
class Choices:
    """What the user chose.

    :param replaced: source node → file that it reads instead.
    :param synthetic: live sources are replaced by made-up data.
    :param keep_sinks: the real sinks are written to, beside the probes.
    :param own_brokers: brokers that are there already are replaced by embedded ones.
    :param seconds: how long the data are to last.
    """

    replaced: Mapping[str, Path] = field(default_factory=dict)
    synthetic: bool = False
    keep_sinks: bool = False
    own_brokers: bool = False
    seconds: float = 60.0


@dataclass(frozen=True)
class Source:
    """One source as it is in the drill.

    :param how: ``file`` and ``made``: the same data in each run, and they end; ``fed``: an MQTT source that the drill itself
        publishes to; ``live``: the world, as it is.
    :param config: what is written for it, without a pace.
    :param rows: rows that it gives in all, as far as that is known before it ran.
    """

    name: str
    how: Literal["file", "made", "fed", "live"]
    config: dict[str, Any]
    rows: int | None = None
    note: str = ""


class Disguise:
    """Makes the topology of each run.

    :param plan: of the user's topology.
    :param folder: scratch folder, for data that are cut short.
    :param token: ends the topology's name.
    :ivar sources: by node.
    :ivar probes: name of each probe's node → the sink or port that it stands for.
    :raises ConfigError: a source that is named is none.
    """

    def __init__(self, plan: Plan, choices: Choices, folder: Path, token: str) -> None:
        self.plan = plan
        self.choices = choices
        self.name = f"{plan.topology.name}-drill-{token}"
        self._folder = folder
        self._real = tuple(node.name for node in plan.nodes.values() if node.kind == "uplink")
        self.sources = {node.name: self._source(node.name) for node in plan.nodes.values() if node.kind == "ingest"}
        for name in choices.replaced:
            if name not in self.sources:
                raise ConfigError(f"--source: there is no source {name!r}{did_you_mean(name, self.sources)}")

    @property
    def repeatable(self) -> bool:
        """Whether each run has the same data, so that two can be compared."""
        return all(source.how in {"file", "made"} for source in self.sources.values())

    @property
    def fed(self) -> list[str]:
        """Sources that the drill itself publishes to."""
        return [name for name, source in self.sources.items() if source.how == "fed"]

    @property
    def own(self) -> frozenset[str]:
        """Brokers that the run starts."""
        return frozenset(name for name, broker in self._brokers().items() if broker.run is not None)

    def topology(self, folder: Path, rows: Mapping[str, int] | None, *, real_sinks: bool = False) -> Topology:
        """The topology of one run.

        :param folder: where the probes keep their records.
        :param rows: how many rows each source gives in all, for their pace; None: as fast as they are taken, all edges safe,
            so that what arrives is all that can.
        :param real_sinks: the real sinks take part, beside the probes.
        """
        nodes: dict[str, Node] = {}
        for name, node in self.plan.topology.nodes.items():
            if name in self.sources:
                source = self.sources[name]
                known = source.rows if rows is None else rows.get(name, source.rows)
                config = source.config if rows is None else self._paced(source, known)
                nodes[name] = dataclasses.replace(node, config=config)
            elif name not in self._real or real_sinks:
                nodes[name] = node
        for name, (inputs, host, _) in self._probed(real_sinks).items():
            config = {"sink": PROBE, "path": str(folder.resolve() / f"{name}.sqlite")}
            nodes[name] = Node(name=name, kind="uplink", config=config, inputs=inputs, host=host)
        if rows is None:
            nodes = {name: dataclasses.replace(node, inputs=_all_safe(node.inputs)) for name, node in nodes.items()}
        return dataclasses.replace(self.plan.topology, name=self.name, brokers=self._brokers(), nodes=nodes)

    def standing_for(self, *, real_sinks: bool = False) -> dict[str, str]:
        """Each probe's node, and what it stands for: a sink, or a port that nobody in the topology reads."""
        return {name: what for name, (_, _, what) in self._probed(real_sinks).items()}

    def _probed(self, real_sinks: bool) -> dict[str, tuple[tuple[Edge, ...], str, str]]:
        """Probe → what it reads, on which host, and for which sink, or port that is only published, it stands."""
        out: dict[str, tuple[tuple[Edge, ...], str, str]] = {}
        written = self.plan.topology.nodes
        for name in self._real:
            out[f"{name}-{PROBE}" if real_sinks else name] = (written[name].inputs, written[name].host, name)
        for name, node in self.plan.nodes.items():
            for port in node.outputs:
                if not any(edge.port == port for edge in node.consumers):
                    edge = Edge(name, port, EdgeOptions(), ("from",))
                    out[f"{name}-{port}-{PROBE}"] = ((edge,), node.host, f"{edge.name} (published)")
        return out

    def _brokers(self) -> dict[str, Broker]:
        out = {}
        for name, broker in self.plan.topology.brokers.items():
            if broker.run is not None:
                out[name] = broker.model_copy(update={"listen": "127.0.0.1:0"})
            elif self.choices.own_brokers:
                out[name] = Broker(run="embedded")
            else:
                out[name] = broker
        return out

    def _source(self, name: str) -> Source:
        node = self.plan.nodes[name]
        config, seconds = node.config, self.choices.seconds
        if not isinstance(config, VariantConfig):
            raise TypeError(f"{name} is no source")
        written: dict[str, Any] = dict(node.written)
        if (path := self.choices.replaced.get(name)) is not None:
            written = sources.of_file(path)
            if not path.exists():
                raise ConfigError(f"--source {name}: there is no file {path}")
            config = sources.checked(written, node.context)
        live = sources.is_live(config.options)
        if live and self.choices.synthetic:
            (flow,) = node.outputs.values()
            written = sources.made_up(flow, name)
            config, live = sources.checked(written, node.context), False
        if live:
            fed = config.kind == "mqtt" and (written.get("broker") or node.broker) in self.own
            if config.kind == "mqtt":
                written.pop("group", None)  # in a group we would take messages from its other members
            return Source(name, "fed" if fed else "live", written)
        tamed, rows, note = sources.tamed(written, config, node.context, seconds, self._folder / "data" / name)
        return Source(name, "file" if "path" in written else "made", tamed, rows, note)

    def _paced(self, source: Source, rows: int | None) -> dict[str, Any]:
        if source.how in {"fed", "live"}:
            return source.config
        context = self.plan.nodes[source.name].context
        return sources.paced(source.config, context, rows, self.choices.seconds)


def _all_safe(inputs: tuple[Edge, ...]) -> tuple[Edge, ...]:
    return tuple(dataclasses.replace(edge, options=EdgeOptions(delivery="safe")) for edge in inputs)
