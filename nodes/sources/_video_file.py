"""The ``video`` source for files. PyAV is imported when it is opened."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from nodes.operator import Chunk, Context, Draft, Source
from nodes.sources import _files
from nodes.sources._pace import Pacer, nanoseconds
from schemas.errors import RunError
from schemas.messages import Array, Frame, Scalar

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from nodes.sources.video import Config

AHEAD = 8
"""Frames that are decoded in one go where nothing sets a pace."""
_DAMAGE = 100
"""Most faults in a row before the rest of a file is given up."""


def pixels(frame: VideoFrame, config: Config) -> Array:
    """A decoded frame as uint8 [h, w, 3] or [h, w]."""
    form = "rgb24" if config.colour == "rgb" else "gray"
    return frame.to_ndarray(format=form, width=config.width, height=config.height)


class VideoFile(Source):
    """Frames by number; each pass of a loop goes on counting frames and time."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._path = context.path(config.path or "")
        self._device = config.device or context.node
        self._label = _files.labeller(config.label, context.path)
        self._container: InputContainer | None = None
        self._lock = threading.Lock()  # a read that was cancelled goes on in its thread: nothing is closed under it

    async def open(self, position: Any) -> str:
        """:raises RunError: it is no video."""
        return await asyncio.to_thread(self._open, position)

    def _open(self, position: Any) -> str:
        if not self._path.is_file():
            raise _files.missing(self._path)
        stream = _files.digest(self._path)
        if position is not None and position["stream"] != stream:
            position = None
        self._begin()
        self._stream = stream
        self._number, self._offset, self._seen, self._skip = 0, 0, 0, 0
        self._pts: int | None = None
        if position is None:
            self._start = self._config.start if self._config.start is not None else self._recorded()
        else:
            self._start, self._number, self._offset = position["start"], position["number"], position["offset"]
            self._skip, self._pts = position["seen"], position["pts"]
            self._frames = self._resumed(self._pts, self._skip)
            self._last = position["last"]
        return stream

    def _begin(self) -> None:
        """Open the file at its beginning."""
        import av

        self._close()
        try:
            self._container = container = av.open(str(self._path))
        except (av.FFmpegError, OSError) as error:
            raise RunError(f"{self._path} is no video that can be read: {error}") from error
        if not container.streams.video:
            self._close()
            raise RunError(f"{self._path} has no video in it")
        self._video: VideoStream = container.streams.video[0]
        self._video.thread_type = "AUTO"
        self._first: int | None = self._video.start_time
        rate = self._video.average_rate or self._video.guessed_rate
        self._rate = float(rate) if rate else 25.0
        self._last = -round(1e9 / self._rate)
        self._frames = self._decoded()

    def _recorded(self) -> int:
        """When the file says that it was recorded; otherwise now. ns since the epoch."""
        text = (self._container.metadata if self._container is not None else {}).get("creation_time", "")
        with suppress(ValueError):
            moment = datetime.fromisoformat(text)
            return nanoseconds(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
        return time.time_ns()

    def _decoded(self) -> Iterator[VideoFrame | Exception]:
        """All frames from where the container stands; damage is told and passed over."""
        import av

        assert self._container is not None  # noqa: S101 - _begin() came first
        faults = 0
        packets = self._container.demux(self._video)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = packet.decode()
            except av.EOFError:
                return
            except (av.FFmpegError, OSError) as error:
                yield error
                if (faults := faults + 1) >= _DAMAGE:
                    return
                continue
            faults = 0 if frames else faults
            yield from frames

    def _resumed(self, pts: int | None, seen: int) -> Iterator[VideoFrame | Exception]:
        """Frames after the one with this time stamp: from the key frame before it, or from the beginning."""
        import av

        assert self._container is not None  # noqa: S101 - _begin() came first
        if pts is not None:
            with suppress(av.FFmpegError, OSError):
                self._container.seek(pts, stream=self._video, backward=True)
                ahead = self._decoded()
                first = next((f for f in ahead if not isinstance(f, Exception)), None)
                if first is not None and first.pts is not None and first.pts <= pts:
                    return (f for f in ahead if isinstance(f, Exception) or f.pts is None or f.pts > pts)
            self._begin()
            if self._first is not None:
                return (f for f in self._decoded() if isinstance(f, Exception) or f.pts is None or f.pts > pts)
        number = iter(range(seen + 10**12))
        return (f for f in self._decoded() if isinstance(f, Exception) or next(number) >= seen)

    async def chunks(self) -> AsyncIterator[Chunk]:
        config = self._config
        pacer, origin, sent = Pacer(), None, 0
        while True:
            ahead = AHEAD if config.fps == "max" else 1
            drafts, dead, ended = await asyncio.to_thread(self._read, ahead)
            for draft in drafts[:1]:
                origin = draft.time if origin is None else origin
                if config.fps == "recorded":
                    await pacer.until((draft.time - origin) / 1e9)
                elif config.fps != "max":
                    await pacer.until(sent / config.fps)
                sent += 1
            if drafts or dead:
                if config.fps == "max":
                    await asyncio.sleep(0)
                yield Chunk(drafts, self._position(), dead)
            if ended:
                if not config.loop or not self._seen + self._skip:
                    return
                await asyncio.to_thread(self._again)

    def _read(self, count: int) -> tuple[list[Draft], list[tuple[bytes, str, str, str]], bool]:
        with self._lock:
            return self._read_on(count)

    def _read_on(self, count: int) -> tuple[list[Draft], list[tuple[bytes, str, str, str]], bool]:
        drafts: list[Draft] = []
        dead: list[tuple[bytes, str, str, str]] = []
        for frame in self._frames:
            where = f"{self._path.name}: frame {self._number}"
            if isinstance(frame, Exception):
                dead.append((b"", "bad-frame", str(frame), where))
            else:
                drafts.append(self._draft(frame))
            if len(drafts) + len(dead) >= count:
                return drafts, dead, False
        return drafts, dead, True

    def _draft(self, frame: VideoFrame) -> Draft:
        if frame.pts is not None and frame.time_base is not None:
            since = frame.pts - (self._first or 0)
            elapsed = int(since * 10**9 * frame.time_base)
        else:
            elapsed = self._last + round(1e9 / self._rate)
        self._last, self._pts = elapsed, frame.pts
        number = self._number
        attributes: dict[str, Scalar] = {"index": number}
        if (label := self._label(PurePath(str(self._skip + self._seen)))) is not None:
            attributes["label"] = label
        self._number += 1
        self._seen += 1
        data = pixels(frame, self._config)
        layout = "HWC" if data.ndim == 3 else "HW"
        body = Frame(data=data, layout=layout, rate=self._rate, attributes=attributes)
        return Draft(self._device, self._start + self._offset + elapsed, body, str(number))

    def _again(self) -> None:
        """The next pass."""
        with self._lock:
            if self._container is None:  # closed meanwhile
                return
            self._offset += self._last + round(1e9 / self._rate)
            self._begin()
            self._seen = self._skip = 0

    def _position(self) -> dict[str, Any]:
        return {
            "stream": self._stream,
            "start": self._start,
            "number": self._number,
            "offset": self._offset,
            "seen": self._skip + self._seen,
            "pts": self._pts,
            "last": self._last,
        }

    def _close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _end(self) -> None:
        with self._lock:
            self._frames = iter(())
            self._close()

    async def close(self) -> None:
        await asyncio.to_thread(self._end)
