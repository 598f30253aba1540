"""The mqtt source and sink: decoding of foreign payloads, and both ends against a real mosquitto."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.bus import Delivery, Publication
from nodes import ingest, uplink
from nodes.operator import Chunk, Context, Source
from nodes.sources._mapping import MAX_FIELDS, getter
from nodes.sources.mqtt import Config, Decoder
from schemas import codec
from schemas.errors import ConfigError
from schemas.messages import Message, Readings

NOW = 1714543200 * 10**9


def decode(payloads: list[tuple[str, bytes]], **options: Any) -> tuple[list[Any], list[tuple[bytes, str, str, str]]]:
    config = Config.model_validate({"topics": ["#"], **options})
    config.check(Context("line", "in", Path(), Path()))
    return Decoder(config, "in").decode([Delivery(t, p, 1) for t, p in payloads], NOW)


def only(drafts: list[Any]) -> Readings:
    (draft,) = drafts
    assert isinstance(draft.body, Readings)
    return draft.body


def column(body: Readings, name: str) -> list[Any]:
    found = body.columns[name]
    return found if isinstance(found, list) else found.tolist()


def test_a_chunk_of_json_becomes_columns() -> None:
    payloads = [
        ("zigbee2mqtt/kitchen", b'{"temperature": 21.5, "battery": 90, "state": "ON", "update": {"state": "idle"}}'),
        ("zigbee2mqtt/hall", b'{"temperature": 19, "occupancy": true, "list": [1]}'),
        ("zigbee2mqtt/hall", b'{"temperature": "18.5"}'),
    ]
    drafts, dead = decode(payloads, device="topic[1]")
    body = only(drafts)
    assert dead == []
    assert body.source == ["kitchen", "hall", "hall"]
    assert column(body, "temperature") == [21.5, 19.0, 18.5]
    np.testing.assert_array_equal(np.asarray(body.columns["battery"]), [90, np.nan, np.nan])
    assert column(body, "state") == ["ON", None, None]
    assert column(body, "update.state") == ["idle", None, None]
    assert "list" not in body.columns
    assert drafts[0].time == NOW


def test_a_mapping_with_times_rows_and_devices() -> None:
    payload = {
        "gw": "g1",
        "data": [{"id": 7, "t": 1714543200.5, "v": {"temp": 1}}, {"id": 8, "t": 1714543201, "v": {}}],
    }
    options = {"rows": "$.data", "time": "$.t", "device": "$.id", "fields": {"temp": "$.v.temp", "line": "topic[0]"}}
    drafts, dead = decode([("a/b", json.dumps(payload).encode())], **options, split=True)
    assert dead == []
    assert [(d.source, d.time) for d in drafts] == [("7", NOW + 500_000_000), ("8", NOW + 10**9)]
    assert column(drafts[0].body, "temp") == [1.0]
    assert column(drafts[0].body, "line") == ["a"]


def test_garbage_goes_to_the_dead_letters_with_its_topic_and_the_rest_goes_on() -> None:
    payloads = [
        ("a/1", b'{"v": 1}'),
        ("a/2", b"not json"),
        ("a/3", b""),
        ("a/4", b'{"x": 1'),  # this one and the next would be whole if they were joined
        ("a/5", b'"y": 2}'),
        ("a/6", b"[" * 100_000),
        ("a/7", b"[1, 2]"),
        ("a/8", b'{"v": "hot"}'),
        ("a/9", b'{"v": null}'),
        ("a/10", b'{"v": 2}'),
        ("a/11", b'{"v": 1e999}'),
        ("a/12", b'{"\xff": 2}'),
    ]
    drafts, dead = decode(payloads, fields={"v": "$.v"})
    assert [v for v in column(only(drafts), "v") if np.isfinite(v)] == [1.0, 2.0]
    assert {d[3] for d in dead} >= {f"a/{i}" for i in (2, 3, 4, 5, 6, 7, 8, 9, 12)}
    assert {d[1] for d in dead} == {"not-json", "bad-field"}
    assert max(len(d[0]) for d in dead) <= 65536


def test_plain_numbers_texts_and_msgpack() -> None:
    drafts, dead = decode([("t", b" 21.5 "), ("t", b"x"), ("t", b"1_0"), ("t", b"-3")], format="number", field="temp")
    assert column(only(drafts), "temp") == [21.5, -3.0]
    assert [d[1] for d in dead] == ["not-number"] * 2
    drafts, dead = decode([("t", "grün".encode()), ("t", b"\xff")], format="text")
    assert column(only(drafts), "value") == ["grün"]
    assert [d[1] for d in dead] == ["not-text"]
    drafts, dead = decode([("t", msgspec.msgpack.encode({"a": 1, 2: True})), ("t", b"\xc1")], format="msgpack")
    assert column(only(drafts), "a") == [1.0]
    assert column(only(drafts), "2") == [True]
    assert [d[1] for d in dead] == ["not-msgpack"]


def test_types_stay_as_first_seen_and_new_fields_have_a_limit() -> None:
    config = Config.model_validate({"topics": ["#"]})
    decoder = Decoder(config, "in")

    def feed(record: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        return decoder.decode([Delivery("t", json.dumps(record).encode(), 1)], NOW)

    feed({"a": 1, "b": True, "c": "x"})
    drafts, dead = feed({"a": "2", "b": "off", "c": 3})
    body = only(drafts)
    assert [column(body, n) for n in "abc"] == [[2.0], [False], ["3"]]
    drafts, dead = feed({"a": "warm"})
    assert not drafts
    assert "'warm' is no number" in dead[0][2]
    for i in range(3):
        drafts, dead = feed({f"f{i}-{k}": k for k in range(200)})
    assert dead[0][1] == "bad-field"
    drafts, _ = feed({"a": 5})
    assert column(only(drafts), "a") == [5.0]
    drafts, dead = feed({f"x{k}": k for k in range(MAX_FIELDS + 50)})
    assert "more than" in dead[0][2]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=30), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["v", "t", "d", "x"]), inner, max_size=3),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())), min_size=1, max_size=8))  # fmt: skip
def test_every_payload_is_a_row_or_a_dead_letter(payloads: list[bytes]) -> None:
    for options in ({}, {"fields": {"v": "$.v"}, "time": "$.t", "device": "$.d"}, {"format": "msgpack"}):
        drafts, dead = decode([(f"t/{i}", p) for i, p in enumerate(payloads)], **options)
        rows = sum(d.body.n for d in drafts)
        assert rows + len(dead) == len(payloads)
        for draft in drafts:
            message = Message("a:1:1", draft.source, draft.time, draft.body)
            assert codec.decode(codec.encode(message)).rows == draft.body.n


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("$.a.b", 1),
        ('$.a["x y"]', 2),
        ("$.l[-1]", 4),
        ("$.l[9]", None),
        ("topic[1]", "q"),
        ("topic[5]", None),
        ("$.a.b.c", None),
    ],
)
def test_paths(path: str, want: Any) -> None:
    assert getter(path)({"a": {"b": 1, "x y": 2}, "l": [3, 4]}, ["p", "q"]) == want


@pytest.mark.parametrize("path", ["a.b", "$a", "$.", "$.a[", "topic", "topic[x]", '$["a]'])
def test_what_is_no_path_is_said(path: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        getter(path)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"topics": ["a/#/b"]}, ("topics", 0)),
        ({"topics": ["a", "b+"]}, ("topics", 1)),
        ({"fields": {"a": "x"}}, ("fields", "a")),
        ({"format": "number", "time": "$.t"}, ("time",)),
        ({"broker": "cluod"}, ("broker",)),
        ({"rows": "rows"}, ("rows",)),
    ],
)
def test_check_of_the_source(options: dict[str, Any], path: tuple[str | int, ...]) -> None:
    config = ingest.Config.model_validate({"source": "mqtt", "topics": ["a"], **options})
    with pytest.raises(ConfigError) as caught:
        config.check(Context("line", "in", Path(), Path(), brokers={"cloud": "mqtt://x"}))
    assert caught.value.problems[0].path == path


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"topic": "a/{sorce}"}, ("topic",)),
        ({"topic": "a/#"}, ("topic",)),
        ({"topic": "$SYS/x"}, ("topic",)),
        ({"topic": "a", "broker": "nope"}, ("broker",)),
        ({"topic": "a", "format": "msgpack", "each": "row"}, ("each",)),
    ],
)
def test_check_of_the_sink(options: dict[str, Any], path: tuple[str, ...]) -> None:
    config = uplink.Config.model_validate({"sink": "mqtt", **options})
    with pytest.raises(ConfigError) as caught:
        config.check(Context("line", "up", Path(), Path()))
    assert caught.value.problems[0].path == path


# -- against a real broker ------------------------------------------------------------------------------------------

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
connected = [pytest.mark.connected, pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")]


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    tmp_path.chmod(0o755)
    assert MOSQUITTO is not None
    broker = subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            assert broker.poll() is None
    yield f"mqtt://127.0.0.1:{port}"
    broker.terminate()
    broker.wait(10)


async def first(source: Source, rows: int) -> tuple[list[Chunk], Any]:
    """Chunks until so many rows came."""
    out: list[Chunk] = []
    got = 0
    chunks = source.chunks()
    async with asyncio.timeout(10):
        async for chunk in chunks:
            out.append(chunk)
            for draft in chunk.drafts:
                assert isinstance(draft.body, Readings)
                got += draft.body.n
            if got >= rows:
                break
    return out, chunks


@pytest.mark.parametrize("_", [pytest.param(0, marks=connected)])
def test_from_a_device_through_a_broker_and_out_to_a_topic(mosquitto: str, tmp_path: Path, _: int) -> None:
    context = Context("line", "in", tmp_path, tmp_path, broker=mosquitto, brokers={"site": mosquitto})
    options = {"source": "mqtt", "topics": ["dev/+/t"], "device": "topic[1]", "capacity": 64, "broker": "site"}
    source = ingest.build(ingest.Config.model_validate(options), context)
    sinks = [
        uplink.build(uplink.Config.model_validate({"sink": "mqtt", "topic": "out/{source}/{type}", **extra}), context)
        for extra in ({}, {"format": "msgpack", "topic": "wire", "retain": True})
    ]

    async def run() -> None:
        await source.open(None)
        async with context.bus(mosquitto, "device") as device:
            listening = await device.subscribe(["out/#", "wire"], qos=1)
            receipt = await device.publish(
                [Publication(f"dev/d{i % 3}/t", json.dumps({"v": i}).encode(), 1) for i in range(40)]
            )
            await receipt
            chunks, generator = await first(source, 40)
            # nothing was acknowledged yet: once it is, what is over the capacity comes
            await source.settled(chunks[-1].position)
            receipt = await device.publish([Publication("dev/x/t", b'{"v": 1}', 1) for _ in range(100)])
            more: list[Chunk] = []
            rows = 0
            async with asyncio.timeout(10):
                while rows < 100:
                    chunk = await anext(generator)
                    more.append(chunk)
                    rows += sum(d.body.n for d in chunk.drafts)
                    await source.settled(chunk.position)
            await receipt
            bodies = [d.body for c in chunks for d in c.drafts if isinstance(d.body, Readings)]
            assert [v for b in bodies for v in np.asarray(b.columns["v"]).tolist()] == list(range(40))
            batch = [Message(f"n:1:{i}", f"a/{i}+", NOW, bodies[0]) for i in range(5)]
            for sink in sinks:
                await sink.open()
                await sink.write(batch)
            got: list[Delivery] = []
            async with asyncio.timeout(10):
                while len(got) < 10:
                    got += await listening.receive()
            topics = {d.topic for d in got}
            assert topics == {*(f"out/a-{i}-/readings" for i in range(5)), "wire"}
            wire = [codec.decode(d.payload) for d in got if d.topic == "wire"]
            assert [m.id for m in wire] == [m.id for m in batch]
            plain = [json.loads(d.payload) for d in got if d.topic != "wire"]
            assert sorted(p["id"] for p in plain) == [m.id for m in batch]
            for sink in sinks:
                await sink.close()
            await generator.aclose()
        await source.close()

    asyncio.run(run())


@pytest.mark.parametrize("_", [pytest.param(0, marks=connected)])
def test_what_was_not_settled_comes_again_after_a_restart_and_what_came_meanwhile_too(
    mosquitto: str, tmp_path: Path, _: int
) -> None:
    context = Context("line", "in", tmp_path, tmp_path, broker=mosquitto)
    config = ingest.Config.model_validate({"source": "mqtt", "topics": ["t"], "format": "number"})

    async def publish(values: range) -> None:
        async with context.bus(mosquitto, "device") as device:
            receipt = await device.publish([Publication("t", str(v).encode(), 1) for v in values])
            await receipt

    def values(chunks: list[Chunk]) -> list[float]:
        bodies = [d.body for c in chunks for d in c.drafts if isinstance(d.body, Readings)]
        return [v for b in bodies for v in np.asarray(b.columns["value"]).tolist()]

    async def run() -> None:
        source = ingest.build(config, context)
        await source.open(None)
        await publish(range(5))
        chunks, generator = await first(source, 5)
        await source.settled(chunks[-1].position)
        await publish(range(5, 10))
        more, _ = await first(source, 5)
        assert values(chunks + more) == list(range(10))
        await generator.aclose()
        await source.close()  # the last five are not settled
        await publish(range(10, 15))
        again = ingest.build(config, context)
        await again.open(None)
        rest, generator = await first(again, 10)
        assert values(rest) == list(range(5, 15))
        await generator.aclose()
        await again.close()

    asyncio.run(run())


def test_the_in_process_bus_carries_it_too(tmp_path: Path) -> None:
    context = Context("line", "in", tmp_path, tmp_path, broker="local:test-sources-mqtt")
    source = ingest.build(ingest.Config.model_validate({"source": "mqtt", "topics": ["t/#"]}), context)
    sink = uplink.build(uplink.Config.model_validate({"sink": "mqtt", "topic": "t/{source}"}), context)
    raw = Message("n:1:0", "d", NOW, Readings(n=1, columns={"v": np.zeros(1)}))

    async def run() -> list[Chunk]:
        await source.open(None)
        await sink.open()
        async with context.bus(context.broker, "node") as node:
            chunks, writing = source.chunks(), asyncio.ensure_future(sink.write([raw]))
            await node.publish([Publication("t/x", raw, 0), Publication("t/y", b"{}", 0)])
            out: list[Chunk] = []
            async with asyncio.timeout(10):
                while sum(len(c.drafts) + len(c.dead) for c in out) < 3:
                    out.append(await anext(chunks))
                    await source.settled(out[-1].position)
                await writing
            await chunks.aclose()  # type: ignore[attr-defined] # it is an async generator
        await sink.close()
        await source.close()
        return out

    chunks = asyncio.run(run())
    dead = {d[3]: d[1] for c in chunks for d in c.dead}
    assert dead == {"t/x": "not-json", "t/y": "bad-field"}
    (draft,) = [d for c in chunks for d in c.drafts]
    assert isinstance(draft.body, Readings)
    assert draft.body.columns["id"] == ["n:1:0"]


_CELLS = st.one_of(
    st.floats(allow_nan=False, width=32),
    st.integers(-(2**70), 2**70),
    st.sampled_from(["on", "", "21.5", "2024-05-01T06:00:00Z"]),
    st.booleans(),
    st.none(),
    st.just([1]),
    st.dictionaries(st.sampled_from(["a", "b"]), st.floats(0, 9), max_size=2),
)
_RECORDS = st.one_of(
    st.fixed_dictionaries({"v": st.floats(-50, 50), "n": st.integers(0, 9), "t": st.integers(0, 2**40)}),
    st.dictionaries(st.sampled_from(["v", "n", "t", "o", "id"]), _CELLS, max_size=5),
    st.just(3.5),
)
_WAYS = st.fixed_dictionaries(
    {},
    optional={
        "fields": st.dictionaries(
            st.sampled_from("pqr"), st.sampled_from(["$.v", "$.n", "$.o.a", "$.o", "topic[1]"]), min_size=1
        ),
        "device": st.sampled_from(["topic[1]", "topic[5]", "$.id", "$.v"]),
        "time": st.sampled_from(["$.t", "$.o.b"]),
        "time_unit": st.sampled_from(["s", "ms", "iso", None]),
        "types": st.sampled_from([{"p": "int"}, {"p": "text", "q": "float"}, {"v": "int", "n": "bool"}]),
        "format": st.sampled_from(["json", "msgpack"]),
    },
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(st.sampled_from("xyz"), _RECORDS), max_size=6), max_size=4), _WAYS)
def test_the_short_way_gives_what_the_long_way_gives(
    chunks: list[list[tuple[str, Any]]], options: dict[str, Any]
) -> None:
    """The decoder has a short way for records that are all as expected; here the same chunks go both ways."""
    config = Config.model_validate({"topics": ["#"], **options})
    short, long = Decoder(config, "in"), Decoder(config, "in")
    long.regular = None
    for chunk in chunks:
        try:
            payloads = [(f"a/{d}", getattr(msgspec, config.format).encode(record)) for d, record in chunk]
        except OverflowError:  # msgpack has no integers of 70 bits
            return
        one, other = (way.decode([Delivery(t, p, 0) for t, p in payloads], NOW) for way in (short, long))
        assert [letter[:2] for letter in one[1]] == [letter[:2] for letter in other[1]]
        assert [(d.source, d.time) for d in one[0]] == [(d.source, d.time) for d in other[0]]
        for a, b in zip(map(only, [[d] for d in one[0]]), map(only, [[d] for d in other[0]]), strict=True):
            assert (a.n, a.source) == (b.n, b.source)
            np.testing.assert_array_equal(np.asarray(a.time), np.asarray(b.time))
            assert list(a.columns) == list(b.columns)
            for left, right in zip(a.columns.values(), b.columns.values(), strict=True):
                assert type(left) is type(right)
                assert getattr(left, "dtype", None) == getattr(right, "dtype", None)
                np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_the_short_way_is_gone() -> None:
    """By records as devices send them; else the test above compares the long way with itself."""
    fields = {"v": "$.v.w", "topic": "topic[0]"}
    config = Config.model_validate({"topics": ["#"], "fields": fields, "device": "topic[1]", "time": "$.t"})
    decoder = Decoder(config, "in")
    deliveries = [Delivery(f"a/{i % 3}", b'{"v": {"w": %d.5}, "t": 1714543200}' % i, 0) for i in range(9)]
    decoder.decode(deliveries, NOW)  # types are seen here first
    assert decoder.regular is not None
    n, columns, devices, times = decoder.regular.rows(deliveries)
    assert n == 9
    assert list(columns) == ["v", "topic"]
    assert devices == ["0", "1", "2"] * 3
    assert times is not None
    assert times.tolist() == [NOW] * 9
