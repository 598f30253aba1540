"""What an operator installs: each file is given to the program that reads it, where that is here."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from broker.bus import Publication
from broker.connect import connect
from nodes.cli import main

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def loaded(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


@pytest.mark.connected
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "systemd" / "penstock@.service").read_text()
    program = "/opt/penstock/bin/penstock"
    assert f"ExecStart={program} run " in unit
    here = tmp_path / "penstock@gateway.service"
    here.write_text(unit.replace(program, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True, check=False)
    own = [line for line in done.stderr.splitlines() if "penstock" in line]
    assert own == []
    assert done.returncode == 0, done.stderr


def test_the_units_options_are_those_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    unit = (DEPLOY / "systemd" / "penstock@.service").read_text()
    start = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert main.run(["run", "--help"]) == 0
    usage = capsys.readouterr().out
    options = [word for word in start.split() if word.startswith("--")]
    assert options
    assert all(option in usage for option in options)


def test_the_compose_file_and_what_it_mounts() -> None:
    compose = loaded(DEPLOY / "compose.yaml")
    services = compose["services"]
    assert set(services) == {"mosquitto", "penstock"}
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in compose["volumes"]
    build = services["penstock"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    command = services["penstock"]["command"].split()
    assert command[0] == "run"
    hosts = loaded(DEPLOY / "topology.yaml")["hosts"]
    assert command[command.index("--host") + 1] in hosts


@pytest.mark.connected
@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_compose_takes_its_file() -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose")
    done = subprocess.run(
        ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_topology_of_the_compose_file_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["check", str(DEPLOY / "topology.yaml")]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_the_image_is_made_of_what_is_there() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    let_in = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY ")]
    names = [name for line in copied for name in line]
    assert names
    for name in names:
        assert (ROOT / name).exists()
        assert f"!{name}" in let_in


def test_the_images_constraints_are_the_lock_without_hashes() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    line = next(line for line in dockerfile.splitlines() if line.startswith("RUN sed "))
    script = line.split("'")[1]
    lock = ROOT / "requirements-dev.lock"
    made = subprocess.run(["sed", "-n", script, str(lock)], capture_output=True, text=True, check=True).stdout
    assert "hash" not in made
    assert "\\" not in made
    assert len(made.splitlines()) == sum("==" in line and line[0] != " " for line in lock.read_text().splitlines())


@pytest.mark.connected
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_mosquitto_takes_its_file_and_messages(tmp_path: Path) -> None:
    """As Debian has it: a main file with the place of the data, and a folder that it includes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    included = tmp_path / "conf.d"
    included.mkdir()
    text = (DEPLOY / "mosquitto" / "gateway.conf").read_text()
    assert "listener 1883 127.0.0.1" in text
    (included / "gateway.conf").write_text(text.replace("listener 1883 ", f"listener {port} "))
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"user root\npersistence true\npersistence_location {tmp_path}/\ninclude_dir {included}\n")
    process = subprocess.Popen([str(MOSQUITTO), "-c", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        assert process.poll() is None

        async def pass_through() -> int:
            async with connect(f"mqtt://127.0.0.1:{port}", client_id="test", patience=5) as bus:
                subscription = await bus.subscribe(["a"])
                await (await bus.publish([Publication("a", b"x" * 6_300_000, qos=1)]))
                (delivery,) = await subscription.receive()
                subscription.acknowledge([delivery])
                return len(delivery.payload)

        assert asyncio.run(pass_through()) == 6_300_000
    finally:
        process.terminate()
        _, told = process.communicate(timeout=10)
    assert "Error" not in told
