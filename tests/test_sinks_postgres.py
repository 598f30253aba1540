"""The ``postgres`` sink against a real server, which is locked, filled, killed and started again meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import passed, rows, run, until
from postgres_server import PASSWORD, Server, programs
from pydantic import ValidationError

from nodes import uplink
from nodes.operator import Context, Sink
from nodes.sinks._postgres_table import rounds
from nodes.supervisor import Supervisor
from schemas.errors import ConfigError, ConnectError, RejectedError, RunError, SinkAwayError
from schemas.messages import Aggregate, Body, Column, Event, Message, Model, Predictions, Readings, Window

T0 = 1714543200 * 10**9 + 123_456_789  # 2024-05-01T06:00:00.123456789Z
pytestmark = pytest.mark.connected


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    made = Server(found)
    yield made
    made.remove()


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METER_PASSWORD", PASSWORD)


def make(server: Server | None, base: Path, **options: Any) -> Sink:
    options = {"sink": "postgres", "user": "meter", "password": {"env": "METER_PASSWORD"}, **options}
    if server is not None:
        options.setdefault("url", server.url)
    config = uplink.Config.model_validate(options)
    context = Context("line", "store", base, base / "state")
    config.check(context)
    return uplink.build(config, context)


async def _write(sink: Sink, batches: Sequence[Sequence[Message]]) -> None:
    await sink.open()
    try:
        for batch in batches:
            await sink.write(batch)
    finally:
        await sink.close()


def write(sink: Sink, *batches: Sequence[Message]) -> None:
    asyncio.run(_write(sink, batches))


def message(number: int, body: Body, ident: str = "") -> Message:
    return Message(ident or f"cam:1:{number}", "line-3", T0 + number * 10**9, body)


def reading(number: int, **columns: Column | float) -> Message:
    data: dict[str, Column] = {k: np.array([v]) if isinstance(v, (int, float)) else v for k, v in columns.items()}
    return message(number, Readings(n=len(next(iter(data.values()))), columns=data))


def columns(server: Server, table: str) -> dict[str, str]:
    found = server.query(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = $1 ORDER BY ordinal_position",
        table,
    )
    return {name: kind for name, kind in found if name not in {"id", "row", "source", "time", "timestamp"}}


def test_every_kind_of_row_with_its_values_and_a_repeat_changes_nothing(server: Server, tmp_path: Path) -> None:
    big = 2**60 + 1
    body = Readings(
        n=3,
        columns={
            "temp": np.array([21.5, np.nan, -0.25]),
            "count": np.array([big, -5, 0]),
            "on": np.array([True, False, True]),
            "note": ["é\"'\\", None, ""],
        },
        time=np.array([T0, T0 + 1, -1]),
        source=["a", "b", "c"],
    )
    event = Event(name="late", text="x", values={"n": 3, "on": None})
    model = Model(name="digits", version="1", digest="ab")
    seen = Predictions(model=model, seen="x", labels=["7"], scores=np.array([0.75], "<f4"), attributes={"label": "1"})
    batch = [message(1, body), message(2, event), message(3, seen), reading(4, huge=np.array([2**64 - 1], np.uint64))]
    for _ in range(2):
        write(make(server, tmp_path, table="kinds"), batch, batch[:1])
    got = server.query(
        "SELECT row, source, time, temp, count, \"on\", note FROM kinds WHERE id = 'cam:1:1' ORDER BY row"
    )
    assert got == [
        (0, "a", T0, 21.5, big, True, "é\"'\\"),
        (1, "b", T0 + 1, None, -5, False, None),
        (2, "c", -1, -0.25, 0, True, ""),
    ]
    assert server.query("SELECT name, text, n FROM kinds WHERE id = 'cam:1:2'") == [("late", "x", 3)]
    assert server.query("SELECT label, score, known_label, model FROM kinds WHERE id = 'cam:1:3'") == [
        ("7", 0.75, "1", "digits")
    ]
    assert server.query("SELECT huge FROM kinds WHERE id = 'cam:1:4'") == [(float(2**64 - 1),)]
    assert server.query("SELECT count(*) FROM kinds") == [(6,)]
    (made,) = server.query("SELECT timestamp FROM kinds WHERE id = 'cam:1:1' AND row = 0")
    assert made == (datetime(2024, 5, 1, 6, 0, 0, 123457, UTC),)


def test_new_fields_become_columns_and_types_widen(server: Server, tmp_path: Path) -> None:
    sink = make(server, tmp_path, table="grows")
    long = "x" * 70
    write(sink, [reading(1, a=1, time=2.0)], [reading(2, a=2, A=3), reading(3, b=["t"])], [reading(4, **{long: 1.0})])
    assert columns(server, "grows") == {
        "a": "bigint",
        "field_time": "double precision",
        "A_2": "bigint",
        "b": "text",
        next(n for n in columns(server, "grows") if n.startswith("xxx")): "double precision",
    }
    write(make(server, tmp_path, table="grows"), [reading(5, A=7)], [reading(6, a=np.array([3.0, np.nan]))])
    assert columns(server, "grows")["a"] == "bigint"  # whole, with one missing
    write(make(server, tmp_path, table="grows"), [reading(7, a=0.5), reading(8, a=9), reading(9, b=3.5)])
    assert columns(server, "grows")["a"] == "double precision"
    got = server.query('SELECT id, a, "A_2", b FROM grows ORDER BY id, row')
    assert got == [
        ("cam:1:1", 1, None, None),
        ("cam:1:2", 2, 3, None),
        ("cam:1:3", None, None, "t"),
        ("cam:1:4", None, None, None),
        ("cam:1:5", None, 7, None),
        ("cam:1:6", 3, None, None),
        ("cam:1:6", None, None, None),
        ("cam:1:7", 0.5, None, None),
        ("cam:1:8", 9, None, None),
        ("cam:1:9", None, None, "3.5"),
    ]
    on = make(server, tmp_path, table="switch")
    write(
        on, [reading(1, on=np.array([True])), reading(2, on=1)], [reading(3, on=5)], [reading(4, on=np.array([False]))]
    )
    assert server.query('SELECT "on" FROM switch ORDER BY id') == [(1,), (1,), (5,), (0,)]


def test_poison_is_found_and_all_else_is_written(server: Server, tmp_path: Path) -> None:
    bad = {
        7: reading(7, v=["text"]),
        300: reading(300, v=1.0, s=["nul\0"]),
        555: reading(555, v=1.0, s=["\ud800"]),
        599: message(
            599, Readings(n=1, columns={"v": np.array([1.0])}), ident="i" * 9000 + "".join(map(chr, range(32, 9000)))
        ),
    }
    batch = [bad.get(i) or reading(i, v=float(i), s=[str(i)]) for i in range(600)]
    with pytest.raises(RejectedError) as caught:
        write(make(server, tmp_path, table="poison"), batch[:1], batch)
    assert [i for i, _ in caught.value.rejected] == list(bad)
    reasons = dict(caught.value.rejected)
    assert reasons[7] == "poison: a text for column 'v', which is double precision"
    assert "0x00" in reasons[300] or "null" in reasons[300].lower()
    assert server.query("SELECT count(*), sum(v) FROM poison") == [(596, sum(i for i in range(600) if i not in bad))]
    wide = make(server, tmp_path, table="wide", max_columns=7)
    with pytest.raises(RejectedError, match="field 'c' would be column 8 of at most 7"):
        write(wide, [reading(1, a=1.0), reading(2, b=1.0, c=1.0, a=2.0), reading(3, a=3.0)])


def test_later_revisions_replace_earlier_ones(server: Server, tmp_path: Path) -> None:
    def window(revision: int, mean: float) -> Message:
        span = Window(start=T0, end=T0 + 10**9)
        body = Aggregate(window=span, key="k", values={"mean": mean}, count=3, revision=revision)
        return message(1, body, ident="w:1/2" if revision == 2 else f"w:1/{revision}" if revision else "w:1")

    sink = make(server, tmp_path, table="windows")
    write(sink, [window(0, 1.0), window(2, 3.0), window(1, 2.0)], [window(1, 2.0)])
    assert server.query("SELECT id, revision, mean FROM windows") == [("w:1", 2, 3.0)]


def test_statements_hold_what_belongs_together() -> None:
    one, two = reading(1, v=1.0), reading(2, v=2)
    assert rounds([one, two, one, reading(3, v=1.5)]) == [[0, 3], [1], [2]]
    many = [message(i, Readings(n=9000, columns={"v": np.zeros(9000)})) for i in range(5)]
    assert rounds(many) == [[0, 1], [2, 3], [4]]


def test_a_table_of_ones_own(server: Server, tmp_path: Path) -> None:
    server.query("CREATE SCHEMA plant AUTHORIZATION meter")
    server.query(
        "CREATE TABLE plant.own (id text, row int, source varchar(40), time bigint, v numeric(9,2), small smallint,"
        " extra jsonb, made timestamptz DEFAULT now(), UNIQUE (row, id))"
    )
    server.query("GRANT ALL ON plant.own TO meter")
    sink = make(server, tmp_path, table="plant.own")
    good = reading(1, v=1.239, small=7, extra=['{"a": 1}'])
    with pytest.raises(RejectedError) as caught:
        write(sink, [good, reading(2, v=1.0, small=70_000), reading(3, v=1.0, extra=["no json"])])
    assert [i for i, _ in caught.value.rejected] == [1, 2]
    assert server.query("SELECT v::text, small, extra ->> 'a' FROM plant.own") == [("1.24", 7, "1")]
    server.query("CREATE TABLE foreign_one (id int)")
    server.query("CREATE TABLE keyless (id text, row bigint, source text, time bigint)")
    for table, told in (("foreign_one", "has no column 'row'"), ("keyless", r"has no unique key \(id, row\)")):
        with pytest.raises(RunError, match=told):
            write(make(server, tmp_path, table=table))


def test_two_writers_make_and_widen_one_table(server: Server, tmp_path: Path) -> None:
    async def both() -> None:
        sinks = [make(server, tmp_path, table="shared") for _ in range(3)]
        await asyncio.gather(*(sink.open() for sink in sinks))
        for turn in range(4):
            batches = [[reading(100 * k + turn, **{f"f{turn}": float(k)}, v=turn + k / 2)] for k in range(3)]
            for sink, batch in zip(sinks, batches, strict=True):
                await sink.write(batch)
            await asyncio.gather(*(s.write([reading(1000 * k + turn, g=k)]) for k, s in enumerate(sinks, 1)))
        await asyncio.gather(*(sink.close() for sink in sinks))

    asyncio.run(both())
    assert server.query("SELECT count(*), sum(g) FROM shared") == [(24, 24)]


def test_a_locked_table_is_waited_for(server: Server, tmp_path: Path) -> None:
    sink = make(server, tmp_path, table="locked", timeout="200ms")

    async def go() -> None:
        await sink.open()
        await sink.write([reading(1, v=1.0)])
        other = await server.connect()
        async with other.transaction():
            await other.execute("LOCK TABLE locked IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(SinkAwayError, match="statement timeout"):
                await sink.write([reading(2, v=2.0)])
        await other.close()
        await sink.write([reading(2, v=2.0)])
        await sink.close()

    asyncio.run(go())
    assert server.query("SELECT v FROM locked ORDER BY v") == [(1.0,), (2.0,)]


def test_whatever_refuses_us_is_told_clearly(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG", "wrong")
    refused = {
        "password authentication failed": make(server, tmp_path, password={"env": "WRONG"}),
        'database "nowhere" does not exist': make(server, tmp_path, url=server.url.replace("/site", "/nowhere")),
        'schema "nowhere" does not exist': make(server, tmp_path, table="nowhere.t"),
        "its certificate is not accepted": make(server, tmp_path, tls="verify-full"),
    }
    for told, sink in refused.items():
        with pytest.raises(ConnectError, match=told) as caught:
            write(sink)
        assert caught.value.permanent
        assert PASSWORD not in str(caught.value)
    with pytest.raises(SinkAwayError, match=r"Connect call failed|refused"):
        write(make(server, tmp_path, url="postgres://127.0.0.1:9/site"))

    async def rights() -> None:
        sink = make(server, tmp_path, table="rights")
        await sink.open()
        await sink.write([reading(1, v=1.0)])
        other = await server.connect()
        await other.execute("ALTER TABLE rights OWNER TO owner")
        with pytest.raises(SinkAwayError, match="permission denied"):  # it was right once: waited for
            await sink.write([reading(2, v=2.0)])
        await other.execute("ALTER TABLE rights OWNER TO meter")
        await other.close()
        await sink.write([reading(2, v=2.0)])
        await sink.close()

    asyncio.run(rights())


def test_no_room_for_another_connection(server: Server, tmp_path: Path) -> None:
    import asyncpg  # type: ignore[import-untyped] # has no py.typed

    async def go() -> None:
        others: list[Any] = []
        sink = make(server, tmp_path, table="room")
        try:
            with contextlib.suppress(asyncpg.PostgresError):
                while len(others) < 20:
                    others.append(await server.connect(user="meter"))
            assert 5 < len(others) < 20
            with pytest.raises(SinkAwayError, match=r"too many|remaining connection slots"):
                await sink.open()
        finally:
            await asyncio.gather(*(other.close() for other in others))
        await sink.open()
        await sink.close()

    asyncio.run(go())


def test_encrypted_checked_and_by_a_socket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(server.ca.read_bytes())
    mine = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    for options, encrypted in (({"ca": "ca.pem"}, True), ({"tls": "require"}, True), ({"tls": "disable"}, False)):
        sink: Any = make(server, tmp_path, **options)

        async def look(sink: Any = sink) -> bool:
            await sink.open()
            try:
                return bool(await sink._connection.fetchval(mine))
            finally:
                await sink.close()

        assert asyncio.run(look()) is encrypted
    monkeypatch.setenv("DSN", f"postgres://meter:{PASSWORD}@/site?host={server.folder}&port={server.port}")
    write(make(None, tmp_path, url={"env": "DSN"}, user=None, password=None, table="by_socket"), [reading(1, v=1.0)])
    assert server.query("SELECT v FROM by_socket") == [(1.0,)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"url": "mysql://h/d"}, "expected postgres://host/database, got 'mysql://h/d'"),
        ({"url": "postgres://u:p@h/d"}, r"no password in a URL; say password: \{env: NAME\}"),
        ({"url": "postgres://h/d", "table": "a."}, "expected table or schema.table"),
        ({"url": "postgres://h/d", "ca": "none.pem"}, "no such file"),
        ({"url": "postgres://h/d", "password": {"env": "NOT_SET_AT_ALL"}}, "NOT_SET_AT_ALL is not set"),
        ({"url": {"file": "nothing"}}, "cannot read"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    with pytest.raises(ConfigError, match=told):
        make(None, tmp_path, **options)


def test_a_password_is_not_written_down(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a secret is never written here"):
        make(None, tmp_path, url="postgres://h/d", password="secret")  # noqa: S106 - refused, as it should be


TOTAL = 3000
TOPOLOGY = """
topology: stored
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 2000/s}}}}
  store: {{uplink: {{sink: postgres, url: "{url}", user: meter, password: {{env: METER_PASSWORD}}, table: run}}, from: meter}}
  keep: {{uplink: {{sink: sqlite, path: out.sqlite, table: run}}, from: meter}}
"""


def test_the_server_is_killed_while_rows_are_written(server: Server, tmp_path: Path) -> None:
    lines = ["time,device,value,note", *(f"{1_700_000_000 + i},d{i % 4},{i / 4},n{i}" for i in range(TOTAL))]
    (tmp_path / "meter.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "stored.yaml"
    path.write_text(TOPOLOGY.format(url=server.url))

    async def kill(supervisor: Supervisor) -> None:
        for _ in range(2):
            before = passed(supervisor, "store")
            await until(lambda before=before: passed(supervisor, "store") > before + 100)  # type: ignore[misc] # mypy knows no default arguments of lambdas
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)

    outcome = run(path, meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    query = "SELECT id, row, source, time, value, note FROM run ORDER BY id"
    stored = server.query(query.replace("ORDER BY id", 'ORDER BY id COLLATE "C"'))
    assert len(stored) == TOTAL
    assert stored == rows(tmp_path / "out.sqlite", query)
