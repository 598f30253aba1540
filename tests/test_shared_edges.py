"""Frames between processes of one host by shared memory: the same results, nothing torn, and real bytes for everybody else."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from brokers import free_port
from harness import advance, rows, run, stored, until
from memory_seen import holders, rings

from broker.connect import connect
from broker.shared_memory import Reader
from broker.window import SendWindow
from nodes.assignment import InEdge
from nodes.channel import Channel
from nodes.edge import Edge
from nodes.journal import Journal
from nodes.plan import prepare
from nodes.sharing import BUDGET, LEAST, Audience, Reading, Writing
from nodes.supervisor import Supervisor
from schemas import codec, detached
from schemas.errors import PayloadError
from schemas.messages import Frame, Message

ROOT = Path(__file__).parent.parent
SIDE = 256
"""Frames are SIDE by SIDE bytes, all of one value: the number of the frame."""

NODE = """
import mmap
import time

import numpy as np

from schemas.messages import Frame, Readings


def look(frame: Frame, pause: float = 0.0) -> Readings:
    if pause:
        time.sleep(pause)
    data = frame.data
    root = data
    while getattr(root, "base", None) is not None or isinstance(root, memoryview):
        root = root.obj if isinstance(root, memoryview) else root.base
    columns = {
        "number": np.array([int(data.flat[0])]),
        "whole": np.array([bool((data == data.flat[0]).all())]),
        "shared": np.array([isinstance(root, mmap.mmap)]),
        "index": np.array([frame.attributes["index"]]),
    }
    return Readings(n=1, columns=columns)
"""

TOPOLOGY = """
topology: {name}
shared: {shared}
brokers: {{local: {{run: {broker}{listen}}}}}
nodes:
  camera: {{ingest: {{source: arrays, path: frames.npy, start: "2026-01-01T00:00:00Z", interval: 1ms{rate}}}}}
  look: {{custom: {{path: look.py, function: look, options: {{pause: {pause}}}}}, from: {{camera: {edge}}}}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: seen}}, from: look, process: look}}
"""

BROKERS = ["embedded", pytest.param("mosquitto", marks=pytest.mark.connected)]


def site(
    folder: Path,
    count: int,
    *,
    broker: str = "embedded",
    edge: str = "{}",
    shared: str = "true",
    pause: float = 0.0,
    rate: str = "",
    name: str = "frames",
    listen: str = "",
) -> Path:
    frames = np.lib.format.open_memmap(folder / "frames.npy", mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE))
    frames[:] = (np.arange(count) % 256).astype(np.uint8)[:, None, None]
    frames.flush()
    (folder / "look.py").write_text(NODE)
    path = folder / "frames.yaml"
    path.write_text(
        TOPOLOGY.format(
            broker=broker,
            edge=edge,
            shared=shared,
            pause=pause,
            rate=f", rate: {rate}" if rate else "",
            name=name,
            listen=listen and f", listen: '{listen}'",
        )
    )
    return path


def numbers(folder: Path) -> list[tuple[int, ...]]:
    """(index, number, whole) of the frames that the node saw, in the order of their indices."""
    found = rows(folder / "out.sqlite", 'SELECT "index", number, whole FROM seen')
    return sorted(tuple(int(float(value)) for value in row) for row in found)


def by_memory(folder: Path) -> int:
    """How many of them came by shared memory."""
    return sum(int(float(value)) for (value,) in rows(folder / "out.sqlite", "SELECT shared FROM seen"))


def every(count: int) -> list[tuple[int, ...]]:
    return [(i, i % 256, 1) for i in range(count)]


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> str:
    if request.param == "mosquitto":
        request.getfixturevalue("needs_mosquitto")
    return str(request.param)


@pytest.mark.parametrize("broker", BROKERS, indirect=True)
@pytest.mark.parametrize("edge", ["{delivery: safe}", "{delivery: fast}"])
def test_results_are_the_same_with_and_without(tmp_path: Path, broker: str, edge: str) -> None:
    found = {}
    for shared in ("true", "false"):
        folder = tmp_path / shared
        folder.mkdir()
        # a fast edge by MQTT alone may lose what a broker has no room for; at this pace it has
        outcome = run(site(folder, 200, broker=broker, edge=edge, shared=shared, rate="400/s"))
        assert outcome.complete
        assert outcome.findings == []
        assert outcome.lost == {}
        found[shared] = rows(folder / "out.sqlite", 'SELECT id, time, source, "index", number, whole FROM seen')
        assert numbers(folder) == every(200)
        shares = by_memory(folder)
        # on a safe edge a frame may be sent again while both ends find each other
        assert shares > 150 if shared == "true" else shares == 0
    assert sorted(found["true"]) == sorted(found["false"])


@pytest.mark.parametrize("broker", BROKERS, indirect=True)
def test_a_producer_waits_for_a_slow_reader_of_a_fast_edge(tmp_path: Path, broker: str) -> None:
    outcome = run(site(tmp_path, 300, broker=broker, edge="{delivery: fast}", pause=0.002))
    assert outcome.complete
    assert outcome.lost == {}
    assert numbers(tmp_path) == every(300)
    assert by_memory(tmp_path) == 300


def test_a_reader_that_is_too_slow_is_told_and_sees_no_torn_frame(tmp_path: Path) -> None:
    edge = "{delivery: fast, overflow: latest, queue: 2000}"
    outcome = run(site(tmp_path, 4000, edge=edge, pause=0.005, rate="2000/s"))
    assert outcome.complete
    book = outcome.nodes["look"].books
    assert book is not None
    found = numbers(tmp_path)
    assert [row for row in found if row != (row[0], row[0] % 256, 1)] == []
    assert by_memory(tmp_path) == len(found) == book.passed
    assert set(book.dropped) <= {"queue-full", "overwritten"}
    assert book.dropped.get("overwritten", 0) > 0, "its loop stood still while the ring went round"
    assert book.passed + sum(book.dropped.values()) == book.received["camera.out"].rows == 4000
    assert outcome.findings == []


@pytest.mark.parametrize("broker", BROKERS, indirect=True)
def test_both_ends_are_killed_and_every_frame_arrives_once(tmp_path: Path, broker: str) -> None:
    async def kill(supervisor: Supervisor) -> None:
        for victim in ("look", "camera", "look", "camera"):
            await advance(tmp_path, 100, "seen")
            used.update(rings(supervisor.views["camera"].pid))
            supervisor.kill(victim)

    used: set[int] = set()
    outcome = run(site(tmp_path, 1500, broker=broker, edge="{delivery: safe}", rate="400/s"), meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    assert sum(view.restarts for view in outcome.nodes.values()) >= 4
    assert numbers(tmp_path) == every(1500)
    assert by_memory(tmp_path) > 750, "what is sent again is sent by MQTT, everything else is not"
    assert used
    assert holders(used) == [], "nothing is left of the killed"


def below(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended, its parent having looked or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.campaign
@pytest.mark.parametrize("broker", BROKERS, indirect=True)
def test_everything_is_killed_and_the_next_run_goes_on_exactly(tmp_path: Path, broker: str) -> None:
    """Supervisor, broker and nodes, all in one moment, with frames under way; nobody has time to clean up anything."""
    path = site(tmp_path, 1500, broker=broker, edge="{delivery: safe}", rate="400/s")
    state = tmp_path / "state"
    command = [sys.executable, "-m", "nodes.cli.main", "run", str(path), "--state", str(state)]
    for least in (200, 600):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as penstock:
            waited_for(lambda least=least: stored(tmp_path, "seen") > least)  # type: ignore[misc] # mypy knows no default arguments of lambdas
            victims = below(penstock.pid)
            shared = [pid for pid in victims if rings(pid)]
            used = set().union(*map(rings, victims))
            for pid in victims:
                os.kill(pid, signal.SIGSTOP)  # so that nobody sees another die
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        assert len(shared) == 2, "camera and look have it"
        waited_for(lambda victims=victims: all(gone(pid) for pid in victims))  # type: ignore[misc] # likewise
        assert holders(used) == [], "nothing is left of the killed"
    outcome = run(path, state=state)
    assert outcome.complete
    assert outcome.findings == []
    assert numbers(tmp_path) == every(1500)
    assert by_memory(tmp_path) > 750, "what is sent again is sent by MQTT, everything else is not"


def waited_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("broker", BROKERS, indirect=True)
@pytest.mark.parametrize("edge", ["{delivery: safe}", "{delivery: fast}"])
def test_who_listens_gets_the_real_bytes(tmp_path: Path, broker: str, edge: str) -> None:
    port, count = free_port(), 1200
    heard: dict[str, list[Frame]] = {"first": [], "later": []}
    private: list[bytes] = []

    async def listen(supervisor: Supervisor) -> None:
        url = f"mqtt://127.0.0.1:{port}"
        await until(lambda: all(v.state in {"ready", "starting"} for v in supervisor.views.values()))

        async def one(name: str) -> None:
            async with connect(url) as bus:
                subscription = await bus.subscribe(["frames/camera/#"], qos=0, capacity=10_000)
                while True:
                    for delivery in await subscription.receive():
                        if delivery.topic.startswith("frames/camera/out/"):
                            body = codec.decode(delivery.payload).body
                            if isinstance(body, Frame):  # and the end of the stream
                                heard[name].append(body)
                        elif "/shared/" in delivery.topic:
                            private.append(bytes(delivery.payload))

        first = asyncio.create_task(one("first"))
        later = None
        try:
            await until(lambda: first.done() or len(heard["first"]) > 100, within=40)
            assert not first.done(), first.result()
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await advance(tmp_path, 500, "seen")  # longer than it takes to see that it left
            later = asyncio.create_task(one("later"))
            await until(lambda: stored(tmp_path, "seen") >= count, within=40)
        finally:
            for task in (first, later):
                if task is not None:
                    task.cancel()

    path = site(tmp_path, count, broker=broker, edge=edge, rate="250/s", listen=f"127.0.0.1:{port}")
    outcome = run(path, meddle=listen)
    assert outcome.complete
    assert numbers(tmp_path) == every(count)
    for name, some in heard.items():
        assert len(some) > 100, name
        for body in some:
            index = body.attributes["index"]
            assert isinstance(body.data, np.ndarray)
            assert isinstance(index, int)
            assert np.all(body.data == index % 256)
    assert any(detached.is_detached(payload) and len(payload) < 1000 for payload in private)
    with pytest.raises(PayloadError):
        codec.decode(next(payload for payload in private if detached.is_detached(payload)))


def _channel() -> Channel:
    return Channel("out", "out", SendWindow(1, {"look": True}))


def test_a_reader_that_keeps_many_frames_gets_more_slots() -> None:
    writing = Writing("camera", "out", _channel(), readers=["block"], always=False, whole=False)
    reader, kept, most = Reader(0), [], BUDGET >> 20
    try:
        for i in range(most):
            waited_for(lambda: writing.room)
            frame = Frame(
                data=np.full((1024, 1024 - 64), i, np.uint8), layout="HW"
            )  # with its slot's rounding 1 MB at most
            payload = writing.encode(Message(str(i), "camera", i, frame))
            assert detached.is_detached(payload), f"{i} of {most}"
            kept.append(reader.lease(detached.read(payload)[0].place))
        assert [array[0] for array in kept] == [*range(most)]
    finally:
        kept.clear()
        writing.close()


@pytest.mark.parametrize("readers", [["block"], ["block", "latest"]])
def test_what_is_staged_together_is_told_at_once_unless_a_reader_may_miss_some(readers: list[str]) -> None:
    writing = Writing("camera", "out", _channel(), readers=readers, always=False, whole=False)
    reading, big = Reader(0), np.arange(LEAST, dtype=np.uint8).reshape(256, -1)
    bodies = [Frame(data=big + i, layout="HW") if i != 3 else Frame(data=big[:4], layout="HW") for i in range(6)]
    try:
        payloads = writing.encode_all([Message(str(i), "camera", i, body) for i, body in enumerate(bodies)])
        sizes, messages = [], []
        for payload in payloads:
            if detached.is_detached(payload):
                told = detached.read(payload)
                sizes.append(len(told))
                messages += [detached.decode(each, reading.lease(each.place))[0] for each in told]
            else:
                sizes.append(0)
                messages.append(codec.decode(payload))
        assert sizes == ([3, 0, 2] if readers == ["block"] else [1, 1, 1, 0, 1, 1])
        assert [message.id for message in messages] == [str(i) for i in range(6)]
        for message, sent in zip(messages, bodies, strict=True):
            assert isinstance(message.body, Frame)
            assert np.array_equal(message.body.data, sent.data)
        del message, messages
    finally:
        writing.close()


def test_of_several_told_at_once_only_what_was_overwritten_is_missed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "look.journal", durable=False)
    spec = InEdge(producer="camera", port="out", carrier="mqtt", safe=False, queue=64, shared=0)
    edge, gave_up = Edge(spec, journal, (), ()), list[bool]()
    writing = Writing("camera", "out", _channel(), readers=["block"], always=False, whole=False)
    reading = Reading("look", edge, 0, lambda: gave_up.append(True))
    frames = [Message(str(i), "camera", i, Frame(data=np.full((256, 256), i, np.uint8), layout="HW")) for i in range(3)]
    try:
        (payload,) = writing.encode_all(frames)
        first, second, third = detached.read(payload)
        older = msgspec.structs.replace(second, place=msgspec.structs.replace(second.place, generation=2**40))
        found = reading.decode(detached.encode([first, older]))
        assert [message.id for message, _, _ in found] == ["0"]
        assert (edge.dropped.messages, edge.dropped.rows) == (1, {"overwritten": 1})
        nobody = msgspec.structs.replace(third, place=msgspec.structs.replace(third.place, mark=b"x" * 16))
        assert reading.decode(detached.encode([nobody, third])) == []
        assert gave_up == [True]
        assert edge.dropped.rows == {"overwritten": 3}
        assert reading.decode(payload) == [], "it comes by the public topic too"
        del found
    finally:
        writing.close()
        journal.close()


def test_where_memory_is_full_the_slots_that_are_there_do(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, taken = os.posix_fallocate, list[int]()

    def full(fd: int, at: int, size: int) -> None:
        if len(taken) == 4:  # the head and three slots
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken.append(size)
        allocate(fd, at, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    writing = Writing("camera", "out", _channel(), readers=["block"], always=False, whole=False)
    reader, frame = Reader(0), Frame(data=np.zeros((1024, 1024 - 64), np.uint8), layout="HW")
    try:
        for i in range(20):
            assert writing.room, "nothing is leased, and more there will not be"
            payload = writing.encode(Message(str(i), "camera", i, frame))
            assert detached.is_detached(payload)
            reader.lease(detached.read(payload)[0].place)
    finally:
        writing.close()


def test_everything_is_published_until_the_broker_says_that_nobody_listens() -> None:
    audience = Audience(always=False)
    told = audience.wants(10.0)
    assert callable(told)
    assert audience.wants(10.1) is True, "it has not answered"
    told(False)
    assert audience.wants(10.2) is False
    again = audience.wants(11.5)
    assert callable(again)
    again(True)
    assert audience.wants(11.6) is True
    assert Audience(always=True).wants(1.0) is True


def told_of_broken(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """What is logged of a run, all of it by MQTT, whose workers are forks of a process that has run this code first."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    (folder / "sitecustomize.py").write_text(code)
    outcome = run(site(folder, 200, edge="{delivery: safe}", rate="200/s"))
    assert outcome.complete
    assert outcome.findings == []
    assert numbers(folder) == every(200)
    assert by_memory(folder) == 0
    return capfd.readouterr().err


def test_memory_out_of_reach_is_told_and_the_frames_come_by_mqtt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a container of its own: the process is not to be seen."""
    broken = (
        "import broker.shared_memory as s\n"
        "def gone(*asked):\n    raise s.UnreachableError('no such process')\n"
        "s._reopened = gone\n"
    )
    assert "out of reach" in told_of_broken(broken, tmp_path, monkeypatch, capfd)


def test_a_full_system_is_told_and_the_frames_come_by_mqtt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = (
        "import errno, os\n"
        "def full(fd, at, size):\n    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "os.posix_fallocate = full\n"
    )
    told = told_of_broken(broken, tmp_path, monkeypatch, capfd)
    assert "no shared memory" in told
    assert told.count("No space left") == 1


def test_the_plan_says_which_edges_share_memory_and_one_word_turns_it_off(tmp_path: Path) -> None:
    def shared(**options: str) -> dict[str, bool]:
        plan = prepare(site(tmp_path, 1, **options))  # type: ignore[arg-type]
        return {edge.consumer: edge.shared for edge in plan.edges}

    assert shared() == {"look": True, "store": False}
    assert shared(shared="false") == {"look": False, "store": False}
    assert shared(edge="{shared: false}") == {"look": False, "store": False}
