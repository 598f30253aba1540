"""When a device may train: in certain hours, while it has little else to do, on mains power, or while an operator's file says so.

Training waits, nothing else does: examples are kept and the client stays in its job, which asks others meanwhile. What is under
way when the permission ends is finished.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from nodes.options import Options

EVERY = 10.0
"""Seconds between two looks."""
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d) ?- ?([01]\d|2[0-3]):([0-5]\d)")
_SUPPLIES = Path("/sys/class/power_supply")


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _hours(text: str) -> str:
    if not _HOURS.fullmatch(text):
        raise ValueError(f"expected hours such as 22:00-06:00, got {text[:40]!r}")
    return text


Hours = Annotated[str, BeforeValidator(lambda value: _hours(value) if isinstance(value, str) else value)]


class When(Options):
    """All that is named must hold."""

    hours: Annotated[list[Hours], BeforeValidator(_several)] = Field(
        [], description="hours of the day, local time, e.g. 22:00-06:00; or a list, of which one must hold"
    )
    load: float | None = Field(
        None, gt=0, description="load average of the last minute, for each core, below which it may begin"
    )
    mains: bool = Field(False, description="only while a power supply is connected; a device without a battery has one")
    battery: float | None = Field(None, ge=0, le=100, description="charge in percent, of the fullest battery, at least")
    file: str | None = Field(
        None, description="only while this file is there: for what only you know, such as an unmetered link"
    )

    def why_not(
        self,
        now: datetime,
        path: Callable[[str], Path],
        *,
        load: Callable[[], float] = lambda: os.getloadavg()[0],
        supplies: Path = _SUPPLIES,
    ) -> str:
        """What forbids it now, in words; empty: nothing.

        :param now: local time.
        :param path: of a path in the config.
        :param supplies: the kernel's folder of power supplies, ``Documentation/ABI/testing/sysfs-class-power``.
        """
        if self.hours and not any(_within(hours, now.time()) for hours in self.hours):
            return f"outside of {', '.join(self.hours)}"
        if self.load is not None and (busy := load() / (os.cpu_count() or 1)) >= self.load:
            return f"load {busy:.2f}, at most {self.load:g}"
        if self.mains and not on_mains(supplies):
            return "no mains power"
        if self.battery is not None and (charge := charged(supplies)) is not None and charge < self.battery:
            return f"battery {charge:.0f} %, at least {self.battery:g}"
        if self.file is not None and not path(self.file).exists():
            return f"{self.file} is not there"
        return ""


def _within(hours: str, now: time) -> bool:
    match = _HOURS.fullmatch(hours)
    if match is None:
        return False
    h1, m1, h2, m2 = map(int, match.groups())
    begin, end = time(h1, m1), time(h2, m2)
    return begin <= now < end if begin < end else now >= begin or now < end


def on_mains(supplies: Path) -> bool:
    """Whether a supply that is no battery is connected, or there is no battery that could stand in for it."""
    online = [_read(supply / "online") for supply in _of(supplies, batteries=False)]
    return any(value == "1" for value in online) or not _of(supplies, batteries=True)


def charged(supplies: Path) -> float | None:
    """Charge in percent of the fullest battery; None: there is none that tells it."""
    found = [_read(supply / "capacity") for supply in _of(supplies, batteries=True)]
    return max((float(value) for value in found if value.isdigit()), default=None)


def _of(supplies: Path, *, batteries: bool) -> list[Path]:
    """A mouse's battery (scope Device) says nothing of us."""
    if not supplies.is_dir():
        return []
    return [
        supply
        for supply in sorted(supplies.iterdir())
        if _read(supply / "scope") != "Device" and (_read(supply / "type") == "Battery") is batteries
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
