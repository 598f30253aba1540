"""Set-up from nothing: the lock file, the Makefile's first words, and the wheel, run outside of any checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nodes.cli._version import VERSION

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements-dev.lock"
MAKE = shutil.which("make")


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_everything_that_is_asked_for() -> None:
    pinned = {plain(line.split("==")[0]) for line in LOCK.read_text().splitlines() if re.match(r"[a-z]", line)}
    wanted = project()["project"]
    # executorch brings PyTorch, and an attrs that dp-accounting does not take: its tests say that it is not installed
    extras = {name: each for name, each in wanted["optional-dependencies"].items() if name != "executorch"}
    for requirement in [*wanted["dependencies"], *(d for e in extras.values() for d in e)]:
        name = plain(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
        assert name == "penstock" or name in pinned, f"{name} is not in the lock: make lock"


def test_the_lock_has_exact_versions_hashes_and_nothing_of_a_machine() -> None:
    lines = LOCK.read_text().splitlines()
    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.!+]+( ; [^\\]+)? \\| {4}--hash=sha256:[0-9a-f]{64}( \\)?", line), line
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "==" in line:
            assert following.startswith("    --hash=")


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", VERSION)
    hatch = project()["tool"]["hatch"]["version"]
    found = re.search(hatch["pattern"], (ROOT / hatch["path"]).read_text())
    assert found is not None
    assert found["version"] == VERSION


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What ``make`` looks at before it sets anything up."""
    for name in ("Makefile", "pyproject.toml", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, script: str) -> str:
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def made(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run([str(MAKE), *args], cwd=folder, capture_output=True, text=True, check=False, env=env)


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 1", "is not Python 3.11 or newer"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "cannot make virtual environments"),
    ],
)
def test_a_python_that_will_not_do_is_told_in_one_line(script: str, told: str, copy: Path) -> None:
    done = made(copy, "test", f"PYTHON={fake_python(copy, script)}")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert told in errors[0]
    assert not (copy / ".venv").exists()


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
def test_no_python_at_all_is_told_in_one_line(copy: Path) -> None:
    done = made(copy, "test", "PYTHON=")
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert errors == [
        "error: Penstock needs Python 3.11 or newer and found none; name one: make PYTHON=/path/to/python3"
    ]


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
def test_help_lists_every_target(copy: Path) -> None:
    text = (copy / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert declared is not None
    listed = {line.split()[1] for line in made(copy).stdout.splitlines()}
    assert listed == set(declared[1].split())


def test_ci_ends_with_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-3:] == ["make check", "make campaigns", "make test"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installer would."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_has_what_belongs_in_it_and_nothing_else(wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir()} == {"schemas", "broker", "nodes", f"penstock-{VERSION}.dist-info"}
    assert (wheel / f"penstock-{VERSION}.dist-info" / "licenses" / "LICENSE").is_file()
    for package in ("schemas", "broker", "nodes"):
        here = {
            str(path.relative_to(ROOT))
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        there = {str(path.relative_to(wheel)) for path in (wheel / package).rglob("*") if path.is_file()}
        assert there == here


def installed(wheel: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-c", "from nodes.cli.main import main; main()", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    where = "import nodes; print(nodes.__file__)"
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(wheel)
    done = installed(wheel, tmp_path, "demo", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["demo"]["frames"] == 450
    assert outcome["demo"]["accuracy"] >= 0.9
    assert str(ROOT) not in done.stdout


def test_new_and_check_work_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    assert installed(wheel, tmp_path, "new", "line", "--starter", "camera").returncode == 0
    checked = installed(wheel, tmp_path, "check", "line/topology.yaml")
    assert (checked.returncode, checked.stdout) == (0, "ok: 5 nodes, 4 edges\n"), checked.stderr
