"""``penstock new``: every starter is right as it stands, and nothing that is there is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodes.cli import main, new


@pytest.mark.parametrize("starter", sorted(new.STARTERS))
def test_every_starter_is_right_as_it_stands(starter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "Line 3"
    assert main.run(["new", str(folder), "--starter", starter]) == 0
    out = capsys.readouterr().out
    assert f"next: penstock check {folder}/topology.yaml" in out
    assert (folder / "topology.yaml").read_text().count("topology: line-3\n") == 1
    assert main.run(["check", str(folder / "topology.yaml")]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_every_folder_of_starters_is_offered() -> None:
    folders = {path.name for path in (Path(new.__file__).parent / "starters").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == set(new.STARTERS)


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "topology.yaml"
    mine.write_text("mine")
    assert main.run(["new", str(tmp_path), "--starter", "custom"]) == 2
    assert capsys.readouterr().err == f"error: {mine} is there already; nothing was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["topology.yaml"]
    assert mine.read_text() == "mine"


def test_into_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main.run(["new", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "topology.yaml"]


def test_wrong_starters_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["new", str(tmp_path / "a"), "--starter", "kamera"]) == 2
    assert "did you mean 'camera'?" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main.run(["new", str(tmp_path / "file" / "a")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["ünïcode", "---", "a" * 200, "CAPS and spaces", "12", "null", "1e5"])
def test_any_folder_name_makes_a_topology_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["new", str(tmp_path / name)]) == 0
    assert main.run(["check", str(tmp_path / name / "topology.yaml")]) == 0, capsys.readouterr().err
