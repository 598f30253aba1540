"""What ``train`` and ``federate`` take and refuse: options, messages, and what must agree in one topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes.federated.labelled import Labelled, UnlabelledError
from nodes.plan import prepare
from schemas.errors import ConfigError
from schemas.messages import Frame, Message, Readings, Tensors

MLP = "trainer: {mlp: {layers: [64, 10], seed: 1}}"
CAMERA = "  camera: {ingest: {source: arrays, path: a.npz}}"
METER = "  meter: {ingest: {source: csv, path: a.csv}}"


def wrong(folder: Path, *nodes: str) -> list[str]:
    np.savez(folder / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.arange(2))
    (folder / "a.csv").write_text("time,temperature,humidity,fault\n1,2,3,0\n")
    path = folder / "t.yaml"
    path.write_text("\n".join(["topology: t", "nodes:", *nodes]) + "\n")
    try:
        prepare(path)
    except ConfigError as error:
        return [str(line).partition(f"{path.name}:")[2] for line in getattr(error, "lines", ())]
    return []


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([CAMERA, f"  a: {{train: {{job: j, {MLP}}}, from: camera}}"], []),
        (
            [CAMERA, "  a: {train: {job: j, trainer: {mlpp: {layers: [64, 10]}}}, from: camera}"],
            ["unknown trainer 'mlpp'; did you mean 'mlp'?"],
        ),
        (
            [CAMERA, "  a: {train: {job: j, trainer: {mlp: {layer: [64, 10]}}}, from: camera}"],
            ["unknown key 'layer'; did you mean 'layers'?"],
        ),
        ([CAMERA, f"  a: {{train: {{job: J/x, {MLP}}}, from: camera}}"], ["expected a name of a-z, 0-9, _ and -"]),
        (
            [CAMERA, f"  a: {{train: {{job: j, {MLP}, spool: 20MB}}, from: camera}}"],
            ["unknown key 'spool'"],
        ),
        (
            [CAMERA, f"  a: {{train: {{job: j, {MLP}}}, from: camera, replicas: 2}}"],
            ["cannot have replicas: each would be a client of the same name"],
        ),
        (
            [CAMERA, f"  a: {{train: {{job: j, {MLP}, target: number, policy: balanced}}, from: camera}}"],
            ["labels that are numbers have no classes to balance"],
        ),
        (
            [CAMERA, f"  a: {{train: {{job: j, {MLP}, classes: [x, y, x]}}, from: camera}}"],
            ["the class 'x' is there twice"],
        ),
        (
            [CAMERA, f"  a: {{train: {{job: j, {MLP}, classes: none.txt}}, from: camera}}"],
            ["cannot read"],
        ),
        (
            [METER, f"  a: {{train: {{job: j, {MLP}, label: fault}}, from: meter}}"],
            ["say in 'fields' which columns"],
        ),
        (
            [METER, f"  a: {{train: {{job: j, {MLP}, label: fault, fields: [temprature]}}, from: meter}}"],
            ["no column 'temprature'; did you mean 'temperature'?"],
        ),
        (
            [METER, f"  a: {{train: {{job: j, {MLP}, label: fault, fields: [fault]}}, from: meter}}"],
            ["'fault' is the label, so it cannot be part of the input"],
        ),
        (
            [
                CAMERA,
                f"  a: {{train: {{job: j, {MLP}}}, from: camera}}",
                "  lead: {federate: {job: j, trainer: {mlp: {layers: [64, 10], seed: 2}}}, publish: always}",
            ],
            ["not the trainer of 'lead', which has the same job: seed is 2 there, 1 here"],
        ),
        (
            [
                CAMERA,
                f"  a: {{train: {{job: j, {MLP}}}, from: camera}}",
                f"  b: {{train: {{job: j, {MLP}, client: a}}, from: camera}}",
            ],
            ["'a' is the client 'a' of the job 'j' already"],
        ),
        (
            [
                f"  a: {{federate: {{job: j, {MLP}}}, publish: always}}",
                f"  b: {{federate: {{job: j, {MLP}}}, publish: always}}",
            ],
            ["'a' leads the job 'j' already"],
        ),
        (
            [f"  a: {{federate: {{job: j, {MLP}, evaluate: none.npz}}, publish: always}}"],
            ["there is no file"],
        ),
        (
            [f"  a: {{federate: {{job: j, {MLP}, strategy: fedavgg}}, publish: always}}"],
            ["unknown strategy 'fedavgg'; did you mean"],
        ),
        (
            [f"  a: {{federate: {{job: j, {MLP}, clients: {{most: 2, quorum: 3}}}}, publish: always}}"],
            ["2 are asked, and quorum is 3"],
        ),
        (
            [CAMERA, f"  a: {{federate: {{job: j, {MLP}}}, from: camera}}"],
            ["federate reads nothing from other nodes"],
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(nodes: list[str], said: list[str], tmp_path: Path) -> None:
    lines = wrong(tmp_path, *nodes)
    assert len(lines) == len(said), lines
    for text in said:
        assert any(text in line for line in lines), lines
    assert all(line.split(":")[0].isdigit() for line in lines), "each has its line and column"


@pytest.mark.parametrize(
    ("train", "said"),
    [("", ["its broker is 'site', and 'lead', which has the same job, is at 'cloud'"]), (", broker: cloud", [])],
)
def test_the_parties_of_a_job_meet_at_one_broker(train: str, said: list[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.arange(2))
    path = tmp_path / "t.yaml"
    lines = [
        "topology: t",
        "brokers: {site: {url: mqtt://site}, cloud: {url: mqtt://cloud}}",
        "hosts: {gateway: {broker: site}, cloud: {broker: cloud}}",
        "nodes:",
        "  camera: {ingest: {source: arrays, path: a.npz}, on: gateway}",
        f"  learn: {{train: {{job: j, {MLP}{train}}}, from: camera, on: gateway}}",
        f"  lead: {{federate: {{job: j, {MLP}}}, on: cloud, publish: always}}",
    ]
    path.write_text("\n".join(lines) + "\n")
    try:
        prepare(path)
    except ConfigError as error:
        found = [str(line) for line in getattr(error, "lines", ())]
    else:
        found = []
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True))


def message(body: Any) -> Message:
    return Message("m:1:7", "camera", 5, body)


def frame(label: Any, data: Any = None) -> Message:
    attributes = {} if label is None else {"label": label}
    return message(Frame(data=np.ones((2, 2), np.uint8) if data is None else data, layout="HW", attributes=attributes))


def test_frames_tensors_and_readings_become_examples() -> None:
    (one,) = Labelled().read(frame("7"))
    assert (one.id, one.time, one.y, one.x.tolist()) == ("m:1:7", 5, 7, [[1, 1], [1, 1]])
    assert Labelled().read(frame(3.0))[0].y == 3
    assert Labelled(classes={"cat": 0, "dog": 1}).read(frame("dog"))[0].y == 1
    assert Labelled(numbers=True).read(frame("2.5"))[0].y == 2.5
    tensors = Tensors(tensors={"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}, attributes={"label": 1})
    assert Labelled(tensor="b").read(message(tensors))[0].x.tolist() == [1, 1]
    columns = {"x": np.array([1.0, 2.0]), "y": np.array([3, 4]), "label": ["0", "1"]}
    body = Readings(n=2, columns=columns, time=np.array([10, 11]))  # type: ignore[arg-type] # a dict of two kinds
    found = Labelled(fields=("y", "x")).read(message(body))
    assert [(e.id, e.time, e.x.tolist(), e.y) for e in found] == [
        ("m:1:7/0", 10, [3, 1], 0),
        ("m:1:7/1", 11, [4, 2], 1),
    ]


@pytest.mark.parametrize(
    ("labelled", "given", "said"),
    [
        (Labelled(), frame(None), "it has no 'label'"),
        (Labelled(), frame("cat"), "a class is a whole number from 0 on, or has a name in 'classes'"),
        (Labelled(), frame(-1), "label is -1"),
        (Labelled(), frame(2.5), "label is 2.5"),
        (Labelled(classes={"cat": 0}), frame("dog"), "'dog', which is none of the classes"),
        (Labelled(numbers=True), frame("warm"), "not a number"),
        (Labelled(numbers=True), frame(float("inf")), "label is inf"),
        (Labelled(), frame("1", np.array([[np.nan]])), "infinite or none"),
        (Labelled(), frame("1", np.zeros((0, 2))), "nothing to learn from"),
        (Labelled(), message(Frame(data=b"x", encoding="jpeg", attributes={"label": 1})), "decode it first"),
        (
            Labelled(),
            message(Tensors(tensors={"a": np.zeros(1), "b": np.zeros(1)}, attributes={"label": 1})),
            "say which in 'tensor'",
        ),
        (
            Labelled(fields=("x",)),
            message(Readings(n=1, columns={"x": np.array([np.nan]), "label": np.array([1])})),
            "row 0 has no number in x",
        ),
        (
            Labelled(fields=("x",)),
            message(Readings(n=2, columns={"x": np.zeros(2), "label": np.array([1, np.nan])})),
            "row 1 has no 'label'",
        ),
        (Labelled(fields=("z",)), message(Readings(n=1, columns={"label": np.array([1])})), "no column 'z'"),
        (
            Labelled(fields=("x",)),
            message(Readings(n=1, columns={"x": ["warm"], "label": np.array([1])})),
            "the column 'x' has texts",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_words(labelled: Labelled, given: Message, said: str) -> None:
    with pytest.raises(ValueError, match=r"it|label|row|frame|column|learn") as caught:
        labelled.read(given)
    assert said in str(caught.value)


def test_what_has_no_label_may_be_left_out() -> None:
    skip = Labelled(fields=("x",), skip=True)
    assert skip.read(frame(None)) == []
    body = Readings(n=3, columns={"x": np.arange(3.0), "label": np.array([1, np.nan, 0])})
    assert [example.y for example in skip.read(message(body))] == [1, 0]
    with pytest.raises(UnlabelledError):
        Labelled().read(frame(None))


def site(name: str = "line", job: str = "line", of: str = "{job: top}", more: str = "") -> str:
    return f"  {name}: {{federate: {{job: {job}, {MLP}, of: {of}{more}}}, publish: always}}"


TOP = f"  top: {{federate: {{job: top, {MLP}}}, publish: always}}"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([TOP, site()], []),
        ([TOP, site(of="top", more=", rounds: 2, fit: {rate: 0.5}, seed: 3")], []),
        ([site(of="{job: far, topology: factory, broker: 'mqtt://cloud', client: line-3}")], []),
        ([site(of="{job: top, broker: cloud}")], ["unknown broker 'cloud'"]),
        ([site(of="{job: top, jobb: 1}")], ["jobb"]),
        ([site(of="{job: Top}")], ["expected a name of a-z"]),
        ([site(of="line")], ["the job 'line' cannot be a part of itself"]),
        ([site("a", "a", "b"), site("b", "b", "a")], ["the job 'a' is a part of itself"]),
        ([TOP, site(more=", until: {accuracy: 0.9}")], ["a part of another one ends with that one"]),
        (
            [TOP, site(more=", time: 1h, stall: 3, wait: 5s")],
            ["ends with that one", "ends with", "waits for its clients"],
        ),
        ([TOP, site(more=", tolerance: 0.1")], ["which model is kept is for the job above to say"]),
        ([TOP, site(more=", buffer: 3")], ["all updates of a site begin with the model of one round above"]),
        ([TOP, site(more=", privacy: {clip: 1.0, epsilon: 3}")], ["only the job above knows"]),
        (
            [TOP, site("a", "a"), site("b", "b", "{job: top, client: a}")],
            ["'a' is the client 'a' of the job 'top' already"],
        ),
        (
            [
                CAMERA,
                f"  a: {{train: {{job: top, {MLP}}}, from: camera}}",
                TOP,
                site("b", "b", "{job: top, client: a}"),
            ],
            ["'a' is the client 'a' of the job 'top' already"],
        ),
        (
            [TOP, site().replace("seed: 1", "seed: 2")],
            ["not the trainer of 'top', of whose job this one is a part: seed is 1 there, 2 here"],
        ),
        (
            [f"  top: {{federate: {{job: top, {MLP}, strategy: scaffold}}, publish: always}}", site()],
            ["'top' leads the job above by scaffold, which corrects each step of a client"],
        ),
    ],
)
def test_what_does_not_go_together_with_a_job_above_is_said_with_its_place(
    nodes: list[str], said: list[str], tmp_path: Path
) -> None:
    lines = wrong(tmp_path, *nodes)
    assert len(lines) == len(said), lines
    for text in said:
        assert any(text in line for line in lines), lines
    assert all(line.split(":")[0].isdigit() for line in lines), "each has its line and column"


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("{job: top}", ["its broker 'site', and 'top', which leads it, is at 'cloud'"]),
        ("{job: top, broker: cloud}", []),
    ],
)
def test_a_site_and_the_job_above_meet_at_one_broker(of: str, said: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    lines = [
        "topology: t",
        "brokers: {site: {url: mqtt://site}, cloud: {url: mqtt://cloud}}",
        "hosts: {gateway: {broker: site}, cloud: {broker: cloud}}",
        "nodes:",
        f"  top: {{federate: {{job: top, {MLP}}}, on: cloud, publish: always}}",
        f"  line: {{federate: {{job: line, {MLP}, of: {of}}}, on: gateway, publish: always}}",
    ]
    path.write_text("\n".join(lines) + "\n")
    try:
        prepare(path)
    except ConfigError as error:
        found = [str(line) for line in getattr(error, "lines", ())]
    else:
        found = []
    assert len(found) == len(said), found
    assert all(text in line for text, line in zip(said, found, strict=True))


def test_a_host_knows_the_brokers_that_its_nodes_name(tmp_path: Path) -> None:
    """Also those that no node of it has for its own, and none that nobody there names."""
    path = tmp_path / "t.yaml"
    lines = [
        "topology: t",
        "brokers: {site: {url: mqtt://site}, cloud: {url: mqtt://cloud}, other: {url: mqtt://other}}",
        "hosts: {gateway: {broker: site}, cloud: {broker: cloud}, elsewhere: {broker: other}}",
        "nodes:",
        f"  line: {{federate: {{job: line, {MLP}, of: {{job: top, broker: cloud}}}}, on: gateway, publish: always}}",
        f"  top: {{federate: {{job: top, {MLP}, broker: other}}, on: cloud, publish: always}}",
    ]
    path.write_text("\n".join(lines) + "\n")
    plan = prepare(path)
    assert set(plan.brokers("gateway")) == {"site", "cloud"}
    assert set(plan.brokers("cloud")) == {"cloud", "other"}
    assert set(plan.brokers()) == {"site", "cloud", "other"}
