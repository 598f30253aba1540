"""The ``litert`` backend, and the reader of .tflite files against the runtime."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.backends import _tflite_file, litert
from nodes.backends._backend import Quantisation, Spec, dequantise, quantise
from nodes.operator import Context
from schemas.errors import ConfigError, MissingError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "tests" / "models").glob("*.tflite"), *(ROOT / "nodes" / "demo").glob("*.tflite")])

interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")


def backend(path: Path, **config: Any) -> litert.LiteRT:
    made = litert.build(litert.Config(**config), Context("t", "n", path.parent, path.parent), path, 1)
    assert isinstance(made, litert.LiteRT)
    return made


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_file_says_what_the_runtime_says(path: Path) -> None:
    said = litert.inspect(path)
    runner = interpreter.Interpreter(str(path))
    runner.allocate_tensors()
    for specs, details in ((said.inputs, runner.get_input_details()), (said.outputs, runner.get_output_details())):
        assert len(specs) == len(details)
        for spec, detail in zip(specs, details, strict=True):
            assert spec.dtype == np.dtype(detail["dtype"])
            assert tuple(detail["shape"])[-len(spec.shape) :] == spec.shape or spec.shape == ()
            scale, zero = detail["quantization"]
            assert spec.quantisation == (Quantisation(float(scale), zero) if scale else None)
    (signature,) = runner.get_signature_list().values()
    assert {s.name for s in said.inputs} == set(signature["inputs"])
    assert {s.name for s in said.outputs} == set(signature["outputs"])
    assert backend(path).open() == said


def test_answers_belong_to_the_caller() -> None:
    model = backend(ROOT / "tests" / "models" / "logits.tflite")
    model.open()
    first = model.infer({"x": np.zeros((2, 4), np.float32)})["logits"]
    kept = first.copy()
    model.infer({"x": np.ones((2, 4), np.float32)})
    model.infer({"x": np.ones((8, 4), np.float32)})
    model.close()
    np.testing.assert_array_equal(first, kept)


def test_several_inputs_are_not_mixed_up() -> None:
    model = backend(ROOT / "tests" / "models" / "pair.tflite")
    model.open()
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    answer = model.infer({"b": b, "a": a})
    assert answer["sum"].tolist() == [[11, 22]]
    assert answer["product"].tolist() == [[10, 40]]


def test_one_process_may_hold_many_models() -> None:
    models = [backend(path) for path in FILES for _ in range(3)]
    for model in models:
        model.open()
    for model in models:
        model.close()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_an_error_of_ours(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(FILES[:6])).read_bytes())
    for _ in range(data.draw(st.integers(1, 12))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    with suppress(ConfigError):
        _tflite_file.signature(bytes(content[:cut]))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_ours(content: bytes) -> None:
    with pytest.raises(ConfigError):
        _tflite_file.signature(content[:4] + b"TFL3" + content[4:])


def test_what_only_the_runtime_sees_is_a_config_error(tmp_path: Path) -> None:
    whole = (ROOT / "nodes" / "demo" / "digits-int8.tflite").read_bytes()
    broken = tmp_path / "broken.tflite"
    refused = 0
    for cut in range(0, len(whole), len(whole) // 40):
        broken.write_bytes(whole[:cut])
        with pytest.raises(ConfigError) as caught:
            backend(broken).open()
        refused += "refuses" in str(caught.value)
    assert refused  # some are sound for the reader and not for the runtime


def test_a_delegate_that_is_not_there_or_is_none(tmp_path: Path) -> None:
    model = ROOT / "tests" / "models" / "logits.tflite"
    with pytest.raises(MissingError, match=r"the delegate libnowhere\.so\.1"):
        backend(model, delegate="libnowhere.so.1").open()
    text = tmp_path / "libtext.so"
    text.write_text("no library")
    with pytest.raises(MissingError, match=r"libtext\.so"):
        backend(model, delegate=str(text)).open()
    with pytest.raises(ConfigError, match="a library, but no delegate"):
        backend(model, delegate="libm.so.6").open()


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_no_runtime_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, "ai_edge_litert", "tflite_runtime")
    monkeypatch.delitem(sys.modules, "ai_edge_litert.interpreter", raising=False)
    with pytest.raises(MissingError, match=r"pip install 'penstock\[litert\]'"):
        backend(FILES[0]).open()


def test_tflite_runtime_serves_where_only_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    older = ModuleType("tflite_runtime.interpreter")
    older.Interpreter = interpreter.Interpreter  # type: ignore[attr-defined]  # the same class by its older name
    _without(monkeypatch, "ai_edge_litert")
    monkeypatch.delitem(sys.modules, "ai_edge_litert.interpreter", raising=False)
    monkeypatch.setitem(sys.modules, "tflite_runtime", ModuleType("tflite_runtime"))
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", older)
    model = backend(ROOT / "tests" / "models" / "logits.tflite")
    assert model.open().batch is None


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    st.floats(1e-4, 10),
    st.integers(-128, 127),
)
def test_quantising_is_within_half_a_step(values: list[float], scale: float, zero: int) -> None:
    spec = Spec("x", (len(values),), "int8", Quantisation(float(np.float32(scale)), zero))
    real = np.array(values, np.float32)
    low, high = (-128 - zero) * scale, (127 - zero) * scale
    back = dequantise(quantise(real, spec), spec)
    clipped = np.clip(real, low, high)
    assert (np.abs(back - clipped) <= 0.5 * scale + 1e-4 * scale + np.abs(clipped) * 1e-5).all()
