"""``penstock model``: what is in a model's file, and how right it is."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_kit import penstock

from nodes.models.evaluation import Report
from nodes.models.labelled import examples
from schemas.errors import ConfigError
from schemas.messages import Frame, Tensors

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "nodes" / "demo"

pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")


EVALUATE = (
    "model",
    "evaluate",
    DEMO / "digits-float.tflite",
    "--labels",
    DEMO / "labels.txt",
    "--infer",
    "{scale: 1/255}",
)


def evaluated(*arguments: str | Path) -> list[dict[str, Any]]:
    done = penstock(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout)
    return told


def test_a_report_counts() -> None:
    report = Report(Counter({("a", "a"): 3, ("a", "b"): 1, ("b", "b"): 2, ("b", ""): 1}), refused=Counter({"bad": 1}))
    assert (report.examples, report.right, report.accuracy) == (8, 5, 5 / 8)
    assert report.labels(["b", "a", "c"]) == ["b", "a"]
    assert (report.recall("a"), report.precision("b")) == (3 / 4, 2 / 3)
    assert math.isnan(report.recall("c"))
    assert Report(answers={"1": "a", "2": "b"}).agreement(Report(answers={"1": "a", "2": "a"})) == 0.5


def test_the_digits_are_as_right_as_the_model_is() -> None:
    (told,) = evaluated(*EVALUATE, "--data", DEMO / "digits.npz")
    assert (told["examples"], told["right"]) == (450, 437)
    assert sum(n for row in told["confusion"].values() for n in row.values()) == 450
    assert told["confusion"]["8"]["8"] / sum(told["confusion"]["8"].values()) == told["recall"]["8"]
    assert len(told["wrong"]) == 13


def test_a_topology_brings_what_stands_before_the_model() -> None:
    whole = penstock("model", "evaluate", ROOT / "examples" / "digits" / "topology.yaml", "--data", DEMO / "digits.npz")
    assert whole.returncode == 0, whole.stderr
    table, confusion = whole.stdout.split("\n\n")
    assert "437 of 450" in table
    assert "97.11%" in table
    assert confusion.splitlines()[0].split() == ["known", *"0123456789", "recall"]


def test_images_in_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with np.load(DEMO / "digits.npz") as file:
        for i, (value, label) in enumerate(zip(file["images"][:40], file["labels"][:40], strict=True)):
            folder = tmp_path / "images" / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(value[:, :, 0]).resize((32, 32), 0).save(folder / f"{i}.png")
    (tmp_path / "images" / "3" / "notes.txt").write_text("not an image")
    (told,) = evaluated(*EVALUATE, "--data", tmp_path / "images", "--steps", "[decode, {resize: [8, 8]}]")
    assert told["examples"] == 40
    assert told["right"] >= 38
    (broken,) = (tmp_path / "images" / "3").glob("*.txt")
    broken.rename(broken.with_suffix(".png"))
    (told,) = evaluated(*EVALUATE, "--data", tmp_path / "images", "--steps", "[decode, {resize: [8, 8]}]")
    assert (told["examples"], sum(told["refused"].values())) == (41, 1)


def test_several_models_side_by_side() -> None:
    int8 = DEMO / "digits-int8.tflite"
    done = penstock(*EVALUATE[:3], int8, *EVALUATE[3:], "--data", DEMO / "digits.npz")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert "as the first" in head
    assert [row.split()[0] for row in rows] == ["digits-float.tflite", "digits-int8.tflite"]
    assert "100.00%" in rows[0]


def test_show_needs_no_runtime() -> None:
    done = penstock("model", "show", DEMO / "digits-int8.tflite")
    assert done.returncode == 0, done.stderr
    assert "litert, 44,408 bytes, sha256" in done.stdout
    assert "int8[8, 8, 1]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "evaluate needs examples: --data"),
        (("--data", "nowhere"), "nowhere: expected an .npz file, or a folder"),
        (("--data", DEMO / "digits.npz", "--x", "pictures"), "has no array 'pictures'; it has images, labels"),
        (("--data", DEMO / "digits.npz", "--infer", "{scale: 1/255"), "--infer: "),
        (("--data", DEMO / "digits.npz", "--infer", "[1]"), "--infer: expected a map"),
        (("--data", DEMO / "digits.npz", "--infer", "{scales: 2}"), "did you mean 'scale'"),
        (("--data", DEMO / "digits.npz", "--steps", "[{resise: 8}]"), "did you mean 'resize'"),
        (("--data", ROOT / "tests" / "models"), "has no folder with images"),
    ],
)
def test_what_is_wrong_is_told(arguments: tuple[str | Path, ...], words: str) -> None:
    done = penstock(*EVALUATE[:5], *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_that_are_none_of_the_models(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 7]))
    with pytest.raises(ConfigError, match="labels from 0 to 7 for 2 classes"):
        list(examples(path, classes=["a", "b"]))
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.array(["a", "c"]))
    with pytest.raises(ConfigError, match="the label 'c' is none of the model's"):
        list(examples(path, classes=["a", "b"]))
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros((3,), np.int64))
    with pytest.raises(ConfigError, match="expected a label for each input"):
        list(examples(path))


def test_pixels_become_frames_and_numbers_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 1]))
    assert [type(one.message.body) for one in examples(path)] == [Frame, Frame]
    np.savez(path, images=np.zeros((2, 4), np.float32), labels=np.array([0, 1]))
    assert [type(one.message.body) for one in examples(path)] == [Tensors, Tensors]
