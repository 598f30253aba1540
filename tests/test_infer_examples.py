"""The examples run as they stand; the demo's answers are the model's own."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*/topology.yaml"))
COMMAND = [sys.executable, "-c", "from nodes.cli.main import main; main()"]


def penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=50)


def copied(name: str, folder: Path) -> Path:
    """The example's topology in a folder of its own, so that results do not end in the checkout."""
    shutil.copytree(ROOT / "examples" / name, folder / "examples" / name)
    shutil.copytree(ROOT / "nodes" / "demo", folder / "nodes" / "demo")
    return folder / "examples" / name / "topology.yaml"


def on_a_free_port(topology: Path) -> int:
    """Let the topology's broker listen on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    text = topology.read_text()
    fixed = text.split("127.0.0.1:")[1].split('"')[0]
    topology.write_text(text.replace(f"127.0.0.1:{fixed}", f"127.0.0.1:{port}"))
    return port


def listening(port: int, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and run.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)  # between two tries
        else:
            return
    raise AssertionError(f"no broker on {port}")


@pytest.mark.parametrize("topology", EXAMPLES, ids=lambda p: p.parent.name)
def test_every_example_checks_and_says_what_it_is(topology: Path) -> None:
    done = penstock("check", str(topology))
    assert done.returncode == 0, done.stderr
    readme = (topology.parent / "README.md").read_text()
    assert f"penstock run examples/{topology.parent.name}/topology.yaml" in readme


def test_the_demo_answers_every_frame_as_the_model_does(tmp_path: Path) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")
    pytest.importorskip("av", reason="PyAV is not installed")
    topology = copied("digits", tmp_path)
    done = penstock("run", str(topology))
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(topology.parent / "digits.npz") as stack:
        images, labels = stack["images"], stack["labels"]
    runner = interpreter.Interpreter(str(topology.parent / "digits-int8.tflite"))
    source, sink = runner.get_input_details()[0], runner.get_output_details()[0]
    runner.resize_tensor_input(source["index"], images.shape)
    runner.allocate_tensors()
    runner.set_tensor(source["index"], (images.astype(np.int16) - 128).astype(np.int8))
    runner.invoke()
    expected = runner.get_tensor(sink["index"]).argmax(axis=1)
    db = sqlite3.connect(topology.parent / "results.sqlite")
    try:
        rows = db.execute('select "index", label, known_label from predictions order by "index"').fetchall()
        (frames, right) = db.execute("select sum(frames), sum(right) from rates where right is not null").fetchone()
        (seen, accuracy) = db.execute(
            "select sum(frames), sum(frames * accuracy) / sum(frames) from rates where accuracy is not null"
        ).fetchone()
    finally:
        db.close()
    assert rows == [
        (i, str(e), str(k)) for i, (e, k) in enumerate(zip(expected.tolist(), labels.tolist(), strict=True))
    ]
    share = float((expected == labels).mean())
    assert share >= 0.97
    assert (frames, right, seen) == (450, int((expected == labels).sum()), 450)
    assert accuracy == pytest.approx(share)


def test_the_anomalies_are_those_of_the_series(tmp_path: Path) -> None:
    topology = copied("anomaly", tmp_path)
    done = penstock("run", str(topology))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (topology.parent / "unusual.jsonl").read_text().splitlines()]
    found = {(line["time"][:10], line["co2"]) for line in lines}
    assert found == expected_anomalies(topology.parent / "co2.csv")
    assert len(found) == 4


def expected_anomalies(table: Path) -> set[tuple[str, float]]:
    """By the book: every Thursday-aligned window of five weeks since the epoch, by plain loops."""
    weeks = []
    for line in table.read_text().splitlines()[1:]:
        day, value = line.split(",")
        if value:
            weeks.append((np.datetime64(day[:10], "D").astype(int), float(value)))
    found = set()
    for end in range(min(d for d, _ in weeks) // 7 * 7 + 7, max(d for d, _ in weeks) + 36, 7):
        inside = [(day, value) for day, value in weeks if end - 35 <= day < end]
        values = [value for _, value in inside]
        if len(values) >= 4 and abs(values[-1] - float(np.median(values))) > 2:
            found.add((str(np.datetime64(int(end - 1), "D")), values[-1]))
    return found


def test_the_custom_nodes_do_what_they_say(tmp_path: Path) -> None:
    topology = copied("custom", tmp_path)
    done = penstock("run", str(topology))
    assert done.returncode == 0, done.stdout + done.stderr
    db = sqlite3.connect(topology.parent / "rooms.sqlite")
    try:
        rows = db.execute("select temp, humidity, dew from readings").fetchall()
    finally:
        db.close()
    assert len(rows) == 2880
    temp, humidity, dew = np.array(rows).T
    # The vapour pressure at the dew point is the pressure that the air has.
    pressure = 6.112 * np.exp(17.62 * temp / (243.12 + temp)) * humidity / 100
    np.testing.assert_allclose(6.112 * np.exp(17.62 * dew / (243.12 + dew)), pressure, rtol=1e-9)
    events = [json.loads(line) for line in (topology.parent / "events.jsonl").read_text().splitlines()]
    assert {event["source"] for event in events} == {"room-0", "room-1"}
    assert all(event["body"]["values"]["by"] > 3 for event in events)


def test_foreign_devices_are_understood_and_nonsense_is_dead_lettered(tmp_path: Path) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    topology = copied("telemetry", tmp_path)
    port = on_a_free_port(topology)
    run = subprocess.Popen(
        [*COMMAND, "run", str(topology)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        listening(port, run)
        devices = [
            sys.executable,
            "examples/telemetry/devices.py",
            "--port",
            str(port),
            "--seconds",
            "4",
            "--rate",
            "20",
        ]
        done = subprocess.run(devices, cwd=ROOT, capture_output=True, text=True, timeout=40)
        assert done.returncode == 0, done.stderr
        run.send_signal(signal.SIGINT)  # drains and ends
        said, _ = run.communicate(timeout=40)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0, said
    assert "not-json" in said
    db = sqlite3.connect(topology.parent / "house.sqlite")
    try:
        devices_kept = {row[0] for row in db.execute("select distinct source from changes")}
    finally:
        db.close()
    assert devices_kept == {"kitchen", "cellar", "shellyplusplug-7c2d"}


def test_a_subscriber_needs_only_mqtt_and_msgpack(tmp_path: Path) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    pytest.importorskip("msgpack", reason="msgpack is not installed")
    pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")
    topology = copied("subscribers", tmp_path)
    port = on_a_free_port(topology)
    program = topology.parent / "python" / "subscribe.py"
    assert "nodes" not in program.read_text()
    assert "schemas" not in program.read_text()
    run = subprocess.Popen(
        [*COMMAND, "run", str(topology)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        listening(port, run)
        arguments = [sys.executable, str(program), "--port", str(port), "--count", "5"]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        run.send_signal(signal.SIGINT)  # drains and ends
        said, _ = run.communicate(timeout=40)
    finally:
        run.kill()
        run.wait()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "connected: Success"
    assert len(lines) == 6
    assert all("digits/digits/out/camera" in line and "(it is " in line for line in lines[1:])
    assert run.returncode == 0, said
