"""What ``infer`` finds wrong before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from nodes.infer import Config, build
from nodes.operator import Context, Flow
from schemas.errors import ConfigError, Problem
from schemas.problems import validated

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "tests" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The test models, and files that are none."""
    for model in MODELS.glob("*.tflite"):
        (tmp_path / model.name).symlink_to(model)
    whole = (MODELS / "logits.tflite").read_bytes()
    (tmp_path / "short.tflite").write_bytes(whole[:300])
    (tmp_path / "text.tflite").write_text("this is not a model at all")
    (tmp_path / "empty.tflite").write_bytes(b"")
    (tmp_path / "model.h5").write_bytes(whole)
    (tmp_path / "model").write_bytes(whole)
    (tmp_path / "three.txt").write_text("a\nb\nc\n\n")
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "so").mkdir()
    return tmp_path


def problems(folder: Path, **config: Any) -> tuple[Problem, ...]:
    context = Context("line", "infer", folder, folder)
    with pytest.raises(ConfigError) as caught:
        validated(Config, config).check(context)
    return caught.value.problems


WRONG: list[tuple[dict[str, Any], tuple[str | int, ...], str]] = [
    ({"model": "nowhere.tflite"}, ("model",), "no such file"),
    ({"model": "so"}, ("model",), "no ending"),
    (
        {"model": "model"},
        ("model",),
        "no backend takes a model with no ending; known: .eim, .npz, .onnx, .pt, .pte, .tflite, .xml",
    ),
    ({"model": "model.h5"}, ("model",), "'.h5'; known: .eim, .npz, .onnx, .pt, .pte, .tflite, .xml"),
    ({"model": "short.tflite"}, ("model",), "short.tflite: a damaged TFLite model"),
    ({"model": "text.tflite"}, ("model",), "text.tflite: not a TFLite model: it lacks the mark TFL3"),
    ({"model": "empty.tflite"}, ("model",), "empty"),
    ({"model": "logits.tflite", "labels": "nowhere.txt"}, ("labels",), "no such file"),
    ({"model": "logits.tflite", "labels": "so"}, ("labels",), "cannot read"),
    ({"model": "logits.tflite", "labels": "none.txt"}, ("labels",), "is empty"),
    ({"model": "logits.tflite", "labels": "bytes.txt"}, ("labels",), "no text in UTF-8"),
    ({"model": "logits.tflite", "labels": "two.txt"}, ("decoder",), "2 labels, but the model tells 3 classes apart"),
    ({"model": "logits.tflite", "labels": ["a"]}, ("decoder",), "1 labels"),
    ({"model": "logits.tflite", "decoder": "clasification"}, ("decoder",), "did you mean 'classification'?"),
    ({"model": "logits.tflite", "decoder": {"detecton": {}}}, ("decoder", "detecton"), "did you mean 'detection'?"),
    ({"model": "logits.tflite", "decoder": {}}, ("decoder",), "expected one name"),
    ({"model": "logits.tflite", "decoder": {"raw": {}, "regression": {}}}, ("decoder",), "expected one name"),
    (
        {"model": "yolo.tflite", "decoder": {"detection": {"treshold": 1}}},
        ("decoder", "detection", "treshold"),
        "did you mean 'threshold'?",
    ),
    (
        {"model": "yolo.tflite", "decoder": {"detection": {"threshold": 2}}},
        ("decoder", "detection", "threshold"),
        "at most 1",
    ),
    ({"model": "yolo.tflite", "decoder": "detection"}, ("decoder",), "cannot tell the format"),
    ({"model": "yolo.tflite", "decoder": "detection", "labels": ["a"] * 9}, ("decoder",), "does not fit 9 labels"),
    ({"model": "logits.tflite", "decoder": "detection"}, ("decoder",), "two axes"),
    ({"model": "pair.tflite"}, ("decoder",), "the model has 2 outputs"),
    (
        {"model": "pair.tflite", "decoder": {"classification": {"output": "sums"}}},
        ("decoder", "classification"),
        "did you mean 'sum'?",
    ),
    (
        {"model": "pair.tflite", "decoder": {"raw": {"outputs": ["sum", "produkt"]}}},
        ("decoder", "raw", "outputs", 1),
        "did you mean 'product'?",
    ),
    ({"model": "logits.tflite", "decoder": "regression"}, ("decoder",), "3 numbers, but there are no names"),
    (
        {"model": "logits.tflite", "fields": ["a", "b"]},
        ("fields",),
        "2 fields, but the model's input 'x' float32[4] takes 4",
    ),
    ({"model": "pair.tflite", "decoder": "raw", "fields": ["a", "b"]}, ("fields",), "2 inputs"),
    ({"model": "logits.tflite", "backend": "litter"}, ("backend",), "did you mean 'litert'?"),
    (
        {"model": "logits.tflite", "backend": {"litert": {"delegate": "./so/libx.so"}}},
        ("backend", "litert", "delegate"),
        "no such file",
    ),
    (
        {"model": "logits.tflite", "backend": {"litert": {"delegate_options": {"a": "b"}}}},
        ("backend", "litert", "delegate_options"),
        "no delegate",
    ),
    ({"model": "logits.tflite", "batch": {"max": 0}}, ("batch", "max"), "at least 1"),
    ({"model": "logits.tflite", "batch": {"wait": 5}}, ("batch", "wait"), "a duration with a unit"),
    ({"model": "logits.tflite", "tresholds": 1}, ("tresholds",), "unknown key"),
    ({"model": "logits.tflite", "top": 0}, ("top",), "at least 1"),
    ({"model": "logits.tflite", "parallel": 0}, ("parallel",), "at least 1"),
    ({"model": "logits.tflite", "offset": -1}, ("offset",), "no 'scale'"),
    ({"model": "logits.tflite", "scale": "1/0"}, ("scale",), ""),
    ({}, ("model",), "missing"),
    (
        {"model": "belt.npz", "backend": {"trained": {"trainer": "mpl"}}},
        ("backend", "trained", "trainer"),
        "did you mean 'mlp'?",
    ),
    ({"model": "logits.tflite", "job": "belt"}, ("job",), "run by their trainer"),
]


@pytest.mark.parametrize(("config", "path", "words"), WRONG, ids=[f"{i}-{w[2][:24]}" for i, w in enumerate(WRONG)])
def test_one_precise_problem(folder: Path, config: dict[str, Any], path: tuple[str | int, ...], words: str) -> None:
    (problem,) = problems(folder, **config)
    assert problem.path == path
    assert words in problem.message
    assert "\n" not in problem.message


def test_all_problems_are_told_at_once(folder: Path) -> None:
    found = problems(folder, model="nowhere.tflite", labels="nowhere.txt", decoder={"raw": {"output": "x"}})
    assert [p.path for p in found] == [("model",), ("labels",), ("decoder", "raw", "output")]


@pytest.mark.parametrize(
    "config",
    [
        {"model": "logits.tflite", "labels": "three.txt"},
        {"model": "logits.tflite", "labels": ["a", "b", "c"], "decoder": "regression"},
        {"model": "logits.tflite", "decoder": {"classification": None}},
        {"model": "logits.tflite", "backend": "litert", "decoder": {"classification": {"activation": "softmax"}}},
        {"model": "chance.tflite", "labels": ["no", "yes"]},
        {"model": "ssd.tflite", "decoder": "detection"},
        {
            "model": "ssd.tflite",
            "decoder": {"detection": {"outputs": {"boxes": "o0", "classes": "o1", "scores": "o2"}}},
        },
        {"model": "yolo.tflite", "decoder": {"detection": {"format": "yolo"}}},
        {"model": "model", "backend": {"litert": {}}},
    ],
)
def test_right_configs_pass(folder: Path, config: dict[str, Any]) -> None:
    context = Context("line", "infer", folder, folder)
    made = validated(Config, config)
    made.check(context)
    build(made, context)


def test_what_comes_in_and_goes_out(folder: Path) -> None:
    context = Context("line", "infer", folder, folder)
    plain = validated(Config, {"model": "logits.tflite"})
    assert plain.accepts() == {"frame/1", "tensors/1", "readings/1"}
    assert plain.emits([Flow("frame/1")], context) == {"out": Flow("predictions/1")}
    with pytest.raises(ConfigError, match="fields: "):
        plain.emits([Flow("readings/1")], context)
    named = validated(Config, {"model": "ratio.tflite", "fields": ["heat", "flow"], "keep": ["lin"]})
    named.emits([Flow("readings/1", None)], context)
    named.emits([Flow("readings/1", frozenset({"heat", "flow", "lin"}))], context)
    with pytest.raises(ConfigError) as caught:
        named.emits([Flow("readings/1", frozenset({"head", "flow", "line"}))], context)
    (problem,) = caught.value.problems
    assert problem.path == ("fields", 0)
    assert "did you mean 'head'?" in problem.message
    with pytest.raises(ConfigError) as caught:
        named.emits([Flow("readings/1", frozenset({"heat", "flow", "line"}))], context)
    assert caught.value.problems[0].path == ("keep", 0)


def test_checking_loads_no_runtime(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nodes.infer import Config; from nodes.operator import Context\n"
        f"p = Path({str(folder)!r}); Config(model='logits.tflite', labels='three.txt').check(Context('t', 'n', p, p))\n"
        "print([m for m in sys.modules if m.startswith(('ai_edge', 'tflite', 'PIL', 'av.'))])"
    )
    done = run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
