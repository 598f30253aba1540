"""Whatever is in a topology file, planning it ends with a plan or with a ConfigError, in bounded time."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodes.plan import prepare
from schemas.errors import ConfigError
from schemas.topology import TopologyError

MODEL = Path(__file__).parent.parent / "nodes" / "demo" / "digits-int8.tflite"
GOOD: dict[str, Any] = {
    "topology": "t",
    "brokers": {
        "site": {"run": "embedded", "listen": "127.0.0.1:1883", "on": "h"},
        "cloud": {"url": "mqtts://c:8883", "user": "u", "password": {"env": "P"}},
    },
    "hosts": {"h": {"broker": "site"}, "i": {"broker": "cloud"}},
    "nodes": {
        "line": {
            "ingest": {"source": "synthetic", "signals": {"v": {"kind": "sine", "period": "5s"}}, "count": 9},
            "on": "h",
        },
        "belt": {"ingest": {"source": "synthetic", "frames": {"width": 8, "height": 8}, "rate": "30/s"}, "on": "h"},
        "clean": {
            "preprocess": {
                "steps": ["dedupe", {"filter": "v > 1"}, {"derive": {"w": "v * 2"}}, {"split": {"hot": "w > 3"}}]
            },
            "from": "line",
            "on": "h",
            "process": "p",
        },
        "small": {"preprocess": {"steps": [{"resize": [8, 8]}, {"scale": "1/255"}]}, "from": "belt", "on": "h"},
        "see": {
            "infer": {"model": "digits.tflite", "batch": {"max": 4, "wait": "5ms"}},
            "from": "small",
            "on": "i",
        },
        "rate": {
            "aggregate": {
                "window": {"sliding": {"size": "10s", "every": "1s"}},
                "by": "source",
                "fields": {"m": "mean(w)"},
            },
            "from": {"clean": {"queue": 5}, "clean.hot": {"delivery": "fast", "overflow": "latest"}},
            "on": "h",
        },
        "store": {"uplink": {"sink": "sqlite", "path": "x.db"}, "from": ["rate", "see"], "on": "i"},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("topology")
    shutil.copy(MODEL, made / "digits.tflite")
    return made


def planned(folder: Path, text: str | bytes) -> str:
    """What is wrong with a topology, or ``""``; anything but a ConfigError escapes."""
    path = folder / "t.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        prepare(path)
    except TopologyError as error:
        lines = str(error).splitlines()
        if not lines or any(not line.startswith(f"{path}:") for line in lines) or len(lines) > 200:
            raise
        return lines[0]
    except ConfigError as error:
        return str(error)
    return ""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value, the root first."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


PLACES = list(places(GOOD))
ODD: list[Any] = [None, True, -(2**63), 2**64 - 1, 1e300, "x", "a.b", [[]], {"x": {}}]


def test_the_good_one_is_good(folder: Path) -> None:
    assert planned(folder, json.dumps(GOOD)) == ""


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_value_in_every_place(folder: Path, odd: Any) -> None:
    wrong = [planned(folder, json.dumps(replaced(GOOD, path, odd))) for path in PLACES]
    assert len([line for line in wrong if line]) > len(PLACES) // 4


def test_every_key_misspelt_and_every_entry_left_out(folder: Path) -> None:
    for path in PLACES[1:]:
        parent: Any = GOOD
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, dict):
            renamed = {f"{k}x" if k == path[-1] else k: v for k, v in parent.items()}
            planned(folder, json.dumps(replaced(GOOD, path[:-1], renamed)))
        rest = (
            {k: v for k, v in parent.items() if k != path[-1]}
            if isinstance(parent, dict)
            else [v for i, v in enumerate(parent) if i != path[-1]]
        )
        planned(folder, json.dumps(replaced(GOOD, path[:-1], rest)))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["line", "see.out", "1s"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(
    deadline=None, derandomize=True, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(PLACES), plain)
def test_any_value_in_any_place(folder: Path, path: tuple[Any, ...], value: Any) -> None:
    planned(folder, json.dumps(replaced(GOOD, path, value)))


def test_mutated_text(folder: Path) -> None:
    draw = random.Random(11)
    text = json.dumps(GOOD, indent=1).encode()
    wrong = 0
    for _ in range(100):
        data = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 4)] = bytes(
                draw.choice(b"{}[]:,\n\t&*'\"\xffab10.-") for _ in range(draw.randint(0, 3))
            )
        wrong += planned(folder, bytes(data)) != ""
    assert wrong > 50
