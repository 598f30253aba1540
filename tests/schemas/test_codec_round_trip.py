"""What is encoded is decoded: every body, every dtype, every shape and layout of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from wire_samples import equal, foreign

from schemas.codec import decode, encode, from_tensor, to_tensor
from schemas.errors import PayloadError
from schemas.messages import (
    Aggregate,
    Body,
    Dead,
    End,
    Event,
    Flow,
    Frame,
    Ledger,
    Message,
    Model,
    Predictions,
    Progress,
    Readings,
    State,
    Tensors,
    Update,
    Window,
)

DTYPES = (
    "?",
    "i1",
    "u1",
    "<i2",
    "<u2",
    "<i4",
    "<u4",
    "<i8",
    "<u8",
    "<f2",
    "<f4",
    "<f8",
    ">i2",
    ">u4",
    ">i8",
    ">f4",
    ">f8",
)
INT64 = st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**63 - 1)
texts = st.text(max_size=12)
scalars = st.none() | st.booleans() | INT64 | st.floats() | texts
scalar_maps = st.dictionaries(texts, scalars, max_size=4)


@st.composite
def arrays(draw: st.DrawFn, shape: Any = None) -> Any:
    """Arrays of every dtype, from 0-d to 4-d, also empty, transposed, strided, reversed, big-endian, with NaN."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    wanted = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4) if shape is None else st.just(shape)
    array = draw(hnp.arrays(dtype, wanted))
    match draw(st.integers(0, 3)) if shape is None and array.ndim else 0:
        case 1:
            array = array.T
        case 2:
            array = array[::2]
        case 3:
            array = array[..., ::-1]
    return array


@st.composite
def readings(draw: st.DrawFn) -> Readings:
    n = draw(st.integers(0, 5))
    column = arrays(shape=(n,)) | st.lists(st.none() | texts, min_size=n, max_size=n)
    columns = draw(st.dictionaries(texts, column, min_size=1 if n else 0, max_size=4))
    time = draw(st.none() | hnp.arrays(np.dtype("<i8"), (n,)))
    return Readings(n=n, columns=columns, time=time, source=draw(st.none() | st.lists(texts, min_size=n, max_size=n)))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    rate, attributes = draw(st.none() | st.floats(allow_nan=False)), draw(scalar_maps)
    if draw(st.booleans()):
        return Frame(data=draw(st.binary(max_size=20)), encoding="jpeg", rate=rate, attributes=attributes)
    array = draw(arrays())
    return Frame(data=array, layout="TCHW"[: array.ndim], rate=rate, attributes=attributes)


@st.composite
def predictions(draw: st.DrawFn) -> Predictions:
    labels = draw(st.lists(texts, max_size=4))
    k = len(labels)
    return Predictions(
        model=Model(name=draw(texts), version=draw(texts), digest=draw(texts)),
        seen=draw(texts),
        labels=labels,
        scores=draw(hnp.arrays(np.dtype("<f4"), (k,))),
        boxes=draw(st.none() | hnp.arrays(np.dtype("<f4"), (k, 4))),
        values=draw(st.none() | st.dictionaries(texts, arrays(), max_size=3)),
        times=draw(st.dictionaries(texts, INT64, max_size=3)),
        attributes=draw(scalar_maps),
    )


flows = st.builds(Flow, messages=COUNT, rows=COUNT)
counts = st.dictionaries(texts, COUNT, max_size=3)
bodies: st.SearchStrategy[Body] = st.one_of(
    readings(),
    frames(),
    predictions(),
    st.builds(Tensors, tensors=st.dictionaries(texts, arrays(), max_size=3), attributes=scalar_maps),
    st.builds(
        Aggregate,
        window=st.builds(Window, start=INT64, end=INT64),
        key=texts,
        values=scalar_maps,
        count=COUNT,
        revision=COUNT,
    ),
    st.builds(Event, name=texts, severity=texts, text=texts, values=scalar_maps),
    st.builds(
        Update,
        job=texts,
        round=COUNT,
        client=texts,
        base=texts,
        samples=COUNT,
        tensors=st.dictionaries(texts, arrays(), max_size=3),
        metrics=st.dictionaries(texts, st.floats(), max_size=3),
    ),
    st.builds(State, node=texts, status=texts, host=texts, pid=COUNT, detail=texts),
    st.builds(
        Ledger,
        node=texts,
        received=st.dictionaries(texts, flows, max_size=2),
        repeated=counts,
        emitted=st.dictionaries(texts, flows, max_size=2),
        passed=COUNT,
        filtered=COUNT,
        dropped=counts,
        dead=counts,
        held=COUNT,
        latency=st.dictionaries(texts, counts, max_size=2),
    ),
    st.builds(End, messages=COUNT),
    st.builds(Progress, time=INT64),
    st.builds(Dead, node=texts, reason=texts, detail=texts, edge=texts, position=texts, payload=st.binary(max_size=20)),
)
messages = st.builds(Message, id=texts, source=texts, time=INT64, body=bodies, born=COUNT)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(messages)
def test_every_message_comes_back(message: Message) -> None:
    payload = encode(message)
    assert equal(decode(payload), message)
    assert encode(decode(payload)) == payload
    assert foreign(payload)["type"] == message.type


@settings(deadline=None, derandomize=True, max_examples=200)
@given(messages, st.integers(0, 7))
def test_unaligned_views_are_read_as_well(message: Message, shift: int) -> None:
    """A payload inside a larger buffer, as the session hands it on."""
    payload = encode(message)
    view = memoryview(b"\0" * shift + payload)[shift:]
    assert equal(decode(view), message)


@settings(deadline=None, derandomize=True)
@given(arrays())
def test_a_tensor_travels_little_endian_in_c_order(array: Any) -> None:
    tensor = to_tensor(array)
    assert bytes(tensor.data) == array.astype(array.dtype.newbyteorder("<")).tobytes("C")
    assert tensor.shape == list(array.shape)
    assert tensor.dtype[0] in "<|"


def test_arrays_are_views_on_the_payload() -> None:
    array = np.arange(1000, dtype="<f8")
    payload = encode(Message(id="a", source="b", time=0, body=Readings(n=1000, columns={"x": array})))
    body = decode(payload).body
    assert isinstance(body, Readings)
    column = body.columns["x"]
    assert isinstance(column, np.ndarray)
    assert np.shares_memory(column, np.frombuffer(payload, np.uint8))
    assert not column.flags.writeable


@pytest.mark.parametrize("dtype", ["O", "c8", "U3", "S2", "M8[ns]", "V4"])
def test_a_dtype_that_does_not_travel_is_refused(dtype: str) -> None:
    with pytest.raises(TypeError, match="does not travel"):
        to_tensor(np.zeros(2, dtype))


def test_platform_twins_of_a_dtype_travel() -> None:
    for code in ("l", "q", "L", "Q", "i", "h", "intc", "longlong"):
        array = np.array([1, 2], code)
        assert np.array_equal(from_tensor(to_tensor(array)), array)


def test_the_trace_is_not_in_the_payload() -> None:
    message = Message(id="a", source="b", time=0, body=End(messages=1), trace="00-ab-cd-01")
    assert b"00-ab" not in encode(message)
    assert decode(encode(message), trace="00-ab-cd-01") == message


def test_the_longest_payload_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schemas.codec.MAX_BYTES", 10)
    with pytest.raises(PayloadError, match="too-big") as caught:
        decode(b"\0" * 11)
    assert caught.value.reason == "too-big"
