"""An answer larger than the broker takes: a dead letter with its reason, the others go on, the books balance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import rows, run

ROOT = Path(__file__).parent.parent
TOPOLOGY = """
topology: large
brokers: {{small: {{url: '{url}'}}}}
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, batch: 1}}}}
  grow: {{custom: {{path: grow.py, function: grow}}, from: meter}}
  wide: {{preprocess: {{steps: [{{derive: {{a: value, b: value, c: value, d: value}}}}]}}, from: grow}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: wide}}
"""
GROW = """
import numpy as np
from schemas.messages import Readings

SIZES = {3: 100_000, 5: 3_000}  # the first is too large at once, the second when the next node has made it wider


def grow(readings: Readings) -> Readings:
    value = int(readings.columns["value"][0])
    return Readings(n=SIZES.get(value, 1), columns={"value": np.full(SIZES.get(value, 1), value)})
"""


def test_an_answer_too_large_is_a_dead_letter_and_the_books_balance(tmp_path: Path) -> None:
    (tmp_path / "meter.csv").write_text("value\n" + "\n".join(map(str, range(10))) + "\n")
    (tmp_path / "grow.py").write_text(GROW)
    command = [sys.executable, "-m", "broker.embedded", "--listen", "127.0.0.1:0", "--limit", "packet_bytes=65536"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as broker:
        assert broker.stdout is not None
        url = broker.stdout.readline().split('"addresses": ["')[1].split('"')[0]
        path = tmp_path / "large.yaml"
        path.write_text(TOPOLOGY.format(url=url))
        try:
            outcome = run(path, within=40)
        finally:
            broker.terminate()
    assert outcome.complete
    assert outcome.findings == []
    stored = rows(tmp_path / "out.sqlite", "SELECT DISTINCT value FROM rows ORDER BY value")
    assert [value for (value,) in stored] == [0, 1, 2, 4, 6, 7, 8, 9]
    books = outcome.ledgers
    assert (books["grow"].passed, books["grow"].dead) == (9, {"too-large": 1})  # of the ten rows that it was given
    assert books["wide"].dead == {"too-large": 3000}
    assert books["wide"].passed == 8
