"""Messages as plain JSON, for every sink that writes it: whole messages, or one object a row.

Times are ISO 8601 with nanoseconds (a JSON number cannot hold them in every language); NaN and infinity are null; small
arrays are nested lists, larger ones and bytes are base64 text beside their dtype and shape.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import numpy as np

from schemas.messages import (
    Aggregate,
    Array,
    Body,
    Column,
    Dead,
    Frame,
    Message,
    Predictions,
    Readings,
    Tensors,
    Update,
)
from schemas.rows import ROW_TYPES, Rows, rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

Each: TypeAlias = Literal["message", "row"]
"""What one JSON object stands for."""

INLINE = 1024
"""Most elements of an array that is written as a list."""

FEW = 32
"""Times up to which each is written by itself."""

RESERVED = ("id", "row", "type", "source", "time")
"""Keys of a row's object that are not its fields; a field of that name is written as ``field_<name>``."""

_encoder = msgspec.json.Encoder()
encode = _encoder.encode
"""JSON bytes of what :func:`plain` and :func:`records` answer."""


def iso(time: int) -> str:
    """``2024-05-01T06:00:00.000000000Z`` of ns since the epoch."""
    seconds, rest = divmod(time, 10**9)
    return f"{_second(seconds)}.{rest:09d}Z"


@lru_cache(maxsize=1024)
def _second(seconds: int) -> str:
    return str(np.datetime64(seconds, "s"))


def iso_all(times: NDArray[np.int64]) -> list[str]:
    """ISO 8601 of a column of ns since the epoch."""
    if len(times) <= FEW:
        return [iso(time) for time in times.tolist()]
    if bool((times == times[0]).all()):
        return [iso(int(times[0]))] * len(times)
    texts: list[str] = np.datetime_as_string(times.astype("datetime64[ns]"), unit="ns").tolist()
    return [f"{t}Z" for t in texts]


def _array(array: Array, inline: int) -> Any:
    if array.size <= inline:
        return array.tolist()
    head = {"dtype": array.dtype.str, "shape": list(array.shape)}
    if not inline:
        return head
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {**head, "dtype": little.dtype.str, "base64": b64encode(np.ascontiguousarray(little).data).decode()}


def _bytes(data: bytes | memoryview, inline: int) -> Any:
    return {"bytes": len(data)} if not inline else b64encode(data).decode()


def _column(column: Column) -> list[Any]:
    return column if isinstance(column, list) else column.tolist()


def _body(body: Body, inline: int) -> Any:
    match body:
        case Readings():
            out: dict[str, Any] = {"n": body.n, "columns": {k: _column(c) for k, c in body.columns.items()}}
            if body.time is not None:
                out["time"] = iso_all(body.time)
            if body.source is not None:
                out["source"] = body.source
            return out
        case Frame():
            raw = isinstance(body.data, np.ndarray)
            data = _array(body.data, inline) if isinstance(body.data, np.ndarray) else _bytes(body.data, inline)
            head = {"encoding": body.encoding, "layout": body.layout} if raw else {"encoding": body.encoding}
            rate = {} if body.rate is None else {"rate": body.rate}
            return {**head, **rate, "attributes": body.attributes, "data": data}
        case Tensors():
            return {"tensors": {k: _array(t, inline) for k, t in body.tensors.items()}, "attributes": body.attributes}
        case Predictions():
            out = {
                "model": msgspec.structs.asdict(body.model),
                "seen": body.seen,
                "labels": body.labels,
                "scores": body.scores.tolist(),
                "attributes": body.attributes,
            }
            if body.boxes is not None:
                out["boxes"] = body.boxes.tolist()
            if body.values is not None:
                out["values"] = {k: _array(t, inline) for k, t in body.values.items()}
            if body.times:
                out["times"] = {k: iso(t) for k, t in body.times.items()}
            return out
        case Aggregate():
            window = {"start": iso(body.window.start), "end": iso(body.window.end)}
            return {**msgspec.structs.asdict(body), "window": window}
        case Update():
            return {**msgspec.structs.asdict(body), "tensors": {k: _array(t, inline) for k, t in body.tensors.items()}}
        case Dead():
            return {**msgspec.structs.asdict(body), "payload": _bytes(body.payload, inline)}
        case _:
            return msgspec.to_builtins(body)


def plain(message: Message, *, inline: int = INLINE) -> dict[str, Any]:
    """A message as JSON-able values: ``type``, ``id``, ``source``, ``time``, ``body``.

    :param inline: most elements of an array that becomes a list; 0 leaves contents out and tells shapes and lengths only
        (for a screen).
    """
    head = {"type": message.type, "id": message.id, "source": message.source, "time": iso(message.time)}
    return {**head, "body": _body(message.body, inline)}


def values(rows: Rows) -> dict[str, list[Any]]:
    """Columns as lists of plain values, with the names that they have in a row's object."""
    return {f"field_{k}" if k in RESERVED else k: _column(c) for k, c in rows.columns.items()}


def row_numbers(table: Rows) -> NDArray[np.int64]:
    """Number of each row within its message, from 0."""
    if not table.n:
        return np.zeros(0, np.int64)
    if table.message[0] == table.message[-1]:
        return np.arange(table.n)
    first = np.searchsorted(table.message, np.arange(int(table.message[-1]) + 1))
    return np.arange(table.n) - first[table.message]


def records(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as one flat object for each row: ``id``, ``row``, ``type``, ``source``, ``time`` and the fields by name.

    A message whose type has no rows is one object, as :func:`plain` has it. A field that only other messages have is left
    out; one that is missing in a row is null.
    """
    out: list[dict[str, Any]] = []
    for _, part, table in _tables(messages):
        if table is None:
            out += map(plain, part)
        else:
            out += (dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True))
    return out


def _tables(messages: Sequence[Message]) -> Iterator[tuple[list[int], list[Message], dict[str, list[Any]] | None]]:
    """Neighbours with the same fields: for each row the index of its message, the messages, and all cells by name.

    Where they have no rows, the messages' own indexes and no cells.
    """
    start = 0
    while start < len(messages):
        stop = start + 1
        shape = _shape(messages[start])
        while stop < len(messages) and _shape(messages[stop]) == shape:
            stop += 1
        part = list(messages[start:stop])
        if shape is None:
            yield list(range(start, stop)), part, None
        else:
            table = rows(part)
            of = table.message.tolist()
            cells: dict[str, list[Any]] = {
                "id": [part[i].id for i in of],
                "row": row_numbers(table).tolist(),
                "type": [part[0].type] * table.n,
                "source": table.source,
                "time": iso_all(table.time),
                **values(table),
            }
            if isinstance(part[0].body, Aggregate):
                bodies = [m.body for m in part if isinstance(m.body, Aggregate)]
                cells["revision"] = [b.revision for b in bodies]
                cells["start"] = [iso(b.window.start) for b in bodies]
                cells["end"] = [iso(b.window.end) for b in bodies]
            yield [start + i for i in of], part, cells
        start = stop


def _shape(message: Message) -> Any:
    """Messages with equal shapes have the same fields and may share a table; None: no rows."""
    if message.type not in ROW_TYPES:
        return None
    body = message.body
    match body:
        case Readings():
            return message.type, tuple(body.columns)
        case Predictions():
            named = None if body.values is None else tuple(body.values)
            return message.type, tuple(body.attributes), bool(body.labels), body.boxes is None, named
        case _:
            return message.type, tuple(getattr(body, "values", ()))


def lines(messages: Sequence[Message], each: Each) -> list[tuple[int, bytes]]:
    """(index of its message, JSON without a line break) of each object."""
    if each == "message":
        return [(i, encode(plain(m))) for i, m in enumerate(messages)]
    out: list[tuple[int, bytes]] = []
    for of, part, table in _tables(messages):
        made: Iterable[Any] = map(plain, part) if table is None else map(_row(tuple(table)), *table.values())
        out += zip(of, map(encode, made), strict=True)
    return out


@lru_cache(maxsize=256)
def _row(names: tuple[str, ...]) -> Callable[..., Any]:
    """What makes an object of a row's cells. A struct is made and written in half the time of a map."""
    fields = [f"f{i}" for i in range(len(names))]
    try:
        return msgspec.defstruct("Row", fields, rename=dict(zip(fields, names, strict=True)), gc=False)
    except (TypeError, ValueError):  # a name that a struct cannot have
        return lambda *cells: dict(zip(names, cells, strict=True))
