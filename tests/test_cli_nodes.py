"""``penstock nodes`` and ``penstock schema``: everything that can be written is described, and described truly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from nodes import kinds
from nodes.cli import _kinds, main
from nodes.cli import nodes as command
from nodes.cli.schema import message_schema, topology_schema

ROOT = Path(__file__).parent.parent
EVERY = [(family, name) for family in _kinds.FAMILIES for name in kinds.names(family)]
TOPOLOGIES = sorted(
    [*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("nodes/cli/starters/*/*.yaml"), ROOT / "deploy/topology.yaml"]
)


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_every_kind_is_described(family: str, name: str) -> None:
    kind = _kinds.describe(family, name)
    summary = _kinds.summary(family, name)
    assert re.fullmatch(r"[A-Z][^`\n]{10,150}\.", summary), summary
    assert kind.text.replace("`", "").startswith(summary[:-1])
    for option in kind.options:
        assert option.description, f"{option.name} has no description"
        assert option.type not in {"", "anything"} or family == "node", f"{option.name} does not say what it takes"
        json.dumps(option.default)
    shown = command.one(kind).splitlines()
    assert shown[0] == f"{family} {name}"
    assert all(any(line.startswith(f"  {option.name}: ") for line in shown) for option in kind.options)


def test_the_overview_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["nodes"]) == 0
    out = capsys.readouterr().out
    for _, name in EVERY:
        assert f"\n  {name} " in out


def test_one_name_in_two_families_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["nodes", "csv"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("source csv\n")
    assert "\nsink csv\n" in out
    assert main.run(["nodes", "sink/csv"]) == 0
    assert capsys.readouterr().out.startswith("sink csv\n")


def test_options_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["nodes", "source/csv", "--json"]) == 0
    (kind,) = json.loads(capsys.readouterr().out)
    options = {option["name"]: option for option in kind["options"]}
    assert options["path"]["required"] is True
    assert options["delimiter"] == {
        "name": "delimiter",
        "type": "text",
        "required": False,
        "default": ",",
        "description": options["delimiter"]["description"],
    }


def test_defaults_have_their_units() -> None:
    options = {option.name: option for option in _kinds.describe("node", "infer").options}
    assert options["batch.wait"].default == "5ms"
    assert options["batch.max"].default == 16


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, "anything"),
        ({"type": "integer", "minimum": 1, "maximum": 64}, "whole number ≥ 1, ≤ 64"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "list of a | b"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "map of number"),
        ({"$ref": "#/$defs/X", "$defs": {"X": {"const": "now"}}}, "X"),
        ({"type": ["string", "integer"], "examples": ["20MB"]}, "text or whole number (20MB)"),
    ],
)
def test_schemas_in_words(schema: dict[str, Any], text: str) -> None:
    assert _kinds.type_text(schema) == text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cvs", "error: there is no kind 'cvs'; did you mean 'csv'?"),
        ("snik/csv", "error: there is no family 'snik'; did you mean 'sink'?"),
        ("sink/video", "error: there is no kind 'video'"),
    ],
)
def test_unknown_kinds(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["nodes", name]) == 2
    assert capsys.readouterr().err.startswith(told)


def test_the_reference_in_the_docs_is_of_these_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["nodes", "--markdown"]) == 0
    made = capsys.readouterr().out
    page = (ROOT / "docs" / "kinds.md").read_text()
    assert page == made, "docs/kinds.md is not what the kinds say now: make docs"


@pytest.fixture(scope="module")
def topology() -> dict[str, Any]:
    return topology_schema()


def test_the_topology_schema_is_one(topology: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(topology)
    assert main.run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == topology


@pytest.mark.parametrize("path", TOPOLOGIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_topologies_are_right_by_the_schema(path: Path, topology: dict[str, Any]) -> None:
    document = YAML(typ="safe").load(path.read_text().replace("topology: NAME", "topology: name"))
    errors = [
        f"{error.json_path}: {error.message[:200]}" for error in Draft202012Validator(topology).iter_errors(document)
    ]
    assert errors == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"topology": "a", "nodes": {}, "brokres": {}},
        {"topology": "a"},
        {"topology": "a", "nodes": {"n": {"ingest": {"source": "synthetic", "cuont": 1}}}},
        {"topology": "a", "nodes": {"n": {"ingest": {"source": "none"}}}},
        {"topology": "a", "nodes": {"n": {"from": "m"}}},
        {"topology": "a", "nodes": {"n": {"ingest": {"source": "synthetic"}, "uplink": {"sink": "stdout"}}}},
        {"topology": "a", "nodes": {"n": {"ingest": {"source": "synthetic"}, "publish": "never"}}},
    ],
)
def test_the_schema_refuses(wrong: dict[str, Any], topology: dict[str, Any]) -> None:
    assert not Draft202012Validator(topology).is_valid(wrong)


def test_message_schemas_describe_the_golden_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["schema", "messages"]) == 0
    everything = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(everything)
    types = [
        next(iter(everything["$defs"][ref["$ref"].rsplit("/", 1)[-1]]["properties"]["type"].values()))
        for ref in everything["oneOf"]
    ]
    assert len(types) == len(everything["oneOf"]) >= 11
    end = {"type": "end/1", "id": "a", "source": "b", "time": 1, "body": {"messages": 3}}
    assert Draft202012Validator(everything).is_valid(end)
    assert not Draft202012Validator(everything).is_valid({**end, "body": {"messages": "3"}})


@pytest.mark.parametrize("name", ["readings/1", "readings", "predictions/1", "end/1"])
def test_one_message_schema_has_all_that_it_names(name: str) -> None:
    schema = message_schema(name)
    Draft202012Validator.check_schema(schema)
    text = json.dumps(schema)
    for definition in schema["$defs"]:
        assert f'"#/$defs/{definition}"' in text
    assert not Draft202012Validator(schema).is_valid({"type": "other/1"})


def test_an_unknown_message_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["schema", "reading/1"]) == 2
    assert capsys.readouterr().err == "error: there is no message type 'reading/1'; did you mean 'readings/1'?\n"
