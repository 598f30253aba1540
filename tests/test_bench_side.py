"""The benchmarks' generator, contestants and collector do the work and count right. Nothing is timed here: counts only."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import brokers
import pytest

from benchmarks import contestants, figures, side
from benchmarks.figures import OURS, in_turns
from nodes.cli import bench
from nodes.cli.main import run as penstock

ROOT = Path(__file__).parent.parent
COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
NODE_RED = contestants.cache_folder() / contestants.NODE_RED
LITTLE = side.Load(window=500, warm=0.1, seconds=0.2, patience=20)
PEERS = [
    "c" if COMPILER else pytest.param("c", marks=pytest.mark.skip(reason="there is no C compiler")),
    "paho",
    "aiomqtt",
]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled goes where the tests' other files are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "benchmarks"))
    contestants.compiled.cache_clear()


PEERS_DO = [("telemetry", 0), ("relay", 1), ("gathered", 0)]


@pytest.mark.parametrize(("work", "qos"), [("telemetry", 1), ("relay", 0), ("gathered", 0)])
def test_our_topologies_do_the_whole_work_at_our_broker(work: str, qos: int) -> None:
    outcome = side.run(OURS, side.EMBEDDED, work, qos, LITTLE)  # raises if a value is wrong
    assert (outcome.lost, outcome.counted > 0, outcome.memory > 0) == (0, True, True)


@pytest.mark.parametrize(("work", "qos"), [("telemetry", 0), ("relay", 1)])
@pytest.mark.parametrize("at", [brokers.param(side.MOSQUITTO)])
def test_our_topologies_do_the_whole_work_at_mosquitto(work: str, qos: int, at: str) -> None:
    outcome = side.run(OURS, at, work, qos, LITTLE)
    assert (outcome.lost, outcome.counted > 0, outcome.memory > 0) == (0, True, True)


@pytest.mark.parametrize(("work", "qos"), PEERS_DO)
@pytest.mark.parametrize("who", PEERS)
@pytest.mark.parametrize("at", [brokers.param(side.MOSQUITTO)])
def test_every_peer_does_the_whole_work(who: str, work: str, qos: int, at: str) -> None:
    outcome = side.run(who, at, work, qos, LITTLE)
    assert (outcome.lost, outcome.counted > 0, outcome.memory > 0) == (0, True, True)


@pytest.mark.connected
@pytest.mark.skipif(not (NODE_RED / "whole").exists(), reason="Node-RED is not installed; make bench does it")
@pytest.mark.parametrize("work", ["telemetry", "relay", "gathered"])
def test_the_flows_of_node_red_do_the_whole_work(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "node_red", lambda: NODE_RED / "node_modules/node-red/red.js")
    outcome = side.run("node-red", side.EMBEDDED, work, 1, LITTLE)
    assert (outcome.lost, outcome.counted > 0, outcome.memory > 0) == (0, True, True)


@pytest.mark.parametrize(("work", "qos"), PEERS_DO)
def test_the_generator_in_python_does_what_the_one_in_c_does(
    work: str, qos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert side.load_command()[-1].endswith("load_without_c.py")
    outcome = side.run("paho", side.EMBEDDED, work, qos, LITTLE)
    assert (outcome.lost, outcome.counted > 0) == (0, True)


@pytest.mark.parametrize("at", [side.EMBEDDED, brokers.param(side.MOSQUITTO)])
def test_the_generator_alone_gets_all_that_it_sends(at: str) -> None:
    outcome = side.run(side.ALONE, at, "relay", 0, LITTLE)
    assert (outcome.lost, outcome.counted > 0, outcome.cpu) == (0, True, 0)


SLOPPY = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.peers import with_paho
from benchmarks.peers.with_paho import Relay

n, take = 0, Relay.take

def sloppy(self, payload):
    global n
    n += 1
    if n % 500:
        take(self, payload)
    else:
        {fault}

Relay.take = sloppy
with_paho.main()
"""


def sloppy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    """A contestant ``sloppy`` that treats one message in 500 so."""
    script = tmp_path / "sloppy.py"
    script.write_text(SLOPPY.format(root=str(ROOT), fault=fault))

    def command(work: str, qos: int, port: int, folder: Path) -> contestants.Command:
        return [sys.executable, str(script), str(port), work, str(qos)], {}

    monkeypatch.setattr(side, "PROGRAMS", {"sloppy": command})


@pytest.mark.parametrize(
    ("fault", "sign"), [("pass", 1), ("take(self, payload); take(self, payload)", -1)], ids=["loses", "repeats"]
)
def test_who_loses_or_repeats_has_no_rate(
    fault: str, sign: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sloppy(monkeypatch, tmp_path, fault)
    outcome = side.run("sloppy", side.EMBEDDED, "relay", 0, side.Load(window=2000, warm=0.1, seconds=0.3, patience=1))
    assert outcome.lost * sign > 0
    assert outcome.rate == 0


def test_who_answers_wrong_values_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sloppy(monkeypatch, tmp_path, "take(self, payload.replace(b'temperature\":1', b'temperature\":2'))")
    with pytest.raises(RuntimeError, match="wrong values"):
        side.run("sloppy", side.EMBEDDED, "relay", 0, LITTLE)


def test_a_program_that_does_not_answer_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(work: str, qos: int, port: int, folder: Path) -> contestants.Command:
        return [sys.executable, "-c", "raise SystemExit('no licence')"], {}

    monkeypatch.setattr(side, "PROGRAMS", {"ended": command})
    with pytest.raises(RuntimeError, match="no licence"):
        side.run("ended", side.EMBEDDED, "relay", 0, LITTLE)


def test_who_is_not_to_be_had_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    contestants.node_red.cache_clear()
    found = side.contestants("relay", 0, LITTLE, side.EMBEDDED, [OURS, "c", "node-red", side.ALONE])
    assert set(found) == {OURS, side.ALONE}
    said = capsys.readouterr().err
    assert "without c: no C compiler" in said
    assert "without node-red: no node or npm" in said


def test_the_command_lists_refuses_and_says_where_it_is_to_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert penstock(["bench", "--list"]) == 0
    assert {"telemetry", "relay"} <= set(capsys.readouterr().out.split())
    assert penstock(["bench", "telemtry"]) == 2
    assert "did you mean 'telemetry'?" in capsys.readouterr().err
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert penstock(["bench", "telemetry"]) == 2
    assert "not installed with Penstock" in capsys.readouterr().err


def test_rounds_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_turns({OURS: lambda: 1})[OURS] == [1] * 5
    monkeypatch.setattr(figures, "ROUNDS", 2)
    assert in_turns({OURS: lambda: 1, "c": lambda: 2}) == {OURS: [1, 1], "c": [2, 2]}
