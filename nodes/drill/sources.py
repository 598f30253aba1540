"""What a drill changes in the options of sources, so that their data end, are the same each time, and last as long as wanted.

It goes by the options' names, which mean the same for every source: ``rate`` or ``fps``, ``start``, ``interval``, ``loop``,
``count``, ``batch``. A source with a ``path`` reads a file, one with a ``count`` makes its data up, any other is live.
"""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from nodes import ingest
from nodes.operator import Context, Flow
from nodes.options import Options
from nodes.variants import VariantConfig
from schemas.errors import ConfigError

START = "2026-01-01T00:00:00Z"
"""Event time of the first row where the data have no times: the clock's would differ from run to run."""
MOST_ROWS = 1000
"""Rows per second of data that are used at most: a small machine is to have breath left for the faults."""
_USUAL_ROWS = 50
"""Rows per second of a source that makes them up and says no rate."""
_MESSAGES = 20
"""Messages per second that a source sends at least, where it has so many rows: a blow is to fall between messages."""
_SUFFIXES = {
    ".csv": "csv", ".npz": "arrays", ".npy": "arrays",
    ".mkv": "video", ".mp4": "video", ".avi": "video", ".mov": "video", ".webm": "video",
}  # fmt: skip
_TIMES = ("time", "timestamp", "ts", "datetime", "date")
_DEVICES = ("device", "source", "sensor")


def is_live(options: Options) -> bool:
    """Whether what it reads is gone when it is not taken."""
    fields = type(options).model_fields
    return bool(getattr(options, "live", False)) or not ({"path", "count"} & fields.keys())


def checked(written: dict[str, Any], context: Context) -> VariantConfig:
    """The options of a source.

    :raises ConfigError: they are wrong.
    """
    try:
        config = cast("VariantConfig", ingest.Config.model_validate(written))
    except ValidationError as error:
        raise ConfigError(f"{context.node}: {error.errors()[0]['msg']}") from None
    config.check(context)
    return config


def of_file(path: Path) -> dict[str, Any]:
    """A source that reads a recording: the kind by the file's ending, times and devices of a CSV file by usual names.

    :raises ConfigError: no source reads such files.
    """
    if path.is_dir():
        return {"source": "images", "path": str(path.resolve())}
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(_SUFFIXES)
        raise ConfigError(
            f"--source: {path.name} is no recording that is known by its ending: {known}, or a folder of images"
        )
    out: dict[str, Any] = {"source": kind, "path": str(path.resolve())}
    if kind == "csv" and path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            names = [name.strip().strip('"') for name in file.readline().split(",")]
        by_lower = {name.lower(): name for name in names}
        for key, usual in (("time", _TIMES), ("device_column", _DEVICES)):
            if found := next((by_lower[name] for name in usual if name in by_lower), None):
                out[key] = found
    return out


def made_up(flow: Flow, name: str) -> dict[str, Any]:
    """A synthetic source of the same type, with the same columns where they are known."""
    if flow.type == "frame/1":
        return {"source": "synthetic", "frames": {}, "rate": "10/s", "device": name}
    names = sorted(flow.fields) if flow.fields else ["value"]
    signals = {field: {"kind": "sine", "offset": 20 + i, "noise": 0.1} for i, field in enumerate(names)}
    return {"source": "synthetic", "signals": signals, "rate": f"{_USUAL_ROWS}/s", "device": name}


def tamed(
    written: dict[str, Any], config: VariantConfig, context: Context, seconds: float, folder: Path
) -> tuple[dict[str, Any], int | None, str]:
    """Options that give the same data in each run, and an end, as fast as they are taken.

    :param seconds: how long the data are to last later, at :func:`paced`.
    :param folder: where a shortened copy of too long a file may go.
    :returns: the options; how many rows they give in all, None if that is to be found out by running; what to tell.
    """
    options, fields, out, note = config.options, type(config.options).model_fields, dict(written), ""
    per_second = _number(getattr(options, "rate", None))
    rows: int | None = None
    if "loop" in fields:
        out.pop("loop", None)
    if "path" not in fields:
        devices = int(getattr(options, "devices", 1))
        most = max(1, round(min(per_second or _USUAL_ROWS, MOST_ROWS / devices) * seconds))
        given = getattr(options, "count", None)
        if given is not None and not per_second:
            most = max(1, round(MOST_ROWS / devices * seconds))
        out["count"] = min(given or most, most)
        rows = out["count"] * devices
        if given is not None and out["count"] < given:
            note = f"{context.node}: the first {out['count']} of {given} rows of each device"
    elif config.kind == "csv":
        rows, note = _shortened(out, context, round(MOST_ROWS * seconds), folder)
    _fix_times(out, options, per_second)
    if "batch" in fields and rows is not None:
        devices = int(getattr(options, "devices", 1))
        fit = max(1, int(rows / devices / seconds / _MESSAGES))
        out["batch"] = min(getattr(options, "batch", None) or fit, fit)
    for key in ("rate", "fps"):
        if key in fields:
            out.pop(key, None)
            if fields[key].default is not None:
                out[key] = "max"
    return out, rows, note


def _fix_times(out: dict[str, Any], options: Options, per_second: float | None) -> None:
    """Event times from the data or from a fixed start, never from the clock."""
    fields = type(options).model_fields
    if "start" not in fields or getattr(options, "time", None) is not None:
        if getattr(options, "start", None) == "now":
            out["start"] = START
        return
    if getattr(options, "start", None) in {None, "now"}:
        out["start"] = START
    if "interval" in fields and getattr(options, "interval", None) is None:
        out["interval"] = f"{round(1e9 / per_second) if per_second else 10**9}ns"


def paced(config: dict[str, Any], context: Context, rows: int | None, seconds: float) -> dict[str, Any]:
    """The same data at a pace at which they last so long.

    :param rows: in all; None: not known, ten a second.
    """
    options = checked(config, context).options
    per_second = max(0.001, (rows / seconds if rows else 10.0) / int(getattr(options, "devices", 1)))
    for key in ("rate", "fps"):
        if key in type(options).model_fields:
            return {**config, key: round(per_second, 3)}
    return config


def _number(rate: Any) -> float | None:
    return float(rate) if isinstance(rate, (int, float)) and not isinstance(rate, bool) else None


def _shortened(out: dict[str, Any], context: Context, most: int, folder: Path) -> tuple[int, str]:
    """Lines of a text file after its header; one with too many is copied up to there."""
    path = context.path(out["path"])
    head = int(out.get("skip", 0)) + (0 if out.get("columns") else 1)
    with path.open("rb") as file:
        lines = sum(1 for _ in islice(file, most + head + 1))
    if lines <= most + head:
        return max(1, lines - head), ""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    with path.open("rb") as file, copy.open("wb") as short:
        short.writelines(islice(file, most + head))
    shutil.copystat(path, copy)
    out["path"] = str(copy.resolve())
    return most, f"{context.node}: the first {most:,} rows of {path.name}"
