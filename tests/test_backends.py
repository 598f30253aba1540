"""Every backend on the demo's digits model: the same answers from the same weights, whatever the format of the file."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import eim_runner
import numpy as np
import pytest

from nodes import infer, kinds
from nodes.backends._backend import Backend, Scaling
from nodes.inference import Infer
from nodes.operator import Context, Emit
from schemas.errors import ConfigError, MissingError, RunError
from schemas.messages import Array, Frame, Message, Predictions

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "nodes" / "demo"

NEEDS = {
    "litert": ("ai_edge_litert",),
    "onnx": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "torchscript": ("torch",),
    "executorch": ("executorch", "torch"),
    "edge-impulse": ("ai_edge_litert",),
}
"""What each format's file or runtime needs, beside LiteRT, from which the weights come."""
OPTIONS: dict[str, dict[str, Any]] = {"torchscript": {"inputs": {"image": [8, 8, 1]}}}
PIXELS = ("edge-impulse",)
"""They take pixels, and scale them themselves."""


def needs(*libraries: str) -> None:
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


@pytest.fixture(scope="session")
def formats(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """``examples/digits/make_formats.py`` as a module, with a folder for its files."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    try:
        module = import_module("make_formats")
    finally:
        sys.path.pop(0)
    module.OUT = tmp_path_factory.mktemp("formats")  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="session")
def held() -> Iterator[tuple[Array, Array]]:
    """The 450 held-out images, uint8, and their labels."""
    with np.load(DEMO / "digits.npz") as file:
        yield file["images"], file["labels"]


def made(name: str, formats: ModuleType) -> Path:
    needs(*NEEDS[name])
    if name == "litert":
        return DEMO / "digits-float.tflite"
    if name == "edge-impulse":
        return eim_runner.write(formats.OUT / "digits.eim")
    there = formats.OUT / name
    if not there.is_file():
        path: Path = formats.WRITERS[name](formats.weights(DEMO / "digits-float.tflite"), formats.OUT)
        there.write_text(path.name)
    return formats.OUT / there.read_text()  # type: ignore[no-any-return]


def backend(name: str, path: Path, threads: int = 1, **options: Any) -> Backend:
    module = kinds.module("backend", name)
    context = Context("t", "n", path.parent, path.parent)
    config = module.Config(**{**OPTIONS.get(name, {}), **options})
    config.check(context)
    opened: Backend = module.build(config, context, path, threads)
    return opened


@pytest.fixture(params=NEEDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(name: str, formats: ModuleType) -> Path:
    return made(name, formats)


def answers(name: str, path: Path, images: Array, batch: int = 64, **options: Any) -> Array:
    """Scores of each image, [n, 10]."""
    model = backend(name, path, **options)
    signature = model.open()
    size = signature.batch or batch
    values = images if name in PIXELS else (images / np.float32(255)).astype(np.float32)
    (entry,), (out,) = signature.inputs, signature.outputs
    try:
        parts = [model.infer({entry.name: values[i : i + size]})[out.name] for i in range(0, len(values), size)]
    finally:
        model.close()
    return np.concatenate(parts)


def reference(images: Array) -> Array:
    needs("ai_edge_litert")
    return answers("litert", DEMO / "digits-float.tflite", images)


def test_equal_answers_on_all_held_out_images(name: str, path: Path, held: tuple[Array, Array]) -> None:
    images, labels = held
    ours, theirs = answers(name, path, images), reference(images)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    assert (ours.argmax(1) == labels).mean() > 0.96


def test_what_the_file_says_is_what_opens(name: str, path: Path) -> None:
    said = kinds.module("backend", name).inspect(path)
    model = backend(name, path)
    signature = model.open()
    model.close()
    assert [spec.shape for spec in signature.inputs] == [(8, 8, 1)]
    assert [spec.shape for spec in signature.outputs] == [(10,)]
    if said is not None:
        assert said == signature


def test_answers_belong_to_the_caller(name: str, path: Path, held: tuple[Array, Array]) -> None:
    images, _ = held
    model = backend(name, path)
    signature = model.open()
    n = signature.batch or 2
    entry, out = signature.inputs[0], signature.outputs[0]
    values = images.astype(entry.dtype)
    first = model.infer({entry.name: values[:n]})[out.name]
    kept = first.copy()
    model.infer({entry.name: values[n : 2 * n]})
    model.close()
    np.testing.assert_array_equal(first, kept)


def test_pixels_are_scaled_by_the_backend(name: str, path: Path, held: tuple[Array, Array]) -> None:
    if name in PIXELS:
        pytest.skip("it takes pixels as they are")
    images, _ = held
    model = backend(name, path)
    signature = model.open()
    n = signature.batch or 16
    entry, out = signature.inputs[0], signature.outputs[0]
    scaled = model.infer({entry.name: images[:n]}, Scaling(1 / 255))[out.name]
    model.close()
    np.testing.assert_allclose(scaled, reference(images[:n]), atol=2e-5)


def test_inputs_that_may_not_be_written_to(name: str, path: Path, held: tuple[Array, Array]) -> None:
    images, _ = held
    model = backend(name, path)
    signature = model.open()
    n = signature.batch or 4
    entry = signature.inputs[0]
    value = images[:n].astype(entry.dtype)
    value.flags.writeable = False  # what comes off the bus is
    model.infer({entry.name: value})
    model.infer({entry.name: np.broadcast_to(value[:1], value.shape)})
    model.close()


def test_a_damaged_file_is_an_error_of_ours(name: str, path: Path, tmp_path: Path) -> None:
    module = kinds.module("backend", name)
    broken = tmp_path / f"broken{path.suffix}"
    content = path.read_bytes()
    if path.suffix == ".xml":
        broken.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:1000])
    for kept in (b"", content[: len(content) // 2], b"no model at all" * 100):
        broken.write_bytes(kept)
        broken.chmod(0o755)
        with pytest.raises(ConfigError):
            module.inspect(broken) or backend(name, broken).open()
        with pytest.raises(ConfigError):
            backend(name, broken).open()


def test_a_missing_runtime_says_what_to_install(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "edge-impulse":
        pytest.skip("it needs none")
    several = {
        "litert": ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"),
        "executorch": ("executorch", "executorch.runtime"),
    }
    for gone in several.get(name, NEEDS[name][:1]):
        monkeypatch.setitem(sys.modules, gone, None)
    with pytest.raises(MissingError, match=r"(?i)install"):
        backend(name, path).open()


def test_infer_runs_it(name: str, path: Path, held: tuple[Array, Array]) -> None:
    """As a node does: chosen by the file's ending, in batches, with labels, checked before it is opened."""
    images = held[0]
    context = Context("line", "digits", path.parent, path.parent)
    scale: dict[str, Any] = {} if name in PIXELS else {"scale": "1/255"}
    options = {"backend": {name: OPTIONS[name]}} if name in OPTIONS else {}
    config = infer.Config.model_validate(
        {"model": str(path), "labels": str(DEMO / "labels.txt"), "batch": {"max": 16}, **scale, **options}
    )
    config.check(context)
    assert config.chosen_backend()[0] is kinds.module("backend", name)
    node = infer.build(config, context)
    assert isinstance(node, Infer)
    node.open()
    emit = Emit()
    frames = [Message(f"cam:1:{i}", "cam", i, Frame(data=image)) for i, image in enumerate(images[:50])]
    node.process(frames, "cam.out", emit)
    node.close()
    said = [m.body for m in emit.messages()]
    assert not emit.dead
    right = [isinstance(b, Predictions) and (b.labels or [""])[0] for b in said] == reference(images[:50]).argmax(
        1
    ).astype(str)
    assert right.all()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".xml":  # of two files, both count
        other = hashlib.sha256(path.with_suffix(".bin").read_bytes()).hexdigest()
        digest = hashlib.sha256((digest + other).encode()).hexdigest()
    assert {b.model.digest for b in said if isinstance(b, Predictions)} == {digest}


class TestOnnx:
    def test_a_provider_that_is_not_there(self, formats: ModuleType) -> None:
        path = made("onnx", formats)
        with pytest.raises(ConfigError, match=r"has no provider 'Tensorrt'; it has .*CPU"):
            backend("onnx", path, providers=["Tensorrt", "CPU"]).open()

    def test_openvino_takes_it_too(self, formats: ModuleType, held: tuple[Array, Array]) -> None:
        needs("openvino")
        path = made("onnx", formats)
        np.testing.assert_allclose(answers("openvino", path, held[0]), answers("onnx", path, held[0]), atol=2e-5)

    def test_a_fixed_batch(self, formats: ModuleType, held: tuple[Array, Array], tmp_path: Path) -> None:
        needs(*NEEDS["onnx"])
        layers = formats.weights(DEMO / "digits-float.tflite")
        path = tmp_path / "four.onnx"
        path.write_bytes(formats.onnx_model(layers, batch=4).SerializeToString())
        model = backend("onnx", path)
        assert model.open().batch == 4
        model.close()
        np.testing.assert_allclose(answers("onnx", path, held[0][:8]), reference(held[0][:8]), atol=2e-5)


class TestOpenVino:
    def test_a_device_that_is_not_there(self, formats: ModuleType) -> None:
        path = made("openvino", formats)
        with pytest.raises(ConfigError, match="there is no NPU here; there is CPU"):
            backend("openvino", path, device="AUTO:NPU,CPU").open()

    def test_without_its_weights(self, formats: ModuleType, tmp_path: Path) -> None:
        path = made("openvino", formats)
        alone = tmp_path / "alone.xml"
        alone.write_bytes(path.read_bytes())
        with pytest.raises(ConfigError, match=r"alone\.bin is missing"):
            kinds.module("backend", "openvino").inspect(alone)


class TestTorchScript:
    def test_wrong_inputs_are_told(self, formats: ModuleType) -> None:
        path = made("torchscript", formats)
        with pytest.raises(ConfigError, match="are 'inputs' right"):
            backend("torchscript", path, inputs={"image": [9, 8, 1]}).open()

    def test_weights_alone_are_no_model(self, tmp_path: Path) -> None:
        needs("torch")
        torch = import_module("torch")
        torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
        with pytest.raises(ConfigError, match="only weights"):
            kinds.module("backend", "torchscript").inspect(tmp_path / "w.pt")


class TestEdgeImpulse:
    """Against a program that speaks the protocol."""

    def test_a_sensor_with_anomalies(self, tmp_path: Path) -> None:
        model = backend("edge-impulse", eim_runner.write(tmp_path / "m.eim", "motion"))
        signature = model.open()
        assert [(s.name, s.shape) for s in signature.outputs] == [("scores", (2,)), ("anomaly", (1,))]
        rows = np.array([[0, 0, 0, 0, 0, 0], [0, 0.5, 0, 2, 1.5, 2]], np.float32)
        said = model.infer({"features": rows})
        model.close()
        assert said["scores"].tolist() == [[1, 0], [0, 1]]
        assert said["anomaly"].tolist() == [[0], [2]]

    def test_boxes_are_those_of_ssd(self, tmp_path: Path) -> None:
        model = backend("edge-impulse", eim_runner.write(tmp_path / "b.eim", "boxes"))
        model.open()
        image = np.zeros((1, 10, 20, 3), np.uint8)
        image[0, 5, 10], image[0, 0, 2] = (255, 0, 0), (0, 0, 255)
        said = model.infer({"image": image})
        model.close()
        assert said["count"].tolist() == [2]
        assert said["classes"][0, :2].tolist() == [1, 0]
        np.testing.assert_allclose(said["boxes"][0, :2], [[0, 0.1, 0.1, 0.2], [0.5, 0.5, 0.6, 0.6]], atol=1e-6)

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            ("start", r"ended by itself with code 1 \(libgomp.so.1: cannot open"),
            ("mute", "does not open its socket"),
            ("parameters", "does not tell what it takes"),
        ],
    )
    def test_a_program_that_does_not_start(
        self, fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EIM_FAULT", fault)
        path = eim_runner.write(tmp_path / "m.eim", "motion")
        with pytest.raises(ConfigError, match=words):
            backend("edge-impulse", path, start="2s" if fault == "mute" else "10s").open()

    @pytest.mark.parametrize(("fault", "words"), [("dies", "with code 7"), ("hangs", "no answer within 1 s")])
    def test_a_program_that_fails_is_started_anew(
        self, fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EIM_FAULT", fault)
        model = backend("edge-impulse", eim_runner.write(tmp_path / "m.eim", "motion"), answer="1s")
        model.open()
        row = {"features": np.zeros((1, 6), np.float32)}
        model.infer(row)
        with pytest.raises(RunError, match=words):
            model.infer(row)
        assert model.infer(row)["anomaly"].tolist() == [[0]]
        model.close()

    def test_it_refuses_in_words(self, tmp_path: Path) -> None:
        model = backend("edge-impulse", eim_runner.write(tmp_path / "m.eim", "motion"))
        model.open()
        with pytest.raises(RunError, match="size of the input buffer"):
            model.infer({"features": np.zeros((1, 5), np.float32)})
        model.close()

    def test_a_file_that_may_not_be_run(self, tmp_path: Path) -> None:
        path = eim_runner.write(tmp_path / "m.eim", "motion")
        path.chmod(0o644)
        with pytest.raises(ConfigError, match=r"chmod \+x m\.eim"):
            kinds.module("backend", "edge-impulse").inspect(path)

    def test_nothing_of_it_is_left(self, tmp_path: Path) -> None:
        model = backend("edge-impulse", eim_runner.write(tmp_path / "m.eim", "motion"))
        model.open()
        running = model._runner  # type: ignore[attr-defined]
        model.close()
        assert running._process.returncode is not None
        assert not Path(running._folder.name).exists()
