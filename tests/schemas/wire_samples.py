"""One message of every type and form, pinned by the golden files, and how two messages are compared.

To pin a new body or a new form of one: add it to :data:`SAMPLES`, run ``python tests/schemas/wire_samples.py`` from the
root of the repository, look at the new ``.json`` in ``golden/``, and commit both files. Existing files are never
written again: bytes that change are a new version of the body.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has neither stubs nor py.typed
import msgspec
import numpy as np

from schemas.codec import encode
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
    Spooled,
    State,
    Tensors,
    Update,
    Window,
)

GOLDEN = Path(__file__).parent / "golden"
_TIME = 1_700_000_000_123_456_789
_MODEL = Model(name="digits", version="3", digest="9f" * 32)


def _message(body: Body, ident: str = "camera:5f0c1a2b:17", source: str = "Line 3/Camera É") -> Message:
    return Message(id=ident, source=source, time=_TIME, body=body)


SAMPLES: dict[str, Message] = {
    "readings-1": _message(Readings(n=1, columns={"temperature": np.array([21.5])}), "ingest:a:1", "boiler"),
    "readings-1-empty": _message(Readings(n=0, columns={})),
    "readings-1-columns": _message(
        Readings(
            n=3,
            columns={
                "value": np.array([1.5, -2.25, 1e300]),
                "count": np.array([1, 2, 3], "<u2"),
                "ok": np.array([True, False, True]),
                "label": ["a", None, "é"],
            },
            time=np.array([_TIME, _TIME + 1, _TIME + 2], "<i8"),
            source=["a", "b", "a"],
        )
    ),
    "frame-1": _message(
        Frame(
            data=np.arange(12, dtype="u1").reshape(2, 2, 3),
            rate=30.0,
            attributes={"label": "7", "exposure": 0.5, "n": 4, "night": False, "note": None},
        )
    ),
    "frame-1-jpeg": _message(Frame(data=b"\xff\xd8\xff\xd9", encoding="jpeg", layout="HWC")),
    "frame-1-samples": _message(Frame(data=np.array([0, -1, 32767], "<i2"), layout="T", rate=16000.0)),
    "tensors-1": _message(
        Tensors(
            tensors={"features": np.array([[0.5, 1.5]], "<f4"), "scale": np.array(2.0, "<f2")}, attributes={"part": 1}
        )
    ),
    "predictions-1": _message(
        Predictions(
            model=_MODEL,
            seen="camera:5f0c1a2b:17",
            labels=["7", "1"],
            scores=np.array([0.75, 0.25], "<f4"),
            times={"ingest": _TIME, "infer": _TIME + 2_000_000},
            attributes={"label": "7"},
        )
    ),
    "predictions-1-boxes": _message(
        Predictions(
            model=_MODEL,
            seen="x",
            labels=["cat"],
            scores=np.array([0.5], "<f4"),
            boxes=np.array([[1, 2, 30, 40.5]], "<f4"),
        )
    ),
    "predictions-1-values": _message(
        Predictions(model=_MODEL, seen="x", values={"wear": np.array([0.125], "<f4"), "life": np.array(9, "<i4")})
    ),
    "aggregate-1": _message(
        Aggregate(
            window=Window(start=_TIME, end=_TIME + 10**10),
            key="boiler/a",
            values={"mean": 1.5, "count": 3, "last": "on", "any": True, "none": None},
            count=3,
            revision=1,
        )
    ),
    "event-1": _message(Event(name="anomaly", severity="alarm", text="too hot", values={"score": 4.5})),
    "update-1": _message(
        Update(
            job="digits",
            round=4,
            client="site-a",
            base="9f" * 32,
            samples=1347,
            tensors={"w": np.array([[1, 2], [3, 4]], "<f4")},
            metrics={"loss": 0.5},
        )
    ),
    "state-1": _message(State(node="camera", status="ready", host="gateway", pid=42, detail="")),
    "ledger-1": _message(
        Ledger(
            node="rate",
            received={"detect.out": Flow(messages=10, rows=12)},
            repeated={"detect.out": 1},
            emitted={"out": Flow(messages=2, rows=2)},
            passed=9,
            filtered=1,
            dropped={"late": 1},
            dead={"bad-tensor": 1},
            held=0,
            latency={"wait": {"p50": 1000, "p99": 5000}},
        )
    ),
    "ledger-1-relay": _message(
        Ledger(
            node="relay-gateway-cloud",
            received={"detect.out": Flow(messages=10, rows=12)},
            emitted={"detect.out": Flow(messages=6, rows=7)},
            passed=7,
            dropped={"spool-full": 3},
            held=2,
            spooled={
                "detect.out": Spooled(
                    readers=["store", "show"],
                    taken=Flow(messages=10, rows=12),
                    given=Flow(messages=6, rows=7),
                    dropped={"spool-full": Flow(messages=2, rows=3)},
                    held=Flow(messages=2, rows=2),
                    disk=4096,
                )
            },
        )
    ),
    "end-1": _message(End(messages=17)),
    "progress-1": _message(Progress(time=1_700_000_000_000_000_000)),
    "dead-1": _message(
        Dead(node="rate", reason="not-msgpack", detail="?", edge="detect.out", position="t/x:3", payload=b"\x00\xc1")
    ),
}


def equal(a: Any, b: Any) -> bool:
    """Deep equality of messages, bodies and what they hold; arrays by dtype, shape and bits of value (NaN is NaN)."""
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and a.shape == b.shape
            and a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=")
            and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        )
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and all(equal(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__)
    if isinstance(a, (bytes, memoryview)):
        return bytes(a) == bytes(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and bool(a == b)


def foreign(payload: bytes) -> Any:
    """What a client with nothing but a msgpack library sees; no extension type gets by."""

    def refuse(code: int, data: bytes) -> Any:
        raise AssertionError(f"extension type {code}")

    return msgpack.unpackb(payload, strict_map_key=True, ext_hook=refuse)


def as_json(value: Any) -> Any:
    """Plain values as JSON has them: ``bin`` as ``{"bin": base64}``."""
    if isinstance(value, bytes):
        return {"bin": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    return [as_json(v) for v in value] if isinstance(value, list) else value


def write_missing() -> None:
    """Write the golden files of samples that have none."""
    for name, message in SAMPLES.items():
        wire, text = GOLDEN / f"{name}.msgpack", GOLDEN / f"{name}.json"
        if not wire.exists():
            wire.write_bytes(encode(message))
        if not text.exists():
            plain = as_json(foreign(wire.read_bytes()))
            text.write_text(json.dumps(plain, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_missing()
