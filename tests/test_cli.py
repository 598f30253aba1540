"""The command line itself: finding commands, telling errors, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from nodes.cli import commands, main
from schemas.errors import (
    ConfigError,
    ConnectError,
    MissingError,
    PenstockError,
    Problem,
    RunError,
    UnbalancedError,
)

ROOT = Path(__file__).parent.parent


def penstock(*args: str, timeout: float = 30, **env: str) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "nodes.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, text) in commands.COMMANDS.items():
        assert f"  {name} " in out
        assert text.split()[0] in out


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_every_command_is_there_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = commands.COMMANDS[name]
    assert callable(import_module(module).command)
    assert main.run([name, "--help"]) == 0
    assert f"Usage: penstock {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "never"),
    [
        (["--help"], {"rich", "numpy", "pydantic", "ruamel", "asyncio", "structlog"}),
        (["--version"], {"rich", "numpy", "pydantic", "ruamel", "asyncio", "structlog"}),
        (["new", "--help"], {"rich", "numpy", "ruamel", "asyncio", "structlog"}),
        (["check", "none.yaml"], {"rich", "structlog", "mqtt5", "av", "PIL", "ai_edge_litert"}),
    ],
)
def test_a_command_imports_only_what_it_needs(args: list[str], never: set[str]) -> None:
    code = (
        f"import sys; from nodes.cli.main import run; run({args!r});"
        f"print('imported', sorted({never!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "imported []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    first = capsys.readouterr().out
    assert main.run(["version"]) == 0
    assert first.split()[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["chek"], "error: there is no command 'chek'; did you mean 'check'?"),
        (["check"], "error: Missing argument"),
        (["check", "--jsn", "x.yaml"], "error: No such option: --jsn"),
        (["check", "a.yaml", "b.yaml"], "error: Got unexpected extra argument(s) (b.yaml)"),
        (["tap", "mqtt://localhost", "--count", "0"], "error: Invalid value for '--count'"),
        (["graph", "x.yaml", "--format", "png"], "error: Invalid value for '--format'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(args) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith(told)
    assert caught.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (RunError("node camera failed"), 1, ["error: node camera failed"]),
        (
            ConfigError(Problem(("nodes", "a", 0), "wrong"), Problem((), "also wrong")),
            2,
            ["error: nodes.a.0: wrong", "error: also wrong"],
        ),
        (MissingError("PyAV", extra="camera"), 3, ["error: PyAV is not installed; install it with: pip install"]),
        (ConnectError("localhost:1883: refused"), 4, ["error: localhost:1883: refused"]),
        (UnbalancedError("detect: 3 rows are missing"), 5, ["error: detect: 3 rows are missing"]),
    ],
)
def test_errors_have_their_exit_codes(
    error: PenstockError,
    code: int,
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "failing", SimpleNamespace(command=command))
    monkeypatch.setitem(commands.COMMANDS, "fail", ("failing", "Fail."))
    assert main.run(["fail"]) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(lines)
    for line, start in zip(told, lines, strict=True):
        assert line.startswith(start)


def test_a_fault_of_ours_is_told_without_traceback_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> None:
        raise KeyError("x")

    monkeypatch.delenv("PENSTOCK_DEBUG", raising=False)
    monkeypatch.setitem(sys.modules, "failing", SimpleNamespace(command=command))
    monkeypatch.setitem(commands.COMMANDS, "fail", ("failing", "Fail."))
    assert main.run(["fail"]) == 1
    told = capsys.readouterr().err
    assert "KeyError" in told
    assert "Traceback" not in told
    monkeypatch.setenv("PENSTOCK_DEBUG", "1")
    with pytest.raises(KeyError):
        main.run(["fail"])


def test_a_command_returns_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seven", SimpleNamespace(command=lambda: 7))
    monkeypatch.setitem(commands.COMMANDS, "seven", ("seven", "Seven."))
    assert main.run(["seven"]) == 7


def test_the_real_program_ends_with_the_code() -> None:
    done = penstock("check", "no-such-file.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no-such-file.yaml: there is no such file\n"


def test_shell_completion_names_the_commands() -> None:
    done = penstock(_PENSTOCK_COMPLETE="complete_bash", COMP_WORDS="penstock ch", COMP_CWORD="1")
    assert done.stdout.split() == ["check"]
