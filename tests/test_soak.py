"""The soak test's verdict sees what grows and nothing else, its picture shows it, and its command lives."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.plot import Panel, picture, steps
from benchmarks.soak_verdict import FLOORS, growing, trend, windows

ROOT = Path(__file__).parent.parent
MB = 1e6


def series(growth: float, noise: float, *, mean: float = 50 * MB, seed: int = 1) -> list[tuple[float, float]]:
    """Twenty windows of half a minute; ``growth`` from the first to the last."""
    draw = random.Random(seed)
    return [(30.0 * i, mean + growth * i / 19 + draw.gauss(0, noise)) for i in range(20)]


def test_what_grows_is_named_with_how_fast() -> None:
    (fault,) = growing({("store", "rss"): series(10 * MB, 0.1 * MB), ("clean", "rss"): series(0, 0.1 * MB)})
    said = re.fullmatch(r"store: rss grows by ([\d.]+) MB over the second half, ([\d.]+) MB an hour \(.*\)", fault)
    assert said is not None, fault
    assert 4 < float(said[1]) < 5.5
    assert 53 < float(said[2]) < 73


@pytest.mark.parametrize(
    ("metric", "growth"), [("fds", 8.0), ("threads", 4.0), ("files", 30 * MB), ("p99", 0.4), ("p50", 0.02)]
)
def test_everything_that_is_watched_can_be_named(metric: str, growth: float) -> None:
    assert growing({("x", metric): series(growth, growth / 100, mean=growth / 4)})
    assert set(FLOORS) >= {metric}


def test_noise_is_not_growth() -> None:
    flat = {(str(seed), "rss"): series(0, 3 * MB, seed=seed) for seed in range(300)}
    assert len(growing(flat)) <= 3
    assert growing({("x", "rss"): [(30.0 * i, 50 * MB) for i in range(20)]}) == []


def test_what_grows_at_the_beginning_only_is_settled() -> None:
    warming = [(30.0 * i, min(60 * MB, 40 * MB + 4 * MB * i)) for i in range(20)]
    assert growing({("x", "rss"): warming}) == []


def test_too_few_windows_say_nothing() -> None:
    assert trend(series(10 * MB, 0)[:6]) is None


def test_windows_are_medians_and_the_last_must_be_full() -> None:
    samples = [(float(i), 1000.0 if i == 4 else float(i // 10)) for i in range(25)]
    assert windows(samples, 10) == [(5.0, 0.0), (15.0, 1.0)]
    assert windows([*samples, *((float(i), 2.0) for i in range(25, 30))], 10)[-1] == (25.0, 2.0)
    assert windows([], 10) == []


def test_the_picture_is_well_formed_and_holds_every_curve() -> None:
    panels = [
        Panel("memory & more", {"a<b": [(0, 1), (300, 2.5)], "c": [(0, 0), (600, 4)]}),
        Panel("empty", {"a<b": []}),
    ]
    root = ElementTree.fromstring(picture(panels, 600))  # noqa: S314 - our own
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"memory & more", "empty", "a<b", "c", "10 min"} <= set(texts)


@pytest.mark.parametrize("most", [0.0, 0.003, 0.99, 1.0, 4.2, 55.0, 1e6, 9.99e8])
def test_axes_end_above_the_greatest_value_in_few_steps(most: float) -> None:
    ticks = steps(most)
    assert ticks[0] == 0
    assert ticks[-1] >= most
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seconds", "0"], "must be greater than 0"),
        (["--output", "nowhere/soak.jsonl"], "nowhere/soak.jsonl: No such file or directory"),
    ],
)
def test_wrong_command_lines(options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", *options]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_short_soak_notes_every_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--seconds", "5", "--window", "1", "--maximum", "4000"]
    files = ["--output", str(tmp_path / "soak.jsonl"), "--picture", str(tmp_path / "soak.svg")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=150, check=False, cwd=ROOT)
    assert done.returncode in {0, 1}, done.stderr  # that nothing grows is not to be seen in five seconds
    head, *samples, last = map(json.loads, (tmp_path / "soak.jsonl").read_text().splitlines())
    assert head["maximum"] == 4000
    assert last["rows"] > 0
    assert not [fault for fault in last["faults"] if "grows" not in fault], last
    nodes = {"meter", "clean", "means", "store", "report"}
    assert set(samples[-1]["processes"]) == {*nodes, "supervisor", "broker site"}
    assert all(samples[-1]["processes"][name]["rss"] > 10 * MB for name in nodes)
    assert {"rss", "fds", "threads", "files", "p50", "p99"} == set(samples[-1]["processes"]["store"])
    assert (tmp_path / "soak.svg").read_text().startswith("<svg")
