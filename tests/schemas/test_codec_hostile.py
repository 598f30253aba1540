"""Whatever arrives, decoding answers with a message or a PayloadError, and takes memory in proportion to the bytes."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has neither stubs nor py.typed
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import SAMPLES, foreign

from schemas.codec import decode, encode
from schemas.errors import PayloadError
from schemas.rows import ROW_TYPES, rows

REASONS = {"not-msgpack", "unknown-type", "bad-body", "bad-tensor", "too-big"}
PAYLOADS = {name: encode(message) for name, message in SAMPLES.items()}


def refused(payload: bytes) -> str:
    """The reason why a payload is refused; ``""`` if it is a message. Anything but a PayloadError escapes."""
    try:
        message = decode(payload)
    except PayloadError as error:
        if error.reason not in REASONS or len(str(error)) > 1000:
            raise
        return error.reason
    if message.type in ROW_TYPES:
        assert rows([message]).n <= len(payload)
    return ""


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.binary(max_size=200))
def test_random_bytes(payload: bytes) -> None:
    assert refused(payload)


@pytest.mark.parametrize("name", PAYLOADS)
def test_mutated_messages(name: str) -> None:
    """Bytes changed, cut out, repeated, spliced from other messages; never anything but ours comes out."""
    draw = random.Random(name)
    others = list(PAYLOADS.values())
    reasons = set()
    for _ in range(400):
        payload = bytearray(PAYLOADS[name])
        for _ in range(draw.randint(1, 4)):
            at, other = draw.randrange(len(payload) + 1), draw.choice(others)
            match draw.randrange(4):
                case 0:
                    payload[at : at + 1] = bytes([draw.randrange(256)])
                case 1:
                    del payload[at : at + draw.randint(1, 9)]
                case 2:
                    payload[at:at] = payload[at : at + draw.randint(1, 9)]
                case _:
                    start = draw.randrange(len(other))
                    payload[at:at] = other[start : start + draw.randint(1, 30)]
        reasons.add(refused(bytes(payload)))
    assert len(reasons) > 1


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_beginning_of_a_message_is_refused(name: str) -> None:
    payload = PAYLOADS[name]
    assert {refused(payload[:end]) for end in range(len(payload))} == {"not-msgpack"}
    assert refused(payload + b"\0") == "not-msgpack"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.sampled_from(sorted(SAMPLES)), plain, st.data())
def test_any_value_in_any_place(name: str, value: Any, data: st.DataObject) -> None:
    """A well-formed message in which one value, at any depth, is another one."""
    seen = foreign(PAYLOADS[name])
    here: Any = seen
    while True:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else list(range(len(here)))))
        inner = here[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        here = inner
    here[key] = value
    refused(msgpack.packb(seen))


def changed(name: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    seen: dict[str, Any] = foreign(PAYLOADS[name])
    change(seen)
    return bytes(msgpack.packb(seen))


def tensor(dtype: str = "<f8", shape: Any = (1,), data: bytes = b"\0" * 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data": data}


WRONG: list[tuple[str, bytes, str, str]] = [
    ("empty", b"", "not-msgpack", "truncated"),
    ("json", b'{"type": "end/1"}', "not-msgpack", "0x7b"),
    ("no map", msgpack.packb([1]), "not-msgpack", "0x91"),
    ("no type", changed("end-1", lambda m: m.pop("type")), "unknown-type", "type"),
    ("type of tomorrow", changed("end-1", lambda m: m.update(type="end/2")), "unknown-type", "end/2"),
    ("type is no text", changed("end-1", lambda m: m.update(type=1)), "unknown-type", "str"),
    ("a type of a megabyte", changed("end-1", lambda m: m.update(type="x" * 1_000_000)), "unknown-type", "xxx"),
    ("no id", changed("end-1", lambda m: m.pop("id")), "bad-body", "id"),
    ("no body", changed("end-1", lambda m: m.pop("body")), "bad-body", "body"),
    ("time is a float", changed("end-1", lambda m: m.update(time=1.5)), "bad-body", "time"),
    ("time beyond int64", changed("end-1", lambda m: m.update(time=2**63)), "bad-body", "time"),
    ("negative n", changed("readings-1", lambda m: m["body"].update(n=-1)), "bad-body", "n is -1"),
    (
        "rows without a column",
        changed("readings-1", lambda m: m["body"].update(n=2**62, columns={})),
        "bad-body",
        "column",
    ),
    ("n does not fit", changed("readings-1", lambda m: m["body"].update(n=2)), "bad-body", "2 rows"),
    (
        "a column of two dimensions",
        changed("readings-1", lambda m: m["body"]["columns"].update(temperature=tensor(shape=(1, 1)))),
        "bad-body",
        "1 rows",
    ),
    ("times as floats", changed("readings-1", lambda m: m["body"].update(time=tensor())), "bad-body", "<i8"),
    ("sources too few", changed("readings-1", lambda m: m["body"].update(source=[])), "bad-body", "source"),
    ("dtype object", changed("tensors-1", lambda m: m["body"]["tensors"].update(x=tensor("|O"))), "bad-tensor", "|O"),
    (
        "dtype big-endian",
        changed("tensors-1", lambda m: m["body"]["tensors"].update(x=tensor(">f8"))),
        "bad-tensor",
        ">f8",
    ),
    (
        "negative extent",
        changed("tensors-1", lambda m: m["body"]["tensors"].update(x=tensor(shape=(-1, -1)))),
        "bad-tensor",
        "negative",
    ),
    (
        "a giant shape",
        changed("tensors-1", lambda m: m["body"]["tensors"].update(x=tensor(shape=(2**62, 2**62)))),
        "bad-tensor",
        "needs",
    ),
    (
        "a giant shape without a value",
        changed("tensors-1", lambda m: m["body"]["tensors"].update(x=tensor(shape=(0, 2**62), data=b""))),
        "bad-tensor",
        "too big",
    ),
    (
        "nine dimensions",
        changed("tensors-1", lambda m: m["body"]["tensors"].update(x=tensor(shape=(1,) * 9))),
        "bad-tensor",
        "9 dimensions",
    ),
    (
        "bytes too few",
        changed("tensors-1", lambda m: m["body"]["tensors"].update(x=tensor(shape=(2,)))),
        "bad-tensor",
        "16",
    ),
    ("raw frame of bytes", changed("frame-1", lambda m: m["body"].update(data=b"x")), "bad-body", "raw"),
    ("jpeg of a tensor", changed("frame-1-jpeg", lambda m: m["body"].update(data=tensor())), "bad-body", "jpeg"),
    ("layout too long", changed("frame-1", lambda m: m["body"].update(layout="NHWC")), "bad-body", "layout"),
    ("scores too few", changed("predictions-1", lambda m: m["body"].update(labels=["a"])), "bad-body", "scores"),
    (
        "boxes too few",
        changed("predictions-1-boxes", lambda m: m["body"].update(boxes=tensor("<f4", (2,)))),
        "bad-body",
        "boxes",
    ),
    ("a text that is not UTF-8", PAYLOADS["end-1"].replace("É".encode(), b"\xff\xff"), "not-msgpack", "utf-8"),
    ("nested lists", b"\x91" * 100_000 + b"\xc0", "", ""),
    ("nested lists in an unknown key", b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0", "", ""),
    ("nested lists in a body", PAYLOADS["end-1"][:-1] + b"\x91" * 100_000 + b"\xc0", "", ""),
    ("an array of 4 billion", b"\xdd\xff\xff\xff\xff", "", ""),
    ("a map of 4 billion", b"\xdf\xff\xff\xff\xff\xa1x\xc0", "", ""),
    ("a bin of 4 GB", b"\x81\xa4type\xc6\xff\xff\xff\xff", "", ""),
    ("a text of 4 GB", b"\x81\xa4type\xdb\xff\xff\xff\xff", "", ""),
    ("an extension type", changed("end-1", lambda m: m.update(id=msgpack.ExtType(4, b"x"))), "bad-body", "id"),
    ("the reserved byte", b"\xc1", "not-msgpack", ""),
]


@pytest.mark.parametrize(("payload", "reason", "detail"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_said(payload: bytes, reason: str, detail: str) -> None:
    with pytest.raises(PayloadError) as caught:
        decode(payload)
    assert reason in {"", caught.value.reason}
    assert detail in caught.value.detail
    assert len(caught.value.detail) <= 300


def bombs() -> dict[str, bytes]:
    """Payloads of about a megabyte that ask for as much memory as they can."""
    n = 50_000
    texts = b"\xdd" + struct.pack(">I", n)
    label = changed("predictions-1", lambda m: m["body"].update(labels=["LABELS"]))
    many = {f"{i:x}": tensor("|u1", (0,), b"") for i in range(n // 8)}
    return {
        "missing texts": changed(
            "readings-1", lambda m: m["body"].update(n=n, columns={"x": [None] * n, "y": [""] * n})
        ),
        "labels": label.replace(msgpack.packb(["LABELS"]), texts + b"\xa0" * n),
        "attributes": changed("event-1", lambda m: m["body"].update(values={f"{i:x}": 0 for i in range(n)})),
        "tensors": changed("tensors-1", lambda m: m["body"].update(tensors=many)),
        "a shape of a million": changed(
            "tensors-1", lambda m: m["body"]["tensors"].update(x=tensor(shape=[1] * n * 5))
        ),
        "declared": b"\x82\xa4type\xaareadings/1\xa4body\x82\xa1n\xcf" + b"\x7f" * 8 + b"\xa7columns\xdf" + b"\xff" * 4,
        "nested": b"\x91" * 1_000_000,
    }


@pytest.mark.parametrize("name", bombs())
def test_memory_stays_in_proportion(name: str) -> None:
    payload = bombs()[name]
    tracemalloc.start()
    try:
        refused(payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000 + 60 * len(payload)
