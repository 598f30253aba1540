"""Sources of files and generators: csv, images, arrays, synthetic. Real files, no bus."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nodes import ingest
from nodes.operator import Chunk, Context, Source
from nodes.sources import _files, _times, synthetic
from nodes.sources._pace import Pacer, instant
from nodes.sources._records import MAX_LINE, RecordReader
from schemas.errors import ConfigError, MissingError
from schemas.messages import Frame, Readings
from schemas.units import duration


def context(base: Path) -> Context:
    return Context("line", "camera", base, base / "state")


def make(base: Path, **options: Any) -> Source:
    config = ingest.Config.model_validate(options)
    config.check(context(base))
    return ingest.build(config, context(base))


async def _take(source: Source, position: Any, limit: int | None) -> tuple[str, list[Chunk]]:
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(position))  # as the runtime keeps it
    stream = await source.open(kept)
    out: list[Chunk] = []
    chunks = source.chunks()
    async for chunk in chunks:
        out.append(chunk)
        if limit is not None and len(out) >= limit:
            break
    await chunks.aclose()  # type: ignore[attr-defined] # it is an async generator
    await source.close()
    return stream, out


def take(source: Source, position: Any = None, limit: int | None = None) -> tuple[str, list[Chunk]]:
    """All chunks, or the first ``limit``."""
    return asyncio.run(_take(source, position, limit))


def readings(chunks: list[Chunk]) -> list[Readings]:
    out = []
    for chunk in chunks:
        for draft in chunk.drafts:
            assert isinstance(draft.body, Readings)
            out.append(draft.body)
    return out


def column(chunks: list[Chunk], name: str) -> list[Any]:
    return [v for r in readings(chunks) for v in np.asarray(r.columns[name], object).tolist()]


def problems(base: Path, **options: Any) -> list[tuple[tuple[str | int, ...], str]]:
    config = ingest.Config.model_validate(options)
    with pytest.raises(ConfigError) as caught:
        config.check(context(base))
    return [(p.path, p.message) for p in caught.value.problems]


# -- the family -----------------------------------------------------------------------------------------------------


def test_an_unknown_source_says_which_one_may_be_meant() -> None:
    with pytest.raises(ValidationError) as caught:
        ingest.Config.model_validate({"source": "cvs"})
    (error,) = caught.value.errors()
    assert error["loc"] == ("source",)
    assert "did you mean 'csv'?" in error["msg"]


def test_a_wrong_option_has_the_path_that_the_user_wrote() -> None:
    with pytest.raises(ValidationError) as caught:
        ingest.Config.model_validate({"source": "csv", "path": "a", "batsh": 3, "types": {"a": "flaot"}})
    assert {e["loc"] for e in caught.value.errors()} == {("batsh",), ("types", "a")}


def test_every_source_describes_its_options() -> None:
    for name, options in ingest.variants().items():
        for field in options.model_fields.values():
            assert field.description, name
    schema = ingest.Config.model_json_schema()
    names = {s["properties"]["source"]["const"] for s in schema["oneOf"]}
    assert {"csv", "images", "arrays", "synthetic"} <= names
    assert all(s["additionalProperties"] is False for s in schema["oneOf"])


# -- csv ------------------------------------------------------------------------------------------------------------

SIMPLE = """time,machine,temp,ok,note
2024-05-01T06:00:00Z,a,20.5,true,fine
2024-05-01T06:00:01Z,b,,false,
2024-05-01T06:00:02.5Z,a,22,true,"two
lines, one row"
"""


def test_csv_reads_types_times_and_devices(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(SIMPLE)
    source = make(tmp_path, source="csv", path="a.csv", time="time", device_column="machine")
    _, chunks = take(source)
    (body,) = readings(chunks)
    assert body.n == 3
    temp = body.columns["temp"]
    assert isinstance(temp, np.ndarray)
    np.testing.assert_array_equal(temp, [20.5, np.nan, 22])
    assert np.asarray(body.columns["ok"]).dtype == np.bool_
    assert body.columns["note"] == ["fine", None, "two\nlines, one row"]
    assert body.source == ["a", "b", "a"]
    assert body.time is not None
    assert body.time.tolist() == [instant("2024-05-01T06:00:00Z") + s for s in (0, 10**9, 2_500_000_000)]
    assert chunks[0].drafts[0].time == body.time[0]


def test_csv_says_its_fields_before_it_runs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(SIMPLE)
    config = ingest.Config.model_validate({"source": "csv", "path": "a.csv", "time": "time"})
    flow = config.emits([], context(tmp_path))["out"]
    assert flow.type == "readings/1"
    assert flow.fields == frozenset({"machine", "temp", "ok", "note"})


def test_csv_check_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(SIMPLE)
    (path, text), *_ = problems(tmp_path, source="csv", path="a.csv", time="tiem")
    assert path == ("time",)
    assert "did you mean 'time'" in text
    assert problems(tmp_path, source="csv", path="b.csv")[0][0] == ("path",)
    assert problems(tmp_path, source="csv", path="a.csv", types={"x": "int"})[0][0] == ("types", "x")
    assert problems(tmp_path, source="csv", path="a.csv", fields=["temp", "x"])[0][0] == ("fields", 1)
    assert problems(tmp_path, source="csv", path="a.csv", rate="recorded")[0][0] == ("rate",)
    assert problems(tmp_path, source="csv", path="a.csv", timezone="Mars/One")[0][0] == ("timezone",)
    assert problems(tmp_path, source="csv", path="a.csv", start="2024-01-01")[0][0] == ("start",)
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    assert "named 'a'" in problems(tmp_path, source="csv", path="twice.csv")[0][1]
    (tmp_path / "empty.csv").write_text("")
    assert "empty" in problems(tmp_path, source="csv", path="empty.csv")[0][1]


def test_csv_bad_rows_go_to_the_dead_letters_and_the_others_go_on(tmp_path: Path) -> None:
    rows = [b"t,v"] + [b"%d,%d" % (1714543200 + i, i) for i in range(200)]
    rows[3] = b"1714543202,abc"  # not a number
    rows[5] = b"1714543204"  # too short
    rows[7] = b"yesterday,6"  # not a time
    rows[9] = b'1714543208,"8'  # a quote that is not closed
    rows[11] = b"1714543210,\xff\xfe"  # not UTF-8
    rows[13] = b"1714543212,1_2"  # not a number either
    (tmp_path / "a.csv").write_bytes(b"\n".join(rows))
    _, chunks = take(make(tmp_path, source="csv", path="a.csv", time="t", batch=10))
    dead = [d for c in chunks for d in c.dead]
    assert [d[3] for d in dead] == [f"a.csv:{i}" for i in (4, 6, 8, 10, 12, 14)]
    assert dead[0][0] == b"1714543202,abc\n"
    assert all(d[1] == "bad-row" for d in dead)
    assert "'abc' is not a number" in dead[0][2]
    assert column(chunks, "v") == [float(i) for i in range(200) if i not in (2, 4, 6, 8, 10, 12)]


def test_csv_resumes_at_every_position(tmp_path: Path) -> None:
    lines = [f"{i},{i * 2}" for i in range(100)]
    lines[33] = '33,"66"'
    lines[40] = ""  # a blank line is no row
    lines[50] = "50,x"
    (tmp_path / "a.csv").write_text("n,v\n" + "\n".join(lines) + "\n")
    whole_stream, whole = take(make(tmp_path, source="csv", path="a.csv", batch=7, rate="100000/s"))
    for cut in range(len(whole)):
        stream, rest = take(make(tmp_path, source="csv", path="a.csv", batch=7, rate="100000/s"), whole[cut].position)
        assert stream == whole_stream
        assert [d.key for c in rest for d in c.drafts] == [d.key for c in whole[cut + 1 :] for d in c.drafts]
        assert column(rest, "v") == column(whole[cut + 1 :], "v")
        assert [d for c in rest for d in c.dead] == [d for c in whole[cut + 1 :] for d in c.dead]


def test_csv_a_file_that_grew_goes_on_and_another_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("v\n1\n2\n")
    stream, chunks = take(make(tmp_path, source="csv", path="a.csv"))
    with path.open("a") as file:
        file.write("3\n")
    grown, rest = take(make(tmp_path, source="csv", path="a.csv"), chunks[-1].position)
    assert grown == stream
    assert column(rest, "v") == [3.0]
    assert rest[0].drafts[0].key == "2"
    again, none = take(make(tmp_path, source="csv", path="a.csv"), rest[-1].position)
    assert (again, none) == (stream, [])
    path.write_text("v\n7\n8\n9\n10\n")
    other, chunks = take(make(tmp_path, source="csv", path="a.csv"), rest[-1].position)
    assert other != stream
    assert column(chunks, "v") == [7.0, 8.0, 9.0, 10.0]


def test_csv_loops_with_times_that_go_on(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t,v\n100,1\n110,2\n120,3\n")
    source = make(tmp_path, source="csv", path="a.csv", time="t", loop=True, start="2024-01-01T00:00:00Z", batch=2)
    _, chunks = take(source, limit=3)
    times = np.concatenate([r.time for r in readings(chunks) if r.time is not None])
    assert times.tolist() == [instant("2024-01-01") + 10 * 10**9 * i for i in range(9)]
    _, rest = take(source, chunks[0].position, limit=1)
    assert rest[0].drafts[0].time == chunks[1].drafts[0].time


def test_csv_without_times_counts_from_start(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("v\n" + "\n".join(map(str, range(5))))
    source = make(tmp_path, source="csv", path="a.csv", start="2024-01-01", interval="250ms", batch=2)
    _, chunks = take(source)
    base = instant("2024-01-01T00:00:00")
    drafts = [d for c in chunks for d in c.drafts]
    assert [d.time - base for d in drafts] == [0, 500_000_000, 1_000_000_000]
    body = drafts[0].body
    assert isinstance(body, Readings)
    assert body.time is not None
    assert (body.time - base).tolist() == [0, 250_000_000]


def test_csv_of_another_country(tmp_path: Path) -> None:
    text = "Anlage;Zeit;Temperatur °C\nA1;01.07.2024 12:00;21,5\nA1;01.07.2024 12:01;-\n"
    (tmp_path / "a.csv").write_bytes(("# logger 7\n" + text).encode("cp1252"))
    source = make(
        tmp_path, source="csv", path="a.csv", delimiter=";", decimal=",", encoding="cp1252", skip=1, time="Zeit",
        time_format="%d.%m.%Y %H:%M", timezone="Europe/Berlin", device_column="Anlage",
    )  # fmt: skip
    _, chunks = take(source)
    (body,) = readings(chunks)
    np.testing.assert_array_equal(np.asarray(body.columns["Temperatur °C"]), [21.5, np.nan])
    assert chunks[0].drafts[0].source == "A1"
    assert chunks[0].drafts[0].time == instant("2024-07-01T10:00:00Z")


def test_csv_split_gives_each_device_its_messages(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("d,v\n" + "\n".join(f"m{i % 3},{i}" for i in range(9)))
    _, chunks = take(make(tmp_path, source="csv", path="a.csv", device_column="d", split=True))
    drafts = chunks[0].drafts
    assert [(d.source, d.key) for d in drafts] == [("m0", "0:m0"), ("m1", "0:m1"), ("m2", "0:m2")]
    assert np.asarray(drafts[1].body.columns["v"]).tolist() == [1, 4, 7]  # type: ignore[union-attr] # readings


def test_csv_at_recorded_speed_keeps_time_and_can_be_cancelled(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t,v\n" + "\n".join(f"{1000 + i * 0.02},{i}" for i in range(16)) + "\n99999,16\n")
    source = make(tmp_path, source="csv", path="a.csv", time="t", rate="recorded", batch=1)

    async def run() -> tuple[float, int]:
        await source.open(None)
        began, count = time.monotonic(), 0
        took = 0.0
        try:
            async with asyncio.timeout(1.5):
                async for _ in source.chunks():
                    count += 1
                    took = time.monotonic() - began
        except TimeoutError:
            pass
        await source.close()
        return took, count

    took, count = asyncio.run(run())
    assert count == 16  # the last one is hours away
    assert 0.29 < took < 1.2


def test_csv_garbage_file_ends_and_all_of_it_is_accounted_for(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
    (tmp_path / "a.csv").write_bytes(b"v\n" + noise + b"\n" + b"x" * (3 * MAX_LINE) + b"\n5\n")
    _, chunks = take(make(tmp_path, source="csv", path="a.csv", types={"v": "float"}))
    dead = [d for c in chunks for d in c.dead]
    assert column(chunks, "v")[-1] == 5.0
    assert any("longer than" in d[2] for d in dead)
    assert max(len(d[0]) for d in dead) <= 1 << 20


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.lists(st.lists(st.text(st.sampled_from('ab",\n é0'), max_size=5), min_size=2, max_size=2), max_size=30),
    count=st.integers(1, 9),
)
def test_records_equal_those_of_the_csv_module(rows: list[list[str]], count: int) -> None:
    import csv
    import io

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    data = text.getvalue().encode()
    reader = RecordReader(io.BytesIO(data), delimiter=",", encoding="utf-8")
    seen: list[list[str]] = []
    raw = b""
    while len(block := reader.read(count)):
        assert not block.bad
        for row, piece, end in zip(block.rows, block.raw, block.ends, strict=True):
            seen.append(row)
            raw += piece
            again = RecordReader(io.BytesIO(data[end:]), delimiter=",", encoding="utf-8").read(1)
            assert not again.rows or again.rows[0] == rows[len(seen)]
    assert seen == rows
    assert raw == data


# -- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "form", "first"),
    [
        (["2024-05-01T06:00:00.123456789Z"], "iso", 1714543200123456789),
        (["2024-05-01 08:00:00+02:00"], "iso", 1714543200 * 10**9),
        (["2024-05-01"], "iso", 1714521600 * 10**9),
        (["1714543200"], "s", 1714543200 * 10**9),
        (["1714543200.25"], "s", 1714543200_250000000),
        (["1714543200123"], "ms", 1714543200_123000000),
        (["1714543200123456789"], "ns", 1714543200123456789),
    ],
)
def test_times(cells: list[str], form: str, first: int) -> None:
    assert _times.guess(cells) == form
    assert _times.from_texts(cells * 3, form).tolist() == [first] * 3
    assert _times.from_text(cells[0], form, None) == first


@pytest.mark.parametrize(
    "cell", ["", "nan", "inf", "1_0", "99999999999999999999", "3000-01-01T00:00:00Z", "2024-13-01"]
)
@pytest.mark.parametrize("form", ["iso", "s"])
def test_what_is_no_time_raises_value_error(cell: str, form: str) -> None:
    with pytest.raises((ValueError, OverflowError)):
        _times.from_text(cell, form, None)
    with pytest.raises((ValueError, OverflowError)):
        _times.from_texts([cell], form)


def test_the_pacer_does_not_drift_and_lets_lateness_go() -> None:
    async def run() -> tuple[float, float]:
        pacer, began = Pacer(catch_up=0.05), time.monotonic()
        for i in range(40):
            await pacer.until(i * 0.005)
        steady = time.monotonic() - began
        time.sleep(0.3)  # noqa: ASYNC251 - this is the stall that is meant
        began = time.monotonic()
        for i in range(40, 80):
            await pacer.until(i * 0.005)
        return steady, time.monotonic() - began

    steady, after = asyncio.run(run())
    assert 0.19 < steady < 0.4
    assert after > 0.12  # 0.2 s of work, of which at most 0.05 s were caught up


# -- images and arrays ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
    for i, label in enumerate(("cat", "dog", "cat")):
        pixels = np.full((4, 6, 3), i * 10, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pets" / label / f"p{[2, 9, 10][i]}_{label}.png")
    Image.fromarray(np.full((5, 5), 9, np.uint8)).save(tmp_path / "pets" / "dog" / "grey.jpg")
    np.save(tmp_path / "pets" / "dog" / "wave.npy", np.arange(8.0))
    (tmp_path / "pets" / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (tmp_path / "pets" / "dog" / "text.txt").write_text("no image")
    return tmp_path


def frames(chunks: list[Chunk]) -> list[Frame]:
    out = []
    for chunk in chunks:
        for draft in chunk.drafts:
            assert isinstance(draft.body, Frame)
            out.append(draft.body)
    return out


def test_images_in_natural_order_with_labels(folder: Path) -> None:
    stream, chunks = take(make(folder, source="images", path="pets", label="folder"))
    got = frames(chunks)
    assert [f.attributes["path"] for f in got] == [
        "cat/p2_cat.png", "cat/p10_cat.png", "dog/grey.jpg", "dog/p9_dog.png", "dog/wave.npy",
    ]  # fmt: skip
    assert [f.attributes["label"] for f in got] == ["cat", "cat", "dog", "dog", "dog"]
    assert [f.layout for f in got] == ["HWC", "HWC", "HW", "HWC", "T"]
    assert np.asarray(got[1].data).shape == (4, 6, 3)
    assert np.asarray(got[1].data).max() == 20
    (dead,) = [d for c in chunks for d in c.dead]
    assert dead[1] == "bad-image"
    assert dead[3] == "dog/broken.png"
    assert dead[0].startswith(b"\x89PNG")
    again, rest = take(make(folder, source="images", path="pets", rate=1000), {"stream": stream, "number": 4})
    assert again == stream
    assert [d.key for c in rest for d in c.drafts] == ["4", "5"]


@pytest.mark.parametrize(("label", "want"), [(r"_([a-z]+)\.png$", "cat"), ("labels.csv", "Felis")])
def test_image_labels_by_name_and_by_table(folder: Path, label: str, want: str) -> None:
    (folder / "labels.csv").write_text("p2_cat.png,Felis\n")
    _, chunks = take(make(folder, source="images", path="pets", pattern="cat/*.png", label=label))
    assert frames(chunks)[0].attributes["label"] == want


def test_images_encoded(folder: Path) -> None:
    _, chunks = take(make(folder, source="images", path="pets/cat", decode=False, loop=True, count=1), limit=1)
    (draft, *_) = chunks[0].drafts
    assert isinstance(draft.body, Frame)
    assert draft.body.encoding == "png"
    assert bytes(draft.body.data).startswith(b"\x89PNG")
    assert [d.key for d in chunks[0].drafts[:3]] == ["0", "1", "2"]


def test_images_check(folder: Path) -> None:
    assert problems(folder, source="images", path="nowhere")[0][0] == ("path",)
    assert problems(folder, source="images", path="pets", pattern="*.gif")[0][0] == ("pattern",)
    assert problems(folder, source="images", path="pets", label="(")[0][0] == ("label",)
    assert problems(folder, source="images", path="pets", interval="1s")[0][0] == ("interval",)
    source = make(folder, source="images", path="pets")
    for file in sorted((folder / "pets").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (folder / "pets").rmdir()
    with pytest.raises(MissingError):
        take(source)


def test_arrays_with_labels(tmp_path: Path) -> None:
    images = np.arange(10 * 4).reshape(10, 2, 2).astype(np.float32)
    np.savez_compressed(tmp_path / "d.npz", images=images, labels=np.arange(10) % 3)
    source = make(tmp_path, source="arrays", path="d.npz", names=["a", "b"], start="2024-01-01", rate="10000/s")
    _, chunks = take(source)
    got = frames(chunks)
    assert [f.attributes["label"] for f in got[:4]] == ["a", "b", "2", "a"]
    np.testing.assert_array_equal(np.asarray(got[7].data), images[7])
    assert got[7].layout == "HW"
    assert chunks[7].drafts[0].time == instant("2024-01-01") + 700_000
    np.save(tmp_path / "d.npy", images)
    _, chunks = take(make(tmp_path, source="arrays", path="d.npy", count=3))
    assert len(frames(chunks)) == 3


def test_arrays_check(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", frames=np.zeros((3, 2)), labels=np.zeros(2))
    assert "known: frames, labels" in problems(tmp_path, source="arrays", path="d.npz")[0][1]
    assert problems(tmp_path, source="arrays", path="d.npz", frames="frames")[0][0] == ("labels",)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing")
    assert problems(tmp_path, source="arrays", path="bad.npz")[0][0] == ("path",)
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    assert problems(tmp_path, source="arrays", path="pickled.npy")[0][0] == ("path",)


# -- synthetic ------------------------------------------------------------------------------------------------------

SIGNALS = {
    "s": {"kind": "sine", "period": "10s", "noise": 0.1},
    "w": {"kind": "walk", "amplitude": 0.5, "offset": 100},
    "r": {"kind": "ramp"},
    "c": {"kind": "constant", "offset": 3},
}


def test_synthetic_is_the_same_whatever_the_batch_and_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "ROWS_AHEAD", 1)  # so a chunk is one batch of each device
    common = {"source": "synthetic", "signals": SIGNALS, "count": 5000, "devices": 2, "start": "2024-01-01", "seed": 4}
    one_stream, one = take(make(tmp_path, **common, batch=5000))
    other_stream, other = take(make(tmp_path, **common, batch=333))
    assert one_stream == other_stream
    for device in (0, 1):
        for name in SIGNALS:
            whole = np.asarray(readings(one)[device].columns[name])
            parts = np.concatenate([np.asarray(r.columns[name]) for r in readings(other)[device::2]])
            np.testing.assert_array_equal(whole, parts)
    stream, rest = take(make(tmp_path, **common, batch=333), other[6].position)
    assert stream == one_stream
    np.testing.assert_array_equal(column(rest, "w"), column(other[7:], "w"))
    assert [d.key for c in rest for d in c.drafts] == [d.key for c in other[7:] for d in c.drafts]
    assert np.asarray(readings(one)[0].columns["w"]).std() > 1
    for ahead in (2000, 65536):
        monkeypatch.setattr(synthetic, "ROWS_AHEAD", ahead)
        stream, more = take(make(tmp_path, **common, batch=333))
        assert stream == one_stream
        assert len(more) < len(other) / 2
        assert [(d.key, d.source, d.time) for c in more for d in c.drafts] == [
            (d.key, d.source, d.time) for c in other for d in c.drafts
        ]
        for name in SIGNALS:
            np.testing.assert_array_equal(column(more, name), column(other, name))


def test_synthetic_marks_its_anomalies(tmp_path: Path) -> None:
    options = {"source": "synthetic", "signals": {"v": {"kind": "constant", "offset": 1}}, "count": 1000}
    _, chunks = take(make(tmp_path, **options, anomalies={"every": 100, "length": 3, "magnitude": 50}, batch=64))
    marks, values = np.array(column(chunks, "anomaly")), np.array(column(chunks, "v"))
    assert marks.sum() == 28  # one of the ten is cut off by the end
    assert set(values[marks]) == {51.0}
    assert set(values[~marks]) == {1.0}


def test_synthetic_frames_move_and_their_place_is_known(tmp_path: Path) -> None:
    _, chunks = take(make(tmp_path, source="synthetic", frames={"width": 32, "height": 24}, count=9))
    for frame in frames(chunks):
        x, y, side = (int(frame.attributes[k] or 0) for k in ("x", "y", "side"))
        pixels = np.asarray(frame.data)
        assert pixels.shape == (24, 32, 3)
        assert (pixels[y : y + side, x : x + side] == 255).all()
        assert (pixels == 255).sum() == side * side * 3


def test_synthetic_check(tmp_path: Path) -> None:
    assert problems(tmp_path, source="synthetic", signals={})[0][0] == ("signals",)
    assert problems(tmp_path, source="synthetic", anomalies={"every": 9, "fields": ["x"]})[0][0] == (
        "anomalies",
        "fields",
        0,
    )
    with pytest.raises(ValidationError):
        make(tmp_path, source="synthetic", anomalies={"every": 3, "length": 3})


def test_digest_tells_files_apart_and_is_quick_on_large_ones(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
    began = time.monotonic()
    first = _files.digest(path)
    assert time.monotonic() - began < 2
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert _files.digest(path) != first
    assert duration("1s") == 10**9
