"""Messages to wire bytes and back: plain msgpack, readable with nothing but a msgpack library.

Tensors are decoded as views on the received bytes (no copy, read-only). Only :class:`PayloadError` escapes from
:func:`decode`, whatever the bytes are, and memory stays in proportion to their length: nothing is allocated from a
declared size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np

from schemas.errors import PayloadError
from schemas.messages import (
    Aggregate,
    Array,
    Body,
    Column,
    Dead,
    End,
    Event,
    Frame,
    Ledger,
    Message,
    Predictions,
    Progress,
    Readings,
    State,
    Tensors,
    Update,
)
from schemas.wire import (
    AggregateMessage,
    DeadMessage,
    EndMessage,
    EventMessage,
    FrameBody,
    FrameMessage,
    Int64,
    LedgerMessage,
    PredictionsBody,
    PredictionsMessage,
    ProgressMessage,
    ReadingsBody,
    ReadingsMessage,
    StateMessage,
    Tensor,
    TensorsBody,
    TensorsMessage,
    UpdateBody,
    UpdateMessage,
    WireMessage,
)

CONTENT_TYPE = "application/msgpack"
MAX_BYTES = 256 * 1024 * 1024
"""Longest payload that is looked at; MQTT's own limit is 268,435,455."""
MAX_DIMENSIONS = 8

_CODES = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
"""What travels, as numpy's ``dtype.str`` has it."""


# -- arrays ---------------------------------------------------------------------------------------------------------


_dtype = cache(lambda code: np.dtype(code))
_code = cache(lambda dtype: dtype.str)


def to_tensor(array: Array) -> Tensor:
    """Wire form of an array; big-endian or strided ones are copied, all others are not.

    :raises TypeError: the dtype (object, complex, text) does not travel.
    """
    code = _code(array.dtype)
    if code not in _CODES:
        little = array.dtype.newbyteorder("<")
        code = little.str
        if code not in _CODES:
            raise TypeError(f"an array of dtype {array.dtype} does not travel")
        array = array.astype(little)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return Tensor(code, list(array.shape), array.data)


def from_tensor(tensor: Tensor) -> Array:
    """The array as a read-only view on the tensor's bytes.

    :raises PayloadError: dtype unknown, shape negative or not fitting the bytes.
    """
    if tensor.dtype not in _CODES:
        raise PayloadError("bad-tensor", f"dtype {tensor.dtype[:16]!r} is not one of {', '.join(_CODES)}")
    dtype = _dtype(tensor.dtype)
    shape = tensor.shape
    if len(shape) > MAX_DIMENSIONS:
        raise PayloadError("bad-tensor", f"{len(shape)} dimensions, at most {MAX_DIMENSIONS}")
    size = 1
    for extent in shape:
        if extent < 0:
            raise PayloadError("bad-tensor", f"negative extent {extent}")
        size *= extent
    if size * dtype.itemsize != tensor.data.nbytes:
        raise PayloadError(
            "bad-tensor",
            f"shape {shape} of {tensor.dtype} needs {size * dtype.itemsize} bytes, has {tensor.data.nbytes}",
        )
    if size == 0:
        try:
            return np.zeros(shape, dtype)
        except ValueError:  # empty along one axis, beyond any memory along the others
            raise PayloadError("bad-tensor", f"shape {shape} is too big") from None
    array = np.frombuffer(tensor.data, dtype)
    return array if len(shape) == 1 else array.reshape(shape)


def _to_columns(columns: dict[str, Column]) -> dict[str, Tensor | list[str | None]]:
    return {name: c if isinstance(c, list) else to_tensor(c) for name, c in columns.items()}


def _from_column(name: str, column: Tensor | list[str | None], n: int) -> Column:
    if isinstance(column, list):
        if len(column) == n:
            return column
    else:
        array = from_tensor(column)
        if array.shape == (n,):
            return array
    raise PayloadError("bad-body", f"column {name[:64]!r} does not have {n} rows")


# -- bodies ---------------------------------------------------------------------------------------------------------


def _wire(message: Message) -> WireMessage:
    body, ident, source, time = message.body, message.id, message.source, message.time
    match body:
        case Readings():
            times = None if body.time is None else to_tensor(body.time)
            return ReadingsMessage(
                id=ident,
                source=source,
                time=time,
                body=ReadingsBody(n=body.n, columns=_to_columns(body.columns), time=times, source=body.source),
            )
        case Frame():
            data = to_tensor(body.data) if isinstance(body.data, np.ndarray) else memoryview(body.data)
            return FrameMessage(
                id=ident,
                source=source,
                time=time,
                body=FrameBody(
                    encoding=body.encoding, layout=body.layout, data=data, rate=body.rate, attributes=body.attributes
                ),
            )
        case Tensors():
            tensors = {k: to_tensor(v) for k, v in body.tensors.items()}
            return TensorsMessage(
                id=ident, source=source, time=time, body=TensorsBody(tensors=tensors, attributes=body.attributes)
            )
        case Predictions():
            return PredictionsMessage(
                id=ident,
                source=source,
                time=time,
                body=PredictionsBody(
                    model=body.model,
                    seen=body.seen,
                    labels=body.labels,
                    scores=to_tensor(body.scores),
                    boxes=None if body.boxes is None else to_tensor(body.boxes),
                    values=None if body.values is None else {k: to_tensor(v) for k, v in body.values.items()},
                    times=body.times,
                    attributes=body.attributes,
                ),
            )
        case Update():
            return UpdateMessage(
                id=ident,
                source=source,
                time=time,
                body=UpdateBody(
                    job=body.job,
                    round=body.round,
                    client=body.client,
                    base=body.base,
                    samples=body.samples,
                    tensors={k: to_tensor(v) for k, v in body.tensors.items()},
                    metrics=body.metrics,
                ),
            )
        case Aggregate():
            return AggregateMessage(id=ident, source=source, time=time, body=body)
        case Event():
            return EventMessage(id=ident, source=source, time=time, body=body)
        case State():
            return StateMessage(id=ident, source=source, time=time, body=body)
        case Ledger():
            return LedgerMessage(id=ident, source=source, time=time, body=body)
        case End():
            return EndMessage(id=ident, source=source, time=time, body=body)
        case Progress():
            return ProgressMessage(id=ident, source=source, time=time, body=body)
        case Dead():
            return DeadMessage(id=ident, source=source, time=time, body=body)


def _readings(body: ReadingsBody) -> Body:
    n = body.n
    if n < 0:
        raise PayloadError("bad-body", f"n is {n}")
    time = None if body.time is None else _from_column("time", body.time, n)
    if time is not None and (isinstance(time, list) or time.dtype != np.int64):
        raise PayloadError("bad-body", "the per-row time is not <i8")
    if body.source is not None and len(body.source) != n:
        raise PayloadError("bad-body", f"the per-row source does not have {n} rows")
    columns = {name: _from_column(name, column, n) for name, column in body.columns.items()}
    if n and not columns and time is None and body.source is None:  # nothing bounds n by the payload's length
        raise PayloadError("bad-body", f"{n} rows without a column")
    return Readings(n=n, columns=columns, time=time, source=body.source)


def _frame(body: FrameBody) -> Body:
    raw = isinstance(body.data, Tensor)
    if raw != (body.encoding == "raw"):
        raise PayloadError(
            "bad-body", f"a frame of encoding {body.encoding[:16]!r} with {'a tensor' if raw else 'bytes'}"
        )
    data = from_tensor(body.data) if isinstance(body.data, Tensor) else body.data
    if isinstance(data, np.ndarray) and data.ndim != len(body.layout):
        raise PayloadError("bad-body", f"layout {body.layout[:16]!r} of an array with {data.ndim} dimensions")
    return Frame(data=data, encoding=body.encoding, layout=body.layout, rate=body.rate, attributes=body.attributes)


def _tensors(body: TensorsBody) -> Body:
    return Tensors(tensors={k: from_tensor(v) for k, v in body.tensors.items()}, attributes=body.attributes)


def _predictions(body: PredictionsBody) -> Body:
    k = len(body.labels)
    scores = from_tensor(body.scores)
    boxes = None if body.boxes is None else from_tensor(body.boxes)
    if scores.shape != (k,):
        raise PayloadError("bad-body", f"{k} labels with scores of shape {list(scores.shape)}")
    if boxes is not None and boxes.shape != (k, 4):
        raise PayloadError("bad-body", f"{k} labels with boxes of shape {list(boxes.shape)}")
    return Predictions(
        model=body.model,
        seen=body.seen,
        labels=body.labels,
        scores=scores,
        boxes=boxes,
        values=None if body.values is None else {key: from_tensor(v) for key, v in body.values.items()},
        times=body.times,
        attributes=body.attributes,
    )


def _update(body: UpdateBody) -> Body:
    return Update(
        job=body.job,
        round=body.round,
        client=body.client,
        base=body.base,
        samples=body.samples,
        tensors={k: from_tensor(v) for k, v in body.tensors.items()},
        metrics=body.metrics,
    )


_FROM_WIRE: dict[type, Callable[[Any], Body]] = {
    ReadingsBody: _readings,
    FrameBody: _frame,
    TensorsBody: _tensors,
    PredictionsBody: _predictions,
    UpdateBody: _update,
}


class _Count(msgspec.Struct):
    n: Any = 1


class _Glance(msgspec.Struct):
    type: str
    body: _Count


_glance = msgspec.msgpack.Decoder(_Glance).decode
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(WireMessage)


def encode(message: Message, *, epoch: int = 0, seq: int = 0) -> bytes:
    """The message as it travels. ``trace`` is not in it: it goes as an MQTT user property.

    :param epoch: the producer's incarnation, on ``safe`` edges; 0 leaves both out.
    :param seq: the message's place on the producer's port, from 1.
    """
    wire = _wire(message)
    wire.born, wire.epoch, wire.seq = message.born, epoch, seq
    return _encoder.encode(wire)


def decode(payload: bytes | memoryview, *, trace: str | None = None) -> Message:
    """The message in ``payload``; its arrays are views on it, so keep the buffer as it is.

    :raises PayloadError: it is none, with the reason (see :class:`PayloadError`).
    """
    return decode_sequenced(payload, trace=trace)[0]


def decode_sequenced(payload: bytes | memoryview, *, trace: str | None = None) -> tuple[Message, int, int]:
    """Like :func:`decode`, with the epoch and the sequence number of a ``safe`` edge (0, 0 where it has none)."""
    if len(payload) > MAX_BYTES:
        raise PayloadError("too-big", f"{len(payload)} bytes, at most {MAX_BYTES}")
    try:
        wire = _decoder.decode(payload)
    except msgspec.ValidationError as error:
        if not (0x80 <= payload[0] <= 0x8F or payload[0] in {0xDE, 0xDF}):  # JSON, text: valid msgpack by accident
            raise PayloadError("not-msgpack", f"not a msgpack map, it begins with 0x{payload[0]:02x}") from None
        text = str(error)
        reason = "unknown-type" if "`$.type`" in text or "missing required field `type`" in text else "bad-body"
        raise PayloadError(reason, text[:300]) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PayloadError("not-msgpack", str(error)[:200]) from None
    return received(wire, trace)


def received(wire: WireMessage, trace: str | None) -> tuple[Message, int, int]:
    """A message from its wire form; see :func:`decode_sequenced`.

    :raises PayloadError: its body's parts do not go together.
    """
    body: Any = wire.body
    convert = _FROM_WIRE.get(type(body))
    message = Message(wire.id, wire.source, wire.time, body if convert is None else convert(body), trace, wire.born)
    return message, wire.epoch, wire.seq


def rows_in(payload: bytes | memoryview) -> int | None:
    """Rows that the ledger counts for a message that is not looked at any further, because it is dropped.

    A glance costs a small part of :func:`decode`. None: the end of a stream or its progress, or no message; no loss.
    """
    try:
        seen = _glance(payload)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError):
        return None
    if seen.type in {"end/1", "progress/1"}:
        return None
    n = seen.body.n if seen.type == "readings/1" else 1
    return n if isinstance(n, int) and n >= 0 else None


class _Bare(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Any message, its body unread; keys in the order in which the others are encoded."""

    type: str
    body: msgspec.Raw
    id: str
    source: str
    time: Int64
    born: Int64 = 0
    epoch: int = 0
    seq: int = 0


_bare = msgspec.msgpack.Decoder(_Bare)


def renumber(payload: bytes | memoryview, epoch: int, seq: int) -> tuple[str, bytes]:
    """The identity of a message, and the message with another place on its port. Its body is neither read nor checked.

    :param payload: what :func:`decode` takes.
    """
    bare = _bare.decode(payload)
    bare.epoch, bare.seq = epoch, seq
    return bare.id, _encoder.encode(bare)
