"""The documentation is true: its links lead somewhere, its commands exist, its topology is right, its code runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import msgpack  # type: ignore[import-untyped]  # has neither stubs nor py.typed
import numpy as np
import pytest

from nodes.cli import main
from nodes.cli.commands import COMMANDS
from schemas.codec import encode
from schemas.messages import TYPE_OF, Message, Model, Predictions, Readings

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"node_modules", ".venv", "dist", "build"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Git hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/architecture.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append(target)
    assert lost == []


def commands_in(text: str) -> list[list[str]]:
    """``penstock …`` and ``make …`` as they stand in code: lines of an indented block, and spans."""
    found = re.findall(r"^ {4}(?:\S*/)?((?:penstock|make) [a-z-].*)$", text, re.MULTILINE)
    found += re.findall(r"`((?:penstock|make) [a-z-][^`]*)`", text)
    words = [shlex.split(re.split(r"\s+#|\s*[|>]", line)[0].replace("…", "")) for line in found]
    return [line for line in words if len(line) > 1]


@cache
def help_of(command: str) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main.run([command, "--help"]) == 0
    return out.getvalue()


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists_with_its_options(name: str) -> None:
    wrong = []
    for line in commands_in((ROOT / name).read_text()):
        if line[0] == "make":
            wrong += [line for word in line[1:] if "=" not in word and word not in targets()]
            continue
        known = help_of(line[1]) if line[1] in COMMANDS else help_of("version") if line[1].startswith("-") else None
        if known is None:
            wrong.append(line)
            continue
        if line[1] in COMMANDS:
            options = [word for word in line[2:] if re.match(r"--?[a-z]", word)]
            wrong += [line for option in options if not re.search(rf"(?<!\S){option}\b", known)]
    assert wrong == []


def test_commands_are_found_in_text() -> None:
    text = "    penstock run a.yaml --host b   # c\nand `penstock nodes sink/http`, `make test JOBS=2`\nmake it so\n"
    assert commands_in(text) == [
        ["penstock", "run", "a.yaml", "--host", "b"],
        ["penstock", "nodes", "sink/http"],
        ["make", "test", "JOBS=2"],
    ]


def block(page: str, language: str, number: int = 0) -> str:
    """The n-th fenced block of a language in a page."""
    found: list[str] = re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return found[number]


@pytest.fixture
def line_3(tmp_path: Path) -> Path:
    """The topology of the README, with files by the names that it has."""
    demo = ROOT / "nodes" / "demo"
    for name, source in (
        ("belt.mkv", "digits.mkv"),
        ("defect.tflite", "digits-int8.tflite"),
        ("labels.txt", "labels.txt"),
    ):
        (tmp_path / name).symlink_to(demo / source)
    path = tmp_path / "line-3.yaml"
    path.write_text(block("README.md", "yaml"))
    return path


def test_the_topology_of_the_readme_is_right(line_3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["check", str(line_3)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == "ok: 7 nodes, 6 edges, 3 hosts, 2 brokers\n"


def test_the_picture_of_the_readme_is_of_that_topology(line_3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["graph", str(line_3), "--format", "svg"]) == 0
    assert (ROOT / "docs" / "line.svg").read_text() == capsys.readouterr().out


def test_the_fault_of_the_readme_is_told_so(line_3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = line_3.read_text()
    assert "{resize:" in text
    line_3.write_text(text.replace("{resize:", "{resise:"))
    assert main.run(["check", str(line_3)]) == 2
    told = capsys.readouterr().err.replace(str(line_3), "line-3.yaml").strip()
    assert f"    {told}\n" in (ROOT / "README.md").read_text()


def test_the_node_of_the_readme_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("README.md", "python", 0)
    scope: dict[str, object] = {}
    exec(code, scope)  # noqa: S102 - it is the README's own
    function = scope["fahrenheit"]
    assert callable(function)
    answer = function(Readings(n=2, columns={"temperature": np.array([0.0, 100.0])}))
    assert answer.columns["temperature"].tolist() == [32.0, 212.0]
    (tmp_path / "my_node.py").write_text(code)
    (tmp_path / "line.yaml").write_text(
        "topology: line\nnodes:\n"
        "  sensors: {ingest: {source: synthetic, signals: {temperature: {kind: walk}}}}\n"
        f"{block('README.md', 'yaml', 1)}"
        "  out: {uplink: {sink: stdout}, from: warm}\n"
    )
    assert main.run(["check", str(tmp_path / "line.yaml")]) == 0, capsys.readouterr().err


def test_the_subscriber_of_the_readme_reads_our_messages(capsys: pytest.CaptureFixture[str]) -> None:
    """Its callback, as it stands, is given a message as the bus would; the whole program is in examples/subscribers."""
    code = block("README.md", "python", 1)
    callback = code[code.index("def on_message") : code.index("client = ")]
    scope: dict[str, object] = {"msgpack": msgpack}
    exec(callback, scope)  # noqa: S102 - it is the README's own
    model = Model(name="m", version="1", digest="00")
    body = Predictions(model=model, seen="a", labels=["7"], scores=np.array([0.5], "<f4"))

    class Received:
        payload = encode(Message("a", "camera-1", 1, body))

    on_message = scope["on_message"]
    assert callable(on_message)
    on_message(None, None, Received())
    assert capsys.readouterr().out == "camera-1 ['7']\n"


def test_every_message_type_is_documented() -> None:
    page = (ROOT / "docs" / "wire.md").read_text()
    assert all(f"| `{name}` |" in page for name in TYPE_OF.values())


def test_every_key_of_a_topology_is_documented() -> None:
    from schemas.topology_parts import Broker, Document, EdgeOptions, Host, NodeSettings

    page = (ROOT / "docs" / "topology.md").read_text()
    for model in (Document, Broker, Host, NodeSettings, EdgeOptions):
        for name, info in model.model_fields.items():
            assert re.search(rf"^(\| |### ).*`{info.alias or name}`", page, re.MULTILINE), (
                f"{info.alias or name} is not there"
            )


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert all(f"| `penstock {name}` |" in page for name in COMMANDS)


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in wanted:
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        assert name == "penstock" or f"`{name}`" in page, f"{name} has no reason"


def test_no_page_names_a_machines_path() -> None:
    paths = re.compile(r"/(?:home|Users|root|work|tmp)/")
    assert [name for name in NAMES if paths.search((ROOT / name).read_text())] == []


def test_decisions_are_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    assert all(f"({page.name})" in index for page in folder.glob("0*.md"))


def test_tracked_pages_are_the_ones_looked_at() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert set(listed.stdout.split()) <= set(NAMES)
