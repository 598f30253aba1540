"""The SQLite store: what it keeps, what it refuses, a full disk, a damaged file."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mqtt5
import pytest
from embedded_fixtures import Bench, Client
from mqtt5 import (
    ConnAckPacket,
    ConnectPacket,
    DisconnectPacket,
    PubAckPacket,
    PublishPacket,
    PubRecPacket,
    PubRelPacket,
    QoS,
    SubscribePacket,
    TopicFilter,
    Will,
)

from broker.embedded.limits import Limits
from broker.embedded.server import EmbeddedBroker
from broker.embedded.sqlite_store import SqliteStore
from broker.embedded.store import Batch
from schemas.errors import ConfigError

KEPT: dict[str, Any] = {"clean": False, "session_expiry_interval": 1000}


def restart(bench: Bench, folder: Path) -> Bench:
    """What is committed at this moment is what the next broker finds."""
    store = bench.core.store
    if store.pending:
        store.write(store.seal())
    store.close()
    again = Bench(store=SqliteStore(folder))
    again.now = bench.now
    return again


def rows(folder: Path, table: str) -> int:
    db = sqlite3.connect(folder / "broker.db")
    try:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608 - ours
    finally:
        db.close()


@pytest.mark.parametrize("size", [10, 20_000])
def test_messages_survive_as_they_were(tmp_path: Path, size: int) -> None:
    """Properties, identifiers, order; aliases are not kept; one copy of large messages."""
    bench = Bench(store=SqliteStore(tmp_path))
    for name in ("a", "b"):
        client = bench.client(name, **KEPT)
        client.subscribe("t/#", 1, identifier=7)
        client.lose()
    publisher = bench.client("p")
    extra: dict[str, Any] = {
        "content_type": "x",
        "user_properties": [("k", "1"), ("k", "2")],
        "correlation_data": b"\0",
    }
    publisher.publish("t/1", b"1" * size, 1, 1, topic_alias=3, **extra)
    publisher.publish("t/2", b"2" * size, 2, 2, message_expiry_interval=1000)
    bench.later(10)
    bench = restart(bench, tmp_path)
    for name in ("a", "b"):
        first, second = bench.client(name, **KEPT).messages()
        assert (first.topic, first.payload, first.content_type) == ("t/1", b"1" * size, "x")
        assert list(first.user_properties) == extra["user_properties"]
        assert (first.correlation_data, first.subscription_ids, first.topic_alias) == (b"\0", [7], None)
        assert (second.topic, second.payload, int(second.qos)) == ("t/2", b"2" * size, 1)
        assert second.message_expiry_interval in range(900, 1001)
    bench = restart(bench, tmp_path)
    bench.core.store.close()
    assert rows(tmp_path, "delivery") == 0
    assert rows(tmp_path, "message") == 0
    assert rows(tmp_path, "session") == 2


def test_qos_2_halves_survive(tmp_path: Path) -> None:
    bench = Bench(store=SqliteStore(tmp_path))
    client, publisher = bench.client("s", **KEPT), bench.client("p", **KEPT)
    client.subscribe("a", 2)
    publisher.publish("a", b"once", 2, 5)
    number = client.messages(answer=False)[0].packet_id
    assert number is not None
    client.send(PubRecPacket(number))
    client.one(PubRelPacket)
    bench = restart(bench, tmp_path)
    client = bench.client("s", **KEPT)
    assert client.one(PubRelPacket).packet_id == number
    bench.client("p", **KEPT).publish("a", b"once", 2, 5, duplicate=True)
    assert client.messages() == []


def test_ended_sessions_leave_nothing(tmp_path: Path) -> None:
    bench = Bench(store=SqliteStore(tmp_path))
    for name in ("a", "b"):
        client = bench.client(name, will=Will("w", payload=b""), **KEPT)
        client.subscribe("t", 2)
        client.lose()
    bench.client("p").publish("t", b"x" * 10_000, 2, 1)
    bench.core.store.write(bench.core.store.seal())
    bench.client("a", clean=True).leave()
    bench.client("b", clean=False, session_expiry_interval=0)
    store = bench.core.store
    store.close()
    for table in ("session", "subscription", "delivery", "message", "will", "released", "received"):
        assert rows(tmp_path, table) == 0, table


def test_retained_messages_survive_and_expire(tmp_path: Path) -> None:
    bench = Bench(store=SqliteStore(tmp_path))
    publisher = bench.client("p")
    for topic, payload in (("a", b"1"), ("b", b"2"), ("a", b"3"), ("b", b"")):
        publisher.publish(topic, payload, retain=True)
    publisher.publish("c", b"soon gone", retain=True, message_expiry_interval=30)
    bench.client("s").subscribe("$SYS/#")
    bench = restart(bench, tmp_path)
    found = bench.client("s").subscribe("#")
    assert sorted((p.topic, p.payload) for p in found if isinstance(p, PublishPacket)) == [
        ("a", b"3"),
        ("c", b"soon gone"),
    ]
    bench.later(120)
    bench = restart(bench, tmp_path)
    bench.core.store.close()
    assert rows(tmp_path, "retained") == 1


@pytest.mark.parametrize("back", [False, True])
def test_wills_wait_for_the_client_after_a_restart(tmp_path: Path, back: bool) -> None:
    """3.1.2.5: the will of a client that was connected at a crash is published after the restart, if it stays away."""
    bench = Bench(store=SqliteStore(tmp_path))
    bench.client("c", will=Will("gone", payload=b"c"), **KEPT)
    bench.client("d", will=Will("gone", payload=b"d"), **KEPT).leave()
    watcher = bench.client("w", **KEPT)
    watcher.subscribe("gone", 0)
    bench = restart(bench, tmp_path)
    watcher = bench.client("w", **KEPT)
    bench.later(9)
    assert watcher.messages() == []
    if back:
        bench.client("c", **KEPT)
    bench.later(2)
    assert watcher.payloads() == ([] if back else [b"c"])
    bench = restart(bench, tmp_path)
    bench.core.store.close()
    assert rows(tmp_path, "will") == 0


# Full


def codes(client: Client) -> list[int]:
    return [int(p.reason_code) for p in client.take() if isinstance(p, PubAckPacket | PubRecPacket)]


def test_a_full_store_refuses_what_is_new_and_recovers(tmp_path: Path) -> None:
    """0x97 for publications to sessions that are kept, retained messages, new sessions and subscriptions; the rest works."""
    store = SqliteStore(tmp_path, most_bytes=2_000_000)
    bench = Bench(store=store, limits=Limits(queue_messages=1_000_000))
    away, publisher = bench.client("s", **KEPT), bench.client("p")
    away.subscribe("t", 1)
    away.lose()
    live = bench.client("live")
    live.subscribe("#", 1)
    taken = 0
    for i in range(1, 4000):
        publisher.publish("t", b"%d" % i * 200, 1, i)
        store.write(store.seal())
        live.messages()
        if codes(publisher) == [0x97]:
            break
        taken += 1
    assert 500 < taken < 3999
    assert (tmp_path / "broker.db").stat().st_size < 4_000_000
    publisher.publish("other", b"x", 1, 1)
    assert codes(publisher) == [0]
    publisher.publish("kept", b"x", 1, 1, retain=True)
    assert codes(publisher) == [0x97]
    raw = bench.raw()
    raw.send(ConnectPacket("new", session_expiry_interval=5))
    assert int(raw.one(ConnAckPacket).reason_code) == 0x97
    away = bench.client("s", **KEPT)
    away.send(SubscribePacket(1, [TopicFilter("more")]))
    got = away.take()
    assert [int(c) for p in got if isinstance(p, mqtt5.SubAckPacket) for c in p.reason_codes] == [0x97]
    payloads = [p for p in got if isinstance(p, PublishPacket)]
    away.send(*(PubAckPacket(p.packet_id or 0) for p in payloads))
    assert len(payloads) + len(away.payloads()) == taken
    for _ in range(20):
        if store.pending:
            store.write(store.seal())
        bench.client("x", session_expiry_interval=5) if not store.full else None
    assert not store.full
    publisher.publish("t", b"again", 1, 1)
    assert codes(publisher) == [0]
    store.close()


class Raw:
    """A client on a socket: packets out, packets in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._data = b""

    @classmethod
    async def connect(cls, port: int, client_id: str, seconds: int = 0, *, clean: bool = True) -> tuple[Raw, int]:
        raw = cls(*await asyncio.open_connection("127.0.0.1", port))
        raw.send(ConnectPacket(client_id, clean_start=clean, session_expiry_interval=seconds))
        answer = await raw.read()
        assert isinstance(answer, ConnAckPacket)
        return raw, int(answer.reason_code)

    def send(self, *packets: mqtt5.Packet) -> None:
        self._writer.write(b"".join(p.write() for p in packets))

    async def read(self) -> mqtt5.Packet | None:
        """The next packet; None at the end."""
        while True:
            try:
                packet, size = mqtt5.read(memoryview(self._data))
            except IndexError:
                data = await asyncio.wait_for(self._reader.read(65_536), 10)
                if not data:
                    return None
                self._data += data
            else:
                self._data = self._data[size:]
                return packet

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    """Who waits for an answer is disconnected with 0x97, never told a lie; others are served; all goes on afterwards."""

    async def main() -> None:
        async with EmbeddedBroker(data=tmp_path) as broker:
            kept, code = await Raw.connect(broker.port, "s", 1000)
            assert code == 0
            kept.send(SubscribePacket(1, [TopicFilter("t", max_qos=QoS(1))]))
            assert isinstance(await kept.read(), mqtt5.SubAckPacket)
            publisher, _ = await Raw.connect(broker.port, "p")
            store = broker.core.store
            assert isinstance(store, SqliteStore)
            (tmp_path / "ballast").unlink()
            pages = store._db.execute("PRAGMA page_count").fetchone()[0]
            store._db.execute(f"PRAGMA max_page_count={pages}")
            # in one piece: what the broker has not read when it closes has the system reset the connection, and its word is lost
            publisher.send(*(PublishPacket("t", b"x" * 3000, qos=QoS(1), packet_id=i) for i in range(1, 20)))
            last: mqtt5.Packet | None = None
            while (packet := await publisher.read()) is not None:
                last = packet
                assert not isinstance(packet, PubAckPacket), "answered, and not committed"
            assert isinstance(last, DisconnectPacket)
            assert int(last.reason_code) == 0x97
            refused, code = await Raw.connect(broker.port, "s2", 1000)
            assert code in {0x88, 0x97}
            plain, code = await Raw.connect(broker.port, "plain")
            assert code == 0
            plain.send(PublishPacket("u", b"x", qos=QoS(1), packet_id=1))
            answer = await plain.read()
            assert isinstance(answer, PubAckPacket)
            assert int(answer.reason_code) == 0x10
            store._db.execute("PRAGMA max_page_count=1000000")
            async with asyncio.timeout(15):
                while store.failing or store.full:  # noqa: ASYNC110 - the store has no events
                    await asyncio.sleep(0.05)
            plain.send(PublishPacket("t", b"after", qos=QoS(1), packet_id=1))
            answer = await plain.read()
            assert isinstance(answer, PubAckPacket)
            assert int(answer.reason_code) == 0
            for client in (kept, publisher, refused, plain):
                await client.close()

    asyncio.run(main())
    store = SqliteStore(tmp_path)
    (session,) = list(store.load(0.0)[0])
    assert session.deliveries[-1].message.payload == b"after"
    store.close()


def test_the_ballast_saves_what_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure costs the ballast, not a message; from then on the store is full."""
    bench = Bench(store=SqliteStore(tmp_path))
    store = bench.core.store
    assert isinstance(store, SqliteStore)
    assert (tmp_path / "ballast").stat().st_size >= 1 << 20
    client = bench.client("s", **KEPT)
    client.subscribe("t", 1)
    real, failures = store._write, [sqlite3.OperationalError("database or disk is full")]

    def write() -> None:
        if failures:
            raise failures.pop()
        real()

    monkeypatch.setattr(store, "_write", write)
    bench.client("p").publish("t", b"x", 1, 1)
    store.write(store.seal())
    assert failures == []
    bench = restart(bench, tmp_path)
    assert bench.client("s", **KEPT).payloads() == [b"x"]
    bench.core.store.close()


# Answers wait for the disk


class Slow(SqliteStore):
    """Commits when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.let = threading.Event()
        self.let.set()

    def write(self, batch: Batch) -> None:
        assert self.let.wait(20)
        super().write(batch)


def test_no_answer_leaves_before_its_commit(tmp_path: Path) -> None:
    """PUBACK and the delivery wait; QoS 0 between others, and PINGREQ, do not; one commit then serves all."""

    async def main() -> None:
        store = Slow(tmp_path)
        async with EmbeddedBroker(store=store) as broker:
            kept, _ = await Raw.connect(broker.port, "s", 1000)
            kept.send(SubscribePacket(1, [TopicFilter("t", max_qos=QoS(1))]))
            assert isinstance(await kept.read(), mqtt5.SubAckPacket)
            publisher, _ = await Raw.connect(broker.port, "p")
            other, _ = await Raw.connect(broker.port, "o")
            other.send(SubscribePacket(1, [TopicFilter("plain")]))
            assert isinstance(await other.read(), mqtt5.SubAckPacket)
            store.let.clear()
            before = store.commits
            publisher.send(*(PublishPacket("t", b"x", qos=QoS(1), packet_id=i) for i in range(1, 51)))
            answer = asyncio.create_task(publisher.read())
            delivery = asyncio.create_task(kept.read())
            for _ in range(20):
                other.send(PublishPacket("plain", b"x"), mqtt5.PingReqPacket())
                assert isinstance(await other.read(), PublishPacket)
                assert isinstance(await other.read(), mqtt5.PingRespPacket)
            assert not answer.done()
            assert not delivery.done()
            store.let.set()
            assert isinstance(await answer, PubAckPacket)
            assert isinstance(await delivery, PublishPacket)
            for _ in range(49):
                assert isinstance(await publisher.read(), PubAckPacket)
            assert store.commits - before <= 3
            for client in (kept, publisher, other):
                await client.close()

    asyncio.run(main())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("may not mount a file system of its own")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("crowded", [False, True], ids=["filled by us", "filled by others"])
def test_a_disk_that_is_full(small_disk: Path, crowded: bool) -> None:
    """The publisher is answered 0x97, or disconnected with it; the broker lives; all that had a PUBACK 0 is delivered."""

    async def main() -> None:
        async with EmbeddedBroker(data=small_disk, limits=Limits(queue_messages=100_000)) as broker:
            kept, _ = await Raw.connect(broker.port, "s", 1000)
            kept.send(SubscribePacket(1, [TopicFilter("t", max_qos=QoS(1))]))
            assert isinstance(await kept.read(), mqtt5.SubAckPacket)
            kept.send(DisconnectPacket())
            assert await kept.read() is None
            publisher, _ = await Raw.connect(broker.port, "p")
            taken: list[int] = []
            code = 0
            for i in range(1, 6000):
                if crowded and i == 500:
                    with suppress(OSError), (small_disk / "others").open("wb") as file:
                        for _ in range(5000):
                            file.write(bytes(4096))
                            file.flush()
                publisher.send(PublishPacket("t", b"%d " % i + b"x" * 3000, qos=QoS(1), packet_id=i))
                answer = await publisher.read()
                assert isinstance(answer, PubAckPacket | DisconnectPacket)
                code = int(answer.reason_code)
                if code:
                    break
                taken.append(i)
            assert code == 0x97
            assert len(taken) > 400
            plain, code = await Raw.connect(broker.port, "plain")
            assert code == 0
            (small_disk / "others").unlink(missing_ok=True)
            async with asyncio.timeout(15):
                while broker.core.store.failing:  # noqa: ASYNC110 - the store has no events
                    await asyncio.sleep(0.05)
            await kept.close()
            kept, code = await Raw.connect(broker.port, "s", 1000, clean=False)
            assert code == 0
            got: list[int] = []
            while len(got) < len(taken):
                packet = await kept.read()
                assert isinstance(packet, PublishPacket)
                got.append(int(packet.payload.split()[0]))
                kept.send(PubAckPacket(packet.packet_id or 0))
            assert got[: len(taken)] == taken
            for client in (kept, publisher, plain):
                await client.close()

    asyncio.run(main())


# Wrong folders


def starts(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "broker.embedded", "--listen", "127.0.0.1:0", "--data", str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[2],
    )
    return done.returncode, json.loads(done.stderr)["error"]


def test_a_damaged_file_is_said_clearly(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    store.save_session("c", None, 100)
    store.close()
    path = tmp_path / "broker.db"
    sound = path.read_bytes()
    for damaged in (b"garbage" * 1000, sound[:512] + bytes(3000), sound[:100] + b"\xff" * (len(sound) - 100)):
        path.write_bytes(damaged)
        code, error = starts(tmp_path)
        assert code == 2
        assert "broker.db: damaged" in error
        assert "move it away" in error


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM session",
        "UPDATE delivery SET identifiers = 'x'",
        "UPDATE delivery SET topic = NULL",
        "DROP TABLE delivery",
        "PRAGMA user_version = 99",
    ],
)
def test_contents_that_cannot_be(tmp_path: Path, change: str) -> None:
    bench = Bench(store=SqliteStore(tmp_path))
    client = bench.client("s", **KEPT)
    client.subscribe("t", 1, identifier=4)
    bench.client("p").publish("t", b"x", 1, 1)
    store = bench.core.store
    store.close()
    db = sqlite3.connect(tmp_path / "broker.db")
    with db:
        db.execute(change)
    db.close()
    code, error = starts(tmp_path)
    assert code == 2
    assert "damaged" in error


def test_a_folder_in_use_and_a_foreign_file(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "one")
    with pytest.raises(ConfigError, match="in use by another broker"):
        SqliteStore(tmp_path / "one")
    store.close()
    (tmp_path / "two").mkdir()
    db = sqlite3.connect(tmp_path / "two" / "broker.db")
    db.execute("CREATE TABLE x (y)")
    db.close()
    with pytest.raises(ConfigError, match="another program"):
        SqliteStore(tmp_path / "two")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        SqliteStore(tmp_path / "file" / "x")
