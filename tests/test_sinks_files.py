"""Sinks of files: sqlite, jsonl, csv, stdout. Real files, real crashes, no bus."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from pydantic import ValidationError

from nodes import uplink
from nodes.operator import Context, Sink
from nodes.sinks import _append, _json
from schemas.errors import ConfigError, RejectedError, RunError, SinkAwayError
from schemas.messages import (
    Aggregate,
    Body,
    Column,
    Event,
    Frame,
    Message,
    Model,
    Predictions,
    Readings,
    Tensors,
    Window,
)

T0 = 1714543200 * 10**9  # 2024-05-01T06:00:00Z


def context(base: Path) -> Context:
    return Context("line", "store", base, base / "state")


def make(base: Path, **options: Any) -> Sink:
    config = uplink.Config.model_validate(options)
    config.check(context(base))
    assert config.emits([], context(base)) == {}
    return uplink.build(config, context(base))


async def _write(sink: Sink, batches: Sequence[Sequence[Message]]) -> None:
    await sink.open()
    try:
        for batch in batches:
            await sink.write(batch)
    finally:
        await sink.close()


def write(sink: Sink, *batches: Sequence[Message]) -> None:
    asyncio.run(_write(sink, batches))


def message(number: int, body: Body) -> Message:
    return Message(f"cam:1:{number}", "line-3", T0 + number * 10**9, body)


def reading(number: int, **columns: Column | float) -> Message:
    data: dict[str, Column] = {k: np.array([v]) if isinstance(v, (int, float)) else v for k, v in columns.items()}
    return message(number, Readings(n=len(next(iter(data.values()))), columns=data))


def prediction(number: int, **extra: Any) -> Message:
    model = Model(name="digits", version="1", digest="ab")
    scores = np.array([0.75, 0.25], "<f4")
    body = Predictions(
        model=model, seen="x", labels=["7", "1"], scores=scores, attributes={"label_known": "7"}, **extra
    )
    return message(number, body)


def aggregate(number: int, revision: int, value: float) -> Message:
    window = Window(start=T0, end=T0 + 10**9)
    body = Aggregate(window=window, key="a", values={"mean": value}, count=3, revision=revision)
    first = message(number, body)
    return msgspec.structs.replace(first, id=f"{first.id}/{revision}") if revision else first


def table(path: Path, sql: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(path)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


# -- the family -----------------------------------------------------------------------------------------------------


def test_an_unknown_sink_and_a_wrong_option() -> None:
    with pytest.raises(ValidationError, match="did you mean 'sqlite'"):
        uplink.Config.model_validate({"sink": "sqllite"})
    with pytest.raises(ValidationError) as caught:
        uplink.Config.model_validate({"sink": "sqlite", "path": "a", "tabel": "x"})
    assert caught.value.errors()[0]["loc"] == ("tabel",)


def test_every_sink_describes_its_options() -> None:
    for name, options in uplink.variants().items():
        for field in options.model_fields.values():
            assert field.description, name
    names = {s["properties"]["sink"]["const"] for s in uplink.Config.model_json_schema()["oneOf"]}
    assert {"sqlite", "jsonl", "csv", "stdout"} <= names


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"sink": "jsonl", "path": "."}, "path"),
        ({"sink": "sqlite", "path": "."}, "path"),
        ({"sink": "sqlite", "path": "a.db", "table": "sqlite_x"}, "table"),
        ({"sink": "csv", "path": "a.csv", "keep": 3}, "keep"),
        ({"sink": "jsonl", "path": "a", "rotate_size": 0}, "rotate_size"),
    ],
)
def test_check_finds_what_is_wrong(tmp_path: Path, options: dict[str, Any], key: str) -> None:
    config = uplink.Config.model_validate(options)
    with pytest.raises(ConfigError) as caught:
        config.check(context(tmp_path))
    assert caught.value.problems[0].path == (key,)


# -- sqlite ---------------------------------------------------------------------------------------------------------


def test_sqlite_each_row_once_however_often_it_is_written(tmp_path: Path) -> None:
    batch = [
        reading(i, temp=np.array([i + 0.5, np.nan]), ok=np.array([True, False]), note=["a", None]) for i in range(50)
    ]
    write(make(tmp_path, sink="sqlite", path="a.db"), batch, batch[10:40])
    write(make(tmp_path, sink="sqlite", path="a.db"), batch + batch[:5])
    got = table(tmp_path / "a.db", "SELECT id, row, source, time, temp, ok, note FROM store ORDER BY time, row")
    assert len(got) == 100
    assert got[2] == ("cam:1:1", 0, "line-3", T0 + 10**9, 1.5, 1, "a")
    assert got[3] == ("cam:1:1", 1, "line-3", T0 + 10**9, None, 0, None)
    assert table(tmp_path / "a.db", "PRAGMA integrity_check") == [("ok",)]


def test_sqlite_gets_new_columns_and_shows_readable_times(tmp_path: Path) -> None:
    write(make(tmp_path, sink="sqlite", path="a.db", table="t"), [reading(0, temp=1.0)])
    write(make(tmp_path, sink="sqlite", path="a.db", table="t"), [reading(1, temp=2.0, hum=3.0)], [prediction(2)])
    got = table(tmp_path / "a.db", "SELECT time_iso, temp, hum, label, score FROM t_iso ORDER BY time")
    assert got == [
        ("2024-05-01T06:00:00.000000000Z", 1.0, None, None, None),
        ("2024-05-01T06:00:01.000000000Z", 2.0, 3.0, None, None),
        ("2024-05-01T06:00:02.000000000Z", None, None, "7", 0.75),
    ]


def test_sqlite_names_that_collide_keep_their_values_apart(tmp_path: Path) -> None:
    for _ in range(2):
        names = {"temp": 1.0, "Temp": 2.0, "ID": 3.0, 'a"; DROP TABLE store; --': 4.0, "": 5.0, "time": 6.0}
        write(make(tmp_path, sink="sqlite", path="a.db"), [reading(0, **names)])
    got = table(
        tmp_path / "a.db", 'SELECT temp, Temp_2, field_ID, "a""; DROP TABLE store; --", _, field_time FROM store'
    )
    assert got == [(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]


def test_sqlite_a_later_revision_replaces_and_an_earlier_does_not(tmp_path: Path) -> None:
    sink = make(tmp_path, sink="sqlite", path="a.db")
    write(sink, [aggregate(0, 0, 1.0)], [aggregate(0, 2, 3.0)], [aggregate(0, 1, 2.0)], [aggregate(1, 0, 9.0)])
    got = table(tmp_path / "a.db", 'SELECT mean, revision, key, "count" FROM store ORDER BY time')
    assert got == [(3.0, 2, "a", 3), (9.0, 0, "a", 3)]


@pytest.mark.parametrize("time", [T0 + 1, 0, -1, -(10**18) - 999_999_999])
def test_readable_times_are_right_before_1970_too(tmp_path: Path, time: int) -> None:
    body = Readings(n=1, columns={"v": np.zeros(1)})
    write(make(tmp_path, sink="sqlite", path="a.db"), [Message("a:1:1", "s", time, body)])
    assert table(tmp_path / "a.db", "SELECT time_iso FROM store_iso") == [(_json.iso(time),)]


def test_sqlite_rejects_only_what_it_cannot_hold(tmp_path: Path) -> None:
    batch = [reading(i, v=float(i)) for i in range(20)]
    batch[3] = reading(3, v=["\ud800"])
    batch[7] = message(7, Tensors(tensors={"a": np.zeros(3)}))
    batch[11] = reading(11, **{f"f{i}": 1.0 for i in range(30)})
    batch[13] = reading(13, v=np.array([2**64 - 1], np.uint64))
    with pytest.raises(RejectedError) as caught:
        write(make(tmp_path, sink="sqlite", path="a.db", max_columns=12), batch)
    assert [i for i, _ in caught.value.rejected] == [3, 7, 11]
    assert table(tmp_path / "a.db", "SELECT count(*) FROM store") == [(17,)]
    assert table(tmp_path / "a.db", "SELECT count(*) FROM pragma_table_info('store')")[0][0] <= 12


def test_sqlite_locked_is_away_and_then_it_goes_on(tmp_path: Path) -> None:
    sink = make(tmp_path, sink="sqlite", path="a.db", wait=0)

    async def run() -> None:
        await sink.open()
        other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SinkAwayError, match="locked"):
            await sink.write([reading(0, v=1.0)])
        other.execute("ROLLBACK")
        other.close()
        await sink.write([reading(0, v=1.0)])
        await sink.close()

    asyncio.run(run())
    assert table(tmp_path / "a.db", "SELECT v FROM store") == [(1.0,)]


def test_sqlite_full_disk_is_away_and_nothing_is_half_written(tmp_path: Path) -> None:
    sink = make(tmp_path, sink="sqlite", path="a.db")

    async def run() -> None:
        await sink.open()
        await sink.write([reading(0, v=1.0)])
        db = sink._db  # type: ignore[attr-defined] # a limit on pages is a full disk to SQLite
        db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(SinkAwayError, match="disk is full"):
            await sink.write([reading(i, note=["x" * 500]) for i in range(1, 100)])
        await sink.write([reading(i, note=["x" * 500]) for i in range(1, 100)])
        await sink.close()

    asyncio.run(run())
    assert table(tmp_path / "a.db", "SELECT count(*) FROM store") == [(100,)]


def test_sqlite_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(RunError, match="not an SQLite database"):
        write(make(tmp_path, sink="sqlite", path="a.db"))
    db = sqlite3.connect(tmp_path / "b.db")
    db.execute("CREATE TABLE store (x)")
    db.close()
    with pytest.raises(RunError, match="choose another table"):
        write(make(tmp_path, sink="sqlite", path="b.db"))


WRITER = """
import asyncio, sys
from pathlib import Path
import numpy as np
from nodes import uplink
from nodes.operator import Context
from schemas.messages import Message, Readings

base = Path(sys.argv[1])
config = uplink.Config.model_validate({"sink": sys.argv[2], "path": "out"})

async def main():
    sink = uplink.build(config, Context("line", "store", base, base))
    await sink.open()
    number = 0
    while True:
        bodies = [Readings(n=3, columns={"v": np.arange(3.0) + number + i}) for i in range(50)]
        batch = [Message(f"n:1:{number + i}", "s", 0, body) for i, body in enumerate(bodies)]
        await sink.write(batch)
        number += 50
        print(number, flush=True)

asyncio.run(main())
"""


def killed_writer(base: Path, kind: str) -> int:
    """A process that writes until it is killed in the middle; how many messages it was told are safe."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(base), kind], stdout=subprocess.PIPE, env=environment()
    )
    assert writer.stdout is not None
    safe = 0
    for line in writer.stdout:
        safe = int(line)
        if safe >= 500:
            break
    writer.send_signal(signal.SIGKILL)
    safe = max([safe, *(int(line) for line in writer.stdout.read().split())])
    writer.stdout.close()
    writer.wait()
    return safe


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def numbered(first: int, last: int) -> list[Message]:
    return [Message(f"n:1:{i}", "s", 0, Readings(n=3, columns={"v": np.arange(3.0) + i})) for i in range(first, last)]


@pytest.mark.parametrize("kind", ["sqlite", "jsonl", "csv"])
def test_killed_while_writing_then_repeated_each_row_once(tmp_path: Path, kind: str) -> None:
    safe = killed_writer(tmp_path, kind)
    write(make(tmp_path, sink=kind, path="out"), numbered(safe - 100, safe + 200))
    assert rows_in(tmp_path / "out", kind) == [(f"n:1:{i}", float(i + k)) for i in range(safe + 200) for k in range(3)]


def rows_in(path: Path, kind: str) -> list[tuple[str, float]]:
    if kind == "sqlite":
        return sorted(table(path, "SELECT id, v FROM store"), key=lambda r: (int(r[0][4:]), r[1]))
    if kind == "csv":
        with path.open(newline="") as file:
            return [(r["id"], float(r["v"])) for r in csv.DictReader(file)]
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    return [(m["id"], v) for m in parsed for v in m["body"]["columns"]["v"]]


# -- jsonl and csv --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sink": "jsonl"}, {"sink": "jsonl", "each": "row"}, {"sink": "csv"}])
def test_a_torn_end_is_mended_at_every_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "out"
    batch = [reading(i, v=np.arange(2.0), note=['a"b,\nc', "é"]) for i in range(4)]
    write(make(tmp_path, **options, path="out"), batch)
    whole = path.read_bytes()
    last = whole.rfind(b"cam:1:2")
    for cut in [*range(0, len(whole), 7), *range(last, len(whole))]:
        path.write_bytes(whole[:cut])
        write(make(tmp_path, **options, path="out"), batch)
        assert path.read_bytes() == whole


def test_jsonl_holds_every_body_and_repeats_are_recognised(tmp_path: Path) -> None:
    batch = [
        reading(0, v=np.array([1.0, np.nan, np.inf])),
        prediction(1, boxes=np.ones((2, 4), "<f4"), times={"infer": T0}),
        aggregate(2, 0, 1.0),
        message(3, Event(name="hot", values={"v": 3})),
        message(4, Frame(data=np.zeros((64, 64, 3), np.uint8))),
        message(5, Frame(data=b"\xff\xd8", encoding="jpeg")),
        message(6, Tensors(tensors={"a": np.arange(3)})),
        aggregate(2, 1, 2.0),
    ]
    write(make(tmp_path, sink="jsonl", path="out.jsonl"), batch, batch)
    write(make(tmp_path, sink="jsonl", path="out.jsonl"), batch)
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [g["type"] for g in got] == [m.type for m in batch]
    assert got[0]["body"]["columns"]["v"] == [1.0, None, None]
    assert got[0]["time"] == "2024-05-01T06:00:00.000000000Z"
    assert got[1]["body"]["times"]["infer"] == "2024-05-01T06:00:00.000000000Z"
    assert got[4]["body"]["data"]["shape"] == [64, 64, 3]
    assert got[7]["body"]["revision"] == 1
    rows = _json.records(batch)
    assert [r["id"] for r in rows[:5]] == ["cam:1:0"] * 3 + ["cam:1:1"] * 2
    assert rows[3]["x0"] == 1.0
    assert rows[5]["end"] == "2024-05-01T06:00:01.000000000Z"
    for r in rows:
        json.loads(_json.encode(r))


def test_jsonl_leaves_out_what_is_no_json(tmp_path: Path) -> None:
    batch = [reading(0, v=1.0), reading(1, v=["\ud800"]), reading(2, v=2.0)]
    with pytest.raises(RejectedError) as caught:
        write(make(tmp_path, sink="jsonl", path="out"), [batch[0], *batch])
    assert [i for i, _ in caught.value.rejected] == [2]
    assert [i for i, _ in rows_in(tmp_path / "out", "jsonl")] == ["cam:1:0", "cam:1:2"]


def test_jsonl_rotates_by_size_and_keeps_so_many(tmp_path: Path) -> None:
    sink = make(tmp_path, sink="jsonl", path="out.jsonl", rotate_size="1kB", keep=2)
    write(sink, *[[reading(i, v=float(i))] for i in range(60)])
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 3
    assert names[2] == "out.jsonl"
    assert names[0].startswith("out.0000")
    lines = [json.loads(line)["id"] for n in names for line in (tmp_path / n).read_text().splitlines()]
    assert lines == [f"cam:1:{i}" for i in range(60 - len(lines), 60)]
    # what is in the part before is a repeat as well
    write(make(tmp_path, sink="jsonl", path="out.jsonl"), [reading(i, v=float(i)) for i in range(55, 61)])
    assert sum(len((tmp_path / n).read_text().splitlines()) for n in names) == len(lines) + 1


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    async def run() -> None:
        one, two = (make(tmp_path, sink="jsonl", path="out") for _ in range(2))
        await one.open()
        with pytest.raises(RunError, match="another process"):
            await two.open()
        await one.close()
        await two.open()
        await two.close()

    asyncio.run(run())


def test_csv_a_new_field_begins_a_new_part(tmp_path: Path) -> None:
    sink = make(tmp_path, sink="csv", path="out.csv")
    write(sink, [reading(0, a=1.0, ok=np.array([True]))], [reading(1, a=np.nan)], [reading(2, b=3.5)])
    first = (tmp_path / "out.000001.csv").read_text().splitlines()
    assert first == [
        "id,row,source,time,a,ok",
        "cam:1:0,0,line-3,2024-05-01T06:00:00.000000000Z,1.0,true",
        "cam:1:1,0,line-3,2024-05-01T06:00:01.000000000Z,,",
    ]
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        "id,row,source,time,a,ok,b",
        "cam:1:2,0,line-3,2024-05-01T06:00:02.000000000Z,,,3.5",
    ]


def test_csv_does_not_write_into_a_file_of_others_and_rejects_what_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="no file of ours"):
        write(make(tmp_path, sink="csv", path="mine.csv"))
    with pytest.raises(RejectedError) as caught:
        write(make(tmp_path, sink="csv", path="o.csv"), [message(0, Tensors(tensors={})), aggregate(1, 0, 1.0)])
    assert [i for i, _ in caught.value.rejected] == [0]


def test_csv_revisions_are_new_rows_and_repeats_are_not(tmp_path: Path) -> None:
    for _ in range(2):
        write(
            make(tmp_path, sink="csv", path="o.csv"),
            [aggregate(0, 0, 1.0)],
            [aggregate(0, 1, 2.0), aggregate(0, 1, 2.0)],
        )
    with (tmp_path / "o.csv").open() as file:
        assert [(r["mean"], r["revision"]) for r in csv.DictReader(file)] == [("1.0", "0"), ("2.0", "1")]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """A limit on the size of files (RLIMIT_FSIZE) fails the write in its middle, as a full disk does."""
    code = """
import asyncio, resource, signal, sys
from pathlib import Path
from nodes.sinks._append import AppendFile
from schemas.errors import SinkAwayError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = AppendFile(Path(sys.argv[1]))
file.open()
file.append([b"one\\n"])
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    file.append([b"two is longer than what is left\\n"])
except SinkAwayError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append([b"three\\n"])
"""
    path = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, env=environment(), check=True)
    assert b"File too large" in done.stdout
    assert path.read_bytes() == b"one\nthree\n"


def test_recent_knows_the_newest_messages_only() -> None:
    recent = _append.Recent(limit=2)
    for ident in ("a", "a", "b", "c"):
        recent.add(ident)
    assert [recent.count(i) for i in "abc"] == [0, 1, 1]
    assert recent.new([("b", b"0"), ("b", b"1"), ("d", b"2")]) == [("b", b"1"), ("d", b"2")]


# -- stdout ---------------------------------------------------------------------------------------------------------


def test_stdout_for_people_and_for_programs(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    batch = [reading(0, temp=21.25, note=["\x1b[31mred"]), prediction(1), message(2, Frame(data=np.zeros((4, 4, 3))))]
    write(make(tmp_path, sink="stdout"), batch)
    text = capfdbinary.readouterr().out.decode()
    assert text.splitlines()[0] == "06:00:00.000 line-3 temp=21.25 note=�[31mred"
    assert "label=7 score=0.75" in text.splitlines()[1]
    assert "shape=[4 4 3]" in text.splitlines()[2] or "frame/1=" in text.splitlines()[2]
    write(make(tmp_path, sink="stdout", format="json", each="message"), batch[:2])
    lines = capfdbinary.readouterr().out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["cam:1:0", "cam:1:1"]
