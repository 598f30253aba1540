"""When a device may train."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nodes.federated.permission import When
from schemas.errors import ConfigError
from schemas.problems import validated

NOON = datetime(2026, 3, 1, 12, 0)  # noqa: DTZ001 - local time is what is meant


def supply(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir(parents=True)
    for key, value in files.items():
        (folder / name / key).write_text(value + "\n")


def why(folder: Path, now: datetime = NOON, **options: Any) -> str:
    when = validated(When, options)
    return when.why_not(now, lambda text: folder / text, supplies=folder / "supplies")


@pytest.mark.parametrize(
    ("hours", "at", "may"),
    [
        ("22:00-06:00", "23:10", True),
        ("22:00-06:00", "05:59", True),
        ("22:00-06:00", "06:00", False),
        ("22:00-06:00", "12:00", False),
        ("09:30 - 17:00", "09:30", True),
        ("09:30 - 17:00", "17:00", False),
        (["00:00-01:00", "11:00-13:00"], "12:00", True),
        ("08:00-08:00", "03:00", True),
    ],
)
def test_hours(tmp_path: Path, hours: Any, at: str, may: bool) -> None:
    now = datetime.strptime(f"2026-03-01 {at}", "%Y-%m-%d %H:%M")  # noqa: DTZ007 - as above
    assert (why(tmp_path, now, hours=hours) == "") is may


def test_load() -> None:
    cores = os.cpu_count() or 1
    when = validated(When, {"load": 0.5})
    assert when.why_not(NOON, Path, load=lambda: 0.4 * cores) == ""
    assert when.why_not(NOON, Path, load=lambda: 0.6 * cores) == "load 0.60, at most 0.5"


def test_mains_and_battery(tmp_path: Path) -> None:
    supplies = tmp_path / "supplies"
    assert why(tmp_path, mains=True, battery=50) == ""  # a gateway in a cabinet has neither
    supply(supplies, "AC", type="Mains", online="1")
    supply(supplies, "BAT0", type="Battery", capacity="40", scope="System")
    supply(supplies, "hidpp_battery_0", type="Battery", capacity="97", scope="Device")
    assert why(tmp_path, mains=True) == ""
    assert why(tmp_path, battery=50) == "battery 40 %, at least 50"
    (supplies / "AC/online").write_text("0\n")
    assert why(tmp_path, mains=True) == "no mains power"
    (supplies / "BAT0/capacity").write_text("garbage\n")
    assert why(tmp_path, battery=50) == ""


def test_an_operators_file(tmp_path: Path) -> None:
    assert why(tmp_path, file="unmetered") == "unmetered is not there"
    (tmp_path / "unmetered").touch()
    assert why(tmp_path, file="unmetered") == ""


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"hours": "22-6"}, "expected hours such as"), ({"load": 0}, "more than 0"), ({"battery": 101}, "100"),
     ({"power": "mains"}, "unknown key")],
)  # fmt: skip
def test_what_is_no_condition(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        validated(When, options)
