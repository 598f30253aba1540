"""One delivery for a person or for a program: what ``penstock tap`` prints.

Arrays are summarised; payloads that are none of ours are shown as JSON, text or hex. Nothing that arrives reaches the
terminal as a control character.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from schemas import codec
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

FEW = 8
"""Elements of an array that are shown one by one."""
LONGEST = 400
"""Characters of a foreign payload that are shown."""


def line(topic: str, payload: bytes, *, retained: bool = False) -> str:
    """One delivery as one line."""
    note = " (retained)" if retained else ""
    try:
        message = codec.decode(payload)
    except PayloadError as error:
        if not payload:
            return clean(f"{topic}{note}  (empty)")
        return clean(f"{topic}{note}  {_foreign_text(payload)}{_why(error)}")
    return clean(f"{moment(message.time)}  {topic}{note}  {message.type}  {message.source}  {_body_text(message.body)}")


def data(topic: str, payload: bytes, *, retained: bool = False) -> dict[str, Any]:
    """One delivery as plain JSON values."""
    out: dict[str, Any] = {"topic": topic, "retained": retained, "bytes": len(payload)}
    try:
        message = codec.decode(payload)
    except PayloadError as error:
        return {**out, "refused": error.reason, **_foreign(payload)}
    return {**out, **_message(message)}


def moment(ns: int) -> str:
    """A time in ns as UTC to the millisecond; the number itself where no calendar has it."""
    try:
        at = datetime.fromtimestamp(ns // 1_000_000_000, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{ns} ns"
    return f"{at:%Y-%m-%d %H:%M:%S}.{ns // 1_000_000 % 1000:03d}"


def clean(text: str) -> str:
    """``text`` without anything that a terminal would act on."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


# -- messages of ours ----------------------------------------------------------------------------------------------------


def _message(message: Message) -> dict[str, Any]:
    body = {name: _value(getattr(message.body, name)) for name in message.body.__struct_fields__}
    return {
        "type": message.type,
        "id": message.id,
        "source": message.source,
        "time": message.time,
        "body": {name: value for name, value in body.items() if value is not None},
    }


def _value(value: Any) -> Any:
    """A body's value as plain JSON: long arrays by dtype and shape, bytes by their length, NaN as null."""
    match value:
        case np.ndarray():
            if value.size <= 8 * FEW:
                return _value(value.tolist())
            return {"dtype": value.dtype.str, "shape": list(value.shape), **_range(value)}
        case bytes() | memoryview():
            return {"bytes": len(value)}
        case msgspec.UnsetType():
            return None
        case float():
            return value if math.isfinite(value) else None
        case msgspec.UnsetType():
            return None
        case list() | tuple():
            if len(value) > 8 * FEW:
                return {"length": len(value), "first": _value(value[:FEW])}
            return [_value(item) for item in value]
        case Mapping():
            return {str(key): _value(item) for key, item in value.items()}
        case msgspec.Struct():
            return {name: _value(getattr(value, name)) for name in value.__struct_fields__}
    return value


def _range(array: Array) -> dict[str, Any]:
    if array.dtype == np.bool_ or not array.size:
        return {}
    known = array[np.isfinite(array)]
    return {"min": known.min().item(), "max": known.max().item()} if known.size else {}


def _body_text(body: Body) -> str:
    match body:
        case Readings():
            columns = (f"{name}={_column(column)}" for name, column in body.columns.items())
            return " ".join([*([f"{body.n} rows:"] if body.n != 1 else []), *columns])
        case Frame():
            return " ".join(filter(None, (_frame(body), _pairs(body.attributes))))
        case Tensors():
            return " ".join([*(f"{name}:{_array(a)}" for name, a in body.tensors.items()), _pairs(body.attributes)])
        case Predictions():
            return _predictions(body)
        case Aggregate():
            window = f"[{moment(body.window.start)} … {moment(body.window.end)})"
            again = f" revision {body.revision}" if body.revision else ""
            return f"{window} {body.key or '-'} n={body.count}{again} {_pairs(body.values)}"
        case Event():
            return f"{body.severity}: {body.name} {body.text} {_pairs(body.values)}"
        case Update():
            metrics = _pairs(body.metrics)
            return f"{body.job} round {body.round} client {body.client} samples={body.samples} {metrics}"
        case State():
            where = f" on {body.host}" if body.host else ""
            return f"{body.node} {body.status}{where} {body.detail}"
        case Ledger():
            return _ledger(body)
        case End():
            return f"end after {body.messages} messages"
        case Progress():
            return f"has come to {moment(body.time)}"
        case Dead():
            return f"{body.node}: {body.reason}: {body.detail} ({len(body.payload)} bytes{_from(body.position)})"


def _from(position: str) -> str:
    return f" from {position}" if position else ""


def _predictions(body: Predictions) -> str:
    parts = [f"{label} {score:.3f}" for label, score in list(zip(body.labels, body.scores.tolist(), strict=False))[:3]]
    if len(body.labels) > 3:
        parts.append(f"… ({len(body.labels)})")
    if body.boxes is not None and not len(body.boxes):
        parts.append("no boxes")
    named = (body.values or {}).items()
    values = [f"{name}={_array(value) if value.size > FEW else _column(value.reshape(-1))}" for name, value in named]
    return " ".join([", ".join(parts), *values, f"by {body.model.name}", _pairs(body.attributes)])


def _ledger(body: Ledger) -> str:
    received = sum(flow.rows for flow in body.received.values())
    emitted = sum(flow.rows for flow in body.emitted.values())
    lost = _pairs(body.dropped)
    dead = _pairs(body.dead)
    parts = [f"{body.node} received={received} emitted={emitted} passed={body.passed} filtered={body.filtered}"]
    parts.append(f"held={body.held}")
    parts += [f"dropped({lost})"] if lost else []
    parts += [f"dead({dead})"] if dead else []
    return " ".join(parts)


def _frame(body: Frame) -> str:
    if isinstance(body.data, np.ndarray):
        return f"{_array(body.data)} {body.layout}"
    return f"{body.encoding} {len(body.data)} bytes"


def _array(array: Array) -> str:
    return f"{array.dtype.name}[{'×'.join(map(str, array.shape))}]"


def _column(column: Column) -> str:
    if len(column) == 1:
        return _scalar(column[0] if isinstance(column, list) else column[0].item())
    if isinstance(column, list):
        return f"[{', '.join(_scalar(v) for v in column[:3])}{', …' if len(column) > 3 else ''}]"
    if len(column) <= FEW:
        return f"[{', '.join(_scalar(v) for v in column.tolist())}]"
    found = _range(column)
    return f"{column.dtype.name}[{len(column)}]" + (f" {found['min']:g}…{found['max']:g}" if found else "")


def _pairs(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_scalar(value)}" for key, value in values.items())


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# -- what is not ours ----------------------------------------------------------------------------------------------------


def _foreign(payload: bytes) -> dict[str, Any]:
    """A payload that is no message of ours: ``json``, ``text`` or ``hex``, the first that it is."""
    try:
        value = json.loads(payload, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        pass
    else:
        return {"json": value}
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        return {"hex": payload[: LONGEST // 2].hex()}
    return (
        {"text": text[:LONGEST]}
        if text.isprintable() or text.strip().isprintable()
        else {"hex": payload.hex()[:LONGEST]}
    )


def _foreign_text(payload: bytes) -> str:
    found = _foreign(payload)
    if "json" in found:
        text = json.dumps(found["json"], ensure_ascii=False)
    else:
        text = f"hex {found['hex']}" if "hex" in found else found["text"]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(payload)} bytes)"


def _why(error: PayloadError) -> str:
    """Only for what nearly is a message of ours does it help to say why it is none."""
    return "" if error.reason == "not-msgpack" else f"  ({error.reason})"
