"""The models that benchmarks make, and that their loads are counted right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import mobilenet
from benchmarks.workloads import in_process, inference
from nodes.backends import litert
from nodes.backends._backend import dequantise
from nodes.operator import Context

pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")


def test_a_runtime_answers_as_the_reference_does(tmp_path: Path) -> None:
    network = mobilenet.build(size=32, width=0.35)
    path = tmp_path / "float.tflite"
    path.write_bytes(mobilenet.tflite(network, quantised=False))
    images = mobilenet.pictures(6, 32, seed=2).astype(np.float32) / np.float32(255)
    backend = litert.build(litert.Config.model_validate({}), Context("t", "n", tmp_path, tmp_path), path, 1)
    signature = backend.open()
    assert signature.batch is None
    found = backend.infer({signature.inputs[0].name: images})[signature.outputs[0].name]
    np.testing.assert_allclose(found, mobilenet.run(network, images), atol=2e-3)
    assert len(set(found.argmax(axis=1).tolist())) > 1


def test_the_quantised_one_tells_images_apart(tmp_path: Path) -> None:
    network = mobilenet.build(size=32, width=0.35)
    path = tmp_path / "int8.tflite"
    path.write_bytes(mobilenet.tflite(network, quantised=True))
    images = mobilenet.pictures(6, 32, seed=2)
    backend = litert.build(litert.Config.model_validate({}), Context("t", "n", tmp_path, tmp_path), path, 1)
    signature = backend.open()
    spec = signature.outputs[0]
    stored = (images ^ np.uint8(128)).view(np.int8)
    found = dequantise(backend.infer({signature.inputs[0].name: stored})[spec.name], spec)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=0.3)
    assert len(set(found.argmax(axis=1).tolist())) > 1


def test_every_reading_of_the_load_in_one_process_is_counted(tmp_path: Path) -> None:
    assert in_process.whole(tmp_path, rows=50, devices=3, seconds=0.3) > 0
    assert in_process.chain(tmp_path, 4, seconds=0.3).emitted("meter") > 0


@pytest.mark.parametrize("one", [True, False])
def test_every_image_of_the_load_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, one: bool) -> None:
    monkeypatch.setattr(inference, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(inference, "SECONDS", 0.5)
    assert inference.demo().ours(tmp_path, one=one) > 0
