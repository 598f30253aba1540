"""Small models: what they lose is measured, and a runtime that does not understand one is found out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from command_kit import penstock

from nodes.infer import Config, build
from nodes.inference import Infer
from nodes.models import golden
from nodes.operator import Context
from schemas.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "nodes" / "demo"
DATA = ("--data", DEMO / "digits.npz", "--labels", DEMO / "labels.txt", "--infer", "{scale: 1/255}")

pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")
quantizer = pytest.mark.skipif(find_spec("ai_edge_quantizer") is None, reason="ai-edge-quantizer is not installed")


def opened(model: Path, **options: str) -> Infer:
    config = Config.model_validate({"model": str(model), **options})
    context = Context("line", "n", model.parent, model.parent)
    config.check(context)
    node = build(config, context)
    assert isinstance(node, Infer)
    node.open()
    return node


@quantizer
@pytest.mark.parametrize("way", ["int8", "int8-dynamic"])
def test_the_digits_made_small(way: str, tmp_path: Path) -> None:
    out = tmp_path / "small.tflite"
    done = penstock("model", "compress", DEMO / "digits-float.tflite", *DATA, "--to", way, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["before"]["bytes"] >= 3 * told["after"]["bytes"] == 3 * out.stat().st_size
    assert told["lost"] <= 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.tflite", "small.tflite.golden.npz"]
    opened(out).close()


@quantizer
def test_what_loses_too_much_is_not_kept(tmp_path: Path) -> None:
    """The right answers are those of the float model: the small one then loses where it answers otherwise."""
    model = opened(DEMO / "digits-float.tflite")
    with np.load(DEMO / "digits.npz") as file:
        images = file["images"]
    said = [
        model.answers({name: (images[i : i + 16] / np.float32(255))}, len(images[i : i + 16]))
        for i in range(0, 450, 16)
        for name in [model._loaded.signature.inputs[0].name]
    ]
    model.close()
    labels = np.concatenate([next(iter(part.values())) for part in said]).argmax(1)
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    done = penstock(
        "model",
        "compress",
        DEMO / "digits-float.tflite",
        *DATA[2:],
        "--data",
        tmp_path / "own.npz",
        "--limit",
        "0",
        "--out",
        tmp_path / "small.tflite",
    )
    assert done.returncode == 1
    assert "lost 0.22 points, more than 0: nothing was kept" in done.stderr
    assert "before" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["own.npz"]


@pytest.mark.skipif(find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="onnx is not installed")
def test_an_onnx_model_made_small(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "examples" / "digits" / "make_formats.py", "--out", tmp_path, "onnx"],
        capture_output=True,
        timeout=50,
    )
    assert made.returncode == 0, made.stderr
    done = penstock("model", "compress", tmp_path / "digits.onnx", *DATA, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["before"]["bytes"] >= 3 * told["after"]["bytes"]
    assert Path(told["file"]).name == "digits-int8.onnx"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((DEMO / "digits-float.tflite",), "compress needs examples"),
        ((DEMO / "digits-float.tflite", *DATA, "--to", "int9"), "did you mean 'int8'"),
        ((DEMO / "digits.npz", *DATA), "only .tflite and .onnx models"),
        (("gone.tflite", *DATA), "there is no file gone.tflite"),
        ((DEMO / "digits-float.tflite", *DATA, "--out", DEMO / "digits-float.tflite"), "is the model itself"),
        ((DEMO / "digits-float.tflite", *DATA[:4]), "the model can take none of the examples"),
    ],
)
def test_what_is_wrong_is_told(arguments: tuple[str | Path, ...], words: str) -> None:
    done = penstock("model", "compress", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


class TestGolden:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        """A model with a golden vector beside it, of its own answers."""
        path = tmp_path / "m.tflite"
        shutil.copy(DEMO / "digits-int8.tflite", path)
        node = opened(path)
        inputs = {"x": np.random.default_rng(0).integers(-128, 128, (5, 8, 8, 1)).astype(np.int8)}
        name = node._loaded.signature.inputs[0].name
        inputs = {name: inputs["x"]}
        golden.write(golden.beside(path), inputs, node.answers(inputs, 5))
        node.close()
        return path

    def test_the_right_answers_are_passed(self, model: Path) -> None:
        opened(model).close()

    def test_wrong_answers_are_found_out(self, model: Path) -> None:
        shutil.copy(golden.beside(model), model.parent / "kept.npz")
        with np.load(golden.beside(model)) as file:
            arrays = {name: file[name] for name in file.files}
        arrays = {name: np.roll(v, 1, axis=0) if name.startswith("out/") else v for name, v in arrays.items()}
        np.savez(golden.beside(model), **arrays)
        with pytest.raises(
            ConfigError, match=r"does not answer as m\.tflite\.golden\.npz has it, but off by .*understand"
        ):
            opened(model)
        opened(model, golden="kept.npz").close()

    def test_a_vector_of_another_model(self, model: Path) -> None:
        golden.write(golden.beside(model), {"y": np.zeros((1, 3))}, {"z": np.zeros((1, 2))})
        with pytest.raises(ConfigError, match="is of another model"):
            opened(model)

    @pytest.mark.parametrize("content", [b"", b"no archive", "half"])
    def test_a_damaged_one(self, content: bytes | str, model: Path) -> None:
        whole = golden.beside(model).read_bytes()
        golden.beside(model).write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
        with pytest.raises(ConfigError, match="is no golden vector"):
            opened(model)

    def test_one_that_is_not_there(self, model: Path) -> None:
        with pytest.raises(ConfigError, match="there is no file"):
            opened(model, golden="gone.npz")
