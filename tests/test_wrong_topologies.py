"""Wrong topologies: each gives one precise line with its position, exit code 2, and nothing is started.

The nodes are the real ones, so a message that a kind changes is seen here. ``{base}`` stands for the topology's folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodes.plan import prepare
from schemas.errors import ConfigError
from schemas.topology import TopologyError

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "nodes" / "demo" / "digits-int8.tflite"

ALONE = "nodes: {a: {ingest: {source: synthetic}, publish: always}}\n"
NODES = "topology: t\nnodes:\n"
READINGS = NODES + "  a: {ingest: {source: synthetic}}\n"
FRAMES = NODES + "  a: {ingest: {source: synthetic, frames: {}}}\n"


def step(options: str) -> str:
    return READINGS + f"  b: {{preprocess: {{steps: [{options}]}}, from: a, publish: always}}\n"


def aggregate(options: str) -> str:
    return READINGS + f"  b: {{aggregate: {{{options}}}, from: a, publish: always}}\n"


def infer(options: str) -> str:
    return FRAMES + f"  b: {{infer: {{{options}}}, from: a, publish: always}}\n"


def uplink(options: str) -> str:
    return READINGS + f"  b: {{uplink: {{{options}}}, from: a}}\n"


def broker(options: str) -> str:
    node = "{ingest: {source: synthetic}, publish: always}"
    return f"topology: t\nbrokers:\n  x: {options}\nnodes: {{a: {node}}}\n"


def reads(edges: str) -> str:
    return READINGS + f"  b: {{uplink: {{sink: stdout}}, from: {edges}}}\n"


CASES: list[tuple[str, str | bytes, str]] = [
    (
        "unknown kind",
        NODES + "  a: {ingst: {source: synthetic}}\n",
        "3:7: unknown node kind 'ingst'; did you mean 'ingest'?",
    ),
    (
        "two kinds",
        NODES + "  a: {ingest: {source: synthetic}, uplink: {sink: stdout}}\n",
        "3:36: a node has one kind; this has 'ingest' and 'uplink'",
    ),
    (
        "no kind",
        READINGS + "  b: {from: a}\n",
        "4:3: the node's kind is missing, one of ingest, preprocess, infer, aggregate, join, uplink, custom, train,"
        " federate, pool, answer, ask",
    ),
    (
        "typo in a node's key",
        READINGS + "  b: {uplink: {sink: stdout}, form: a}\n",
        "4:31: unknown key 'form'; did you mean 'from'?",
    ),
    ("typo in a top-level key", "topolgy: t\n" + ALONE, "1:1: unknown key 'topolgy'; did you mean 'topology'?"),
    ("no nodes", "topology: t\n", "1:1: the key 'nodes' is missing"),
    ("empty nodes", "topology: t\nnodes: {}\n", "2:1: there is no node in it"),
    ("nodes as a list", "topology: t\nnodes:\n  - a\n", "3:3: expected a map from names to nodes, got a list"),
    (
        "name with capitals",
        "topology: Line 3\n" + ALONE,
        "1:11: 'Line 3' is no name: only a-z, 0-9, '_' and '-'; for example 'line-3'",
    ),
    (
        "node named with a dot",
        NODES + "  a.b: {ingest: {source: synthetic}, publish: always}\n",
        "3:3: 'a.b' is no name: only a-z, 0-9, '_' and '-'; for example 'a-b'",
    ),
    (
        "reserved name",
        NODES + "  models: {ingest: {source: synthetic}, publish: always}\n",
        "3:3: 'models' is reserved for the topology's own topics",
    ),
    (
        "name that is a number",
        NODES + "  7: {ingest: {source: synthetic}, publish: always}\n",
        "3:3: a name is a text; put 7 in quotes",
    ),
    (
        "two nodes of one name",
        READINGS + "  b: {uplink: {sink: stdout}, from: a}\n  a: {ingest: {source: synthetic}}\n",
        "5:3: the key 'a' is here twice; first at line 3",
    ),
    ("an option twice", uplink("sink: stdout, sink: csv"), "4:30: the key 'sink' is here twice; first at line 4"),
    (
        "cycle",
        READINGS
        + "  b: {preprocess: {steps: [dedupe]}, from: [a, d]}\n"
        + "  c: {preprocess: {steps: [dedupe]}, from: b}\n"
        + "  d: {preprocess: {steps: [dedupe]}, from: c}\n"
        + "  e: {uplink: {sink: stdout}, from: d}\n",
        "4:48: a cycle: b → c → d → b",
    ),
    ("itself", READINGS + "  b: {preprocess: {steps: [dedupe]}, from: [a, b]}\n", "4:48: a cycle: b → b"),
    ("dangling edge", reads("aa"), "4:37: unknown node 'aa'; did you mean 'a'?"),
    ("port that is not there", reads("a.hot"), "4:37: the node 'a' has no port 'hot'; known: a"),
    (
        "port of a split",
        READINGS
        + "  b: {preprocess: {steps: [{split: {hot: value > 0}}]}, from: a}\n  c: {uplink: {sink: stdout}, from: b.hto}\n",
        "5:37: the node 'b' has no port 'hto'; did you mean 'b.hot'?",
    ),
    ("edge twice", reads("[a, a.out]"), "4:41: 'a.out' is read twice"),
    ("empty from", reads("[]"), "4:37: no node is named here"),
    ("from a number", reads("5"), "4:37: expected a node, a list of nodes, or a map from nodes to options, got 5"),
    ("unknown edge option", reads("{a: {queu: 5}}"), "4:42: unknown key 'queu'; did you mean 'queue'?"),
    ("unknown delivery", reads("{a: {delivery: exactly-once}}"), "4:52: expected 'safe' or 'fast', got 'exactly-once'"),
    (
        "overflow on a safe edge",
        reads("{a: {delivery: safe, overflow: latest}}"),
        "4:41: a safe edge loses nothing, so it cannot have overflow 'latest'",
    ),
    ("queue of none", reads("{a: {queue: 0}}"), "4:49: expected at least 1, got 0"),
    (
        "a source that reads",
        READINGS + "  b: {ingest: {source: synthetic}, from: a, publish: always}\n",
        "4:36: ingest (source synthetic) reads nothing from other nodes",
    ),
    (
        "a sink that reads nothing",
        NODES + "  a: {uplink: {sink: stdout}}\n",
        "3:3: uplink (sink stdout) reads from other nodes; say from which in 'from'",
    ),
    (
        "reading from a sink",
        uplink("sink: stdout") + "  c: {uplink: {sink: stdout}, from: b}\n",
        "5:37: the node 'b' sends nothing that can be read",
    ),
    (
        "nobody reads",
        READINGS,
        "3:3: no node reads this; read it, or say publish: always for readers outside of the topology",
    ),
    (
        "wrong type of body between two nodes",
        FRAMES + "  b: {aggregate: {window: 10s, fields: {m: mean(value)}}, from: a, publish: always}\n",
        "4:65: aggregate reads aggregate/1, event/1, predictions/1 or readings/1, but 'a.out' sends frame/1",
    ),
    (
        "unknown host",
        READINGS + "  b: {uplink: {sink: stdout}, from: a, on: gatway}\n",
        "4:44: unknown host 'gatway'; known: local",
    ),
    (
        "no host said",
        "topology: t\nbrokers: {b: {url: 'mqtt://h'}}\nhosts: {x: , y: }\n" + ALONE,
        "4:9: say on which host it runs, on: x or y",
    ),
    (
        "two hosts and no broker",
        "topology: t\nhosts: {x: , y: }\n" + ALONE.replace("publish", "on: x, publish"),
        "2:1: with more than one host, name the broker under 'brokers', and the host that starts it",
    ),
    (
        "broker nobody starts",
        "topology: t\nbrokers: {b: {run: embedded}}\nhosts: {x: , y: }\n" + ALONE.replace("publish", "on: x, publish"),
        "2:11: say which host starts it, on: x or y",
    ),
    ("broker started by a stranger", broker("{run: embedded, on: z}"), "3:26: unknown host 'z'; known: local"),
    (
        "host with unknown broker",
        "topology: t\nbrokers: {site: {url: 'mqtt://h'}}\nhosts: {x: {broker: sight}}\n" + ALONE,
        "3:21: unknown broker 'sight'; did you mean 'site'?",
    ),
    (
        "two brokers, no hosts",
        "topology: t\nbrokers: {x: {url: 'mqtt://h'}, y: {url: 'mqtt://i'}}\n" + ALONE,
        "2:10: with more than one broker, say under 'hosts' which one each host uses",
    ),
    (
        "wrong publish",
        NODES + "  a: {ingest: {source: synthetic}, publish: sometimes}\n",
        "3:45: expected 'auto' or 'always', got 'sometimes'",
    ),
    (
        "broker of http",
        broker("{url: 'http://h'}"),
        "3:12: 'http://h' does not begin with mqtt://, mqtts://, ws://, wss://, unix://",
    ),
    (
        "broker that is neither",
        broker("{}"),
        "3:6: expected one of 'url' (a broker that is there) and 'run' (embedded or mosquitto)",
    ),
    (
        "broker that is both",
        broker("{url: 'mqtt://h', run: embedded}"),
        "3:6: expected one of 'url' (a broker that is there) and 'run' (embedded or mosquitto)",
    ),
    ("broker that cannot be run", broker("{run: emqx}"), "3:12: expected 'embedded' or 'mosquitto', got 'emqx'"),
    (
        "password in plain",
        broker("{url: 'mqtts://h', user: u, password: hunter2}"),
        "3:44: a secret is never written here; say {env: NAME} or {file: path}",
    ),
    (
        "password in the url",
        broker("{url: 'mqtt://u:p@h'}"),
        "3:12: no user or password in a URL; say user: and password: {env: NAME}",
    ),
    ("password without a user", broker("{url: 'mqtts://h', password: {env: P}}"), "3:6: a 'password' needs a 'user'"),
    (
        "secret of two places",
        broker("{url: 'mqtts://h', user: u, password: {env: P, file: p}}"),
        "3:44: expected one of 'env' and 'file'",
    ),
    (
        "certificate without its key",
        broker("{url: 'mqtts://h', cert: c.pem}"),
        "3:6: 'cert' and 'key' are given together",
    ),
    (
        "certificate without tls",
        broker("{url: 'mqtt://h', ca: c.pem}"),
        "3:6: 'ca', 'cert' and 'key' need a URL that begins with mqtts:// or wss://",
    ),
    (
        "no port to listen on",
        broker("{run: embedded, listen: localhost}"),
        "3:30: expected an address and a port, e.g. 127.0.0.1:1883, got 'localhost'",
    ),
    ("tab", "topology: t\nnodes:\n\ta: {}\n", "3:1: a tab; indent with spaces"),
    (
        "unclosed",
        "topology: t\nnodes: {a: {ingest: {source: synthetic}\n",
        "3:1: expected ',' or '}' in the map that was opened at line 2, column 12",
    ),
    ("not utf-8", b"topology: t\nnodes: {\xe9: }\n", "2:9: not UTF-8: byte 0xe9"),
    ("empty file", "", "1:1: the file is empty"),
    (
        "alias bomb",
        "topology: t\nnodes:\n"
        + "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 10)}]\n" for i in range(9)),
        "7:17: more than 20000 values (aliases count as what they name)",
    ),
    (
        "unknown source",
        NODES + "  a: {ingest: {source: vidoe}}\n",
        "3:24: unknown source 'vidoe'; did you mean 'video'?",
    ),
    ("no source", NODES + "  a: {ingest: {}}\n", "3:7: the key 'source' is missing"),
    ("missing file", NODES + "  a: {ingest: {source: csv, path: nope.csv}}\n", "3:35: no such file: {base}/nope.csv"),
    (
        "typo in a source's option",
        NODES + "  a: {ingest: {source: csv, pth: nope.csv}}\n",
        "3:29: unknown key 'pth'; did you mean 'path'?",
    ),
    (
        "wrong type of an option",
        NODES + "  a: {ingest: {source: synthetic, count: many}}\n",
        "3:42: expected a whole number, got 'many'",
    ),
    ("out of range", NODES + "  a: {ingest: {source: synthetic, devices: 0}}\n", "3:44: expected at least 1, got 0"),
    (
        "bad unit",
        NODES + "  a: {ingest: {source: synthetic, interval: 5 parsecs}}\n",
        "3:45: expected a duration with a unit (ns, us, µs, ms, s, min, h, d), e.g. 10s, got '5 parsecs'",
    ),
    (
        "no unit",
        NODES + "  a: {ingest: {source: synthetic, interval: 5}}\n",
        "3:45: expected a duration with a unit (ns, us, µs, ms, s, min, h, d), e.g. 10s, got 5",
    ),
    (
        "deep in a source",
        NODES + "  a: {ingest: {source: synthetic, signals: {v: {kind: sinus}}}}\n",
        "3:55: expected 'sine', 'ramp', 'walk', 'constant' or 'noise', got 'sinus'; did you mean 'sine'?",
    ),
    ("unknown step", step("{filtre: value > 1}"), "4:29: unknown step 'filtre'; did you mean 'filter'?"),
    (
        "step without a name",
        step("{filter: value > 1, select: [value]}"),
        "4:28: expected a step: its name, or one name with its options",
    ),
    ("no steps", step(""), "4:27: expected at least 1 item, got 0"),
    ("bad expression", step("{filter: value > }"), "4:44: expected a value, found the end"),
    ("bad expression in quotes", step("{filter: 'value > 1 and (value < 3'}"), "4:62: expected ')', found the end"),
    (
        "unknown field in an expression",
        step("{filter: vlaue > 1}"),
        "4:37: unknown field 'vlaue'; did you mean 'value'?",
    ),
    ("unknown function", step("{derive: {x: sqroot(value)}}"), "4:41: unknown function 'sqroot'; did you mean 'sqrt'?"),
    ("typo in a step's option", step("{resample: {priod: 1s}}"), "4:40: unknown key 'priod'; did you mean 'period'?"),
    (
        "image step on readings",
        step("{resize: [96, 96]}"),
        "4:56: preprocess reads frame/1, but 'a.out' sends readings/1",
    ),
    ("missing model", infer("model: nope.tflite"), "4:22: no such file: {base}/nope.tflite"),
    (
        "model that is none",
        infer("model: table.csv"),
        "4:22: no backend takes a model with the ending '.csv'; known: .eim, .npz, .onnx, .pt, .pte, .tflite, .xml",
    ),
    (
        "unknown decoder",
        infer("model: digits.tflite, decoder: clasification"),
        "4:46: unknown decoder 'clasification'; did you mean 'classification'?",
    ),
    ("missing labels", infer("model: digits.tflite, labels: nope.txt"), "4:45: no such file: {base}/nope.txt"),
    (
        "readings into a model without fields",
        READINGS + "  b: {infer: {model: digits.tflite}, from: a, publish: always}\n",
        "4:14: readings come in: say which columns the model takes: fields: [name, …]",
    ),
    (
        "unknown aggregate function",
        aggregate("window: 10s, fields: {m: meen(value)}"),
        "4:44: unknown statistic 'meen'; did you mean 'mean'?",
    ),
    (
        "unknown field in an aggregate",
        aggregate("window: 10s, fields: {m: mean(valu)}"),
        "4:49: unknown field 'valu'; did you mean 'value'?",
    ),
    (
        "unknown key to group by",
        aggregate("window: 10s, by: sorce, fields: {m: mean(value)}"),
        "4:36: unknown field 'sorce'; did you mean 'source'?",
    ),
    (
        "window without a unit",
        aggregate("window: 10, fields: {m: mean(value)}"),
        "4:27: expected a duration with a unit (ns, us, µs, ms, s, min, h, d), e.g. 10s, got 10",
    ),
    (
        "unknown window",
        aggregate("window: {tumblin: 10s}, fields: {m: mean(value)}"),
        "4:28: unknown key 'tumblin'; did you mean 'tumbling'?",
    ),
    ("unknown sink", uplink("sink: sqllite, path: x.db"), "4:22: unknown sink 'sqllite'; did you mean 'sqlite'?"),
    ("sink without its path", uplink("sink: jsonl"), "4:7: the key 'path' is missing"),
    (
        "spool of a wrong unit",
        uplink("sink: stdout, spool: 20 parsecs"),
        "4:37: expected a size with a unit (B, kB, KB, MB, GB, KiB, MiB, GiB), e.g. 20MB, got '20 parsecs'",
    ),
    ("spool that is too small", uplink("sink: stdout, spool: 5kB"), "4:37: expected at least 128KiB, got 5000 bytes"),
    (
        "spool that is too small, in the map",
        uplink("sink: stdout, spool: {overflow: block, size: 5kB}"),
        "4:61: expected at least 128KiB, got 5000 bytes",
    ),
    (
        "spool of true",
        uplink("sink: stdout, spool: true"),
        "4:37: expected a size, e.g. 20MB, or a map, got true",
    ),
    ("spool without a size", uplink("sink: stdout, spool: {rate: 5/s}"), "4:30: the key 'size' is missing"),
    ("spool of nothing", uplink("sink: stdout, spool: "), "4:36: the key 'size' is missing"),
    ("typo in a spool", uplink("sink: stdout, spool: {siez: 20MB}"), "4:38: unknown key 'siez'; did you mean 'size'?"),
    ("typo in the key spool", uplink("sink: stdout, spol: 20MB"), "4:30: unknown key 'spol'; did you mean 'spool'?"),
    (
        "unknown overflow of a spool",
        uplink("sink: stdout, spool: {size: 20MB, overflow: drop-odlest}"),
        "4:60: expected 'drop-oldest', 'drop-newest' or 'block', got 'drop-odlest'; did you mean 'drop-oldest'?",
    ),
    (
        "unknown order of a spool",
        uplink("sink: stdout, spool: {size: 20MB, order: random}"),
        "4:57: expected 'oldest' or 'newest', got 'random'",
    ),
    (
        "spool that drains at no rate",
        uplink("sink: stdout, spool: {size: 20MB, rate: 0/s}"),
        "4:56: expected a rate per s, min, h, e.g. 30/s, got '0/s'",
    ),
    (
        "spool in a file",
        uplink("sink: stdout, spool: {size: 20MB, path: table.csv}"),
        "4:56: expected a folder, and {base}/table.csv is a file",
    ),
    (
        "spool of a source",
        NODES + "  a: {ingest: {source: synthetic, spool: 20MB}, publish: always}\n",
        "3:35: unknown key 'spool'; known: anomalies, batch, count, device, devices, frames, "
        "interval, rate, seed, signals, start",
    ),
    (
        "http sink of ftp",
        uplink("sink: http, url: 'ftp://h'"),
        "4:33: expected http://host/path or https://host/path, got 'ftp://h'",
    ),
    (
        "topic with a wildcard",
        uplink("sink: mqtt, topic: 'a/#'"),
        "4:35: expected a topic without wildcards, e.g. plant/{source}",
    ),
    (
        "unknown broker of a sink",
        uplink("sink: mqtt, topic: a, broker: clowd"),
        "4:46: unknown broker 'clowd'; known: local",
    ),
    ("a queue of true", reads("{a: {queue: true}}"), "4:49: expected a whole number, got true"),
    (
        "join of one",
        READINGS + "  b: {join: {within: 1s}, from: a, publish: always}\n",
        "4:13: a join needs at least two inputs, e.g. from: [weight, camera]",
    ),
    (
        "custom file that is not there",
        READINGS + "  b: {custom: {path: nope.py, function: f}, from: a, publish: always}\n",
        "4:22: there is no file {base}/nope.py",
    ),
    (
        "custom file without a function",
        READINGS + "  b: {custom: {path: nope.py}, from: a, publish: always}\n",
        "4:15: path and function go together: the file, and the name in it",
    ),
    (
        "custom file without that function",
        READINGS + "  b: {custom: {path: own.py, function: claen}, from: a, publish: always}\n",
        "4:40: own.py has no 'claen'; did you mean 'clean'?",
    ),
    (
        "video that is not there",
        NODES + "  a: {ingest: {source: video, path: nope.mkv}}\n",
        "3:37: no such file: {base}/nope.mkv",
    ),
]

started: list[str] = []
_watching = False


def _audit(event: str, args: tuple[object, ...]) -> None:
    if not _watching:
        return
    if event in {"socket.bind", "socket.connect", "subprocess.Popen", "os.fork", "os.posix_spawn", "os.mkdir"}:
        started.append(event)
    elif (
        event == "open"
        and isinstance(args[1], str)
        and set(args[1]) & set("wax+")
        and "__pycache__" not in str(args[0])
    ):
        started.append(f"open {args[0]} {args[1]}")


sys.addaudithook(_audit)  # Python has no way to take one back: it looks on only while a test asks it to


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What was started, connected to or written while the test ran."""
    global _watching
    started.clear()
    _watching = True
    yield started
    _watching = False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a topology finds what it names."""
    shutil.copy(MODEL, tmp_path / "digits.tflite")
    (tmp_path / "table.csv").write_text("time,value\n1,2\n", encoding="utf-8")
    (tmp_path / "own.py").write_text("def clean(message):\n    return message\n", encoding="utf-8")
    return tmp_path


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "t.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(("text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_wrong_topology_is_refused_with_its_place(
    folder: Path, text: str | bytes, expected: str, watched: list[str]
) -> None:
    path = written(folder, text)
    watched.clear()
    with pytest.raises(TopologyError) as caught:
        prepare(path)
    assert watched == []
    assert str(caught.value) == f"{path}:{expected.replace('{base}', str(folder))}"
    assert caught.value.exit_code == 2


def test_the_table_is_long_enough_and_right_topologies_pass(folder: Path, watched: list[str]) -> None:
    assert len(CASES) >= 40
    path = written(folder, READINGS + "  b: {uplink: {sink: stdout}, from: a}\n")
    watched.clear()
    assert list(prepare(path).nodes) == ["a", "b"]
    assert watched == []


def test_what_watches_sees(tmp_path: Path, watched: list[str]) -> None:
    (tmp_path / "x").write_text("", encoding="utf-8")
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert watched[0].startswith("open ")
    assert "subprocess.Popen" in watched


def test_a_topology_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file") as caught:
        prepare(tmp_path / "t.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("command", ["check", "run"])
def test_the_command_says_all_of_it_and_ends_with_2(folder: Path, command: str) -> None:
    path = written(folder, NODES + "  a: {ingest: {source: vidoe}}\n  b: {uplink: {sink: jsonl}, from: c}\n")
    ran = subprocess.run(
        [sys.executable, "-m", "nodes.cli.main", command, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    lines = [line.partition(f"{path}:")[2] for line in ran.stderr.splitlines()]
    assert [line.partition(" ")[0] for line in lines] == ["3:24:", "4:7:", "4:36:"]
    assert sorted(p.name for p in folder.iterdir()) == ["digits.tflite", "own.py", "t.yaml", "table.csv"]
