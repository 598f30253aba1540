"""The backend ``mlp``, and the file of weights that it serves."""

from __future__ import annotations

import io
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.backends import mlp
from nodes.backends._backend import Scaling
from nodes.federated.weights import Weights, digest
from nodes.federated.weights_file import ABOUT, read, write
from nodes.operator import Context
from nodes.trainers.mlp import Mlp
from schemas.errors import ConfigError


def network(**options: Any) -> Mlp:
    made = Mlp([6, 5, 3], seed=4, **options)
    made.open()
    return made


def opened(path: Path) -> mlp.Mlp:
    made = mlp.build(mlp.Config(), Context("t", "n", path.parent, path.parent), path, 1)
    assert isinstance(made, mlp.Mlp)
    return made


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_it_answers_as_the_trainer_does(tmp_path: Path, activation: Any, loss: Any) -> None:
    trained = network(activation=activation, loss=loss)
    path = tmp_path / "model.npz"
    path.write_bytes(write(trained.weights(), {"activation": activation, "loss": loss, "shape": "2,3"}))
    model = opened(path)
    signature = model.open()
    assert signature == mlp.inspect(path)
    assert signature.inputs[0].shape == (2, 3)
    x = np.random.default_rng(0).random((7, 2, 3), np.float32)
    np.testing.assert_array_equal(model.infer({"x": x})["y"], trained.predict(x))
    seen = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    answer = model.infer({"x": seen}, Scaling(1 / 255))["y"]
    np.testing.assert_allclose(answer, trained.predict(seen.astype(np.float32) / 255), atol=1e-6)
    model.close()


def test_the_file_is_numpys_and_always_the_same() -> None:
    weights = network().weights()
    data = write(weights, {"activation": "relu"})
    assert data == write(dict(weights), {"activation": "relu"})
    back, about = read(data)
    assert (digest(back), list(back), about) == (digest(weights), list(weights), {"activation": "relu"})
    with np.load(io.BytesIO(write(weights)), allow_pickle=False) as loaded:
        assert {name: loaded[name].tobytes() for name in loaded} == {n: a.tobytes() for n, a in weights.items()}
    odd: Weights = {"0.weight": np.float32(3) * np.ones((), np.float32), "a/b": np.zeros((0, 3)), "file": np.arange(3)}
    again, _ = read(write(odd))
    assert [(n, a.shape, a.dtype) for n, a in again.items()] == [(n, a.shape, a.dtype) for n, a in odd.items()]


def test_a_saved_npz_of_numpy_is_read() -> None:
    out = io.BytesIO()
    np.savez_compressed(out, w1=np.ones((2, 2), np.float32))
    assert read(out.getvalue())[0]["w1"].tolist() == [[1, 1], [1, 1]]


def test_what_is_dangerous_or_damaged_is_refused() -> None:
    pickled = io.BytesIO()
    np.savez(pickled, w1=np.array([{"a": 1}], dtype=object))
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as file:
        file.writestr(ABOUT, "[1]")
    liar = io.BytesIO()
    with zipfile.ZipFile(liar, "w") as file:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
        file.writestr("w1.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for data in (b"", b"PK", b"nonsense" * 30, pickled.getvalue(), text.getvalue(), liar.getvalue(), write({})):
        with pytest.raises(ConfigError):
            read(data)
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        read(write(network().weights()), most=100)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.data())
def test_no_changed_file_does_worse_than_being_refused(data: st.DataObject) -> None:
    whole = bytearray(write(network().weights(), {"activation": "relu"}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ConfigError):
        read(bytes(whole[: data.draw(st.integers(0, len(whole)))]), most=10**6)


@pytest.mark.parametrize(
    ("change", "about", "words"),
    [
        ({"w1": np.zeros((6, 4), np.float32)}, {}, "not those of dense layers"),
        ({"w1": np.zeros((6, 5))}, {}, "float32"),
        ({"w3": np.zeros(3, np.float32)}, {}, "not those of dense layers"),
        ({}, {"activation": "gelu"}, "'gelu' that is not known"),
        ({}, {"shape": "2,4"}, "for a network of 6 inputs"),
        ({}, {"shape": "two"}, "is none"),
    ],
    ids=str,
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, change: Weights, about: dict[str, str], words: str
) -> None:
    path = tmp_path / "model.npz"
    path.write_bytes(write({**network().weights(), **change}, about))
    with pytest.raises(ConfigError, match=words):
        mlp.inspect(path)
    with pytest.raises(ConfigError, match=words):
        opened(path).open()
