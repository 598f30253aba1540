"""The plan: types followed from source to sink, carriers, processes, brokers; with small kinds made for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field

from nodes.operator import Context, Flow
from nodes.options import Options
from nodes.plan import Plan, plan, prepare
from schemas.errors import ConfigError, Problem
from schemas.topology import TopologyError, read


class SourceConfig(Options):
    sends: dict[str, str] = Field({"out": "readings/1"}, description="port → body type")

    def accepts(self) -> frozenset[str]:
        return frozenset()

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        assert not inputs
        return {port: Flow(kind) for port, kind in self.sends.items()}


class OperatorConfig(Options):
    takes: list[str] | None = Field(None, description="body types that may come in")
    sends: list[str] = Field(["out"], description="ports")
    fields: str = Field("", description="fields that are added")
    expression: str = Field("", description="must not have a '!'")

    def accepts(self) -> frozenset[str] | None:
        return None if self.takes is None else frozenset(self.takes)

    def check(self, context: Context) -> None:
        if "!" in self.expression:
            raise ConfigError(Problem(("expression",), "unexpected '!'", offset=self.expression.index("!")))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        fields = frozenset(self.fields).union(*(flow.fields or () for flow in inputs))
        return {port: Flow(inputs[0].type, fields) for port in self.sends}


class SinkConfig(Options):
    path: str = Field(description="where to")

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        return {}


KINDS: dict[str, type[Options]] = {"source": SourceConfig, "operator": OperatorConfig, "sink": SinkConfig}


def module(name: str) -> ModuleType:
    made = ModuleType(name)
    made.__dict__["Config"] = KINDS[name]
    return made


def planned(folder: Path, text: str, **options: Any) -> Plan:
    path = folder / "t.yaml"
    path.write_text(f"topology: t\n{text}", encoding="utf-8")
    return plan(*read(path, kinds=tuple(KINDS)), resolve=module, **options)


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        planned(folder, text)
    return [f"{line.place.line}:{line.place.column}: {line.message}" for line in caught.value.lines]


HOSTS = """\
brokers: {x: {url: mqtt://x}, y: {url: mqtt://y}}
hosts: {h: {broker: x}, i: {broker: x}, j: {broker: y}}
nodes:
  a: {source: {}, on: h, process: p}
  b: {operator: {}, from: a, on: h, process: p}
  c: {operator: {}, from: a, on: h}
  d: {operator: {}, from: b, on: i, process: p}
  e: {sink: o, from: [c, d], on: j}
"""


def test_carriers_follow_from_processes_hosts_and_brokers(tmp_path: Path) -> None:
    made = planned(tmp_path, HOSTS)
    assert {(e.name, e.consumer): e.carrier for e in made.edges} == {
        ("a.out", "b"): "local",
        ("a.out", "c"): "mqtt",
        ("b.out", "d"): "mqtt",
        ("c.out", "e"): "relay",
        ("d.out", "e"): "relay",
    }
    assert {key: [n.name for n in nodes] for key, nodes in made.processes().items()} == {
        ("h", "p"): ["a", "b"],
        ("h", "c"): ["c"],
        ("i", "p"): ["d"],
        ("j", "e"): ["e"],
    }
    assert list(made.processes("i")) == [("i", "p")]


def test_a_node_that_is_named_as_process_shares_its_process(tmp_path: Path) -> None:
    made = planned(tmp_path, "nodes: {a: {source: {}}, b: {sink: o, from: a, process: a}}")
    assert made.edges[0].carrier == "local"
    assert list(made.processes()) == [("local", "a")]


def test_a_host_needs_its_broker_those_it_starts_and_both_ends_of_its_relays(tmp_path: Path) -> None:
    made = planned(tmp_path, HOSTS)
    assert list(made.brokers()) == ["x", "y"]
    assert list(made.brokers("h")) == ["x", "y"]
    assert list(made.brokers("i")) == ["x", "y"]
    one = "nodes: {a: {source: {}, on: h}, b: {sink: o, from: a, on: h}}"
    other = planned(
        tmp_path, f"brokers: {{x: {{run: embedded, on: i}}}}\nhosts: {{h: {{broker: x}}, i: {{broker: x}}}}\n{one}"
    )
    assert list(other.brokers("i")) == ["x"]


def test_a_host_needs_the_brokers_that_its_nodes_name_themselves(tmp_path: Path) -> None:
    brokers = "brokers: {x: {run: embedded}, y: {url: 'mqtt://y'}, z: {url: 'mqtt://z'}}\nhosts: {h: {broker: x}}\n"
    (tmp_path / "t.yaml").write_text(
        f"topology: t\n{brokers}nodes:\n"
        "  a: {ingest: {source: mqtt, broker: y, topics: [t]}}\n"
        "  b: {federate: {job: j, trainer: {mlp: {layers: [2, 2]}}, broker: z}}\n"
        "  o: {uplink: {sink: jsonl, path: o.jsonl}, from: [a, b]}\n"
    )
    assert list(prepare(tmp_path / "t.yaml").brokers()) == ["x", "y", "z"]


def test_nodes_are_in_topological_order_whatever_the_file_says(tmp_path: Path) -> None:
    text = (
        "nodes: {d: {sink: o, from: [b, c]}, c: {operator: {}, from: b}, b: {operator: {}, from: a}, a: {source: {}}}"
    )
    made = planned(tmp_path, text)
    assert list(made.nodes) == ["a", "b", "c", "d"]
    assert [e.name for e in made.nodes["d"].inputs] == ["b.out", "c.out"]
    assert [e.consumer for e in made.nodes["b"].consumers] == ["c", "d"]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("readings/1", "{}", ("safe", 1024, "block")),
        ("event/1", "{}", ("safe", 1024, "block")),
        ("frame/1", "{}", ("fast", 8, "block")),
        ("tensors/1", "{}", ("fast", 8, "block")),
        ("frame/1", "{delivery: safe}", ("safe", 1024, "block")),
        ("frame/1", "{overflow: latest}", ("fast", 8, "latest")),
        ("readings/1", "{delivery: fast, queue: 3, overflow: sample}", ("fast", 3, "sample")),
        ("readings/1", "{overflow: latest}", ("fast", 8, "latest")),
    ],
)
def test_delivery_by_type_and_by_word(tmp_path: Path, kind: str, options: str, expected: tuple[str, int, str]) -> None:
    text = f"nodes:\n  a: {{source: {{sends: {{out: {kind}}}}}}}\n  b: {{sink: o, from: {{a: {options}}}}}"
    edge = planned(tmp_path, text).edges[0]
    assert (edge.delivery, edge.queue, edge.overflow) == expected
    assert (edge.type, edge.topic) == (kind, "t/a/out")


def test_what_is_known_of_fields_flows_down(tmp_path: Path) -> None:
    text = """nodes:
  a: {source: {}}
  b: {operator: {fields: xy}, from: a}
  c: {operator: {fields: z, sends: [out, rest]}, from: b}
  d: {sink: o, from: c.rest}
"""
    made = planned(tmp_path, text)
    assert made.nodes["c"].outputs["rest"] == Flow("readings/1", frozenset("xyz"))
    assert made.nodes["d"].outputs == {}


def test_what_is_published(tmp_path: Path) -> None:
    text = """nodes:
  a: {source: {}, process: p}
  b: {operator: {}, from: a, process: p, publish: always}
  c: {operator: {}, from: b, process: p}
  d: {sink: o, from: c}
"""
    nodes = planned(tmp_path, text).nodes
    assert [nodes[n].published("out") for n in "abc"] == [False, True, True]


def test_contexts_tell_a_kind_where_it_is(tmp_path: Path) -> None:
    made = planned(tmp_path, HOSTS, state=tmp_path / "s", brokers={"x": "mqtt://127.0.0.1:5"})
    context = made.nodes["e"].context
    assert (context.topology, context.node, context.base) == ("t", "e", tmp_path)
    assert (context.state, context.broker) == (tmp_path / "s" / "e", "y")
    assert context.brokers == {"x": "mqtt://127.0.0.1:5", "y": "mqtt://y"}
    assert made.nodes["e"].written == {"path": "o"}
    default = planned(tmp_path, "nodes: {a: {source: {}, publish: always}}").nodes["a"].context
    assert default.state == tmp_path / ".penstock" / "t" / "a"


def test_every_fault_is_found_also_downstream_of_another(tmp_path: Path) -> None:
    text = """nodes:
  a: {source: {sends: 5}}
  b: {operator: {expression: 'x + !'}, from: a}
  c: {sink: {}, from: b}
  d: {sink: {path: o, pth: 1}, from: nowhere, on: mars}
"""
    assert faults(tmp_path, text) == [
        "3:23: expected a map, got 5",
        "4:35: unexpected '!'",
        "5:7: the key 'path' is missing",
        "6:23: unknown key 'pth'; did you mean 'path'?",
        "6:38: unknown node 'nowhere'; known: a, b, c",
        "6:51: unknown host 'mars'; known: local",
    ]


def test_ports_of_nodes_that_are_not_there_or_cannot_be(tmp_path: Path) -> None:
    text = """nodes:
  a: {source: {sends: {hot: readings/1, cold: readings/1}}}
  b: {sink: o, from: a}
  c: {sink: o, from: [a.hott, a.cold]}
  d: {sink: o, from: g}
  e: {source: {sends: {state: readings/1}}, publish: always}
  f: {source: {sends: {A b: reading/1}}, publish: always}
  g: {sink: o, from: a.hot}
"""
    assert faults(tmp_path, text) == [
        "4:22: the node 'a' has no port 'out'; say which: a.cold, a.hot",
        "5:23: the node 'a' has no port 'hott'; did you mean 'a.hot'?",
        "6:22: the node 'g' sends nothing that can be read",
        "7:7: a port cannot be named 'state'",
        "8:7: a port cannot be named 'A b'",
        "8:7: port 'A b' sends 'reading/1', which is no body type; did you mean 'readings/1'?",
    ]


def test_cycles_are_named_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    text = """nodes:
  s: {operator: {}, from: s}
  a: {operator: {}, from: [x, c]}
  b: {operator: {}, from: {a: {queue: 3}}}
  c: {operator: {expression: '!'}, from: b}
  x: {source: {}}
  z: {sink: o, from: c}
"""
    assert faults(tmp_path, text) == [
        "3:27: a cycle: s → s",
        "4:31: a cycle: a → b → c → a",
        "6:30: unexpected '!'",
    ]


def test_a_chain_of_the_most_nodes_is_planned_at_once(tmp_path: Path) -> None:
    lines = [f"  n{i}: {{operator: {{}}, from: n{i + 1}}}" for i in range(498)]
    text = "\n".join(["nodes:", *lines, "  n498: {source: {}}", "  z: {sink: o, from: n0}"])
    began = time.monotonic()
    made = planned(tmp_path, text)
    assert time.monotonic() - began < 5
    assert list(made.nodes) == [f"n{i}" for i in range(498, -1, -1)] + ["z"]
