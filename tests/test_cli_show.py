"""What ``penstock tap`` prints of one delivery: every body, and what is none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.cli import _show
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
    Readings,
    State,
    Tensors,
    Update,
    Window,
)

TIME = 1_700_000_000_123_000_000
MODEL = Model(name="digits", version="1", digest="ab" * 32)
BODIES: dict[str, tuple[Body, tuple[str, ...]]] = {
    "one reading": (
        Readings(n=1, columns={"temp": np.array([21.5]), "on": np.array([True]), "line": ["a"]}),
        ("readings/1", "temp=21.5 on=true line=a"),
    ),
    "many readings": (
        Readings(n=100, columns={"temp": np.linspace(1, 2, 100), "line": ["a", None, "b", *["c"] * 97]}),
        ("100 rows:", "temp=float64[100] 1…2", "line=[a, null, b, …]"),
    ),
    "readings without a number": (Readings(n=1, columns={"temp": np.array([np.nan])}), ("temp=nan",)),
    "raw frame": (
        Frame(data=np.zeros((48, 64, 3), np.uint8), attributes={"label": "7"}),
        ("uint8[48×64×3] HWC label=7",),
    ),
    "jpeg frame": (Frame(data=b"\xff\xd8abc", encoding="jpeg"), ("jpeg 5 bytes",)),
    "tensors": (Tensors(tensors={"x": np.zeros((1, 10), "<f4")}), ("x:float32[1×10]",)),
    "classification": (
        Predictions(model=MODEL, seen="a", labels=["7", "1"], scores=np.array([0.9, 0.1], "<f4")),
        ("7 0.900, 1 0.100", "by digits"),
    ),
    "detection of nothing": (
        Predictions(model=MODEL, seen="a", boxes=np.zeros((0, 4), "<f4")),
        ("no boxes",),
    ),
    "regression": (Predictions(model=MODEL, seen="a", values={"y": np.array([2.5], "<f4")}), ("y=2.5",)),
    "aggregate": (
        Aggregate(window=Window(start=TIME, end=TIME + 10**10), key="a", values={"mean": 2.5}, count=4, revision=1),
        ("[2023-11-14 22:13:20.123 … 2023-11-14 22:13:30.123)", "a n=4 revision 1 mean=2.5"),
    ),
    "event": (Event(name="anomaly", severity="alarm", text="too hot"), ("alarm: anomaly too hot",)),
    "update": (
        Update(job="j", round=3, client="c", base="d", samples=10, tensors={}, metrics={"loss": 0.5}),
        ("j round 3 client c samples=10 loss=0.5",),
    ),
    "state": (State(node="camera", status="ready", host="gateway"), ("camera ready on gateway",)),
    "ledger": (
        Ledger(node="a", received={"b.out": Flow(messages=1, rows=5)}, passed=3, dropped={"late": 2}),
        ("a received=5 emitted=0 passed=3", "dropped(late=2)"),
    ),
    "end": (End(messages=7), ("end after 7 messages",)),
    "dead": (Dead(node="a", reason="bad-body", detail="why", payload=b"xyz"), ("a: bad-body: why (3 bytes)",)),
}


def sent(body: Body) -> bytes:
    return encode(Message("m-1", "camera-1", TIME, body))


@pytest.mark.parametrize("name", sorted(BODIES))
def test_every_body_is_one_telling_line(name: str) -> None:
    body, expected = BODIES[name]
    text = _show.line("line/camera/out", sent(body))
    assert "\n" not in text
    assert text.startswith("2023-11-14 22:13:20.123  line/camera/out  ")
    for part in expected:
        assert part in text


@pytest.mark.parametrize("name", sorted(BODIES))
def test_every_body_is_json(name: str) -> None:
    body, _ = BODIES[name]
    payload = sent(body)
    found = json.loads(json.dumps(_show.data("t", payload), allow_nan=False))
    assert (found["type"], found["id"], found["source"], found["bytes"]) == (
        Message("", "", 0, body).type,
        "m-1",
        "camera-1",
        len(payload),
    )


def test_long_arrays_are_summarised_and_short_ones_are_whole() -> None:
    long = _show.data("t", sent(Readings(n=1000, columns={"x": np.arange(1000.0)})))
    assert long["body"]["columns"]["x"] == {"dtype": "<f8", "shape": [1000], "min": 0.0, "max": 999.0}
    short = _show.data("t", sent(Readings(n=3, columns={"x": np.array([1.0, np.nan, 3.0])})))
    assert short["body"]["columns"]["x"] == [1.0, None, 3.0]


@pytest.mark.parametrize(
    ("payload", "data", "text"),
    [
        (b'{"temperature": 21.5}', {"json": {"temperature": 21.5}}, '{"temperature": 21.5}'),
        (b"21.5", {"json": 21.5}, "21.5"),
        (b"online", {"text": "online"}, "online"),
        ("Tür auf".encode(), {"text": "Tür auf"}, "Tür auf"),
        (b"\xff\xfe\x00", {"hex": "fffe00"}, "hex fffe00"),
        (b"\x1b[2J", {"hex": "1b5b324a"}, "hex 1b5b324a"),
        (b"NaN", {"json": None}, "null"),
        (b"[" * 100_000, {"text": "[" * 400}, "[" * 400),
    ],
)
def test_foreign_payloads(payload: bytes, data: dict[str, Any], text: str) -> None:
    found = _show.data("zigbee/lamp", payload)
    assert {key: found[key] for key in data} == data
    assert found["refused"] in {"not-msgpack", "bad-body"}
    assert _show.line("zigbee/lamp", payload).startswith(f"zigbee/lamp  {text}")


def test_nothing_reaches_the_terminal_as_control_character() -> None:
    body = Event(name="a\x1b[2Jb", text="\u202egnirts")
    assert _show.line("t/\x07", sent(body)).isprintable()
    assert _show.line("t", b'"\\u001b[2J"').isprintable()


def test_retained_and_empty_are_told() -> None:
    assert _show.line("t", b"1", retained=True) == "t (retained)  1"
    assert _show.line("t", b"") == "t  (empty)"


@given(st.binary(max_size=200), st.text(max_size=20))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_payload_is_shown(payload: bytes, topic: str) -> None:
    assert _show.line(topic, payload).isprintable()
    json.dumps(_show.data(topic, payload), allow_nan=False)


@pytest.mark.parametrize("time", [0, -1, 2**63 - 1, -(2**63)])
def test_any_time_is_shown(time: int) -> None:
    assert _show.line("t", encode(Message("a", "b", time, End(messages=1))))
