"""The ``video`` source for cameras: a thread decodes, the newest frames wait to be taken, a lost camera is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from nodes import log
from nodes.operator import Chunk, Context, Draft, Source
from nodes.sources._video_file import pixels
from schemas.messages import Frame

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

    from nodes.sources.video import Config

FIRST_RETRY = 0.5
"""Seconds until a lost camera is tried again; doubled each time, up to ``retry``."""


class Camera(Source):
    """Frames are converted only when they are taken, so that those dropped cost their decoding only."""

    live = True
    awaits = False

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._name = config.url or config.path or ""
        self._device = config.device or context.node
        self._thread: threading.Thread | None = None

    async def open(self, position: Any) -> str:
        """Starts the thread; a camera that is not there yet is waited for."""
        del position
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, float, VideoFrame]] = deque()
        self._overrun = 0
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()
        return ""

    async def chunks(self) -> AsyncIterator[Chunk]:
        while True:
            await self._ready.wait()
            self._ready.clear()
            with self._lock:
                waiting, self._waiting = list(self._waiting), deque()
                overrun, self._overrun = self._overrun, 0
            drafts = await asyncio.to_thread(self._drafts, waiting)
            if drafts or overrun:
                yield Chunk(drafts, None, [], {"overrun": overrun} if overrun else {})

    def _drafts(self, waiting: list[tuple[int, float, VideoFrame]]) -> list[Draft]:
        drafts = []
        for moment, rate, frame in waiting:
            data = pixels(frame, self._config)
            body = Frame(data=data, layout="HWC" if data.ndim == 3 else "HW", rate=rate or None)
            drafts.append(Draft(self._device, moment, body))
        return drafts

    def _run(self) -> None:
        """The thread: open, decode until it breaks, wait, again."""
        wait = FIRST_RETRY
        while not self._stop.is_set():
            why = "it ended"
            got = False
            try:
                with self._open() as container:
                    for moment, rate, frame in self._decoded(container):
                        got, wait = True, FIRST_RETRY
                        self._hand_over(moment, rate, frame)
                        if self._stop.is_set():
                            return
            except Exception as error:  # noqa: BLE001 - whatever a driver or a stream does, it is tried again
                why = f"{type(error).__name__}: {error}".replace(self._name, _public(self._name))
            if self._stop.is_set():
                return
            pause = random.uniform(wait / 2, wait)  # noqa: S311 - spreads the tries of many cameras
            event = "camera is lost" if got else "camera is away"
            self._call(partial(log.warning, event, camera=_public(self._name), why=why, again_in=f"{pause:.1f}s"))
            self._stop.wait(pause)
            wait = min(wait * 2, self._config.retry / 1e9)

    def _open(self) -> InputContainer:
        import av

        config = self._config
        seconds = config.timeout / 1e9
        options: dict[str, str] = {}
        if config.url is None:
            if config.width is not None:
                options["video_size"] = f"{config.width}x{config.height}"
            if isinstance(config.fps, float):
                options["framerate"] = f"{config.fps:g}"
            return av.open(self._name, format="v4l2", options=options, timeout=seconds)
        if config.url.startswith("rtsp"):
            options["rtsp_transport"] = config.transport
        options |= {"fflags": "nobuffer", "analyzeduration": "2000000"}  # µs; the first picture should not take long
        return av.open(self._name, options=options, timeout=seconds)

    def _decoded(self, container: InputContainer) -> Any:
        """(event time, rate, frame). The time is that of the camera's clock where it keeps pace with ours."""
        import av

        video = container.streams.video[0]
        rate = float(video.average_rate or 0)
        least = 1e9 / self._config.fps * 0.9 if isinstance(self._config.fps, float) else 0.0
        clock = _Clock()
        before = -(10**18)
        for packet in container.demux(video):
            try:
                frames = packet.decode()
            except av.InvalidDataError:  # a damaged packet; the next key frame mends the picture
                continue
            for frame in frames:
                moment = clock.at(frame)
                if moment - before >= least:
                    before = moment
                    yield moment, rate, frame

    def _hand_over(self, moment: int, rate: float, frame: VideoFrame) -> None:
        with self._lock:
            if len(self._waiting) >= self._config.buffer:
                self._waiting.popleft()
                self._overrun += 1
            self._waiting.append((moment, rate, frame))
        self._call(self._ready.set)

    def _call(self, function: Callable[[], object]) -> None:
        """From the thread: call it in the loop, unless that was closed without :meth:`close`."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    async def close(self) -> None:
        """Stop the thread; it is waited for as long as one read may take, at most two seconds."""
        if self._thread is not None:
            self._stop.set()
            await asyncio.to_thread(self._thread.join, 2.0)
            self._thread = None


class _Clock:
    """Event times from a camera's time stamps, which count from anywhere.

    The first frame is set to our clock; as long as both clocks agree within :attr:`TOLERANCE` the stamps' even spacing is
    kept, and otherwise (a jump, a camera without stamps) our clock is taken anew.
    """

    TOLERANCE = 1.0

    def __init__(self) -> None:
        self._offset: float | None = None

    def at(self, frame: VideoFrame) -> int:
        """ns since the epoch."""
        now = time.time()
        if frame.pts is None:
            return round(now * 1e9)
        if self._offset is None or abs(frame.time + self._offset - now) > self.TOLERANCE:
            self._offset = now - frame.time
        return round((frame.time + self._offset) * 1e9)


def _public(url: str) -> str:
    """A URL without user and password."""
    scheme, found, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if found else url
