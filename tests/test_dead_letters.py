"""Dead letters: kept in a file within its bounds, listed, shown, and replayed to a node that was repaired."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import passed, rows, run, until

from broker.bus import Publication
from broker.connect import connect
from nodes.cli import main
from nodes.dead import Burials, DeadLetters, Letter, files
from nodes.supervisor import Outcome, Supervisor
from schemas import codec
from schemas.messages import Message, Readings

# -- the file ---------------------------------------------------------------------------------------------------------------


def letter(number: int, payload: bytes = b"x", **more: Any) -> Letter:
    given = {"reason": "failed", "detail": "why", "edge": "a.out", **more}
    return Letter(first=10**18 + number, position=f"m:{number}", payload=payload, **given)


def test_letters_are_kept_and_a_repeat_counts_on(tmp_path: Path) -> None:
    kept = DeadLetters(tmp_path / "n.dead")
    assert kept.letters() == []
    assert not kept.path.exists()  # a healthy node has no file
    kept.add([letter(1, b"one", rows=7), letter(2, b"two", detail="\ud800")])
    kept.add([letter(1, b"one", reason="other"), letter(1, b"else")])
    kept.close()
    again = DeadLetters(tmp_path / "n.dead")
    first, second, third = again.letters([1, 2, 4])
    assert (first.payload, first.times, first.reason, first.rows, first.length) == (b"one", 2, "other", 7, 3)
    assert (second.payload, second.detail) == (b"two", "?")
    assert third.payload == b"else"
    assert [one.payload for one in again.letters()] == [b"", b"", b""]
    assert files(tmp_path).keys() == {"n"}


def test_the_oldest_make_room_and_are_counted(tmp_path: Path) -> None:
    kept = DeadLetters(tmp_path / "n.dead", limit=100_000)
    for i in range(100):
        kept.add([letter(i, os.urandom(3000))])
    left = kept.letters()
    assert kept.dropped == 100 - len(left)
    assert [one.position for one in left] == [f"m:{i}" for i in range(100 - len(left), 100)]
    assert len(left) == 100_000 // 3512
    kept.add([letter(1000, b"y" * 90_000)])  # more than a quarter: kept in part
    (big,) = [one for one in kept.letters([101]) if one.position == "m:1000"]
    assert (len(big.payload), big.length) == (25_000, 90_000)
    kept.add([letter(2000, b"z")] * 50)
    assert kept.letters()[-1].times == 50
    kept.close()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 250_000


def test_what_the_node_is_done_with_goes_and_what_it_refuses_again_stays(tmp_path: Path) -> None:
    node, command = DeadLetters(tmp_path / "n.dead"), DeadLetters(tmp_path / "n.dead")
    node.add([letter(i) for i in range(1, 5)])
    command.sending([1, 2, 3], keep=False)
    assert command.answers([1, 2, 3]) == {1: None, 2: None, 3: None}
    node.add([letter(2, detail="still")])  # refused again, before its step is committed
    node.done([("a.out", "m:1"), ("a.out", "m:2"), ("a.out", "m:4"), ("b.out", "m:3")])
    assert command.answers([1, 2, 3]) == {1: True, 2: False, 3: None}
    assert [(one.id, one.detail) for one in command.letters()] == [(2, "still"), (3, "why"), (4, "why")]
    command.sending([4], keep=True)
    node.done([("a.out", "m:4")])
    assert command.answers([4]) == {4: True}
    assert [one.id for one in command.letters()] == [2, 3, 4]


def test_a_damaged_file_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "n.dead"
    path.write_bytes(os.urandom(5000))
    kept = DeadLetters(path)
    kept.add([letter(1)])
    assert len(kept.letters()) == 1
    assert (tmp_path / "n.dead.damaged").stat().st_size == 5000


def test_a_new_file_is_opened_by_several_at_once(tmp_path: Path) -> None:
    for attempt in range(4):
        files = [DeadLetters(tmp_path / f"{attempt}.dead") for _ in range(6)]
        together = threading.Barrier(len(files))

        def work(of: int, files: list[DeadLetters] = files, together: threading.Barrier = together) -> None:
            together.wait()
            files[of].add([letter(of)])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(files))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(files[0].letters()) == len(files)
        for file in files:
            file.close()


def test_many_threads_write_at_once(tmp_path: Path) -> None:
    kept, other = DeadLetters(tmp_path / "n.dead"), DeadLetters(tmp_path / "n.dead")

    def work(of: int, file: DeadLetters) -> None:
        for i in range(15):
            file.add([letter(1000 * of + i)])

    threads = [threading.Thread(target=work, args=(i, (kept, other)[i % 2])) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept.letters()) == 60


def test_a_step_waits_until_its_letters_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.dead._RETRY", 0.01)
    full = True
    real = DeadLetters.add

    def add(self: DeadLetters, letters: list[Letter]) -> None:
        if full:
            raise sqlite3.OperationalError("database or disk is full")
        real(self, letters)

    monkeypatch.setattr(DeadLetters, "add", add)

    async def go() -> None:
        nonlocal full
        burials = Burials(tmp_path / "n.dead")
        burials.add(letter(1))
        await burials.settle("n", patient=False)  # tries, and comes back
        waiting = [asyncio.create_task(burials.settle("n")) for _ in range(2)]
        burials.add(letter(2))
        done, _ = await asyncio.wait(waiting, timeout=0.1)
        assert not done
        full = False
        await asyncio.gather(*waiting)
        assert len(DeadLetters(tmp_path / "n.dead").letters()) == 2
        await burials.close("n")

    asyncio.run(go())


# -- a topology ---------------------------------------------------------------------------------------------------------------

TOTAL = 20_000
FAULTY = """
from schemas.messages import Readings


def parse(readings: Readings) -> Readings:
    if (readings.columns["value"] % 10 == {bad}).any():
        raise ValueError("cannot take it")
    return Readings(n=readings.n, columns={{**readings.columns, "double": readings.columns["value"] * 2}}, time=readings.time)
"""
TOPOLOGY = """
topology: dead
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, device_column: device, time: time, batch: 1, rate: 200/s}}}}
  parse: {{custom: {{path: parse.py, function: parse}}, from: meter{process}}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: parse{process}}}
"""


def site(folder: Path, process: str = "") -> Path:
    lines = ["time,device,value", *(f"{1_700_000_000 + i},d{i % 4},{i}" for i in range(TOTAL))]
    (folder / "meter.csv").write_text("\n".join(lines) + "\n")
    (folder / "parse.py").write_text(FAULTY.format(bad=3))
    path = folder / "dead.yaml"
    path.write_text(TOPOLOGY.format(process=process))
    return path


def stopped(path: Path, after: int, meddle: Callable[[Supervisor], Any] | None = None) -> Outcome:
    """Run until ``parse`` has refused so many, then drain."""
    stops: list[asyncio.Task[None]] = []

    async def drain(supervisor: Supervisor) -> None:
        await until(lambda: (book := supervisor.views["parse"].books) is not None and sum(book.dead.values()) >= after)
        if meddle is not None:
            await meddle(supervisor)
        stops.append(asyncio.create_task(supervisor.stop()))
        await asyncio.Event().wait()

    return run(path, meddle=drain)


def penstock(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main.run(list(args))
    caught = capsys.readouterr()
    return code, caught.out, caught.err


@pytest.mark.parametrize("process", ["", ", process: both"], ids=["processes", "one-process"])
def test_a_node_is_repaired_and_its_letters_are_replayed(
    tmp_path: Path, process: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = site(tmp_path, process), str(tmp_path / "state")
    first = stopped(path, 8)
    refused = first.ledgers["parse"].dead
    capsys.readouterr()

    code, out, _ = penstock(capsys, "dead", "list", str(path), "--state", state, "--json")
    listed = json.loads(out)
    assert code == 0
    assert listed["dropped"] == {}
    assert len(listed["letters"]) == refused["exception"] >= 8
    one = listed["letters"][0]
    assert (one["id"], one["node"], one["reason"], one["edge"], one["rows"]) == (
        "parse/1",
        "parse",
        "exception",
        "meter.out",
        1,
    )
    assert one["detail"].startswith("parse.py:")
    assert one["detail"].endswith("ValueError: cannot take it")
    code, out, _ = penstock(capsys, "dead", "list", str(path), "--state", state, "--node", "parse", "--since", "1h")
    assert out.splitlines()[2].split()[:4] == [
        "parse",
        "exception",
        str(refused["exception"]),
        str(refused["exception"]),
    ]
    assert penstock(capsys, "dead", "list", str(path), "--state", state, "--since", "1ns")[1] == "no dead letters\n"

    code, out, _ = penstock(capsys, "dead", "show", str(path), "parse/1", "--state", state)
    assert f"reason    exception: {one['detail']}" in out
    assert f"position  {one['position']}" in out
    assert json.loads(out[out.index("{") :])["body"]["columns"]["value"] == [3]

    code, _, err = penstock(capsys, "dead", "replay", str(path), "--state", state)
    assert code != 0
    assert "does not run" in err  # there is nobody who could take them

    (tmp_path / "parse.py").write_text(FAULTY.format(bad=7))  # half repaired
    answers: list[tuple[int, str]] = []
    books: list[Any] = []

    async def replay(supervisor: Supervisor) -> None:
        await until(lambda: supervisor.views["parse"].state == "ready" and passed(supervisor, "store") > 0)
        answers.append(await command("dead", "replay", str(path), "--state", state, "--keep", "parse/1"))
        answers.append(await command("dead", "replay", str(path), "--state", state, "--reason", "exception"))
        async with asyncio.timeout(20):  # a node shows its books once a second
            while not (books and "replayed" in books[-1]["nodes"]["parse"]["ledger"]["received"]):
                books.append(json.loads((await command("ledger", str(path), "--state", state, "--json"))[1]))
        supervisor.end()

    outcome = run(path, meddle=replay)
    assert answers[0] == (0, "parse: 1 replayed\n"), answers
    told = re.fullmatch(r"parse: (\d+) replayed(?:, (\d+) refused again)?\n", answers[1][1])
    assert told is not None, answers
    done, again = int(told[1]), int(told[2] or 0)  # what the half repaired node has refused meanwhile, it refuses again
    assert done == refused["exception"]
    assert outcome.complete
    assert outcome.findings == []
    book = outcome.ledgers["parse"]
    assert book.received["replayed"].messages == refused["exception"] + again
    assert book.repeated["replayed"] == 1  # the one that was kept, and sent twice
    total = outcome.ledgers["meter"].emitted["out"].messages
    late = sum(v % 10 == 7 for v in range(first.ledgers["parse"].received["meter.out"].messages, total))
    assert book.dead["exception"] == refused["exception"] + late + again
    values = [
        v for (v,) in rows(tmp_path / "out.sqlite", "SELECT value FROM rows WHERE double = 2 * value ORDER BY value")
    ]
    missing = set(range(total)) - set(values)
    assert len(values) == len(set(values))
    assert all(v % 10 == 7 for v in missing)
    assert len(missing) == late
    left = files(tmp_path / "state")["parse"].letters()
    assert len(left) == late
    running = books[-1]
    assert running["nodes"]["parse"]["ledger"]["received"]["replayed"]["messages"] > 0
    assert running["findings"] == []
    assert not running["ended"]


async def command(*args: str) -> tuple[int, str]:
    """A ``penstock`` process beside the run: its exit code, and its output with its errors."""
    return await asyncio.to_thread(_command, *args)


def _command(*args: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli.main", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=Path(__file__).parent.parent,
        text=True,
        check=False,
        timeout=30,
    )
    return done.returncode, done.stdout


def test_a_node_that_refuses_everything_goes_on_to_the_end(tmp_path: Path) -> None:
    path = site(tmp_path)
    path.write_text(path.read_text().replace(", rate: 200/s", ""))
    (tmp_path / "parse.py").write_text(FAULTY.format(bad=3).replace("if (", "if True or ("))
    lines = (tmp_path / "meter.csv").read_text().splitlines()[:8001]
    (tmp_path / "meter.csv").write_text("\n".join(lines) + "\n")
    outcome = run(path)
    assert outcome.complete
    assert outcome.findings == []
    assert outcome.ledgers["parse"].dead == {"exception": 8000}
    letters = files(tmp_path / "state")["parse"].letters()
    assert [letter.times for letter in letters] == [1] * 8000


def test_a_killed_node_has_its_letters_and_garbage_cannot_be_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = site(tmp_path), tmp_path / "state"
    draw, answers = random.Random(3), []

    async def break_it(supervisor: Supervisor) -> None:
        async with connect(supervisor.brokers.urls["local"], client_id="intruder", patience=5) as bus:
            foreign = Message("foreign", "x", 1, Readings(n=1, columns={"value": np.array([13])}))
            topic = "dead/meter/out/x"
            thrown = [b"\xc1garbage", b"\xc1garbage", b'{"value": 1}', codec.encode(foreign)]
            await (await bus.publish([Publication(topic, payload, qos=1) for payload in thrown]))
        for _ in range(3):
            before = passed(supervisor, "store")
            await until(lambda before=before: passed(supervisor, "store") > before + draw.randrange(50))  # type: ignore[misc] # mypy knows no default arguments of lambdas
            supervisor.kill("parse")
        await until(lambda: (view := supervisor.views["parse"]).restarts == 3 and view.state == "ready")
        answers.append(await command("dead", "replay", str(path), "--state", str(state), "--reason", "not-msgpack"))

    stopped(path, 3, break_it)
    kept = files(state)["parse"]
    letters = kept.letters()
    whole = kept.letters([one.id for one in letters])
    messages = [codec.decode(one.payload) for one in whole if one.reason == "exception"]
    values = sorted(
        int(np.asarray(m.body.columns["value"])[0])
        for m in messages
        if isinstance(m.body, Readings) and m.id != "foreign"
    )
    assert values == [3 + 10 * i for i in range(len(values))]  # none is missing, none is there twice
    garbage = {one.payload: one.times for one in whole if one.reason == "not-msgpack"}
    assert garbage == {b"\xc1garbage": 2, b'{"value": 1}': 1}
    ((code, told),) = answers
    assert code == 1
    assert told.startswith("parse: 0 replayed\nparse: not replayed: parse/")
    number = next(one.id for one in whole if one.payload == b"\xc1garbage")
    capsys.readouterr()
    _, out, _ = penstock(capsys, "dead", "show", str(path), f"parse/{number}", "--state", str(state))
    assert "c1 67 61 72 62 61 67 65" in out
    assert ".garbage" in out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["list", "--node", "prse"], "--node: there is no node 'prse'; did you mean 'parse'?"),
        (["show"], "show: say which"),
        (["show", "parse/9"], "there is no letter 'parse/9'"),
        (["list", "--reason", "faild"], "--reason: none was refused for 'faild'; did you mean 'failed'?"),
        (["list", "--since", "yesterday"], "--since: expected a time ago"),
        (["replay", "--within", "5"], "--within: expected a duration"),
        (["show", "parse/1", "store/1", "--raw"], "there is no letter 'store/1'"),
    ],
)
def test_wrong_command_lines(tmp_path: Path, args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = site(tmp_path)
    DeadLetters(tmp_path / "state" / "parse.dead").add([letter(1)])
    code, _, err = penstock(capsys, "dead", args[0], str(path), *args[1:], "--state", str(tmp_path / "state"))
    assert code == 2
    assert err.startswith(f"error: {told}")


def test_letters_with_nowhere_to_go_are_told(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    path, state = site(tmp_path), tmp_path / "state"
    DeadLetters(state / "gone.dead").add([letter(1)])
    assert main.run(["dead", "replay", str(path), "--state", str(state)]) == 1
    assert b"gone: not replayed: there is no such node" in capsysbinary.readouterr().out
    assert main.run(["dead", "show", str(path), "gone/1", "--raw", "--state", str(state)]) == 0
    assert capsysbinary.readouterr().out == b"x"
