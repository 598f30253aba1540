"""What travels is plain msgpack that says what it is; what comes back is the same, with keys of a later version passed over."""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]  # has no types
import numpy as np
import pytest

from nodes.federated import wire
from nodes.federated.weights import Shape, digest
from schemas.errors import PayloadError

FORM = (Shape("w", (2, 3)), Shape("b", (3,)))
WEIGHTS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}

PLAIN: list[tuple[Any, dict[str, Any]]] = [
    (
        wire.Presence(True, "0123456789abcdef", 24, 1.5, 7, "on battery"),
        {"type": "fl-client/1", "here": True, "form": "0123456789abcdef", "samples": 24, "pace": 1.5, "skips": 7}
        | {"why": "on battery"},
    ),
    (wire.Presence(False), {"type": "fl-client/1", "here": False}),
    (
        wire.Call("j", 1, 2, 3, wire.COLLECTING, "abc", 9, 2, ("a", "b"), fit={"epochs": 1}, aborted=(2,)),
        {"type": "fl-round/1", "job": "j", "run": 1, "epoch": 2, "round": 3, "phase": "collecting", "base": "abc"}
        | {"deadline": 9, "quorum": 2, "cohort": ["a", "b"], "fit": {"epochs": 1}, "aborted": [2]},
    ),
    (
        wire.Manifest("j", 1, 2, 3, 4, "abc", "def", 5, FORM[1:], 65536, metrics={"accuracy": 0.5}),
        {"type": "fl-model/1", "job": "j", "run": 1, "epoch": 2, "round": 3, "version": 4, "digest": "abc"}
        | {"blob": "def", "size": 5, "shapes": [{"name": "b", "shape": [3], "dtype": "<f4"}], "chunk": 65536}
        | {"metrics": {"accuracy": 0.5}},
    ),
    (
        wire.Ack(1, 2, 3, wire.REFUSED, "norm", "too long"),
        {
            "type": "fl-ack/1",
            "run": 1,
            "epoch": 2,
            "round": 3,
            "status": "refused",
            "reason": "norm",
            "detail": "too long",
        },
    ),
    (wire.Ask("abc", 3), {"type": "fl-ask/1", "model": "abc", "answer": 3}),
    (
        wire.Parcel(1, 3, "def", 5, 65536),
        {"type": "fl-parcel/1", "run": 1, "round": 3, "digest": "def", "size": 5, "chunk": 65536},
    ),
]


@pytest.mark.parametrize(("message", "plain"), PLAIN, ids=lambda value: type(value).__name__)
def test_messages_are_plain_maps(message: Any, plain: dict[str, Any]) -> None:
    payload = wire.say(message)
    assert msgpack.unpackb(payload) == plain
    assert next(iter(msgpack.unpackb(payload))) == "type"
    assert wire.hear(type(message), payload) == message
    assert wire.hear(type(message), msgpack.packb({**plain, "of a later version": [1]})) == message


@pytest.mark.parametrize(("message", "plain"), PLAIN, ids=lambda value: type(value).__name__)
def test_a_message_of_another_type_is_none(message: Any, plain: dict[str, Any]) -> None:
    for other, _ in PLAIN:
        if type(other) is not type(message):
            with pytest.raises(PayloadError):
                wire.hear(type(other), wire.say(message))
    with pytest.raises(PayloadError):
        wire.hear(type(message), wire.say(message)[:-1])
    with pytest.raises(PayloadError):
        wire.hear(type(message), msgpack.packb({**plain, "type": "fl-round/2"}))


def test_an_update_is_what_any_msgpack_library_reads() -> None:
    payload = wire.pack_update(
        "j", 1, 3, "a", base="abc", samples=24, packed=WEIGHTS, extra={"w": WEIGHTS["w"]}, metrics={"loss": 0.5}, time=9
    )
    plain = msgpack.unpackb(payload)
    assert (plain["type"], plain["id"], plain["source"], plain["time"]) == ("update/1", "a:1:3", "a", 9)
    body = plain["body"]
    assert (body["job"], body["round"], body["client"], body["base"], body["samples"]) == ("j", 3, "a", "abc", 24)
    assert list(body["tensors"]) == ["w", "b", "extra/w"]
    assert body["tensors"]["b"] == {"dtype": "<f4", "shape": [3], "data": WEIGHTS["b"].tobytes()}
    ident, update, extra = wire.unpack_update(payload)
    assert ident == "a:1:3"
    assert list(update.tensors) == ["w", "b"]
    assert np.array_equal(extra["w"], WEIGHTS["w"])


def test_a_model_survives_a_map_of_another_order() -> None:
    data = wire.pack_model(WEIGHTS, {"c": WEIGHTS["b"]})
    turned = msgpack.unpackb(data)
    turned["weights"] = dict(reversed(turned["weights"].items()))
    for payload in (data, msgpack.packb(turned)):
        weights, shared = wire.unpack_model(payload, FORM)
        assert digest(weights) == digest(WEIGHTS)
        assert np.array_equal(shared["c"], WEIGHTS["b"])
    with pytest.raises(PayloadError):
        wire.unpack_model(data, FORM[:1])


def test_seeds_differ_by_round_and_client_and_stay_what_they_are() -> None:
    assert wire.seed_of(1, 2, "a") == 8697116134995825354
    assert len({wire.seed_of(s, n, c) for s in range(3) for n in range(3) for c in "abc"}) == 27


def test_the_form_tells_models_apart() -> None:
    assert wire.form(FORM) == wire.form(tuple(FORM))
    assert (
        len({wire.form(FORM), wire.form(FORM[::-1]), wire.form(FORM[:1]), wire.form((Shape("w", (3, 2)), FORM[1]))})
        == 4
    )
