"""``penstock check`` and ``penstock graph``."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from nodes.cli import main
from nodes.cli._late import late

ROOT = Path(__file__).parent.parent
GOOD = """\
topology: line-3
nodes:
  sensor: {ingest: {source: synthetic, count: 10}}
  hot:    {preprocess: {steps: [{filter: value > 0.5}]}, from: sensor}
  store:  {uplink: {sink: sqlite, path: hot.db}, from: hot}
  raw:    {uplink: {sink: sqlite, path: raw.db}, from: {sensor: {delivery: fast}}}
"""
WRONG = """\
topology: line-3
nodes:
  sensor: {ingest: {source: synthetik}}
  store:  {uplink: {sink: sqlite, path: hot.db}, from: sensr}
"""
TWO_HOSTS = """\
topology: line-3
brokers:
  site:  {url: mqtt://gateway.local}
  cloud: {url: mqtt://cloud.example.com}
hosts:
  gateway: {broker: site}
  cloud:   {broker: cloud}
nodes:
  sensor: {ingest: {source: synthetic}, on: gateway}
  store:  {uplink: {sink: sqlite, path: hot.db}, from: sensor, on: cloud}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "line.yaml"
    path.write_text(text)
    return str(path)


def test_a_right_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["check", written(tmp_path, GOOD)]) == 0
    assert capsys.readouterr().out == "ok: 4 nodes, 3 edges\n"
    assert main.run(["check", written(tmp_path, TWO_HOSTS)]) == 0
    assert capsys.readouterr().out == "ok: 2 nodes, 1 edge, 2 hosts, 2 brokers\n"


def test_the_plan_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["check", written(tmp_path, GOOD), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["ok"] is True
    assert [node["name"] for node in plan["nodes"]] == ["sensor", "hot", "raw", "store"]
    deliveries = {(edge["from"], edge["to"]): edge["delivery"] for edge in plan["edges"]}
    assert deliveries == {
        ("sensor.out", "hot"): "safe",
        ("sensor.out", "raw"): "fast",
        ("hot.out", "store"): "safe",
    }


def test_each_fault_is_one_line_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, WRONG)
    assert main.run(["check", path]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    lines = caught.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"error: {path}:3:")
    assert "'synthetic'" in lines[0]
    assert lines[1].startswith(f"error: {path}:4:")
    assert "did you mean 'sensor'?" in lines[1]


def test_faults_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, WRONG)
    assert main.run(["check", path, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [(error["file"], error["line"]) for error in told["errors"]] == [(path, 3), (path, 4)]
    assert main.run(["check", str(tmp_path / "none.yaml"), "--json"]) == 2
    assert "no such file" in json.loads(capsys.readouterr().out)["errors"][0]["message"]


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[" * 100_000, b"a: &a [*a]", b"- 1\n- 2", b"{"])
def test_what_is_no_topology_is_told_in_lines(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "garbage.yaml"
    path.write_bytes(content)
    assert main.run(["check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("error: ") and "Traceback" not in line for line in lines)


def test_a_folder_is_no_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["check", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_answers_soon(tmp_path: Path) -> None:
    """``make bench`` has the figure and its limit of half a second; this is a guard against importing the world. Counted is
    the processor's time, so that a busy machine matters little; the first run compiles.
    """
    path = written(tmp_path, GOOD)
    cache = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
    seconds = []
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-m", "nodes.cli.main", "check", path], cwd=ROOT, env=cache)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 1.0, seconds


def test_check_of_the_demo_loads_no_numpy() -> None:
    """It has all stages, an expression and a window, and would load numpy for any of them."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nodes.cli.main", "check", "nodes/demo/topology.yaml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "msgspec" in told.stderr
    assert "numpy" not in told.stderr


def test_a_late_module_is_loaded_at_its_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tardy").mkdir()
    (tmp_path / "tardy/__init__.py").write_text("import tardy.inner\nvalue = tardy.inner.value\n")
    (tmp_path / "tardy/inner.py").write_text("value = 7\n")
    (tmp_path / "broken_tardy.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tardy", "broken_tardy"):
        late(name)
    try:
        whole = importlib.import_module("tardy")
        assert "tardy.inner" not in sys.modules
        assert importlib.import_module("tardy.inner").value == whole.value == 7
        assert sys.modules["tardy"] is whole
        with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
            _ = importlib.import_module("broken_tardy").value
        assert "broken_tardy" not in sys.modules
        late("there_is_no_such_module")  # whoever imports it hears of it
        assert "there_is_no_such_module" not in sys.modules
    finally:
        for name in ("tardy", "tardy.inner", "broken_tardy"):
            sys.modules.pop(name, None)


def test_mermaid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["graph", written(tmp_path, GOOD)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("flowchart LR\n")
    assert '(["sensor<br/>ingest synthetic"])' in text
    assert len(re.findall(r'-- "readings/1 · safe" -->', text)) == 2
    assert len(re.findall(r'-\. "readings/1 · fast" \.->', text)) == 1
    assert "subgraph" not in text
    assert main.run(["graph", written(tmp_path, TWO_HOSTS)]) == 0
    text = capsys.readouterr().out
    assert 'subgraph h0["gateway"]' in text
    assert "relay" in text


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Box of each node: left, top, right, bottom."""
    space = "{http://www.w3.org/2000/svg}"
    found = {}
    for group in ET.fromstring(svg).findall(f"{space}g"):  # noqa: S314 - our own text
        title, rect = group.find(f"{space}title"), group.find(f"{space}rect")
        assert title is not None
        assert rect is not None
        x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        found[str(title.text)] = (x, y, x + width, y + height)
    return found


def test_svg_shows_every_node_once_and_none_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "line.svg"
    assert main.run(["graph", written(tmp_path, GOOD), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    svg = out.read_text()
    found = boxes(svg)
    assert set(found) == {"sensor", "hot", "store", "raw"}
    places = list(found.values())
    for i, (left, top, right, bottom) in enumerate(places):
        for other in places[i + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    root = ET.fromstring(svg)  # noqa: S314 - our own text
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(left >= 0 and top >= 0 and right <= width and bottom <= height for left, top, right, bottom in places)
    assert found["sensor"][2] < found["hot"][0]
    assert svg.count('class="edge"') == 2
    assert svg.count('class="edge fast"') == 1
    assert "prefers-color-scheme:dark" in svg


def test_svg_of_many_hosts_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["graph", written(tmp_path, TWO_HOSTS), "--format", "svg"]) == 0
    svg = capsys.readouterr().out
    assert "on cloud" in svg
    assert "readings/1 · safe · relay" in svg


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none" / "line.svg"
    assert main.run(["graph", written(tmp_path, GOOD), "-o", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out}: cannot be written: No such file or directory\n"
