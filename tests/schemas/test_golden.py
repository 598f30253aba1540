"""The wire is what the golden files say, byte for byte, and any msgpack library can read it."""

from __future__ import annotations

import json
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has neither stubs nor py.typed
import pytest
from wire_samples import GOLDEN, SAMPLES, as_json, equal, foreign

from schemas.codec import decode, decode_sequenced, encode, renumber
from schemas.messages import TYPE_OF

PLAIN = (dict, list, str, int, float, bool, bytes, type(None))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_message_is_encoded_as_it_always_was(name: str) -> None:
    assert encode(SAMPLES[name]) == (GOLDEN / f"{name}.msgpack").read_bytes()


@pytest.mark.parametrize("name", SAMPLES)
def test_an_old_message_is_still_understood(name: str) -> None:
    assert equal(decode((GOLDEN / f"{name}.msgpack").read_bytes()), SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_foreign_client_reads_plain_values(name: str) -> None:
    seen = foreign((GOLDEN / f"{name}.msgpack").read_bytes())
    assert as_json(seen) == json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert next(iter(seen)) == "type"

    def walk(value: Any) -> None:
        assert type(value) in PLAIN
        for key, inner in value.items() if isinstance(value, dict) else ():
            assert type(key) is str
            walk(inner)
        for inner in value if isinstance(value, list) else ():
            walk(inner)

    walk(seen)


@pytest.mark.parametrize("name", SAMPLES)
def test_keys_of_later_versions_are_ignored(name: str) -> None:
    seen = foreign(encode(SAMPLES[name]))
    seen["later"] = {"x": [1, None]}
    seen["body"]["later"] = b"y"
    assert equal(decode(msgpack.packb(seen)), SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_foreign_publisher_may_order_keys_as_it_likes(name: str) -> None:
    seen = foreign(encode(SAMPLES[name]))
    turned = dict(reversed(seen.items()))
    assert equal(decode(msgpack.packb(turned)), SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_place_is_changed_without_reading_the_body(name: str) -> None:
    message = SAMPLES[name]
    for before in (encode(message), encode(message, epoch=7, seq=70_000)):
        assert renumber(before, 2**40, 3) == (message.id, encode(message, epoch=2**40, seq=3))


def test_every_body_is_pinned_and_no_file_is_left_over() -> None:
    assert {message.type for message in SAMPLES.values()} == set(TYPE_OF.values())
    files = {path.stem for path in GOLDEN.iterdir() if path.suffix == ".msgpack"}
    assert files == {path.stem for path in GOLDEN.iterdir() if path.suffix == ".json"} == set(SAMPLES)


def test_a_safe_edges_place_travels_beside_the_message() -> None:
    message = SAMPLES["end-1"]
    payload = encode(message, epoch=7, seq=3)
    assert foreign(payload)["epoch"] == 7
    assert decode_sequenced(payload)[1:] == (7, 3)
    assert decode_sequenced(encode(message))[1:] == (0, 0)
