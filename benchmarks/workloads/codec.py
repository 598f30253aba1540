"""Messages to bytes and back, µs each: a reading, 256 readings as columns, a 0.9 MB frame, a 4.8 MB model update.

*msgspec bare* is the limit: msgspec alone, the wire's types known, nothing looked at and no array made. *msgpack + pydantic* is
what one would write with the two: ``packb`` of maps made by hand, ``unpackb``, a pydantic model of the message, arrays of its
bytes at the end; what is on the wire is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgpack  # type: ignore[import-untyped] # has neither stubs nor py.typed
import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from benchmarks.figures import OURS, Comparison, Figure, in_turns
from schemas import codec
from schemas.messages import Frame, Message, Readings, Update
from schemas.wire import WireMessage

LIMIT, PEER = "msgspec bare", "msgpack + pydantic"
_ABOUT = 0.1
"""Seconds of one run."""


class _Tensor(BaseModel):
    dtype: str
    shape: list[int]
    data: bytes

    def array(self) -> NDArray[Any]:
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    source: str
    time: int
    born: int = 0


class _Columns(BaseModel):
    n: int
    columns: dict[str, _Tensor]
    time: _Tensor | None = None


class _ReadingsMessage(_Envelope):
    type: Literal["readings/1"]
    body: _Columns


class _Picture(BaseModel):
    encoding: str
    layout: str
    data: _Tensor


class _FrameMessage(_Envelope):
    type: Literal["frame/1"]
    body: _Picture


class _Weights(BaseModel):
    job: str
    round: int
    client: str
    base: str
    samples: int
    tensors: dict[str, _Tensor]


class _UpdateMessage(_Envelope):
    type: Literal["update/1"]
    body: _Weights


def _peer_tensor(array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.data}


def _peer_encode(message: Message) -> bytes:
    body: dict[str, Any]
    match message.body:
        case Readings() as b:
            kind = "readings/1"
            body = {"n": b.n, "columns": {k: _peer_tensor(np.asarray(c)) for k, c in b.columns.items()}}
            if b.time is not None:
                body["time"] = _peer_tensor(b.time)
        case Frame() as b:
            kind = "frame/1"
            body = {"encoding": b.encoding, "layout": b.layout, "data": _peer_tensor(np.asarray(b.data))}
        case Update() as b:
            kind = "update/1"
            body = {"job": b.job, "round": b.round, "client": b.client, "base": b.base, "samples": b.samples}
            body["tensors"] = {k: _peer_tensor(t) for k, t in b.tensors.items()}
        case _:
            raise TypeError(type(message.body))
    envelope = {"type": kind, "id": message.id, "source": message.source, "time": message.time, "body": body}
    done: bytes = msgpack.packb(envelope)
    return done


def _peer_decode(model: type[_ReadingsMessage | _FrameMessage | _UpdateMessage], payload: bytes) -> object:
    found = model.model_validate(msgpack.unpackb(payload))
    match found.body:
        case _Columns() as b:
            return {k: t.array() for k, t in b.columns.items()}, None if b.time is None else b.time.array()
        case _Picture() as b:
            return b.data.array()
        case _Weights() as b:
            return {k: t.array() for k, t in b.tensors.items()}


def _messages() -> dict[str, tuple[Message, type[_ReadingsMessage | _FrameMessage | _UpdateMessage]]]:
    rng = np.random.default_rng(0)

    def envelope(body: Readings | Frame | Update) -> Message:
        return Message("meter:19f2:1234", "boiler-2", 1_700_000_000_000_000_000, body)

    one = Readings(n=1, columns={"value": np.array([21.5])})
    many = Readings(n=256, columns={"value": rng.random(256)}, time=np.arange(256, dtype=np.int64))
    frame = Frame(data=rng.integers(0, 255, (480, 640, 3), np.uint8))
    layers = {f"layer{i}": rng.random((200, 1000), np.float32) for i in range(6)}
    update = Update(job="digits", round=3, client="edge-1", base="0" * 64, samples=600, tensors=layers)
    return {
        "a reading": (envelope(one), _ReadingsMessage),
        "256 readings": (envelope(many), _ReadingsMessage),
        "a frame of 0.9 MB": (envelope(frame), _FrameMessage),
        "an update of 4.8 MB": (envelope(update), _UpdateMessage),
    }


def _each(call: Callable[[], object]) -> float:
    """µs of a call, over so many that they take a while."""
    began = time.perf_counter()
    call()
    count = max(3, int(_ABOUT / (time.perf_counter() - began + 1e-7)))
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count * 1e6


def measure() -> list[Figure | Comparison]:
    """All figures of this file."""
    out: list[Figure | Comparison] = []
    bare, pack = msgspec.msgpack.Decoder(WireMessage), msgspec.msgpack.Encoder()
    for name, (message, model) in _messages().items():
        payload = codec.encode(message)
        if msgpack.unpackb(_peer_encode(message)) != msgpack.unpackb(payload):
            raise RuntimeError(f"{name}: the peer writes something else")
        wire = bare.decode(payload)
        ways: dict[str, dict[str, Callable[[], object]]] = {
            "decode": {
                OURS: partial(codec.decode, payload),
                LIMIT: partial(bare.decode, payload),
                PEER: partial(_peer_decode, model, payload),
            },
            "encode": {
                OURS: partial(codec.encode, message),
                LIMIT: partial(pack.encode, wire),
                PEER: partial(_peer_encode, message),
            },
        }
        for way, calls in ways.items():
            seen = in_turns({who: partial(_each, call) for who, call in calls.items()})
            values = {who: tuple(times) for who, times in seen.items()}
            out.append(Comparison(f"codec, {way} {name}", "µs", values, {PEER: 1.0}, at_most=True))
    return out
