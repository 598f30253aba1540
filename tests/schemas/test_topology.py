"""A topology's form: every way to write it, and what is filled in where it is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from schemas.errors import ConfigError
from schemas.topology import Edge, EdgeOptions, Secret, Topology, TopologyError, load, read
from schemas.topology_parts import Document

FULL = """\
topology: line-3
brokers:
  site:  {url: mqtt://gateway.local:1883}
  edge:  {run: mosquitto, listen: 0.0.0.0:1883, on: gateway}
  cloud: {url: "mqtts://mqtt.example.com:8883", user: line3, password: {env: CLOUD}, ca: ca.pem, cert: c.pem, key: k.pem}
hosts:
  camera-1: {broker: site}
  gateway:  {broker: edge}
  away:     {broker: cloud}
nodes:
  camera: {ingest: {source: video}, on: camera-1, publish: always}
  crop:   {preprocess: [x], from: camera, on: camera-1, process: eye}
  detect: {infer: , from: [crop, camera.raw], on: gateway}
  store:  {uplink: file, from: {detect: {delivery: fast, queue: 4, overflow: latest}, crop: }, on: away}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "t.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def small(folder: Path, text: str) -> Topology:
    return load(written(folder, f"topology: t\n{text}"))


def test_everything_that_can_be_written(tmp_path: Path) -> None:
    path = written(tmp_path, FULL)
    topology = load(path, kinds=("ingest", "preprocess", "infer", "uplink"))
    assert (topology.name, topology.path, topology.base) == ("line-3", path, tmp_path)
    assert topology.hosts == {"camera-1": "site", "gateway": "edge", "away": "cloud"}
    assert topology.brokers["edge"].listen == "0.0.0.0:1883"
    assert topology.brokers["cloud"].password == Secret(env="CLOUD", file=None)
    camera, crop, detect, store = topology.nodes.values()
    assert (camera.kind, camera.config, camera.publish, camera.inputs) == ("ingest", {"source": "video"}, "always", ())
    assert (crop.config, crop.process, crop.host) == (["x"], "eye", "camera-1")
    assert detect.config is None
    assert [edge.name for edge in detect.inputs] == ["crop.out", "camera.raw"]
    assert store.inputs == (
        Edge("detect", "out", EdgeOptions(delivery="fast", queue=4, overflow="latest"), ("from", "detect")),
        Edge("crop", "out", EdgeOptions(delivery=None, queue=None, overflow=None), ("from", "crop")),
    )


def test_a_broker_and_a_host_are_there_when_none_is_named(tmp_path: Path) -> None:
    topology = small(tmp_path, "nodes: {a: {ingest: {}}}")
    assert topology.brokers["local"].run == "embedded"
    assert topology.brokers["local"].listen == "127.0.0.1:0"
    assert topology.brokers["local"].on == "local"
    assert topology.hosts == {"local": "local"}
    assert topology.nodes["a"].host == "local"


def test_the_only_broker_and_the_only_host_need_not_be_said(tmp_path: Path) -> None:
    topology = small(tmp_path, "brokers: {b: {run: embedded}}\nhosts: {h: }\nnodes: {a: {ingest: {}}}")
    assert topology.hosts == {"h": "b"}
    assert topology.brokers["b"].on == "h"
    assert topology.nodes["a"].host == "h"


def test_anchors_make_nodes_that_share_their_keys(tmp_path: Path) -> None:
    text = "nodes:\n  a: &a {ingest: {x: 1}, publish: always}\n  b: {<<: *a, publish: auto}\n"
    nodes = small(tmp_path, text).nodes
    assert (nodes["b"].config, nodes["b"].publish) == ({"x": 1}, "auto")
    nodes["b"].config["x"] = 2
    assert nodes["a"].config == {"x": 1}


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://h",
        "mqtts://h:8883",
        "ws://h/mqtt",
        "wss://[::1]:443/mqtt",
        "mqtt://[fe80::1]:1883",
        "unix:///run/m.sock",
    ],
)
def test_urls_of_brokers(tmp_path: Path, url: str) -> None:
    topology = small(tmp_path, f"brokers: {{b: {{url: '{url}'}}}}\nnodes: {{a: {{ingest: {{}}}}}}")
    assert topology.brokers["b"].url == url


def test_what_is_right_in_a_faulty_file_is_still_read(tmp_path: Path) -> None:
    path = written(tmp_path, "topology: t\nnodes:\n  a: {ingest: {}}\n  b: {ingest: {}, on: mars}\n  c: 5\n")
    topology, problems = read(path)
    assert list(topology.nodes) == ["a"]
    assert set(topology.broken) == {"b", "c"}
    assert len(problems) == 2
    with pytest.raises(TopologyError) as caught:
        load(path)
    assert str(caught.value) == str(topology.error(problems))
    assert caught.value.exit_code == 2
    assert len(caught.value.lines) == len(caught.value.problems) == 2


@pytest.mark.parametrize("name", ["absent.yaml", "absent/t.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file|cannot be read: Is a directory"):
        load(tmp_path / name)


def test_secrets_are_read_when_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINE_PASSWORD", "s e")
    assert Secret(env="LINE_PASSWORD", file=None).read(tmp_path) == "s e"
    (tmp_path / "key").write_bytes(b"pass word\r\nmore\n")
    assert Secret(env=None, file="key").read(tmp_path) == "pass word"
    with pytest.raises(ConfigError, match="the environment variable NOT_SET is not set"):
        Secret(env="NOT_SET", file=None).read(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        Secret(env=None, file="absent").read(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Secret(env=None, file="bytes").read(tmp_path)


def test_a_plain_secret_is_not_repeated_in_the_complaint(tmp_path: Path) -> None:
    text = "brokers:\n  b: {url: 'mqtt://h', user: u, password: hunter2}\n  c: {url: 'http://u:hunter2@h'}\nnodes: {a: {x: }}"
    with pytest.raises(TopologyError) as caught:
        small(tmp_path, text)
    assert "hunter2" not in str(caught.value)
    assert "{env: NAME}" in str(caught.value)


def test_the_json_schema_describes_every_key() -> None:
    schema = Document.model_json_schema()
    text = json.dumps(schema)
    defs = schema["$defs"]
    assert (
        set(re.findall(r'"#/\$defs/(\w+)"', text))
        == set(defs)
        == {"Broker", "EdgeOptions", "Host", "NodeSettings", "RelayOptions", "Secret"}
    )
    for model in (schema, *defs.values()):
        assert model["additionalProperties"] is False
        assert all(field.get("description") for field in model["properties"].values())
    assert set(defs["NodeSettings"]["properties"]) == {"from", "on", "process", "publish", "durable", "replicas"}
