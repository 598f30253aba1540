"""Frames from a video file, a network camera (RTSP, HTTP, UDP …) or a camera of this machine (V4L2).

A file is played at its own speed, at a rate or as fast as the frames are taken, and resumed at the frame where it stood. Of
a camera the latest frame counts: what is not taken in time is dropped and counted as ``overrun``; a lost camera is tried
again for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from nodes.operator import Context, Flow, Source
from nodes.options import Options
from nodes.sources import _files
from nodes.sources._pace import Instant, Pace
from schemas.errors import ConfigError, MissingError, Problem
from schemas.units import Duration

EXTRA = "camera"
_DEVICES = "/dev/"
_SCHEMES = ("rtsp", "rtsps", "http", "https", "udp", "tcp", "srt", "rtmp")


class Config(Options):
    """Options of the ``video`` source."""

    path: str | None = Field(None, description="a video file, or a camera of this machine: /dev/video0")
    url: str | None = Field(None, description=f"a network camera: {', '.join(_SCHEMES)}")
    fps: Pace = Field(
        "recorded",
        description="file: recorded, max, or frames per second; camera: most frames per second, or all with recorded or max",
    )
    loop: bool = Field(False, description="file: begin again at the end, event times going on")
    device: str | None = Field(None, description="what the frames speak of; the node's name if left out")
    start: Instant | None = Field(
        None, description="file: event time of the first frame; when it was recorded, if the file knows, or the clock"
    )
    width: int | None = Field(None, ge=16, le=16384, description="pixels; asked of a camera, otherwise scaled to")
    height: int | None = Field(None, ge=16, le=16384, description="pixels; asked of a camera, otherwise scaled to")
    colour: Literal["rgb", "grey"] = Field("rgb", description="RGB [h, w, 3] or grey [h, w]")
    label: str | None = Field(
        None,
        description="file: a .csv table with the number of a frame, from 0, in the first column and its label in the second",
    )
    transport: Literal["tcp", "udp"] = Field("tcp", description="of RTSP")
    timeout: Duration = Field(10 * 10**9, gt=0, description="camera: without a frame for so long it is lost")
    retry: Duration = Field(30 * 10**9, gt=0, description="camera: longest wait between two tries")
    buffer: int = Field(2, ge=1, le=64, description="camera: frames that wait to be taken; the oldest is dropped")

    @property
    def live(self) -> bool:
        """A camera, not a file."""
        return self.url is not None or (self.path is not None and self.path.startswith(_DEVICES))

    def check(self, context: Context) -> None:
        if (self.path is None) == (self.url is None):
            raise ConfigError(Problem(("path",) if self.path else (), "expected either 'path' or 'url'"))
        if self.url is not None:
            try:
                parts = urlsplit(self.url)
                sound = parts.scheme in _SCHEMES and bool(parts.netloc) and (parts.port is None or parts.port > 0)
            except ValueError:
                sound = False
            if not sound:
                raise ConfigError(Problem(("url",), f"expected scheme://host…, one of {', '.join(_SCHEMES)}"))
        elif self.path is not None and not self.live:
            _files.must_exist(context.path(self.path), "path")
        if (self.width is None) != (self.height is None):
            raise ConfigError(Problem(("width" if self.width else "height",), "'width' and 'height' go together"))
        if self.label is not None and not self.label.endswith(".csv"):
            raise ConfigError(Problem(("label",), f"expected a .csv file, got {self.label!r}"))
        _files.labeller(self.label, context.path)
        if self.live:
            wrong = [key for key in ("loop", "start", "label") if getattr(self, key)]
            if wrong:
                raise ConfigError(Problem((wrong[0],), "a camera has no beginning and no end"))

    def emits(self, inputs: Sequence[Flow], context: Context) -> dict[str, Flow]:
        del inputs, context
        return {"out": Flow("frame/1")}

    def accepts(self) -> frozenset[str]:
        return frozenset()


def build(config: Config, context: Context) -> Source:
    """A :class:`~nodes.sources._video_file.VideoFile` or a :class:`~nodes.sources._camera.Camera`.

    :raises MissingError: PyAV is not installed.
    """
    try:
        import av  # noqa: F401 - found out now, not at the first frame
    except ImportError:
        raise MissingError("PyAV", extra=EXTRA) from None
    if config.live:
        from nodes.sources._camera import Camera

        return Camera(config, context)
    from nodes.sources._video_file import VideoFile

    return VideoFile(config, context)
