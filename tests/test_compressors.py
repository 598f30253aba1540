"""Compressors: what comes out is near what went in, small on the wire, and nothing that comes from outside does harm."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from federated_kit import Federation, Plan, perceptron, train, two_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nodes import kinds
from nodes.compressors import top_k
from nodes.compressors._compressor import Compressor
from nodes.federated.weights import Shape, UnfitError, Weights, fit, flat, minus, norm, plus, shapes
from nodes.strategies.fedavg import Config as AveragingConfig
from nodes.strategies.fedavg import FedAvg
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


EVERY: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int8", {"block": 100}),
    ("int8", {"stochastic": False}),
    ("int4", {}),
    ("int4", {"block": 0}),
    ("int4", {"block": 7}),
    ("fp16", {}),
    ("top-k", {"fraction": 0.05}),
    ("top-k", {"fraction": 1.0}),
    ("top-k", {"fraction": 0.3, "values": "fp16"}),
    ("top-k", {"fraction": 0.3, "values": "fp32"}),
    ("low-rank", {"rank": 1}),
    ("low-rank", {"rank": 4, "passes": 3}),
]
"""Each kind in its ways."""


def test_every_compressor_is_in_these_tests() -> None:
    assert {name for name, _ in EVERY} == set(kinds.names("compressor"))


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
@pytest.mark.parametrize(("name", "most"), [("int8", 127), ("int4", 7)])
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


def learned(*layers: int) -> Weights:
    """What one client with two classes learns of the digits in a round."""
    model = perceptron(*layers, seed=1)
    trained, _ = train(model, two_classes()[0], Plan(), 1)
    return minus(trained, model)


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("fp16", {}, 0.52),
        ("int8", {}, 1 / 4),
        ("int4", {}, 1 / 6.5),
        ("top-k", {"fraction": 0.01}, 1 / 50),
        ("top-k", {"fraction": 0.01, "values": "fp16"}, 1 / 45),
    ],
)
def test_the_share_of_float32s_bytes_with_all_that_travels(name: str, options: dict[str, Any], part: float) -> None:
    """Envelope, names and shapes included; of the smallest models a thing of size travels beside them."""
    for layers in ((64, 64, 10), (64, 128, 64, 10)):
        one = learned(*layers)
        packed = compressor(name, **options).pack(one, 1)
        assert len(on_the_wire(packed)) <= len(on_the_wire(one)) * part


def test_int8_takes_a_quarter_also_of_small_models_and_of_numbers_without_pattern() -> None:
    small, normal = learned(64, 32, 10), mlp(64, 64, 10)
    for one in (small, normal):
        assert len(on_the_wire(compressor("int8").pack(one))) <= len(on_the_wire(one)) / 4


@pytest.mark.parametrize("name", ["int8", "top-k"])
def test_two_classes_each_are_learned_to_95_percent(name: str) -> None:
    """Ten clients who know two digits each; top-k sends one number of a hundred and feeds back what it did not send."""
    begin = perceptron(64, 128, 10, seed=1)
    federation = Federation(FedAvg(AveragingConfig()), two_classes(), begin, Plan(epochs=2), compressor(name))
    assert federation.run(150, until=0.95)[-1] >= 0.95
    assert len(federation.packed) == federation.round * 10


def test_without_error_feedback_top_k_learns_far_less() -> None:
    begin = perceptron(64, 128, 10, seed=1)
    forgetful = compressor("top-k")
    forgetful.feeds_back = False  # type: ignore[misc] # what is looked at is whether it is needed
    fed = Federation(FedAvg(AveragingConfig()), two_classes(), begin, Plan(epochs=2), compressor("top-k"))
    rounds = len(fed.run(80, until=0.9))
    without = Federation(FedAvg(AveragingConfig()), two_classes(), begin, Plan(epochs=2), forgetful).run(rounds)
    assert fed.round < 80
    assert max(without) < 0.88


@pytest.mark.parametrize("values", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize("fraction", [0.0001, 0.003, 0.02, 0.5, 1.0])
def test_top_k_sends_the_largest(values: str, fraction: float) -> None:
    one = {"a": np.random.default_rng(4).normal(size=(300, 211)).astype(np.float32), "b": np.ones(7, np.float32)}
    whole = flat(one)
    count = max(1, int(np.ceil(fraction * whole.size)))
    made = compressor("top-k", fraction=fraction, values=values)
    back = flat(made.unpack(travelled(made.pack(one)), shapes(one)))
    largest = np.sort(np.argsort(-np.abs(whole), kind="stable")[:count])
    assert set(np.flatnonzero(back)) <= set(largest)
    step = {"int8": np.abs(whole).max() / 127, "fp16": np.abs(whole).max() / 2048, "fp32": 0}[values]
    assert np.abs(back[largest] - whole[largest]).max() <= step * 1.001


@given(st.lists(st.integers(0, 70_000), max_size=12), st.sampled_from(["u1", "u2"]))
def test_gaps_say_every_place(gaps: list[int], dtype: str) -> None:
    """Read as the docstring says it, number by number."""
    most = np.iinfo(dtype).max
    said = top_k._said(np.array(gaps, np.int64), np.dtype(dtype).type)
    places, at, gap = [], -1, 0
    for byte in said.tolist():
        gap += byte
        if byte != most:
            at, gap = at + gap + 1, 0
            places.append(at)
    wanted = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    assert places == wanted.tolist() == top_k._places(said).tolist()


def test_low_rank_finds_what_is_of_low_rank_and_nearly_the_best_otherwise() -> None:
    draw = np.random.default_rng(0)
    thin = (draw.normal(size=(80, 2)) @ draw.normal(size=(2, 50)) * 1e-5).astype(np.float32)
    full = (draw.normal(size=(80, 50)) @ np.diag(0.7 ** np.arange(50))).astype(np.float32)
    one = {"thin": thin, "kernel": full.reshape(80, 5, 10), "b": np.ones(4, np.float32)}
    made = compressor("low-rank", rank=2, passes=3)
    packed = made.pack(one)
    assert {name: array.shape for name, array in packed.items()} == {
        "thin/m": (80, 2), "thin/n": (50, 2), "kernel/m": (80, 2), "kernel/n": (50, 2), "b": (4,)
    }  # fmt: skip
    back = made.unpack(travelled(packed), shapes(one))
    assert np.linalg.norm(back["thin"] - thin) <= 2e-3 * np.linalg.norm(thin)
    u, s, v = np.linalg.svd(full)
    best = np.linalg.norm(u[:, :2] * s[:2] @ v[:2] - full)
    assert np.linalg.norm(back["kernel"].reshape(80, 50) - full) <= 1.1 * best


def test_what_is_fed_back_arrives_in_the_end() -> None:
    """The sum of what was sent is the sum of what was to be sent, but for the last residual, which stays small."""
    for name, options in (("top-k", {"fraction": 0.05}), ("low-rank", {"rank": 1})):
        made, residual, sent, wanted = compressor(name, **options), delta(0, 0), delta(0, 0), delta(0, 0)
        sizes = []
        for seed in range(120):
            one = delta(seed)
            residual = plus(one, residual)
            back = made.unpack(made.pack(residual, seed), shapes(one))
            residual, sent, wanted = minus(residual, back), plus(sent, back), plus(wanted, one)
            sizes.append(norm(residual))
        np.testing.assert_allclose(flat(plus(sent, residual)), flat(wanted), atol=1e-4)
        assert sizes[-1] < 1.5 * max(sizes[:60])


def test_what_is_too_small_for_a_scale_becomes_nothing() -> None:
    one = {"w": np.array([1e-45, -1e-44, 0], np.float32)}
    made = compressor("int8")
    assert norm(made.unpack(made.pack(one), shapes(one))) <= 1e-43


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_model_of_nothing_and_of_huge_numbers(name: str, options: dict[str, Any]) -> None:
    made = compressor(name, **options)
    assert made.unpack(made.pack({}), ()) == {}
    huge = {"w": np.full((4, 3), 3.4e38, np.float32)}
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
    refused(made, made.pack(SMALL), change, reason)


FEW = np.array([3, 255, 2], np.uint8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"values": None}, "names"),
        ({"values": np.zeros(0, np.int8)}, "shape"),
        ({"values": np.array([127, 100, 1], np.int8)}, "not-finite"),
        ({"values": np.zeros(3, np.float32)}, "dtype"),
        ({"values": np.zeros(2, np.int8)}, "shape"),
        ({"values": np.zeros(4, np.int8)}, "shape"),
        ({"gaps": FEW.astype(np.int64)}, "dtype"),
        ({"gaps": np.array([14, 13], np.uint8)}, "shape"),
        ({"gaps": np.array([65535, 65534, 0], np.uint16)}, "shape"),
        ({"gaps": np.zeros(29, np.uint8), "values": np.zeros(30, np.int8)}, "shape"),
    ],
)
def test_top_k_refuses_what_is_wrong(change: dict[str, Any], reason: str) -> None:
    """The model has 28 numbers; two are sent."""
    made = compressor("top-k", fraction=0.06)
    packed = made.pack(SMALL)
    assert len(packed["gaps"]) == 2
    refused(made, packed, change, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w/m": None}, "names"),
        ({"w/m": np.zeros((6, 2), "<f2")}, "shape"),
        ({"w/m": np.zeros((6, 1), "<f4")}, "dtype"),
        ({"b": np.full(4, np.nan, "<f2")}, "not-finite"),
    ],
)
def test_low_rank_refuses_what_is_wrong(change: dict[str, Any], reason: str) -> None:
    made = compressor("low-rank", rank=1)
    refused(made, made.pack(SMALL), change, reason)


def refused(made: Compressor, packed: Weights, change: dict[str, Any], reason: str) -> None:
    for name, value in change.items():
        if value is None:
            del packed[name]
        else:
            packed[name] = value(packed[name]) if callable(value) else value
    with pytest.raises(UnfitError) as caught:
        made.unpack(packed, WANTED)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8", {"block": -1}),
        ("int4", {"bits": 4}),
        ("fp16", {"block": 4}),
        ("top-k", {"fraction": 0}),
        ("top-k", {"fraction": 1.1}),
        ("top-k", {"values": "int2"}),
        ("low-rank", {"rank": 0}),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        compressor(name, **options)


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
