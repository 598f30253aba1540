"""Compressors: what comes out is near what went in, small on the wire, and nothing that comes from outside does harm."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes import kinds
from nodes.compressors._compressor import Compressor
from nodes.federated.weights import Shape, UnfitError, Weights, fit, flat, norm, shapes
from schemas.codec import decode, encode
from schemas.messages import Message, Update


def compressor(name: str, **options: Any) -> Compressor:
    module = kinds.module("compressor", name)
    made: Compressor = module.build(module.Config(**options))
    return made


def delta(seed: int = 0, scale: float = 1e-2) -> Weights:
    """Of a small model, with all that is awkward: a vector, a number alone, zeros, nothing."""
    draw = np.random.default_rng(seed)
    forms = {"w1": (64, 32), "b1": (32,), "kernel": (3, 3, 4, 8), "scalar": (), "none": (0, 5)}
    out = {name: (draw.normal(0, scale, form)).astype(np.float32) for name, form in forms.items()}
    return {**out, "zeros": np.zeros((7, 3), np.float32)}


def mlp(*layers: int, seed: int = 0) -> Weights:
    """A delta like one of a perceptron: weights nearly normal, each tensor of a size of its own."""
    draw = np.random.default_rng(seed)
    out: Weights = {}
    for i, (rows, columns) in enumerate(pairwise(layers), 1):
        out[f"w{i}"] = draw.normal(0, 0.01 / i, (rows, columns)).astype(np.float32)
        out[f"b{i}"] = draw.normal(0, 0.003, columns).astype(np.float32)
    return out


def on_the_wire(tensors: Weights) -> bytes:
    body = Update(job="digits", round=12, client="learn-a", base="ab" * 32, samples=180, tensors=tensors)
    return encode(Message("learn-a:1:12", "learn-a", 1_790_000_000_000_000_000, body))


def travelled(tensors: Weights) -> Weights:
    body = decode(on_the_wire(tensors)).body
    assert isinstance(body, Update)
    return body.tensors


EVERY = [("int8", {}), ("int8", {"block": 100}), ("int8", {"stochastic": False})]
"""Each kind in its ways."""


def steps(one: Weights, most: int, block: int = 0) -> Weights:
    """The step between two codes at each number, by the definition."""
    out: Weights = {}
    for name, array in one.items():
        values = np.abs(array.ravel())
        step = np.zeros(values.size)
        for at in range(0, values.size, block or max(values.size, 1)):
            part = slice(at, at + (block or values.size))
            step[part] = values[part].max() / most
        out[name] = step.reshape(array.shape)
    return out


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_what_comes_out_is_of_the_form_that_went_in(name: str, options: dict[str, Any]) -> None:
    made = compressor(name, **options)
    one = delta()
    back = made.unpack(travelled(made.pack(one, 3)), shapes(one))
    fit(back, shapes(one))


@pytest.mark.parametrize("block", [0, 100])
@pytest.mark.parametrize(("name", "most"), [("int8", 127)])
def test_a_code_is_at_most_a_step_away(name: str, most: int, block: int) -> None:
    one = delta()
    for stochastic, part in ((True, 1.0), (False, 0.5)):
        made = compressor(name, block=block, stochastic=stochastic)
        back = made.unpack(made.pack(one), shapes(one))
        for key, step in steps(one, most, block).items():
            assert (np.abs(back[key] - one[key]) <= step * part * 1.0001).all()


def test_rounding_by_chance_is_right_on_average_and_the_same_by_seed() -> None:
    made = compressor("int8")
    one = mlp(20, 10)
    many = [flat(made.unpack(made.pack(one, seed), shapes(one))) for seed in range(400)]
    step = flat(steps(one, 127))
    # the mean of 400 roundings is within 5 standard errors (a rounding's is at most half a step), everywhere
    assert (np.abs(np.mean(many, 0) - flat(one)) <= 5 * 0.5 * step / 20).all()
    assert not np.array_equal(many[0], many[1])
    first, again = made.pack(one, 7), made.pack(one, 7)
    assert all(np.array_equal(first[key], again[key]) for key in first)


def test_int8_takes_a_quarter_of_float32_with_all_that_travels() -> None:
    for layers in ((64, 64, 10), (64, 256, 128, 10)):
        one = mlp(*layers)
        plain, packed = on_the_wire(one), on_the_wire(compressor("int8").pack(one))
        assert len(packed) <= len(plain) / 4


def test_what_is_too_small_for_a_scale_becomes_nothing() -> None:
    one = {"w": np.array([1e-45, -1e-44, 0], np.float32)}
    made = compressor("int8")
    assert norm(made.unpack(made.pack(one), shapes(one))) <= 1e-43


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_model_of_nothing_and_of_huge_numbers(name: str, options: dict[str, Any]) -> None:
    made = compressor(name, **options)
    assert made.unpack(made.pack({}), ()) == {}
    huge = {"w": np.full((4, 3), 3e38, np.float32)}
    fit(made.unpack(made.pack(huge), shapes(huge)), shapes(huge))


WANTED = (Shape("w", (6, 4)), Shape("b", (4,)))
SMALL: Weights = {"w": np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4), "b": np.ones(4, np.float32)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codes": None}, "names"),
        ({"more": np.zeros(1, np.float32)}, "names"),
        ({"scales": np.zeros(3, np.float32)}, "shape"),
        ({"scales": np.zeros((1, 2), np.float32)}, "shape"),
        ({"scales": np.zeros(2, np.float64)}, "dtype"),
        ({"scales": np.array([1, np.nan], np.float32)}, "not-finite"),
        ({"scales": np.array([1, -1], np.float32)}, "not-finite"),
        ({"scales": np.array([1, 3e38], np.float32)}, "not-finite"),
        ({"codes": np.zeros(28, np.uint8)}, "packed"),
        ({"codes": lambda codes: codes[:-3]}, "packed"),
        ({"codes": lambda codes: np.append(codes, np.uint8(0))}, "packed"),
    ],
)
def test_int8_refuses_what_is_wrong(change: dict[str, Any], reason: str) -> None:
    made = compressor("int8")
    packed = made.pack(SMALL)
    for name, value in change.items():
        if value is None:
            del packed[name]
        else:
            packed[name] = value(packed[name]) if callable(value) else value
    with pytest.raises(UnfitError) as caught:
        made.unpack(packed, WANTED)
    assert caught.value.reason == reason


def test_codes_that_would_inflate_to_gigabytes_are_not_inflated() -> None:
    import tracemalloc
    import zlib

    bomb = zlib.compress(bytes(200_000_000), 9)
    packed: Weights = {"codes": np.frombuffer(bomb, np.uint8), "scales": np.ones(2, np.float32)}
    tracemalloc.start()
    try:
        with pytest.raises(UnfitError):
            compressor("int8").unpack(packed, WANTED)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


DTYPES = st.sampled_from(["u1", "i1", "<u2", "<u4", "<i8", "<f2", "<f4", "<f8"])


@st.composite
def arrays(draw: Any) -> Any:
    dtype = np.dtype(draw(DTYPES))
    data = draw(st.binary(max_size=64))
    array = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
    return array.reshape(-1, 1) if draw(st.booleans()) and draw(st.booleans()) else array


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_only_our_own_error_escapes_whatever_comes(name: str, options: dict[str, Any]) -> None:
    made = compressor(name, **options)
    good = made.pack(SMALL)

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        packed = dict(good)
        for key in data.draw(st.sets(st.sampled_from([*good, "other"]), min_size=1)):
            kind = data.draw(st.sampled_from(["gone", "new", "flipped", "shorter"]))
            if kind == "gone":
                packed.pop(key, None)
            elif kind == "new" or key not in packed:
                packed[key] = data.draw(arrays())
            elif kind == "flipped" and packed[key].nbytes:
                raw = bytearray(packed[key].tobytes())
                raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
                packed[key] = np.frombuffer(bytes(raw), packed[key].dtype).reshape(packed[key].shape)
            elif kind == "shorter":
                packed[key] = packed[key][: len(packed[key]) // 2] if packed[key].ndim else packed[key]
        with np.errstate(all="ignore"):
            try:
                out = made.unpack(packed, WANTED)
            except UnfitError:
                return
        fit(out, WANTED)

    holds()
