"""One commit of an operator with state speaks of one moment, whatever goes on while it is written."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from nodes.assignment import NodeSpec
from nodes.journal import _TIDY_EVERY, SEEN, Journal, packed
from nodes.operator import Emit, Operator
from nodes.runners import OperatorRuntime
from nodes.step import Links, Step
from schemas.messages import Message


class Counter(Operator):
    """Its snapshot is what it works with, not a copy."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"rows": 0, "newest": {}}

    def process(self, messages: list[Message], edge: str, emit: Emit) -> None:
        raise AssertionError("not called here")

    def snapshot(self) -> Any:
        return self.state

    def restore(self, state: Any) -> None:
        self.state = state


def test_what_changes_while_a_commit_is_written_is_not_in_it(tmp_path: Path) -> None:
    async def scenario() -> Any:
        operator = Counter()
        spec = NodeSpec(name="n", kind="custom", config={}, inputs=[], outputs=[], host="local", broker="local")
        runtime = OperatorRuntime("t", spec, tmp_path, Links(None, None, None, lambda report: None), operator)
        await runtime.prepare()
        operator.state["rows"] = 1
        operator.state["newest"]["meter"] = 10
        runtime._done.append(Step())
        work = runtime._gather()
        assert work is not None
        operator.state["rows"] = 2
        operator.state["newest"]["meter"] = 20
        runtime.journal.commit(work.values)
        runtime.journal.close()
        return Journal(tmp_path / "n.journal").get("state")

    assert asyncio.run(scenario()) == {"rows": 1, "newest": {"meter": 10}}


def test_packed_values_are_those_of_their_moment() -> None:
    live = {"a": [1]}
    values = packed({"state": live})
    live["a"].append(2)
    assert values == packed({"state": {"a": [1]}})


def test_a_tidied_journal_has_the_newest_identities_and_all_values(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "n.journal")
    made = 0
    while not journal.untidy:
        names = [f"{made}:{i}" for i in range(SEEN // 32)]
        journal.commit(packed({"books": made}), seen=[("p.out", names)])
        made += 1
    before = journal.seen()["p.out"]
    assert len(before) > 2 * SEEN
    journal.tidy()
    assert journal._untidied == 0
    assert SEEN <= len(journal.seen()["p.out"]) < 2 * SEEN
    assert journal.seen()["p.out"] == before[-len(journal.seen()["p.out"]) :]
    journal.close()
    (tmp_path / "n.journal-wal").unlink(missing_ok=True)  # what was in SQLite's log is in the file
    again = Journal(tmp_path / "n.journal")
    assert (again.get("books"), again.seen()["p.out"][-1]) == (made - 1, before[-1])
    again.close()


def test_a_journal_that_nobody_tidies_does_it_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "n.journal")
    names = [str(i) for i in range(SEEN)]
    for _ in range(3 * _TIDY_EVERY):
        journal.commit({}, seen=[("p.out", names[:64])])
    assert len(journal.seen()["p.out"]) <= SEEN + 64 * (_TIDY_EVERY + 1)
    journal.close()
