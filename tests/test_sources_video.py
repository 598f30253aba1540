"""The video source: real files made by the tests, and a real MPEG-TS stream over TCP as a camera."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest

from nodes import ingest, log
from nodes.operator import Chunk, Context, Source
from nodes.sources._pace import instant
from schemas.errors import ConfigError, MissingError, RunError
from schemas.messages import Frame

T0 = instant("2024-05-01T06:00:00Z")
FRAMES = 40


def record(path: Path, frames: int = FRAMES, codec: str = "mpeg4", rate: int = 20, form: str | None = None) -> Path:
    """A video whose frame i is grey of brightness 5 i + 20, key frames every twelve."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 12
        stream.bit_rate = 2_000_000
        for i in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + 5 * (i % 40), np.uint8), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("film") / "belt.mp4")


def make(base: Path, **options: Any) -> Source:
    config = ingest.Config.model_validate({"source": "video", **options})
    context = Context("line", "camera", base, base)
    config.check(context)
    return ingest.build(config, context)


async def _take(source: Source, position: Any, limit: int | None, pause: float) -> tuple[str, list[Chunk]]:
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(position))  # as the runtime keeps it
    stream = await source.open(kept)
    out: list[Chunk] = []
    chunks = source.chunks()
    try:
        async with asyncio.timeout(20):
            async for chunk in chunks:
                out.append(chunk)
                if limit is not None and len(out) >= limit:
                    break
                if pause:
                    await asyncio.sleep(pause)
    finally:
        await chunks.aclose()  # type: ignore[attr-defined] # it is an async generator
        await source.close()
    return stream, out


def take(source: Source, position: Any = None, limit: int | None = None, pause: float = 0) -> tuple[str, list[Chunk]]:
    return asyncio.run(_take(source, position, limit, pause))


def numbers(chunks: list[Chunk]) -> list[int]:
    """Which frames they are, read from the pictures."""
    out = []
    for chunk in chunks:
        for draft in chunk.drafts:
            assert isinstance(draft.body, Frame)
            out.append(round((float(np.asarray(draft.body.data).mean()) - 20) / 5))
    return out


def test_a_file_frame_by_frame_with_its_own_times(film: Path) -> None:
    stream, chunks = take(make(film.parent, path=film.name, fps="max", start="2024-05-01T06:00:00Z"))
    drafts = [d for c in chunks for d in c.drafts]
    assert len(stream) == 8
    assert numbers(chunks) == list(range(FRAMES))
    assert [d.time - T0 for d in drafts] == [i * 50_000_000 for i in range(FRAMES)]
    assert [d.key for d in drafts] == [str(i) for i in range(FRAMES)]
    body = drafts[0].body
    assert isinstance(body, Frame)
    assert np.asarray(body.data).shape == (48, 64, 3)
    assert np.asarray(body.data).dtype == np.uint8
    assert body.rate == 20.0


@pytest.mark.parametrize(
    ("codec", "name"), [("mpeg4", "a.mp4"), ("mpeg2video", "a.ts"), ("mjpeg", "a.avi"), ("mpeg4", "a.m4v")]
)
def test_a_file_resumes_after_any_frame(tmp_path: Path, codec: str, name: str) -> None:
    record(tmp_path / name, codec=codec)
    options = {"path": name, "fps": 100_000, "start": "2024-05-01T06:00:00Z"}
    stream, whole = take(make(tmp_path, **options))
    assert len(numbers(whole)) == FRAMES
    for cut in (0, 1, 11, 12, 13, 25, FRAMES - 2, FRAMES - 1):
        again, rest = take(make(tmp_path, **options), whole[cut].position)
        assert again == stream
        assert numbers(rest) == numbers(whole[cut + 1 :])
        assert [(d.key, d.time) for c in rest for d in c.drafts] == [
            (d.key, d.time) for c in whole[cut + 1 :] for d in c.drafts
        ]


def test_a_loop_goes_on_counting_and_resumes_in_any_pass(film: Path) -> None:
    options = {"path": film.name, "fps": 100_000, "loop": True, "start": "2024-05-01T06:00:00Z"}
    _, chunks = take(make(film.parent, **options), limit=2 * FRAMES + 5)
    assert [d.time - T0 for c in chunks for d in c.drafts] == [i * 50_000_000 for i in range(2 * FRAMES + 5)]
    for cut in (FRAMES - 1, FRAMES, FRAMES + 20):
        _, rest = take(make(film.parent, **options), chunks[cut].position, limit=5)
        assert numbers(rest) == numbers(chunks[cut + 1 : cut + 6])
        assert [d.time for c in rest for d in c.drafts] == [d.time for c in chunks[cut + 1 : cut + 6] for d in c.drafts]


def test_a_file_is_played_at_its_own_speed(film: Path) -> None:
    began = time.monotonic()
    take(make(film.parent, path=film.name), limit=11)
    assert 0.45 < time.monotonic() - began < 2


def test_closing_in_the_middle_of_a_read_does_no_harm(film: Path) -> None:
    async def run() -> None:
        for pause in range(20):
            source = make(film.parent, path=film.name, fps="max", loop=True, width=640, height=480)
            await source.open(None)
            chunks = source.chunks()
            reading = asyncio.ensure_future(anext(chunks))
            await asyncio.sleep(pause / 4000)
            reading.cancel()
            await asyncio.wait({reading})
            await source.close()

    asyncio.run(run())


def test_scaled_and_grey(film: Path) -> None:
    _, chunks = take(make(film.parent, path=film.name, fps="max", width=32, height=16, colour="grey"), limit=1)
    body = chunks[0].drafts[0].body
    assert isinstance(body, Frame)
    assert np.asarray(body.data).shape == (16, 32)
    assert body.layout == "HW"


def test_damage_in_a_file_is_told_and_passed_over(tmp_path: Path) -> None:
    data = bytearray(record(tmp_path / "a.avi", codec="mjpeg").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = b"\x00" * 600
    (tmp_path / "a.avi").write_bytes(data)
    _, chunks = take(make(tmp_path, path="a.avi", fps="max"))
    assert len(numbers(chunks)) + sum(len(c.dead) for c in chunks) >= FRAMES - 3
    assert numbers(chunks)[-1] in (FRAMES - 1, FRAMES - 2)


def test_what_is_no_video_and_what_is_gone(tmp_path: Path, film: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(RunError, match="no video"):
        take(make(tmp_path, path="a.mp4"))
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:600])
    with pytest.raises(RunError):
        take(make(tmp_path, path="cut.mp4"))
    source = make(tmp_path, path="a.mp4")
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(MissingError):
        take(source)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, ()),
        ({"path": "a", "url": "rtsp://a/b"}, ("path",)),
        ({"path": "nowhere.mp4"}, ("path",)),
        ({"url": "rstp://a/b"}, ("url",)),
        ({"url": "rtsp://a:x/b"}, ("url",)),
        ({"url": "rtsp://a/b", "loop": True}, ("loop",)),
        ({"path": "/dev/video0", "start": "2024-01-01"}, ("start",)),
        ({"url": "rtsp://a/b", "width": 100}, ("width",)),
    ],
)
def test_check(tmp_path: Path, options: dict[str, Any], path: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, **options)
    assert caught.value.problems[0].path == path


# -- cameras --------------------------------------------------------------------------------------------------------


@pytest.fixture
def camera(tmp_path: Path) -> Iterator[tuple[str, list[float]]]:
    """A camera on TCP: each connection gets the whole film as MPEG-TS, at thrice its speed, and is then cut."""
    data = record(tmp_path / "c.ts", 60, "mpeg2video", form="mpegts").read_bytes()
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)
    stop = threading.Event()
    connections: list[float] = []

    def serve() -> None:
        while not stop.is_set():
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            connections.append(time.monotonic())
            with client:
                try:
                    for at in range(0, len(data), len(data) // 60):
                        client.sendall(data[at : at + len(data) // 60])
                        if stop.wait(1 / 60):
                            break
                except OSError:
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"tcp://127.0.0.1:{server.getsockname()[1]}", connections
    stop.set()
    thread.join()
    server.close()


def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, Any]]]:
    events: list[tuple[str, str, dict[str, Any]]] = []
    monkeypatch.setattr(log, "_sink", lambda *event: events.append(event))
    return events


def test_a_camera_that_is_cut_off_comes_back(
    tmp_path: Path, camera: tuple[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = told(monkeypatch)
    url, connections = camera
    source = make(tmp_path, url=url.replace("//", "//user:secret@"), retry="1s", buffer=64)
    assert source.live
    before = time.time_ns()

    async def run() -> list[Chunk]:
        await source.open(None)
        out: list[Chunk] = []
        async with asyncio.timeout(20):
            async for chunk in source.chunks():
                out.append(chunk)
                if len(connections) >= 2 and sum(len(c.drafts) for c in out) > 70:
                    break
        await source.close()
        return out

    chunks = asyncio.run(run())
    times = [d.time for c in chunks for d in c.drafts]
    assert before < min(times)
    assert max(times) < time.time_ns() + 3 * 10**9
    assert any(event == "camera is lost" for _, event, _ in events)
    assert "secret" not in str(events)


def test_a_slow_taker_gets_the_newest_frames_and_the_others_are_counted(
    tmp_path: Path, camera: tuple[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch)
    url, _ = camera
    _, chunks = take(make(tmp_path, url=url, buffer=2), limit=4, pause=0.3)
    assert all(len(c.drafts) <= 2 for c in chunks)
    assert sum(c.dropped.get("overrun", 0) for c in chunks) > 5


def waits(source: Source, until: Callable[[], bool]) -> None:
    async def run() -> None:
        await source.open(None)
        waiting = asyncio.ensure_future(anext(source.chunks()))
        async with asyncio.timeout(15):
            while not until():  # noqa: ASYNC110 - what is waited for happens in a list
                await asyncio.sleep(0.01)
        assert not waiting.done()
        waiting.cancel()
        began = time.monotonic()
        await source.close()
        assert time.monotonic() - began < 4

    asyncio.run(run())


@pytest.mark.parametrize(
    "options", [{"path": "/dev/video97"}, {"url": "rtsp://user:secret@127.0.0.1:1/x"}, {"url": "tcp://127.0.0.1:1"}]
)
def test_a_camera_that_is_not_there_is_waited_for(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = told(monkeypatch)
    waits(make(tmp_path, **options, retry="100ms"), lambda: len(events) >= 2)
    assert {event for _, event, _ in events} == {"camera is away"}
    assert "secret" not in str(events)


def test_a_camera_that_says_nothing_is_given_up_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = told(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        waits(make(tmp_path, url=url, timeout="300ms", retry="100ms"), lambda: len(events) >= 1)
