"""``durable: true``: what a node sent is on its disk, so that it may take what nobody sends again while the next is away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from brokers import shared
from harness import rows, run, until

from broker.bus import Publication
from broker.connect import connect
from nodes.journal import Journal
from nodes.plan import prepare
from nodes.supervisor import Supervisor

COUNT = 3000
FOREIGN = """
topology: durable-{name}
brokers: {{site: {{url: '{url}'}}}}
nodes:
  meter: {{ingest: {{source: mqtt, topics: [{name}/+], device: 'topic[1]'}}, durable: {durable}}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: meter}}
"""


def test_a_foreign_publisher_is_served_while_the_next_node_is_away_and_ours_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nodes.supervisor.GRACE", 1.0
    )  # for who must leave with what its reader, which is away, has not
    url = shared("embedded").url
    path = tmp_path / "t.yaml"
    path.write_text(FOREIGN.format(name="served", url=url, durable="true"))
    state = tmp_path / "state"

    async def fill() -> None:
        supervisor = Supervisor(prepare(path, state=state), state=state, only=["meter"])
        running = asyncio.create_task(supervisor.run())
        view = supervisor.views["meter"]
        await until(lambda: view.state == "ready")
        async with connect(url) as bus:
            for i in range(0, COUNT, 100):
                batch = [Publication(f"served/d{k % 3}", b'{"value": %d}' % k, 1) for k in range(i, i + 100)]
                await (await bus.publish(batch))
        await until(lambda: view.books is not None and view.books.emitted["out"].rows == COUNT)
        view.state = "killed"
        supervisor.kill("meter")
        await until(lambda: view.state == "ready")
        await supervisor.stop()
        await running

    asyncio.run(fill())
    journal = Journal(state / "meter.journal", durable=True)
    assert journal.outbox("out")
    journal.close()

    async def drain(supervisor: Supervisor) -> None:
        await until(lambda: (book := supervisor.views["store"].books) is not None and book.passed >= COUNT)
        supervisor.end()

    outcome = run(path, state=state, meddle=drain)
    assert outcome.complete
    assert outcome.findings == []
    assert {v for (v,) in rows(tmp_path / "out.sqlite", "SELECT value FROM rows")} == set(range(COUNT))


LINE = """
topology: durable-line
nodes:
  meter: {{ingest: {{source: csv, path: meter.csv, batch: 1, rate: 2000/s}}, durable: true}}
  warm: {{preprocess: {{steps: [{{filter: value % 3 != 0}}]}}, from: meter, durable: true}}
  store: {{uplink: {{sink: sqlite, path: out.sqlite, table: rows}}, from: warm}}
"""


def test_durable_nodes_are_killed_at_any_time_also_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "meter.csv").write_text("value\n" + "\n".join(map(str, range(COUNT))) + "\n")
    path = tmp_path / "t.yaml"
    path.write_text(LINE.format())

    def passed(supervisor: Supervisor) -> int:
        book = supervisor.views["store"].books
        return book.passed if book is not None else 0

    async def kill(supervisor: Supervisor) -> None:
        for victim in ("meter", "warm", "meter", "warm"):
            before = passed(supervisor)
            await until(lambda before=before: passed(supervisor) > before)  # type: ignore[misc] # mypy knows no default arguments of lambdas
            supervisor.kill(victim)
        # the last ones: everything is read and the end is on its way
        await until(lambda: (b := supervisor.views["meter"].books) is not None and b.emitted["out"].rows == COUNT)
        for victim in ("meter", "warm"):
            if not supervisor.views[victim].gone:
                supervisor.kill(victim)

    outcome = run(path, meddle=kill)
    assert outcome.complete
    assert outcome.findings == []
    stored = [v for (v,) in rows(tmp_path / "out.sqlite", "SELECT value FROM rows ORDER BY value")]
    assert stored == [i for i in range(COUNT) if i % 3]
