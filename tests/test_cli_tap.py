"""``penstock tap`` and ``penstock broker``, against each other as real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broker.bus import Publication
from broker.connect import connect
from nodes.cli import main
from schemas.codec import encode
from schemas.errors import ConnectError
from schemas.messages import Message, Readings

ROOT = Path(__file__).parent.parent
READING = encode(Message("m-1", "boiler", 1_700_000_000_000_000_000, Readings(n=1, columns={"temp": np.array([21.5])})))


def started(*args: str) -> subprocess.Popen[str]:
    """A ``penstock`` process whose output can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "nodes.cli.main", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def ended(process: subprocess.Popen[str]) -> int:
    """Ends a process by Ctrl-C; gives its exit code."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(10)
    finally:
        process.kill()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def address(process: subprocess.Popen[str]) -> str:
    """Where a started broker listens."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening on "), line
    return line.removeprefix("listening on ").strip()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A running ``penstock broker``."""
    process = started("broker", "--listen", "127.0.0.1:0")
    yield address(process)
    assert ended(process) == 0


def publish(url: str, *publications: Publication, user: str | None = None, password: str | None = None) -> None:
    async def send() -> None:
        async with connect(url, client_id="test-publisher", user=user, password=password, patience=5) as bus:
            await (await bus.publish(publications))

    asyncio.run(send())


def test_retained_messages_are_shown_and_counted(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    publish(
        url,
        Publication("line-3/sensor/out/boiler", READING, qos=1, retain=True),
        Publication("zigbee/lamp", b'{"state": "ON"}', qos=1, retain=True),
    )
    assert main.run(["tap", url, "line-3/#", "--count", "1"]) == 0
    caught = capsys.readouterr()
    expected = "2023-11-14 22:13:20.000  line-3/sensor/out/boiler (retained)  readings/1  boiler  temp=21.5\n"
    assert caught.out == expected
    assert caught.err == f"listening to line-3/# on {url}\n"
    assert main.run(["tap", url, "--count", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["topic"] for line in lines} == {"line-3/sensor/out/boiler", "zigbee/lamp"}
    lamp = next(line for line in lines if line["topic"] == "zigbee/lamp")
    assert (lamp["json"], lamp["retained"], lamp["refused"]) == ({"state": "ON"}, True, "not-msgpack")


def test_a_topology_names_broker_and_topic(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(url, Publication("line-7/sensor/out/boiler", READING, qos=1, retain=True))
    path = tmp_path / "line.yaml"
    path.write_text(
        f"topology: line-7\nbrokers: {{site: {{url: '{url}'}}}}\n"
        "nodes:\n  sensor: {ingest: {source: synthetic}, publish: always}\n"
    )
    for what in ([], ["sensor"], ["sensor.out"], ["line-7/+/out/#"]):
        assert main.run(["tap", str(path), *what, "--count", "1"]) == 0
        assert "temp=21.5" in capsys.readouterr().out
    assert main.run(["tap", str(path), "sensr"]) == 2
    assert capsys.readouterr().err == "error: there is no node 'sensr' in it; did you mean 'sensor'?\n"
    assert main.run(["tap", str(path), "--broker", "sit"]) == 2
    assert "did you mean 'site'?" in capsys.readouterr().err


def test_a_topology_whose_broker_has_no_fixed_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "line.yaml"
    path.write_text("topology: line-7\nnodes:\n  sensor: {ingest: {source: synthetic}, publish: always}\n")
    assert main.run(["tap", str(path)]) == 2
    assert "listens on any free port" in capsys.readouterr().err


def test_live_until_interrupted(url: str) -> None:
    process = started("tap", url, "live/#")
    assert process.stderr is not None
    assert process.stdout is not None
    assert process.stderr.readline() == f"listening to live/# on {url}\n"
    publish(url, *(Publication("live/n", str(i).encode(), qos=1) for i in range(3)))
    assert [process.stdout.readline() for _ in range(3)] == ["live/n  0\n", "live/n  1\n", "live/n  2\n"]
    assert ended(process) == 0


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("http://localhost", "error: broker URL must start with a known scheme"),
        ("mqtt://", "error: broker URL has no host"),
        ("none.yaml", "error: none.yaml: there is no such file"),
    ],
)
def test_wrong_places(where: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["tap", where]) == 2
    assert capsys.readouterr().err.startswith(told)


def test_users_and_their_passwords(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "nodes.cli.main", "broker", "--hash-password", "bob"],
        input="secret\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "secret" not in made.stdout
    users = tmp_path / "users"
    users.write_text(made.stdout)
    process = started("broker", "--listen", "127.0.0.1:0", "--users", str(users))
    try:
        url = address(process)
        publish(url, Publication("a/b", b"1", qos=1, retain=True), user="bob", password="secret")  # noqa: S106 - a test's
        with pytest.raises(ConnectError):
            publish(url, Publication("a/b", b"1", qos=1), user="bob", password="guess")  # noqa: S106 - a test's
        monkeypatch.setenv("PENSTOCK_PASSWORD", "secret")
        assert main.run(["tap", url, "--user", "bob", "--count", "1"]) == 0
        assert capsys.readouterr().out == "a/b (retained)  1\n"
        monkeypatch.setenv("PENSTOCK_PASSWORD", "guess")
        assert main.run(["tap", url, "--user", "bob", "--count", "1"]) == 4
        assert capsys.readouterr().err.startswith("error: ")
    finally:
        assert ended(process) == 0


def test_a_unix_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broker.sock"
    process = started("broker", "--listen", f"unix:{path}")
    try:
        assert str(path) in address(process)
        publish(f"unix://{path}", Publication("a", b"1", qos=1, retain=True))
        assert main.run(["tap", f"unix://{path}", "--count", "1"]) == 0
        assert capsys.readouterr().out == "a (retained)  1\n"
    finally:
        assert ended(process) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--listen", "1883"], "error: expected an address and a port"),
        (["--listen", "127.0.0.1:99999"], "error: expected an address and a port"),
        (["--max-packet", "big"], "error: --max-packet: expected a size"),
        (["--cert", "c.pem"], "error: TLS needs"),
        (["--users", "no-such-file"], "error: no-such-file: the password file cannot be read"),
        (["--tls-listen", "127.0.0.1:0", "--cert", "none", "--key", "none"], "error: "),
        (["--hash-password", "a:b"], "error: 'a:b' cannot be a user name"),
    ],
)
def test_wrong_options_of_the_broker(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["broker", *args]) == 2
    caught = capsys.readouterr()
    assert caught.err.startswith(told)
    assert caught.err.count("\n") == 1


def test_a_port_that_is_taken(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["broker", "--listen", url.removeprefix("mqtt://")]) == 2
    assert "cannot be bound" in capsys.readouterr().err
