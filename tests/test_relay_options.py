"""``relay:`` of a host: what is wrong is said with its place, and what is right is planned so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nodes.cli import main
from nodes.cli.graph import mermaid
from nodes.cli.schema import topology_schema
from nodes.plan import prepare
from nodes.planned_relays import private
from schemas.topology import TopologyError

TOPOLOGY = """\
topology: line
brokers:
  site: {{url: "mqtt://gateway.local"}}
  cloud: {{url: "mqtt://cloud.example"}}
  hall: {{url: "mqtt://hall.example"}}
hosts:
  camera: {{broker: site{camera}}}
  gateway: {{broker: site, {relay}}}
  cloud: {{broker: cloud}}
  hall: {{broker: hall}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv}}, on: camera}}
  warm: {{preprocess: {{steps: [{{filter: value > 1}}]}}, from: meter, on: gateway}}
{more}"""
STORE = "  store: {uplink: {sink: stdout}, from: [meter, warm], on: cloud}\n"


def write(folder: Path, relay: str, more: str = STORE, camera: str = "") -> Path:
    (folder / "meter.csv").write_text("value\n1\n")
    path = folder / "line.yaml"
    path.write_text(TOPOLOGY.format(relay=relay, more=more, camera=camera))
    return path


@pytest.mark.parametrize(
    ("relay", "said"),
    [
        ("relay: {spol: 20MB}", "8:35: unknown key 'spol'; did you mean 'spool'?"),
        ("relay: {}", "the key 'spool' is missing"),
        ("relay: 20MB", "expected a map, got '20MB'"),
        ("relay: {spool: 20 apples}", "8:42: expected a size with a unit"),
        ("relay: {spool: 20MB, overflow: drop-oldst}", "'drop-oldst'; did you mean 'drop-oldest'?"),
        ("relay: {spool: 20MB, order: first}", "oldest"),
        ("relay: {spool: 20MB, rate: fast}", "expected a rate per s, min, h, e.g. 30/s, got 'fast'"),
        ("relay: {spool: 20MB, rate: 0/s}", "expected a rate"),
        (
            "relay: {spool: 200kB}",
            "8:42: 2 ports share it, and each needs 131072 bytes: at least 262144 bytes, got 200000",
        ),
        ("raley: {spool: 20MB}", "unknown key 'raley'; did you mean 'relay'?"),
    ],
)
def test_what_is_wrong_has_its_place(tmp_path: Path, relay: str, said: str) -> None:
    with pytest.raises(TopologyError) as caught:
        prepare(write(tmp_path, relay))
    assert "line.yaml:8:" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "camera", "said"),
    [
        (
            "  store: {uplink: {sink: stdout}, from: [meter, warm], on: camera}\n",
            "",
            "8:27: there is nothing to keep: no safe edge leaves the broker 'site' for another one",
        ),
        (
            "  store: {uplink: {sink: stdout}, from: {meter: {delivery: fast}, warm: {delivery: fast}}, on: cloud}\n",
            "",
            "(fast ones are not kept)",
        ),
        (STORE, ", relay: {spool: 20MB}", "8:27: the broker 'site' has a relay that keeps already, on host 'camera'"),
        (
            "  relay-gateway-cloud: {uplink: {sink: stdout}, from: [meter, warm], on: cloud}\n",
            "",
            "14:3: the relay of host 'gateway' has this name",
        ),
    ],
)
def test_what_a_relay_cannot_do(tmp_path: Path, more: str, camera: str, said: str) -> None:
    with pytest.raises(TopologyError) as caught:
        prepare(write(tmp_path, "relay: {spool: 20MB}", more, camera))
    assert said in str(caught.value)


def test_what_it_takes(tmp_path: Path) -> None:
    """Safe edges of its broker, from whichever host; for each other broker a relay, for each port a share of the budget."""
    more = (
        "  store: {uplink: {sink: stdout}, from: [meter, warm], on: cloud}\n"
        "  show: {uplink: {sink: stdout}, from: {meter: {delivery: fast}, warm: {}}, on: cloud}\n"
        "  list: {uplink: {sink: stdout}, from: meter, on: hall}\n"
        "  back: {preprocess: {steps: [{filter: value > 2}]}, from: meter, on: cloud}\n"
        "  lamp: {uplink: {sink: stdout}, from: back, on: gateway}\n"
    )
    plan = prepare(write(tmp_path, "relay: {spool: 20MB, overflow: drop-newest, order: newest, rate: 30/min}", more))
    cloud, hall = plan.relays["relay-gateway-cloud"], plan.relays["relay-gateway-hall"]
    assert [(p.producer, p.consumers, p.private, p.budget) for p in cloud.ports] == [
        ("meter", ["back", "store"], True, 20_000_000 // 3),
        ("warm", ["store", "show"], False, 20_000_000 // 3),
    ]
    assert [(p.producer, p.consumers) for p in hall.ports] == [("meter", ["list"])]
    assert (cloud.options.overflow, cloud.options.order, cloud.options.rate) == ("drop-newest", "newest", 0.5)
    kept = {(e.producer, e.consumer): (e.relay, private(e, plan)) for e in plan.edges if e.carrier == "relay"}
    assert kept == {
        ("meter", "store"): ("relay-gateway-cloud", True),
        ("warm", "store"): ("relay-gateway-cloud", False),
        ("meter", "show"): ("", False),
        ("warm", "show"): ("relay-gateway-cloud", False),
        ("meter", "list"): ("relay-gateway-hall", False),
        ("meter", "back"): ("relay-gateway-cloud", True),
        ("back", "lamp"): ("", False),
    }
    assert set(plan.brokers("gateway")) == {"site", "cloud", "hall"}
    assert "safe · relay, kept" in mermaid(plan)
    assert "fast · relay" in mermaid(plan)


def test_defaults_lose_nothing(tmp_path: Path) -> None:
    options = prepare(write(tmp_path, "relay: {spool: 20MB}")).relays["relay-gateway-cloud"].options
    assert (options.overflow, options.order, options.rate) == ("block", "oldest", None)


def test_the_schema_knows_it() -> None:
    schema = topology_schema()
    assert "RelayOptions" in json.dumps(schema["$defs"]["Host"])
    options = schema["$defs"]["RelayOptions"]
    assert options["required"] == ["spool"]
    assert set(options["properties"]) == {"spool", "overflow", "order", "rate"}


def test_check_says_it_at_the_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["check", str(write(tmp_path, "relay: {spool: 20MB, ordr: oldest}"))]) == 2
    assert "unknown key 'ordr'; did you mean 'order'?" in capsys.readouterr().err
