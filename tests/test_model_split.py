"""Models in two parts: where they can be cut, that the parts answer as the whole, and where a plan would cut."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from command_kit import penstock
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.models import cut_tflite
from nodes.models.cuts import crossing
from nodes.models.halves import compare
from nodes.models.planning import Link, Profile, Timed, best, choices, module_of
from schemas.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "nodes" / "demo"
MODELS = ROOT / "tests" / "models"

pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    graph=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=2, max_size=12),
    last=st.integers(1, 2),
)
def test_a_cut_is_where_all_that_follows_hangs_on_one_tensor(graph: list[list[int]], last: int) -> None:
    """Against a search that knows nothing of lives: take the tensor away, and see whether the rest can still be computed."""
    inputs = [
        [n % (i + 1) for n in names] for i, names in enumerate(graph)
    ]  # tensor i + 1 is made by operator i; 0 comes in
    outputs = [[i + 1] for i in range(len(graph))]
    ends = [len(graph) + 1 - n for n in range(1, last + 1)]

    def needed(wanted: int, without: int, seen: set[int]) -> bool:
        """Whether computing ``wanted`` without that tensor needs what comes in."""
        if wanted == without:
            return False
        if wanted == 0:
            return True
        if wanted in seen:
            return False
        seen.add(wanted)
        return any(needed(name, without, seen) for name in inputs[wanted - 1])

    places = crossing(inputs, outputs, ends)
    for before, tensor in places:
        behind = {i + 1 for i in range(before, len(graph))}
        assert tensor not in behind
        assert behind >= set(ends)
        # of what is computed before, what the ends need is this tensor alone
        wanted, stack = set[int](), list(ends)
        while stack:
            name = stack.pop()
            if name in behind and name not in wanted:
                wanted.add(name)
                stack += inputs[name - 1]
        used = {name for made in wanted for name in inputs[made - 1]} - behind
        assert used == {tensor}
        assert not any(needed(end, int(tensor), set()) for end in ends)
    assert len({tensor for _, tensor in places}) == len(places)


@pytest.mark.parametrize("name", ["digits-float", "digits-int8"])
def test_every_cut_of_the_digits_answers_as_the_whole(name: str, tmp_path: Path) -> None:
    path = DEMO / f"{name}.tflite"
    cuts = cut_tflite.cuts(path)
    assert [cut.number for cut in cuts] == list(range(1, 9))
    for cut in cuts:
        cut_tflite.split(path, cut, tmp_path / "h.tflite", tmp_path / "t.tflite")
        assert compare(path, tmp_path / "h.tflite", tmp_path / "t.tflite").difference == 0, cut


def test_every_cut_of_a_model_with_branches(tmp_path: Path) -> None:
    from benchmarks.mobilenet import build, tflite

    path = tmp_path / "m.tflite"
    path.write_bytes(tflite(build(32, 0.35), quantised=False))
    cuts = cut_tflite.cuts(path)
    assert 20 < len(cuts) < sum((cuts[-1].head, cuts[-1].tail))  # not within a residual block
    for cut in cuts[::5]:
        cut_tflite.split(path, cut, tmp_path / "h.tflite", tmp_path / "t.tflite")
        assert compare(path, tmp_path / "h.tflite", tmp_path / "t.tflite").difference == 0, cut


@pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="onnx and its runtime are not installed"
)
def test_every_cut_of_an_onnx_model(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    try:
        make_formats = import_module("make_formats")
    finally:
        sys.path.pop(0)
    path = make_formats.write_onnx(make_formats.weights(DEMO / "digits-float.tflite"), tmp_path)
    module = module_of(path)
    cuts = module.cuts(path)
    assert len(cuts) == 14
    for cut in cuts:
        module.split(path, cut, tmp_path / "h.onnx", tmp_path / "t.onnx")
        assert compare(path, tmp_path / "h.onnx", tmp_path / "t.onnx").difference == 0, cut


def test_several_inputs_meet_before_the_cut() -> None:
    assert cut_tflite.cuts(MODELS / "pair.tflite") == []
    done = penstock("model", "split", MODELS / "pair.tflite")
    assert done.returncode == 0
    assert "cannot be cut" in done.stdout


class TestCommand:
    def test_list(self) -> None:
        done = penstock("model", "split", DEMO / "digits-int8.tflite")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 9
        told = json.loads(penstock("model", "split", DEMO / "digits-int8.tflite", "--json").stdout)
        assert told[4]["shape"] == [2, 2, 48]
        assert told[4]["bytes"] == 192

    def test_plan_names_the_least(self) -> None:
        done = penstock("model", "plan", DEMO / "digits-int8.tflite", "--least", "bytes", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        sizes = {way["cut"]: way["bytes"] for way in told["ways"]}
        assert sizes["all there"] == 64
        assert sizes[told["best"]] == min(sizes.values()) == 10

    def test_a_profile_of_another_machine(self, tmp_path: Path) -> None:
        path, far = DEMO / "digits-int8.tflite", tmp_path / "far.json"
        done = penstock("model", "plan", path, "--out", far)
        assert done.returncode == 0, done.stderr
        assert "least latency" in done.stdout
        done = penstock("model", "plan", path, "--there", far, "--link", "1kbit/s", "--json")
        assert json.loads(done.stdout)["best"] != "all there"
        done = penstock("model", "plan", DEMO / "digits-float.tflite", "--there", far)
        assert done.returncode == 2
        assert "of different models" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("split", "nowhere.tflite"), "there is no file nowhere.tflite"),
            (("split", DEMO / "digits.npz"), "only .onnx and .tflite models can be cut"),
            (("split", DEMO / "digits-int8.tflite", "--at", "9"), "there are 1 to 8"),
            (("split", DEMO / "digits-int8.tflite", "--at", "dense"), "cannot be cut at 'dense'"),
            (("split", DEMO / "digits-int8.tflite", DEMO / "digits-int8.tflite"), "takes one model"),
            (("plan", DEMO / "digits-int8.tflite", "--link", "fast"), "--link: expected e.g. 10Mbit/s"),
            (("plan", DEMO / "digits-int8.tflite", "--delay", "5"), "--delay: expected a duration"),
            (("plan", DEMO / "digits-int8.tflite", "--least", "speed"), "--least: expected latency, bytes, energy"),
            (("plan", DEMO / "digits-int8.tflite", "--there", DEMO / "labels.txt"), "is no profile"),
        ],
    )
    def test_what_is_wrong_is_told(self, arguments: tuple[str | Path, ...], words: str, tmp_path: Path) -> None:
        done = penstock("model", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_damaged_model(self, tmp_path: Path) -> None:
        path = tmp_path / "m.tflite"
        path.write_bytes((DEMO / "digits-int8.tflite").read_bytes()[:3000])
        done = penstock("model", "split", path)
        assert done.returncode == 2
        assert "damaged" in done.stderr


def test_the_plan_weighs_work_and_link() -> None:
    near = Profile("d", 1000, 10, 1.0, [Timed("a", 100, 0.2, 0.8), Timed("b", 500, 0.5, 0.5)])
    far = Profile("d", 1000, 10, 0.1, [Timed("a", 100, 0.02, 0.08), Timed("b", 500, 0.05, 0.05)])
    fast, slow = Link(1e9, 0.0), Link(200.0, 0.0)
    assert best(choices(near, far, fast, 5, 1), "latency").name == "all there"
    assert best(choices(near, far, slow, 5, 1), "latency").name == "a"
    assert best(choices(near, far, slow, 5, 1), "bytes").name == "all here"
    ways = {way.name: way for way in choices(near, far, slow, 5, 1)}
    assert ways["a"].latency == pytest.approx(0.2 + 0.5 + 0.08)
    assert ways["a"].energy == pytest.approx(0.2 * 5 + 100e-6)
    with pytest.raises(ConfigError, match="different models"):
        choices(near, Profile("e", 1, 1, 1.0, []), fast, 5, 1)


TOPOLOGY = """
topology: halves
nodes:
  camera: {{ingest: {{source: arrays, path: digits.npz, frames: images, labels: labels}}}}
  prepare: {{preprocess: {{steps: [{{scale: 1/255}}]}}, from: {{camera: {{delivery: safe}}}}}}
  head: {{infer: {{model: {head}, decoder: {decoder}}}, from: {{prepare: {{delivery: safe}}}}}}
  tail: {{infer: {{model: {tail}, labels: labels.txt}}, from: {{head: {{delivery: safe}}}}}}
  whole: {{infer: {{model: {whole}, labels: labels.txt}}, from: {{prepare: {{delivery: safe}}}}}}
  tails: {{uplink: {{sink: sqlite, path: results.sqlite, table: tails}}, from: tail}}
  wholes: {{uplink: {{sink: sqlite, path: results.sqlite, table: wholes}}, from: whole}}
"""


@pytest.mark.parametrize(
    ("model", "decoder"), [("digits-int8", "tensors"), ("digits-float", "{tensors: {half: true}}")]
)
def test_two_nodes_answer_as_one(model: str, decoder: str, tmp_path: Path) -> None:
    """Head on the camera, tail on the gateway, by the broker between them: the same answers, id for id."""
    for name in ("digits.npz", "labels.txt", f"{model}.tflite"):
        shutil.copy(DEMO / name, tmp_path / name)
    whole = f"{model}.tflite"
    done = penstock("model", "split", whole, "--at", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"head": f"{model}-head.tflite", "tail": f"{model}-tail.tflite", "whole": whole, "decoder": decoder}
    (tmp_path / "t.yaml").write_text(TOPOLOGY.format(**names))
    done = penstock("run", "t.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    db = sqlite3.connect(tmp_path / "results.sqlite")
    try:
        tails = db.execute("select id, label, score, known_label from tails order by id").fetchall()
        wholes = db.execute("select id, label, score, known_label from wholes order by id").fetchall()
        heads = db.execute("select distinct head from tails").fetchall()
    finally:
        db.close()
    assert len(wholes) == 450
    assert [str(head).split()[0] for (head,) in heads] == [f"{model}-head"]
    assert [row[0] for row in tails] == [row[0] for row in wholes]
    if decoder == "tensors":
        assert tails == wholes
    else:
        assert sum(a[1] != b[1] for a, b in zip(tails, wholes, strict=True)) <= 1
        assert float(np.abs([a[2] - b[2] for a, b in zip(tails, wholes, strict=True)]).max()) < 0.01


def test_what_the_head_gives_is_checked(tmp_path: Path) -> None:
    for name in ("digits.npz", "labels.txt", "digits-int8.tflite"):
        shutil.copy(DEMO / name, tmp_path / name)
    (tmp_path / "t.yaml").write_text(
        "topology: t\nnodes:\n  camera: {ingest: {source: arrays, path: digits.npz, frames: images}}\n"
        "  head: {infer: {model: digits-int8.tflite, decoder: tensors}, from: camera}\n"
        "  sums: {aggregate: {window: 1s, fields: {n: count()}}, from: head}\n"
    )
    done = penstock("check", "t.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "tensors/1" in done.stderr
